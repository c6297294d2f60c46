"""The offline simulator: what any tree would have accepted on a recorded trace, without running the model.

The answers of a lossless decoder do not depend on its trees, so one trace holds all that a step needs: the candidates
at its root, and the tokens that the model says after it. Trees are grown by the same builders as in decoding, then each
answer is walked from step to step.

Of heads that read the tokens before their guesses a trace holds the guesses after the true ones. By these alone a chain
and a fixed tree accept what they accept; which paths a dynamic tree has room for depends on guesses after others. So it
does with a hidden correction for which tokens of a depth any guesses are made, and nothing is simulated.

How far the truth is followed says where tokens are lost. Where it leaves the lattice, the heads did not have it
(coverage); where it leaves the tree, they ranked it too low for the budget (ranking).

Shapes: P positions, B row-steps, K depths, R conditioning rows, C candidates, N nodes (root included).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ladon.calibrate.lattice_trace import LatticeTrace
from ladon.config import HIDDEN, MARKOV_ROWS, PATHS
from ladon.drafting.proposer import candidates_needed, tree_builder
from ladon.errors import TreeError
from ladon.trees.fixed_tree import FixedTree
from ladon.trees.lattice import Lattice, conditioned
from ladon.trees.token_tree import TokenTree
from ladon.util.files import rounded

NOT_SIMULATED = (
    "a trace has what heads guess after the true tokens, and trees of heads that read the tokens before their guesses, "
    "or whose correction does, depend on what they guess after others: `ladon bench` runs them"
)
_CHUNK = 1024  # positions whose trees exist at a time


@dataclass(frozen=True, kw_only=True, slots=True)
class SimulatedRun:
    """What decoding all answers of a trace with one kind of tree would have counted.

    Attributes:
        nodes: node slots verified per step and row, root included.
        tokens: tokens emitted by decode steps.
        row_steps: decode steps, over all rows.
        accepted: per depth, share of the steps that emitted a draft of that depth, [K].
    """

    nodes: int
    tokens: int
    row_steps: int
    accepted: tuple[float, ...]

    @property
    def acceptance_length(self) -> float:
        """Tokens per row-step, as `DecodeStats` defines it; NaN without a step."""
        return self.tokens / self.row_steps if self.row_steps else math.nan


def simulate(trace: LatticeTrace, tree: str | FixedTree, budget: int, **options: Any) -> SimulatedRun:
    """Decode all answers of `trace` with a tree, on paper; `options` are those of `simulate_budgets`."""
    return simulate_budgets(trace, tree, [budget], **options)[0]


def simulate_budgets(
    trace: LatticeTrace,
    tree: str | FixedTree,
    budgets: Sequence[int],
    *,
    temperatures: Sequence[float] | None = None,
    num_candidates: int | None = None,
) -> list[SimulatedRun]:
    """Decode all answers of `trace` with trees of several sizes.

    Trees are grown once: the first n nodes of a tree are the tree of budget n.

    Args:
        trace: the recorded answers.
        tree: "dynamic", "chain" or a `FixedTree`, as `Decoder` takes it.
        budgets: nodes per step and row, root included.
        temperatures: one per depth, [K], by which the heads' logits are divided; None leaves them.
        num_candidates: candidates kept per head, as `Decoder` takes it; None: as many as the trace has.

    The successors of the trace's correction are not simulated: a trace does not hold what heads said of them.

    Returns:
        A run for each budget. What a depth cap of the target (some models with long contexts) would cut is not cut.

    Raises:
        TreeError: an unknown tree, a budget below 1, more candidates than were recorded, a fixed tree that the heads or
            the candidates cannot fill, or one that depends on guesses after tokens that were not said.
    """
    if not budgets or min(budgets) < 1:
        raise TreeError(f"budgets are {list(budgets)!r}; give numbers of nodes, 1 or more (the root is one of them)")
    num_candidates = trace.num_candidates if num_candidates is None else num_candidates
    if not 1 <= num_candidates <= trace.num_candidates:
        raise TreeError(f"num_candidates is {num_candidates}, but the trace holds 1 to {trace.num_candidates}")
    if isinstance(tree, FixedTree):
        tree.check_fits(trace.num_heads, num_candidates)
    elif tree not in ("dynamic", "chain"):
        raise TreeError(f'tree is {tree!r}; a trace can be decoded with "dynamic", "chain" or a ladon.FixedTree')
    elif tree == "dynamic" and trace.joint == PATHS:
        raise TreeError(f'tree is "dynamic"; {NOT_SIMULATED}; give "chain" or a ladon.FixedTree')
    if trace.joint == HIDDEN:
        raise TreeError(f"tree is {tree!r}; {NOT_SIMULATED}")
    slots, largest = _true_slots(trace, tree, max(budgets), temperatures, num_candidates)
    return [_walk(trace, (slots < budget).sum(1), min(budget, largest)) for budget in budgets]


def simulate_prefixes(
    trace: LatticeTrace, budgets: Sequence[int], *, temperatures: Sequence[float] | None = None
) -> dict[str, Any]:
    """How far the truth after every position is followed, be it where a step would begin or not.

    Args:
        trace: the recorded answers.
        budgets: nodes of the dynamic trees, root included.
        temperatures: as in `simulate_budgets`.

    Returns:
        `positions`, and with the mean and the share of the positions by depth (`ladon.calibrate.simulate.reached`):
        `known`, depths that the answer still has; `oracle`, those of the lattice; `selected`, by budget those of the
        tree; `top`, those of the chain. And the mean of `Lattice.leaf_mass`, by depth.
    """
    parts: list[list[Tensor]] = []
    leaves: list[Tensor] = []
    for lattice, roots, truth in _lattices(trace, trace.num_candidates, temperatures):
        rows = true_rows(lattice, truth)
        slots = true_slots(tree_builder("dynamic")(lattice, roots, max(budgets)), truth, max(budgets))
        selected = [(slots < budget).sum(1) for budget in budgets]
        parts.append([(truth >= 0).sum(1), rows.oracle, rows.top, *selected])
        leaves.append(lattice.leaf_mass())
    columns = [reached(torch.cat(column), trace.num_heads) for column in zip(*parts, strict=True)]
    found = dict(zip(("known", "oracle", "top"), columns, strict=False))
    return {
        "positions": trace.num_positions,
        **found,
        "leaf_mass": mean_leaf_mass(leaves, trace.num_heads),
        "selected": dict(zip(map(str, budgets), columns[len(found) :], strict=True)),
    }


def _true_slots(
    trace: LatticeTrace, tree: str | FixedTree, budget: int, temperatures: Sequence[float] | None, num_candidates: int
) -> tuple[Tensor, int]:
    """Slot of the true node of each depth in each position's tree, [P, K], at least `budget` where there is none.

    The second value is the number of node slots of the trees.
    """
    width = min(candidates_needed(tree, num_candidates, budget), trace.num_candidates)
    if trace.correction is not None:
        width = num_candidates
    build = tree_builder(tree)
    slots, num_nodes = [torch.empty(0, trace.num_heads, dtype=torch.long, device="cpu")], min(budget, 1)
    for lattice, roots, truth in _lattices(trace, width, temperatures):
        grown = build(lattice, roots, budget)
        slots.append(true_slots(grown, truth, budget))
        num_nodes = grown.num_nodes
    return torch.cat(slots), num_nodes


def _lattices(
    trace: LatticeTrace, width: int, temperatures: Sequence[float] | None
) -> Iterator[tuple[Lattice, Tensor, Tensor]]:
    """The lattices of all positions, `width` candidates per head, with their roots [p] and truths [p, K], in chunks."""
    depths, correction = range(1, trace.num_heads + 1), trace.correction
    first = [1.0] * trace.num_heads if temperatures is None or correction is not None else temperatures
    log_probs = torch.stack([trace.log_probs(k, first[k - 1])[:, :width] for k in depths], dim=1)
    after = None if temperatures is None else torch.tensor(temperatures, dtype=torch.float32, device="cpu")
    for start in range(0, trace.num_positions, _CHUNK):
        part = slice(start, start + _CHUNK)
        lattice = Lattice(tokens=trace.tokens[part, :, None, :width].long(), log_probs=log_probs[part, :, None])
        roots = trace.roots[part].long()
        if correction is not None:
            gates = None if trace.gates is None else trace.gates[part]
            lattice = conditioned(lattice, roots, correction, temperatures=after, num_rows=MARKOV_ROWS, gates=gates)
        yield lattice, roots, trace.truth[part].long()


def _walk(trace: LatticeTrace, accepted: Tensor, nodes: int) -> SimulatedRun:
    """Jump through every answer: each step emits what was accepted and the bonus token, up to the answer's end."""
    counts, starts = (accepted + 1).tolist(), trace.row_starts.tolist()
    emitted_by_step = []
    for start, end in pairwise(starts):
        position = start
        while position < end:
            emitted = min(counts[position], end - position)
            emitted_by_step.append(emitted)
            position += emitted
    emitted_counts = torch.tensor(emitted_by_step, device="cpu")
    steps = len(emitted_by_step)
    return SimulatedRun(
        nodes=nodes,
        tokens=sum(emitted_by_step),
        row_steps=steps,
        accepted=tuple(int((emitted_counts > k).sum()) / max(steps, 1) for k in range(1, trace.num_heads + 1)),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class TrueRows:
    """Of each depth, the conditioning row that the true path leads to.

    Attributes:
        log_probs: of its candidates, best first, [B, K, C]; -inf where the true path has no row.
        right: which of them is the truth, if any, [B, K, C] bool. None is, from the first depth that lacks it.
    """

    log_probs: Tensor
    right: Tensor

    @property
    def oracle(self) -> Tensor:
        """How many leading depths have their true token among the candidates, [B]."""
        return self.right.any(-1).sum(1)

    @property
    def top(self) -> Tensor:
        """How many leading depths have it as the best candidate: what the chain holds, [B]."""
        return self.right[:, :, 0].long().cumprod(1).sum(1)


def true_rows(lattice: Lattice, truth: Tensor) -> TrueRows:
    """Follow the truth [B, K] (-1 where it is not known) through a lattice, from row to row, until it leaves it."""
    row = torch.zeros_like(truth[:, 0])
    log_probs, right = [], []
    for depth in range(lattice.depth):
        index = row.clamp(min=0)[:, None, None].expand(-1, 1, lattice.num_candidates)
        found = lattice.log_probs[:, depth].gather(1, index)[:, 0].masked_fill(row[:, None] < 0, -torch.inf)
        is_true = lattice.tokens[:, depth].gather(1, index)[:, 0] == truth[:, depth, None]
        is_true &= found > -torch.inf  # padding is no candidate, whatever token it holds
        place = is_true.int().argmax(1, keepdim=True)
        if lattice.next_row is None:
            following = torch.zeros_like(row)
        else:
            following = lattice.next_row[:, depth].gather(1, index)[:, 0].gather(1, place)[:, 0]
        row = torch.where(is_true.any(1), following, -1)
        log_probs.append(found)
        right.append(is_true)
    return TrueRows(log_probs=torch.stack(log_probs, dim=1), right=torch.stack(right, dim=1))


def true_slots(tree: TokenTree, truth: Tensor, missing: int) -> Tensor:
    """Slots of the nodes on the true path [B, K] of each tree; `missing` from the first depth that has none."""
    slots = torch.full_like(truth, missing)
    parent = torch.zeros_like(truth[:, :1])
    for depth in range(min(tree.max_depth, truth.shape[1])):
        right = (tree.parents == parent) & (tree.tokens == truth[:, depth : depth + 1]) & (tree.log_probs > -torch.inf)
        right[:, 0] = False  # the root is no draft
        found, place = right.max(1)
        slots[:, depth] = torch.where(found, place, missing)
        parent = torch.where(found, place, -2)[:, None]  # no node has the parent -2
    return slots


def reached(prefixes: Tensor, num_depths: int) -> dict[str, Any]:
    """The mean of prefixes [B], and of each depth, [K], the share of them that reach it; None where there is none."""
    if len(prefixes) == 0:
        return {"mean": None, "shares": [None] * num_depths}
    shares = (prefixes[:, None] > torch.arange(num_depths, device="cpu")).double().mean(0)
    return {"mean": rounded(float(prefixes.double().mean())), "shares": rounded(shares.tolist())}


def mean_leaf_mass(found: Sequence[Tensor], num_depths: int) -> list[float | None]:
    """The mean over all row-steps of `Lattice.leaf_mass`, [b, k - 1] each, of all depths but the last, [K - 1].

    Where lattices are not all as deep, each depth's mean is over those that have it; None where none does.
    """
    columns = [[mass[:, depth] for mass in found if mass.shape[1] > depth] for depth in range(num_depths - 1)]
    return [rounded(float(torch.cat(column).double().mean())) if column else None for column in columns]
