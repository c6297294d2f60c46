"""The size of the trees, chosen from a profile of the machine alone: no clock enters."""

from __future__ import annotations

from collections.abc import Sequence

from ladon.tree_size.acceptance_model import AcceptanceModel, Sums
from ladon.tree_size.latency_model import LatencyModel
from ladon.tree_size.policy import PLAIN, Size, StepRecord, are_usable, edges_up_to


class FrozenSizing:
    """Chosen from frozen times alone: no clock enters, so that the same trees always get the same size.

    The heads' probabilities are taken at their word. Trees are grown to the greatest size that would pay if every draft
    were right; drafting is off where there is none.
    """

    def __init__(self, cost: LatencyModel, most: int, depth: int) -> None:
        """`cost` must not be added to; trees have `most` nodes and this `depth` at most."""
        self.edges: Sequence[int] = edges_up_to(most)
        self.probes = 0
        self._cost = cost
        self._depth = depth

    def for_run(self) -> FrozenSizing:
        """Itself: it remembers nothing."""
        return self

    def reach(self, batch: int, context: float) -> int:
        """The greatest edge that could pay."""
        plain = self._cost.predict(batch, 1, context, drafts=False)
        could_pay = [n for n in self.edges[1:] if self._seconds(batch, n, context) < min(n, self._depth + 1) * plain]
        return could_pay[-1] if could_pay else 1

    def choose(self, sums: Sums | None, batch: int, context: float, of_heads: Sums | None = None) -> Size:
        """The best edge for these trees."""
        if sums is None or not are_usable(sums):
            return PLAIN
        tokens = AcceptanceModel(len(self.edges)).tokens(sums, batch)
        rates = [t / self._seconds(batch, n, context) for n, t in zip(self.edges, tokens, strict=True)]
        return Size(self.edges[rates.index(max(rates))], True)

    def observe(self, record: StepRecord) -> float:
        """The time predicted; nothing is learnt."""
        return self._cost.predict(record.batch, record.nodes, record.context, drafts=record.grown > 1)

    def _seconds(self, batch: int, nodes: int, context: float) -> float:
        return self._cost.predict(batch, nodes, context, drafts=True)
