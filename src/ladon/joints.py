"""Joints: how the guesses of heads become a lattice, each by itself or each after the tokens before it.

Shapes: B rows, H hidden width, K depths, R conditioning rows, C candidates, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ladon.config import HIDDEN_ROWS, JOINTS, PRODUCT
from ladon.errors import HeadsError, InputError
from ladon.heads import Heads
from ladon.heads.correction import MarkovCorrection
from ladon.heads.hidden_correction import HiddenCorrection
from ladon.lattice import Lattice, after_tokens, conditioned, from_logits

# Hidden rows [B, H] and roots [B] to what may follow the roots.
Joint = Callable[[Tensor, Tensor], Lattice]


def joint_of(heads: Heads | None, joint: str) -> str:
    """What the `joint` option means for these heads: "product", or "markov" or "hidden" if they have such a correction.

    Raises:
        InputError: an unknown option.
        HeadsError: "markov" or "hidden" for heads without that correction.
    """
    if joint not in JOINTS:
        raise InputError(f"joint is {joint!r}; give {', '.join(map(repr, JOINTS))}")
    correction = None if heads is None else heads.correction
    for kind in (MarkovCorrection, HiddenCorrection):
        if joint == kind.joint and not isinstance(correction, kind):
            raise HeadsError(f'joint is "{joint}", but the heads have no {kind.title}; train one, or give "auto"')
    return PRODUCT if correction is None or joint == PRODUCT else correction.joint


def make_joint(heads: Heads, name: str, needed: int, num_candidates: int) -> Joint:
    """The joint of that name.

    Args:
        heads: bound to their model; their calibration counts if it is of this joint.
        name: as `joint_of` gives it.
        needed: candidates per head that trees can use where each head guesses by itself.
        num_candidates: the most that are kept per head.
    """
    temperatures = calibrated_temperatures(heads, name)
    correction = heads.correction if name != PRODUCT else None
    if isinstance(correction, MarkovCorrection):
        # The correction brings forward what was further behind, so more are looked at than trees can use.
        return markov(heads, correction, max(needed, min(num_candidates, heads.vocab_size)), temperatures)
    if isinstance(correction, HiddenCorrection):
        return hidden_rows(heads, correction, needed, temperatures)
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


def hidden_rows(
    heads: Heads,
    correction: HiddenCorrection,
    num_candidates: int,
    temperatures: Tensor | None = None,
    num_rows: int = HIDDEN_ROWS,
) -> Joint:
    """Each head's state corrected by the token before its guess, for the likeliest R tokens of the depth before.

    The root is known, so the first depth is corrected from the start; which tokens stand before further guesses is said
    by the depth before without the correction. Two products with the projection: K - 1 rows, and (K - 1) R of them.

    Args:
        heads: bound to their model.
        correction: theirs.
        num_candidates: C.
        temperatures: [K], by which the corrected logits are divided; None leaves them.
        num_rows: R, at most V.
    """

    def guess(hidden: Tensor, root: Tensor) -> Lattice:
        states, later = heads.states(hidden), heads.num_heads - 1
        first = correction(states[:, :1], heads.embed(root)[:, None], slice(0, 1))
        before = heads.project(torch.cat([first, states[:, 1:later]], dim=1))  # [B, K - 1, V], or 1 if K is 1
        warmth = None if temperatures is None else temperatures[: before.shape[1]]
        known = from_logits(before, max(num_candidates, num_rows), temperatures=warmth)
        rows = known.tokens[:, :later, 0, :num_rows]  # [B, K - 1, R]

        moved = correction(states[:, None, 1:], heads.embed(rows.mT), slice(1, None))  # [B, R, K - 1, H]
        warmth = None if temperatures is None else temperatures[1:].repeat(rows.shape[2])
        guesses = from_logits(heads.project(moved.flatten(1, 2)), num_candidates, temperatures=warmth)
        return after_tokens(known, guesses, rows)

    return guess


def calibrated_temperatures(heads: Heads, joint: str) -> Tensor | None:
    """The temperatures of the heads' calibration, [K] on their device; None if they have none for this joint."""
    if heads.calibration is None or heads.calibration.joint != joint:
        return None
    device = next(heads.parameters()).device
    return torch.tensor(heads.calibration.temperatures, dtype=torch.float32, device=device)
