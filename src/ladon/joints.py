"""Joints: how the guesses of heads become a lattice, each by itself or each after the tokens before it.

Shapes: B rows, H hidden width, K depths, C candidates.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ladon.config import JOINTS, MARKOV, PRODUCT
from ladon.errors import HeadsError, InputError
from ladon.heads import Heads
from ladon.heads.correction import MarkovCorrection
from ladon.heads.mtp import MtpHeads
from ladon.lattice import Lattice, conditioned, from_logits

# Hidden rows [B, H] and roots [B] to what may follow the roots.
Joint = Callable[[Tensor, Tensor], Lattice]


def joint_of(heads: Heads | None, joint: str) -> str:
    """What the `joint` option means for these heads: "product" or "markov".

    Raises:
        InputError: an unknown option.
        HeadsError: "markov" for heads without a correction.
    """
    if joint not in JOINTS:
        raise InputError(f"joint is {joint!r}; give {', '.join(map(repr, JOINTS))}")
    if isinstance(heads, MtpHeads) and joint == PRODUCT:
        raise HeadsError('joint is "product", but MTP modules read the tokens before their guesses; give "auto"')
    has_correction = heads is not None and heads.correction is not None
    if joint == MARKOV and not has_correction:
        raise HeadsError('joint is "markov", but the heads have no Markov correction; train one, or give "auto"')
    return MARKOV if has_correction and joint != PRODUCT else PRODUCT


def make_joint(heads: Heads, name: str, needed: int, num_candidates: int) -> Joint:
    """The joint of that name.

    Args:
        heads: bound to their model; their calibration counts if it is of this joint.
        name: as `joint_of` gives it.
        needed: candidates per head that trees can use where each head guesses by itself.
        num_candidates: the most that are kept per head.
    """
    temperatures = calibrated_temperatures(heads, name)
    if name == MARKOV and heads.correction is not None:
        # The correction brings forward what was further behind, so more are looked at than trees can use.
        return markov(heads, heads.correction, max(needed, min(num_candidates, heads.vocab_size)), temperatures)
    return product(heads, needed, temperatures)


def product(heads: Heads, num_candidates: int, temperatures: Tensor | None = None) -> Joint:
    """Each head by itself (MEDUSA's): the joint distribution is the product of their marginals."""

    def guess(hidden: Tensor, root: Tensor) -> Lattice:
        logits = heads.draft(hidden, root)
        return from_logits(logits, num_candidates, temperatures=temperatures, token_ids=heads.token_ids)

    return guess


def markov(
    heads: Heads, correction: MarkovCorrection, num_candidates: int, temperatures: Tensor | None = None
) -> Joint:
    """Each head's guesses corrected by the token before them."""

    def guess(hidden: Tensor, root: Tensor) -> Lattice:
        candidates = from_logits(heads.draft(hidden, root), num_candidates)
        return conditioned(candidates, root, correction.among, temperatures=temperatures)

    return guess


def calibrated_temperatures(heads: Heads, joint: str) -> Tensor | None:
    """The temperatures of the heads' calibration, [K] on their device; None if they have none for this joint."""
    if heads.calibration is None or heads.calibration.joint != joint:
        return None
    device = next(heads.parameters()).device
    return torch.tensor(heads.calibration.temperatures, dtype=torch.float32, device=device)
