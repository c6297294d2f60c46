"""The rungs of `ladder.py`: which heads, joint, probabilities and trees each one has."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ladon.bench.quality.diagnosis import DiagnosedDecoder
from ladon.bench.systems import LadonSystem
from ladon.calibrate.lattice_trace import hit_rates, record
from ladon.calibrate.temperatures import fit_temperatures
from ladon.config import PRODUCT, DecoderOptions
from ladon.decoder.decoder import Decoder
from ladon.demo.bundled import demo_path, demo_prompts, load_demo
from ladon.drafting.head_chaining import joint_of, product
from ladon.drafting.proposer import HeadsProposer, Proposer, tree_builder
from ladon.heads import Heads, load_heads
from ladon.heads.calibration import Calibration
from ladon.trees.fixed_tree import best_fixed_tree
from ladon.trees.lattice import Lattice
from ladon.util.observer import Observer

_CANDIDATES = DecoderOptions().num_candidates
_PROMPTS, _NEW_TOKENS = 100, 128  # from which the product's calibration is made, where the heads have another joint's
_BY_PRODUCT = ("chain", "fixed", "candidates", "softmax", "calibrated")


class AmongCandidates(Decoder):
    """Dynamic trees by the product of the heads, each normalised over its candidates: flat heads look sure of them."""

    def _proposer(self, observer: Observer) -> Proposer:
        assert self.heads is not None
        guess = product(self.heads.bind(self.model, force=True), _CANDIDATES)

        def joint(hidden: Tensor, root: Tensor) -> Lattice:
            lattice = guess(hidden, root)
            return replace(lattice, log_probs=lattice.log_probs.log_softmax(-1))

        return HeadsProposer(joint, tree_builder("dynamic"), observer)


class DiagnosedAmongCandidates(DiagnosedDecoder, AmongCandidates):
    """The same, looked at."""


class Rungs:
    """Makes the rungs' decoders for the bundled model.

    Attributes:
        model: the bundled model.
        tokenizer: its tokenizer.
        names: the rungs that these heads have, lowest first.
    """

    def __init__(self, heads: Path | None, hydra: Path | None) -> None:
        """`heads`: folder of other heads, calibrated; `hydra`: of sequentially conditioned ones."""
        self.model, self.tokenizer, _ = load_demo()
        self._folder, self._hydra = heads or demo_path() / "heads", hydra
        self._own = self._load(self._folder)
        self._joint = joint_of(self._own, "auto")
        if self._own.calibration is None or self._own.calibration.joint != self._joint:
            raise SystemExit(
                f"the heads have no calibration for their joint, {self._joint}; run `ladon calibrate` first"
            )
        self.names = [*_BY_PRODUCT, *([] if self._joint == PRODUCT else [self._joint]), "ngrams"]
        self.names += [] if hydra is None else ["hydra"]

    @property
    def about(self) -> dict[str, Any]:
        """What heads these are."""
        found = {"family": self._own.family, "joint": self._joint, "weights": self._own.weights_hash}
        return found | {"hydra": None if self._hydra is None else self._load(self._hydra).weights_hash}

    def nodes(self, rung: str, budget: int) -> int:
        """Nodes of a rung's trees at a budget: a chain is no longer than there are heads."""
        return min(budget, self._own.num_heads + 1) if rung == "chain" else budget

    def system(self, rung: str, nodes: int, diagnosed: bool = False) -> LadonSystem:
        """A rung with trees of so many nodes."""
        among = DiagnosedAmongCandidates if diagnosed else AmongCandidates
        make: type[Decoder] = among if rung == "candidates" else DiagnosedDecoder if diagnosed else Decoder
        joint = PRODUCT if rung in _BY_PRODUCT else "auto"

        def decoder(model: Any, heads: Heads | None, **options: Any) -> Decoder:
            return make(model, heads, joint=joint, **options)

        mode = {"chain": "chain", "fixed": "fixed", "ngrams": "dynamic+ngrams"}.get(rung, "dynamic")
        tree = best_fixed_tree(self._of_product.hit_rates, nodes) if rung == "fixed" else None
        return LadonSystem(self.model, self._heads(rung), mode=mode, budget=nodes, fixed_tree=tree, make=decoder)

    def diagnosed(self, rung: str, nodes: int) -> DiagnosedDecoder:
        """Its decoder, looked at."""
        decoder = self.system(rung, nodes, diagnosed=True).decoder
        assert isinstance(decoder, DiagnosedDecoder)
        return decoder

    def _load(self, folder: Path) -> Heads:
        return load_heads(folder, self.model).eval()

    def _heads(self, rung: str) -> Heads:
        """Heads of a rung's own, with the calibration that it goes by."""
        if rung == "hydra":
            assert self._hydra is not None  # else there is no such rung
            return self._load(self._hydra)
        heads = self._load(self._folder)
        if rung in _BY_PRODUCT:
            heads.calibration = self._of_product if rung == "calibrated" else None
        return heads

    @cached_property
    def _of_product(self) -> Calibration:
        """Temperatures and hit rates of the heads, each by itself: their own, or measured on the calibration split."""
        own = self._own.calibration
        assert own is not None  # looked at above
        if own.joint == PRODUCT:
            return own
        prompts = [torch.tensor(self.tokenizer(text)["input_ids"]) for text in demo_prompts(_PROMPTS, "calibration")]
        trace = record(self.model, self._load(self._folder), prompts, max_new_tokens=_NEW_TOKENS)
        return Calibration(
            heads=own.heads,
            temperatures=fit_temperatures(trace),
            hit_rates=hit_rates(trace.ranks(), trace.num_candidates),
        )
