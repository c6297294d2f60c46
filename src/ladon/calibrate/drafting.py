"""What drafts when heads are measured: the trees that a `Decoder` grows by default."""

from __future__ import annotations

import copy

from ladon.config import DecoderOptions
from ladon.drafting.proposer import HeadsProposer, drafting
from ladon.heads import Heads
from ladon.heads.correction import MarkovCorrection
from ladon.target.target import Target
from ladon.trees.lattice import Correction


def default_proposer(target: Target, heads: Heads) -> HeadsProposer:
    """Heads, bound to the model of `target`, that draft the kind of trees it can verify, untimed."""
    tree = "dynamic" if target.supports_trees else "chain"
    options = DecoderOptions()
    return drafting(heads.bind(target.model, force=True), tree, options.num_candidates, "auto")


def correction_of(heads: Heads) -> Correction | None:
    """The heads' Markov correction for traces, which lie on the CPU in float32 and hold its gates; None for none."""
    correction = heads.correction
    return copy.deepcopy(correction).cpu().float().among if isinstance(correction, MarkovCorrection) else None
