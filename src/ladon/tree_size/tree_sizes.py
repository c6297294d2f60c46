"""Between the engine and what chooses its sizes: sums on the device, records of steps, and how long deciding takes.

Shapes: B rows, N node slots, K depths, E bucket edges.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ladon.target.pruning.pruner import Pruning
from ladon.tree_size.policy import FixedSizing, Sizing, StepRecord
from ladon.trees.token_tree import TokenTree, ancestor_mask, node_depths
from ladon.trees.transfer import host_values

_NO_NUMBER = -(2.0**16)  # stands for NaN: no sum of probabilities makes up for it
_ONE = 2**32  # probabilities are summed as integers: the order of the sum, which devices choose, does not matter


class Choice(NamedTuple):
    """How the next step verifies: the best `nodes` of each tree, root included, and how they are pruned on the way."""

    nodes: int
    pruning: Pruning | None


class TreeSizes:
    """Asks a sizing what the engine needs to know, and tells it what the engine did."""

    def __init__(self, budget: int | Sizing, device: torch.device, pruning: Pruning | None = None) -> None:
        """For trees on a device.

        Args:
            budget: a number of nodes, root included, or what chooses it.
            device: of the trees.
            pruning: how trees are pruned while they are verified, when that is chosen; None: they are not.
        """
        self._sizing: Sizing = FixedSizing(budget) if isinstance(budget, int) else budget.for_run()
        self._pruning, self._timed = pruning, _Timed()
        self._edges = list(self._sizing.edges)
        buckets = [place for place, (low, high) in enumerate(pairwise([0, *self._edges])) for _ in range(low, high)]
        self._buckets = torch.tensor(buckets, dtype=torch.long, device="cpu")
        self._bucket_of_node = self._buckets.to(device)
        self._most = 1  # nodes to be grown
        self._depth = 0  # K of the sums on their way to the host
        self._sums: list[list[float]] | None = None  # over the trees as they are
        self._of_heads: list[list[float]] | None = None  # over what heads have drafted
        self._rows = 0  # over how many rows they were summed
        self._expected: list[float] = []
        self._batch, self._context = 0, 0.0
        self._drafted = False  # whether heads have drafted what is verified now

    @property
    def seconds(self) -> float:
        """How long deciding has taken so far."""
        return self._timed.seconds

    @property
    def probes(self) -> int:
        """Steps so far that were taken to learn something."""
        return self._sizing.probes

    def reach(self, lengths: Sequence[int]) -> int:
        """Most nodes worth growing now, for rows of so many cached tokens each."""
        with self._timed:
            self._rows = len(lengths)
            self._most = self._sizing.reach(len(lengths), sum(lengths) / len(lengths))
            return self._most

    def room(self, nodes: int) -> int:
        """The slots of trees of so many nodes: the smallest size that has them, or the greatest of all."""
        if not self._edges:
            return min(nodes, self._most)
        return next((edge for edge in self._edges if edge >= nodes), self._edges[-1])

    def pack(self, table: Tensor, tree: TokenTree | None) -> Tensor:
        """A table [b, n] for the host together with the sums over the new trees, if they are wanted: [1, m] int64."""
        with self._timed:
            masses = None if tree is None else self._masses(tree, self._bucket_of_node)
            self._depth = 0 if tree is None or masses is None else tree.max_depth
            return table.reshape(1, -1) if masses is None else torch.cat([table.flatten(), masses])[None]

    def unpack(self, values: list[int], num_rows: int) -> list[list[int]]:
        """The table back from what the host got; the sums are kept."""
        size = (self._depth + 1) * len(self._edges) if self._depth else 0
        width = (len(values) - size) // num_rows
        with self._timed:
            self._sums = self._of_heads = self._sums_of(values[len(values) - size :])
        return [values[row * width : (row + 1) * width] for row in range(num_rows)]

    def see(self, tree: TokenTree) -> None:
        """The trees, those on the host, have become these."""
        with self._timed:
            self._sums = self._on_host(tree)

    def credit(self, tree: TokenTree | None) -> None:
        """Heads have drafted this, which is on the host, and not what was packed; None: nothing."""
        with self._timed:
            self._of_heads = None if tree is None else self._on_host(tree)

    def _on_host(self, tree: TokenTree) -> list[list[float]] | None:
        masses = self._masses(tree, self._buckets)
        return None if masses is None else self._sums_of(host_values(masses))

    def _masses(self, tree: TokenTree, bucket_of_node: Tensor) -> Tensor | None:
        """Path probabilities by depth and bucket; None if they are not wanted, or there is nothing below the roots."""
        if not self._edges or tree.num_nodes == 1 or tree.max_depth == 0:
            return None
        return path_mass(tree, bucket_of_node, len(self._edges))

    def _sums_of(self, masses: Sequence[int]) -> list[list[float]] | None:
        """Sums by depth, added up from bucket to bucket; None if there are none."""
        if not masses:
            return None
        num_edges = len(self._edges)
        numbers = [value / _ONE if value >= 0 else math.nan for value in masses]
        starts = range(num_edges, len(masses), num_edges)  # the root's depth is left out
        return [list(accumulate(numbers[k : k + num_edges])) for k in starts]

    def choose(self, lengths: Sequence[int], *, depth: int) -> Choice:
        """What to verify now.

        Args:
            lengths: cached tokens of each row; some of those drafted for may have ended.
            depth: no row's tree is cut at this depth or above after the choice.
        """
        with self._timed:
            self._batch, self._context = len(lengths), sum(lengths) / len(lengths)
            share = self._batch / self._rows
            sums = _shared(self._sums, share)
            of_heads = sums if self._of_heads is self._sums else _shared(self._of_heads, share)
            size = self._sizing.choose(sums, self._batch, self._context, of_heads)
            place = self._edges.index(size.nodes) if size.nodes in self._edges else 0
            expected = [masses[place] for masses in sums] if sums is not None and place > 0 else []
            self._expected, self._drafted = expected[:depth], of_heads is not None
            return Choice(size.nodes, self._pruning if size.pruned else None)

    def learn(self, counts: Sequence[int], *, nodes: int, pruned: int, grown: int, seconds: float) -> float:
        """Learn from a step that is done; the seconds that were predicted for it, NaN if none were.

        Args:
            counts: of each row, nodes on the accepted path, the root included.
            nodes: slots that were verified per row.
            pruned: those of them that later layers did not see.
            grown: slots of the trees drafted in it; 1 if none were.
            seconds: how long it took.
        """
        with self._timed:
            depths = range(1, len(self._expected) + 1)
            record = StepRecord(
                batch=self._batch,
                context=self._context,
                nodes=nodes,
                kept=nodes - pruned,
                grown=max(grown, min(self._most, 2)),  # who was asked for nodes and had none took its time too
                seconds=seconds,
                by_heads=self._drafted,
                tokens=sum(counts),
                expected=self._expected,
                accepted=[sum(count > depth for count in counts) for depth in depths],
            )
            return self._sizing.observe(record)


class _Timed:
    """Adds up the time of a block. A class of its own, as it runs five times a step."""

    __slots__ = ("_started", "seconds")

    def __init__(self) -> None:
        self.seconds = self._started = 0.0

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._started


def _shared(sums: list[list[float]] | None, share: float) -> list[list[float]] | None:
    """The sums over as many of the rows as are left."""
    if sums is None or share == 1.0:
        return sums
    return [[share * mass for mass in masses] for masses in sums]


def path_mass(tree: TokenTree, bucket_of_node: Tensor, num_buckets: int) -> Tensor:
    """Path probability by depth and bucket, summed over rows.

    Args:
        tree: grown trees, [B, N].
        bucket_of_node: the bucket of each slot, [N or more] int64.
        num_buckets: E, how many buckets there are.

    Returns:
        [(D + 1) x E] int64, depth by depth from the root's 0, in units of 2^-32; below 0 where a probability is no
        number. No host transfer.
    """
    depths = node_depths(ancestor_mask(tree.parents, tree.max_depth)) if tree.depths is None else tree.depths
    probabilities = tree.log_probs.exp().nan_to_num(nan=_NO_NUMBER, posinf=_NO_NUMBER)
    mass = (probabilities * _ONE).long()
    index = depths * num_buckets + bucket_of_node[: tree.num_nodes]
    return mass.new_zeros((tree.max_depth + 1) * num_buckets).scatter_add_(0, index.flatten(), mass.flatten())
