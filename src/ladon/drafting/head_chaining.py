"""Joints: how the guesses of heads become a lattice, each by itself or each after one or all tokens before it.

Shapes: B rows, H hidden width, K depths, R conditioning rows, C candidates, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ladon.config import HIDDEN, HIDDEN_ROWS, JOINTS, MARKOV, MARKOV_ROWS, MTP, PATH_ROWS, PATHS, PRODUCT
from ladon.errors import HeadsError, InputError
from ladon.heads import ConditionedHeads, Heads
from ladon.heads.correction import HiddenCorrection, MarkovCorrection
from ladon.trees.fixed_tree import FixedTree
from ladon.trees.lattice import (
    Lattice,
    Rows,
    after_tokens,
    along_paths,
    best_rows,
    conditioned,
    from_logits,
    rows_with_children,
)

# Hidden rows [B, H] and roots [B] to what may follow the roots.
Chaining = Callable[[Tensor, Tensor], Lattice]


_LACKING = {  # what heads lack that cannot be joined so
    MARKOV: f"the heads have no {MarkovCorrection.title}; train one",
    HIDDEN: f"the heads have no {HiddenCorrection.title}; train one",
    PATHS: "the heads do not read the tokens before their guesses; train some of family hydra",
}


def joint_of(heads: Heads | None, joint: str) -> str:
    """What the `joint` option means for these heads: the name of a joint, with its rows, if any were named.

    Raises:
        InputError: an unknown option, or rows that are no number of 1 or more.
        HeadsError: a joint that the heads are not made for.
    """
    name, _ = _name_and_rows(joint)
    own = own_joint(heads)
    if name == "auto":
        return own
    if name == PRODUCT and heads is not None and heads.family == MTP:
        raise HeadsError(f'joint is "{joint}", but MTP modules read the tokens before their guesses; give "auto"')
    if name not in (PRODUCT, own):
        raise HeadsError(f'joint is "{joint}", but {_LACKING[name]}, or give "auto"')
    return joint


def own_joint(heads: Heads | None) -> str:
    """What "auto" means for these heads: the joint that they were trained for."""
    if heads is not None and heads.correction is not None:
        return heads.correction.joint
    return PATHS if heads is not None and heads.is_conditioned else PRODUCT


def _name_and_rows(joint: str) -> tuple[str, int]:
    """A joint's name, and how many paths "paths" follows."""
    name, colon, number = str(joint).partition(":")
    if name not in JOINTS or (colon and name != PATHS):
        raise InputError(f"joint is {joint!r}; give {', '.join(map(repr, JOINTS))}")
    if colon and not (number.isdecimal() and int(number) >= 1):
        raise InputError(f"joint is {joint!r}; give how many paths it follows, 1 or more, such as 'paths:16'")
    return name, int(number) if colon else PATH_ROWS


def make_chaining(
    heads: Heads, joint: str, needed: int, num_candidates: int, tree: str | FixedTree, max_nodes: int
) -> Chaining:
    """The joint of that name.

    Args:
        heads: bound to their model; their calibration counts if it is of this joint.
        joint: as `joint_of` gives it.
        needed: candidates per head that trees can use where each head guesses by itself.
        num_candidates: the most that are kept per head.
        tree: what is built of the lattice.
        max_nodes: nodes of the largest such tree, root included.
    """
    name, _ = _name_and_rows(joint)
    temperatures = calibrated_temperatures(heads, name)
    correction = heads.correction if name != PRODUCT else None
    if isinstance(correction, MarkovCorrection):
        # The correction brings forward what was further behind, so more are looked at than trees can use.
        return markov(heads, correction, max(needed, min(num_candidates, heads.vocab_size)), temperatures)
    if isinstance(correction, HiddenCorrection):
        return hidden_rows(heads, correction, needed, temperatures)
    if name == PATHS and isinstance(heads, ConditionedHeads):
        rows, depth = rows_and_depth(joint, tree, heads.num_heads, max_nodes)
        return paths(heads, rows, depth, needed, temperatures)
    return product(heads, needed, temperatures)


def rows_and_depth(joint: str, tree: str | FixedTree, num_heads: int, max_nodes: int) -> tuple[Rows, int]:
    """After which partial paths heads are asked by joint "paths", and how many heads; arguments as `make_chaining`."""
    depth = min(num_heads, max(1, max_nodes - 1))
    if tree == "dynamic":
        _, num_rows = _name_and_rows(joint)
        return best_rows(min(num_rows, max(1, max_nodes - 2))), depth
    shape = tree if isinstance(tree, FixedTree) else FixedTree.chain(depth)
    return rows_with_children(shape), max(1, shape.max_depth)


def product(heads: Heads, num_candidates: int, temperatures: Tensor | None = None) -> Chaining:
    """Each head by itself (MEDUSA's): the joint distribution is the product of their marginals."""

    def guess(hidden: Tensor, root: Tensor) -> Lattice:
        logits = heads.draft(hidden, root)
        return from_logits(logits, num_candidates, temperatures=temperatures, token_ids=heads.token_ids)

    return guess


def markov(
    heads: Heads, correction: MarkovCorrection, num_candidates: int, temperatures: Tensor | None = None
) -> Chaining:
    """Each head's guesses corrected by the token before them, and its successors where the correction has some."""

    def guess(hidden: Tensor, root: Tensor) -> Lattice:
        logits = heads.draft(hidden, root)
        candidates = from_logits(logits, num_candidates)

        def successors(before: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            guesses, added = correction.following(before)
            normalizer = logits.gather(2, candidates.tokens[:, :, 0, :1]) - candidates.log_probs[:, :, 0, :1]
            own = logits.gather(2, guesses.flatten(2)) - normalizer
            return guesses, own.float().view_as(added), added

        return conditioned(
            candidates,
            root,
            correction.among,
            temperatures=temperatures,
            num_rows=MARKOV_ROWS,
            successors=successors if correction.num_successors else None,
            gates=correction.gates(hidden),
        )

    return guess


def paths(
    heads: ConditionedHeads, rows: Rows, depth: int, num_candidates: int, temperatures: Tensor | None = None
) -> Chaining:
    """Each head's guesses after some of the paths so far, the first `depth` heads one after the other."""

    def guess(hidden: Tensor, root: Tensor) -> Lattice:
        return along_paths(
            lambda paths, _: heads.after(hidden, paths),
            root,
            rows,
            depth=depth,
            num_candidates=num_candidates,
            temperatures=temperatures,
            token_ids=heads.token_ids,
        )

    return guess


def hidden_rows(
    heads: Heads,
    correction: HiddenCorrection,
    num_candidates: int,
    temperatures: Tensor | None = None,
    num_rows: int = HIDDEN_ROWS,
) -> Chaining:
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
