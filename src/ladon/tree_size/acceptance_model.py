"""How many tokens a step may expect to emit, by the number of nodes it verifies.

The sum of a tree's path probabilities is the number of nodes that would be accepted, if the heads' probabilities were
true. They are not quite, and how far off they are changes with the text: so each depth has a correction, learnt from
what was accepted, and pruning (`ladon.target.pruning.pruner`) has one of its own. ProPD (arXiv 2402.13485) keeps a
table of acceptance rates by head and rank instead; on recorded traces that predicts worse, because it says the same of
every tree (`benchmarks/expectation.py`, docs/benchmarks/tree-size.md).

Shapes: K depths, E bucket edges. `sums[d][e]` is the path probability of all nodes of depth d + 1 among the first
`edges[e]` nodes, summed over rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from operator import mul

_PRIOR = 2.0  # expected acceptances that count for the heads' own word before any evidence
_KEEP = 0.995  # of the evidence, per row of a step: half is forgotten after 138
_KEEP_RECENT = 0.94  # the same for what is compared with it: after 11
_TURN = 3.0  # standard deviations between the two upon which only the recent evidence is kept
_TYPICAL_ROWS = 16.0  # rows over which the typical tree is averaged

Sums = Sequence[Sequence[float]]


class AcceptanceModel:
    """Corrected expectations, and what a typical tree of late has looked like.

    Attributes:
        rows_verified: verified trees so far.
    """

    def __init__(self, num_edges: int) -> None:
        """Nothing is known about the heads yet; E is `num_edges`."""
        self._num_edges = num_edges
        self._evidence: list[_Evidence] = []
        self._evidence_pruned = _Evidence()
        self._typical: list[list[float]] = []
        self._typical_rows = 0.0
        self.rows_verified = 0

    def corrections(self) -> list[float]:
        """Accepted over expected nodes of each depth, recent rows counting most; 1 where little is known, [K]."""
        return [found.correction for found in self._evidence]

    @property
    def kept_by_pruning(self) -> float:
        """Share of the drafts accepted from whole trees that are accepted when they are pruned; 1 if not known."""
        return min(self._evidence_pruned.correction, 1.0)

    def learn_outcome(
        self, expected: Sequence[float], accepted: Sequence[float], rows: int, *, pruned: bool = False
    ) -> None:
        """A step's verified trees: per depth their path probability, uncorrected, and rows that accepted a node.

        Trees that were `pruned` say what pruning keeps, and nothing of the heads.
        """
        self.rows_verified += rows
        self._evidence += [_Evidence() for _ in range(len(expected) - len(self._evidence))]
        if pruned:
            foreseen = sum(map(mul, self.corrections(), expected))
            self._evidence_pruned.add(foreseen, sum(accepted), rows)
            return
        self._evidence_pruned.fade(rows)  # or a bad start would keep pruning off for ever
        for found, mass, count in zip(self._evidence, expected, accepted, strict=False):
            if mass > 0.0:  # a depth that was not verified says nothing
                found.add(mass, count, rows)

    def learn_trees(self, sums: Sums, rows: int, num_edges: int) -> None:
        """The new trees of a step, verified or not, which were grown up to the first `num_edges` edges."""
        self._typical_rows = min(self._typical_rows + rows, _TYPICAL_ROWS)
        share = min(rows / self._typical_rows, 1.0)
        nothing = [0.0] * self._num_edges  # a depth that these trees do not reach
        self._typical += [list(nothing) for _ in range(len(sums) - len(self._typical))]
        for old, new in zip_longest(self._typical, sums, fillvalue=nothing):
            for edge in range(num_edges):
                old[edge] += share * (new[edge] / rows - old[edge])
            for edge in range(num_edges, self._num_edges):  # not grown: at least what fewer nodes have
                old[edge] = max(old[edge], old[edge - 1])

    def tokens(self, sums: Sums, rows: int, *, corrected: bool = True) -> list[float]:
        """Tokens that all rows together may expect from verifying these trees up to each edge, [E]."""
        factors = self.corrections() if corrected else []
        factors += [1.0] * (len(sums) - len(factors))
        totals = [float(rows)] * self._num_edges
        for factor, masses in zip(factors, sums, strict=False):
            for edge, mass in enumerate(masses):
                totals[edge] += factor * mass
        return totals

    def typical_tokens(self, rows: int) -> list[float]:
        """The same for the trees as they have been of late, [E]."""
        return [rows * tokens for tokens in self.tokens(self._typical, 1)]


@dataclass(slots=True)
class _Evidence:
    """Accepted and expected nodes, the past counting less and less, and the same with a shorter memory."""

    accepted: float = 0.0
    expected: float = 0.0
    recently_accepted: float = 0.0
    recently_expected: float = 0.0

    @property
    def correction(self) -> float:
        """Accepted over expected, 1 where there is no evidence."""
        return (self.accepted + _PRIOR) / (self.expected + _PRIOR)

    def fade(self, rows: int) -> None:
        """Let steps of so many rows have gone by."""
        keep, keep_recent = _KEEP**rows, _KEEP_RECENT**rows
        self.accepted *= keep
        self.expected *= keep
        self.recently_accepted *= keep_recent
        self.recently_expected *= keep_recent

    def add(self, expected: float, accepted: float, rows: int) -> None:
        """One step of so many rows."""
        self.fade(rows)
        self.accepted += accepted
        self.expected += expected
        self.recently_accepted += accepted
        self.recently_expected += expected
        foreseen = self.recently_expected * self.correction
        variance = max(foreseen, 1.0) / (1 + _KEEP_RECENT**rows)
        if (self.recently_accepted - foreseen) ** 2 > _TURN**2 * variance:  # another text, another rate
            self.accepted, self.expected = self.recently_accepted, self.recently_expected
