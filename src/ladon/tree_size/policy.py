"""The size of the trees: how many nodes a step verifies, chosen anew at each step; 1 is plain decoding.

All rows verify the same number of nodes, whole or pruned on the way, and output never depends on it. Here is what the
engine asks of whatever chooses, and two that learn nothing; `ladon.tree_size.adaptive` has the one that does.

Shapes: B rows, K depths, E bucket edges. Everything here is plain host arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from ladon.tree_size.acceptance_model import Sums

EDGES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128)


class Size(NamedTuple):
    """How many nodes a step verifies.

    Attributes:
        nodes: node slots per row, root included.
        pruned: whether they are pruned on the way, if the engine prunes at all.
    """

    nodes: int
    pruned: bool


PLAIN = Size(1, False)


class PrunedSteps(NamedTuple):
    """What pruning does to a step.

    Attributes:
        keep: node slots per row that go on.
        share: of the layers, that see all nodes: 0 to 1.
    """

    keep: int
    share: float

    def work(self, nodes: int, kept: int) -> float:
        """Node slots per row that a layer sees, on average over the layers, if so many of them go on."""
        return kept + self.share * (nodes - kept)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRecord:
    """What a decode step did and took.

    Attributes:
        batch: B, rows it served.
        context: cached tokens per row before it, their mean.
        nodes: node slots verified per row, root included.
        kept: those of them that no pruning took out.
        grown: nodes per row that trees for the next step were grown to; 1 if nothing was drafted.
        seconds: how long it took.
        by_heads: whether heads had a part in the trees that it verified.
        tokens: what all rows accepted, the roots included, and even where a row ended before.
        expected: path probability of the verified nodes of each depth, summed over rows; only as deep as no row's tree
            was cut after the choice.
        accepted: how many rows accepted a node of each depth; as long as `expected`.
    """

    batch: int
    context: float
    nodes: int
    kept: int
    grown: int
    seconds: float
    tokens: int
    by_heads: bool = True
    expected: Sequence[float] = ()
    accepted: Sequence[int] = ()


class Sizing(Protocol):
    """What the engine asks: before it drafts, after it has drafted, and when a step is done.

    Attributes:
        edges: numbers of nodes up to which it wants path probabilities summed; empty if it wants none.
        probes: steps so far that were taken to learn something.
    """

    edges: Sequence[int]
    probes: int

    def for_run(self) -> Sizing:
        """One for another run, which may share what it learns, but not its trees."""

    def reach(self, batch: int, context: float) -> int:
        """Most nodes worth growing now, for the step after this one; 1: the heads need not run."""

    def choose(self, sums: Sums | None, batch: int, context: float, of_heads: Sums | None = None) -> Size:
        """Size of the next step.

        Args:
            sums: [D][E], path probability of the new trees' nodes of each depth up to each edge, summed over rows; None
                if nothing was grown.
            batch: B, rows of the next step.
            context: their cached tokens, the mean.
            of_heads: [K][E], the same of what heads have drafted alone: other numbers than `sums` if n-grams were
                merged in; None if heads have drafted nothing.
        """

    def observe(self, record: StepRecord) -> float:
        """Learn from a step; seconds that were predicted for it, NaN if none were."""


class FixedSizing:
    """Always the same size."""

    def __init__(self, nodes: int) -> None:
        """`nodes` per step and row, root included."""
        self.edges: Sequence[int] = ()
        self.probes = 0
        self._nodes = nodes

    def for_run(self) -> FixedSizing:
        """Itself: it remembers nothing."""
        return self

    def reach(self, batch: int, context: float) -> int:
        """The size."""
        return self._nodes

    def choose(self, sums: Sums | None, batch: int, context: float, of_heads: Sums | None = None) -> Size:
        """The size."""
        return Size(self._nodes, True)

    def observe(self, record: StepRecord) -> float:
        """Nothing to learn."""
        return math.nan


def edges_up_to(most: int) -> tuple[int, ...]:
    """The bucket edges for trees of `most` nodes at most."""
    return (*(edge for edge in EDGES if edge < most), most)


def are_usable(sums: Sums) -> bool:
    """Whether the heads' probabilities are numbers, and not all 0: a model in float16 may overflow."""
    return all(math.isfinite(mass) for masses in sums for mass in masses) and any(masses[-1] > 0.0 for masses in sums)
