"""What the next step takes at every size that may be chosen, as far as it is known.

A size is a number of nodes, verified whole or pruned on the way (`ladon.target.pruning.pruner`). Options are in the
order of their work, so that sizes which were never taken can be tried upwards; place 0 is plain decoding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ladon.tree_size.latency_model import StepCost
from ladon.tree_size.policy import PrunedSteps, Size

_FIRST = 4.0  # work up to which any size may be tried first; beyond, only the next one after a known one
_KNOWN = 0.9  # evidence of a size from which on what it takes is known: two steps, as one may have been an odd one
_PLAIN_FIRST = 2.5  # plain steps without which there is nothing to compare with; old ones count a bit less


@dataclass(frozen=True, slots=True)
class Option:
    """A size that may be chosen.

    Attributes:
        size: the size.
        edge: the place of its nodes among the bucket edges.
        work: node slots per row that a layer sees, on average over the layers.
    """

    size: Size
    edge: int
    work: float

    @property
    def is_cut(self) -> bool:
        """Whether pruning takes nodes out on the way."""
        return self.work < self.size.nodes


def options_of(edges: Sequence[int], pruned: PrunedSteps | None) -> list[Option]:
    """Every edge as it is, and those that pruning would cut also pruned, in the order of their work."""
    found = [Option(Size(nodes, pruned is None), edge, float(nodes)) for edge, nodes in enumerate(edges)]
    if pruned is not None:
        found += [
            Option(Size(nodes, True), edge, pruned.work(nodes, pruned.keep))
            for edge, nodes in enumerate(edges)
            if nodes > pruned.keep
        ]
    return sorted(found, key=lambda option: option.work)


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """What steps take.

    Attributes:
        state: what this holds for.
        plain: seconds that a step of plain decoding takes at the least.
        has_plain: whether enough steps of plain decoding were seen.
        seconds: that a step takes at the least, by place of the option; options that may not be taken are left out.
        known: places of which enough steps were seen, with drafting or without.
        likely_plain: seconds that a step of plain decoding is likely to take.
        likely: seconds that a step is likely to take, by place of the options that are known.
    """

    state: tuple[object, ...] = ()
    plain: float = math.inf
    has_plain: bool = False
    seconds: dict[int, float] = field(default_factory=dict)
    known: set[int] = field(default_factory=set)
    likely_plain: float = math.inf
    likely: dict[int, float] = field(default_factory=dict)


Evidence = Mapping[tuple[float, bool, bool], float]  # steps seen by (work, drafts, pruned)


class Curves:
    """Makes curves from what the cost knows, and keeps the newest one until something changes.

    They are those of steps in which heads draft the next trees, or of steps in which they do not.
    """

    def __init__(self, cost: StepCost, options: Sequence[Option], *, drafts: bool = True) -> None:
        self._cost, self._options, self._drafts = cost, options, drafts
        self.newest = Curve()

    def at(self, batch: int, context: float, *, may_lose: bool) -> Curve:
        """The curve for B rows of so many cached tokens; `may_lose`: sizes that are not known may be taken."""
        state = (batch, int(context) // 128, self._cost.version, may_lose)
        if state != self.newest.state:
            seen = self._cost.evidence(batch)
            known = {place for place, option in enumerate(self._options) if _steps(seen, option) >= _KNOWN}
            self.newest = Curve(
                state=state,
                plain=self._least(seen, batch, self._options[0], context, False),
                has_plain=seen.get((1.0, False, False), 0.0) >= _PLAIN_FIRST,
                seconds=self._seconds(seen, batch, context, known, may_lose),
                known=known,
                likely_plain=self._likely(batch, self._options[0], context, False),
                likely={place: self._likely(batch, self._options[place], context, self._drafts) for place in known},
            )
        return self.newest

    def _likely(self, batch: int, option: Option, context: float, drafts: bool) -> float:
        return self._cost.predict(batch, option.work, context, drafts=drafts, pruned=option.is_cut)

    def _least(self, seen: Evidence, batch: int, option: Option, context: float, drafts: bool) -> float:
        """Seconds that a step may take at the least: what is little known is tried for this, and is then known."""
        evidence = max(seen.get((option.work, drafts, option.is_cut), 0.0), 1.0)
        return self._likely(batch, option, context, drafts) * (1.0 - self._cost.noise / math.sqrt(evidence))

    def _seconds(self, seen: Evidence, batch: int, context: float, known: set[int], may_lose: bool) -> dict[int, float]:
        """Seconds of a step, by place, of the options that may be taken."""
        found: dict[int, float] = {}
        below = {False: (True, math.inf)}  # of whole and of cut sizes: whether the last one is known, and its seconds
        for place, option in enumerate(self._options):
            was_known, least = below.get(option.is_cut, below[False])  # the first cut one comes after a whole one
            is_new = place not in known and place > 0
            if is_new and option.work > _FIRST and not (was_known and may_lose):
                below[option.is_cut] = False, least
                continue
            seconds = self._least(seen, batch, option, context, self._drafts)
            found[place] = min(seconds, least) if is_new else seconds  # at best, time is flat up to a new one
            below[option.is_cut] = not is_new, found[place]
        return found


def _steps(seen: Evidence, option: Option) -> float:
    return sum(seen.get((option.work, drafts, option.is_cut), 0.0) for drafts in (True, False))
