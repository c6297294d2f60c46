"""What a decode step costs: learnt from the steps themselves, as they come.

A step of B rows verifies n nodes per row and then drafts the next trees, or does not: without drafting, a step of one
node is plain decoding. Its time is modelled in two parts:

- a weighted regression over nodes, batch and context with coefficients that are never negative, so that it can be
  trusted between the steps that were seen and a little beyond them;
- what each cell (batch, nodes, drafting, pruning, octave of the context) itself shows over and above the regression,
  because real time is a staircase: flat up to a knee on a GPU, with another kernel for every few rows on a CPU.

Both forget. A machine whose speed changes as a whole (another program runs, the clock is throttled) moves one number,
the pace, which all cells share: sizes that were not tried since then are still compared as they should be.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import mul

from ladon.tree_size.policy import PrunedSteps, Size

_FULL_WEIGHT = 32.0  # steps beyond which a cell counts no more
_PROFILE_WEIGHT = 8.0  # steps that a time of a profile stands for
_CELL_RATE, _PACE_RATE = 0.02, 0.15  # share of a surprise that a well-known cell and the pace take over at most
_FAMILIAR = 16.0  # steps of a cell after which half of a surprise is put down to the machine and not to the cell
_PACE_LEAK = 0.005  # share of the pace that goes with each step: what lasts belongs to the cells
_NOISE, _NOISE_RATE = 0.05, 0.05  # relative error of a time at first; share of a step that it is corrected by
_MOST_NOISE = 0.12  # greater surprises are no measure of what is usual
_CLIP = 0.2  # a surprise counts up to this much (natural logarithm), twice as much for each one that follows another
_STALE = 2000.0  # steps without a visit after which a cell counts by a factor of e less
_MOST_CELLS = 128  # or as many as a profile has
_REFIT_EVERY = 32  # steps
_FAR = 4.0  # cells as unlike as this say nothing of each other
_FRESH = 6.0  # steps during which a cell changes so much that nothing computed from it is kept
_SWEEPS = 12
_OTHER_CELLS = 1.0  # what the cells around weigh against a cell's own steps


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTime:
    """A measured time.

    Attributes:
        batch: rows decoded together.
        nodes: node slots verified per row, root included; of a pruned step, those that a layer sees on average.
        context: cached tokens per row, their mean.
        drafts: whether trees for the next step were drafted in it.
        seconds: how long it took.
        pruned: whether nodes were taken out on the way.
    """

    batch: int
    nodes: float
    context: float
    drafts: bool
    seconds: float
    pruned: bool = False


_Key = tuple[int, float, bool, bool, int]  # batch, nodes, drafts, pruned, octave of the context


@dataclass(slots=True)
class _Cell:
    """What the steps of one key showed.

    Attributes:
        level: logarithm of the seconds of a step with `context` cached tokens, at the pace 0.
        context: cached tokens of those steps.
        regression: what the regression says of such a step, a logarithm.
        count: how many steps there were, up to a bound.
        seen: number of the last one among all steps.
    """

    level: float
    context: float
    regression: float
    count: float
    seen: int


class LatencyModel:
    """Times of decode steps, predicted.

    Times that cannot be (zero, negative, not finite) are ignored. One that is far from the prediction moves it a
    little; only if others follow does it move much. Of the first two steps of a cell the shorter one counts: the first
    compiles, allocates and warms caches.

    Attributes:
        noise: mean relative error of late.
        version: grows whenever predictions have changed by more than the pace: for those who keep some of them.
    """

    def __init__(self, times: Sequence[StepTime] = ()) -> None:
        """Start from measured `times`, a profile, or from nothing."""
        self._cells: dict[_Key, _Cell] = {}
        self._weights = [0.0] * _NUM_FEATURES
        self._pace = 0.0
        self.noise = _NOISE
        self._steps = 0
        self._surprises = 0  # how many times in a row a time was far off, counted with its sign
        self._residuals: dict[_Key, float] = {}  # computed from the next when asked for
        self._gaps: dict[_Key, tuple[float, float]] = {}  # of each cell: beyond the regression; its weight
        self.version = 0
        for time in times:
            if _is_time(time.seconds):
                self._start_from(time)
        self._most_cells = max(_MOST_CELLS, len(self._cells))
        self._refit()

    def _start_from(self, time: StepTime) -> None:
        """Take a time of a profile; times of one cell, at contexts of one octave, count as their mean."""
        key, level = _key(time), math.log(time.seconds)
        cell = self._cells.setdefault(key, _Cell(level, time.context, 0.0, 0.0, 0))
        cell.count += _PROFILE_WEIGHT
        cell.level += (level - cell.level) * _PROFILE_WEIGHT / cell.count
        cell.context += (time.context - cell.context) * _PROFILE_WEIGHT / cell.count

    def __len__(self) -> int:
        """How many kinds of steps were seen, of those that are remembered."""
        return len(self._cells)

    def observe(self, time: StepTime) -> float:
        """Learn from a real step; the seconds that were predicted for it, NaN if nothing was seen before."""
        self._steps += 1
        regression = self._log_regression(time.batch, time.nodes, time.drafts, time.context)
        key = _key(time)
        predicted = math.exp(regression + self._residual(key) + self._pace) if self._cells else math.nan
        if _is_time(time.seconds):
            self._learn(key, time, regression)
        return predicted

    def _learn(self, key: _Key, time: StepTime, regression: float) -> None:
        level, cell = math.log(time.seconds) - self._pace, self._cells.get(key)
        if cell is None or cell.count < 2:
            level, count = (level, 1) if cell is None else (min(level, cell.level), 2)
            self._cells[key] = _Cell(level, time.context, regression, count, self._steps)
            self._refit()
            return
        self._correct(cell, level, time.context, regression)
        if self._steps % max(_REFIT_EVERY, len(self._cells)) == 0:
            self._refit()
        elif cell.count < _FRESH:  # what it says of its neighbours can wait for the next fit
            self._gaps[key] = cell.level - cell.regression, self._weight(cell)
            self._residuals.pop(key, None)
            self.version += 1

    def _correct(self, cell: _Cell, level: float, context: float, regression: float) -> None:
        """Move a cell and the pace towards a new time, at a context for which the regression says `regression`."""
        known = cell.level + regression - cell.regression
        error = level - known
        bound = _CLIP * 2.0 ** min(abs(self._surprises), 10)
        if abs(error) <= _CLIP:
            self._surprises = 0
        else:
            sign = 1 if error > 0 else -1
            self._surprises = self._surprises + sign if self._surprises * sign > 0 else sign
        error = max(-bound, min(bound, error))
        self.noise += _NOISE_RATE * (min(abs(error), _MOST_NOISE) - self.noise)
        cell.count = min(cell.count + 1, 1 / _CELL_RATE)
        cell.level = known + error / cell.count
        cell.context, cell.regression, cell.seen = context, regression, self._steps
        trust = cell.count / (cell.count + _FAMILIAR)
        self._pace += _PACE_RATE * trust * error - _PACE_LEAK * self._pace

    def predict(self, batch: int, nodes: float, context: float, *, drafts: bool, pruned: bool = False) -> float:
        """Seconds of such a step; NaN if nothing was seen yet."""
        if not self._cells:
            return math.nan
        residual = self._residual((batch, nodes, drafts, pruned, _octave(context)))
        return math.exp(self._log_regression(batch, nodes, drafts, context) + residual + self._pace)

    def evidence(self, batch: int) -> dict[tuple[float, bool, bool], float]:
        """How many steps were seen, at this batch or one like it, by (nodes, drafts, pruned).

        Old ones count less, a single one half.
        """
        found: dict[tuple[float, bool, bool], float] = {}
        for (other_batch, nodes, drafts, pruned, _), cell in self._cells.items():
            if batch <= 2 * other_batch and other_batch <= 2 * batch:
                found[nodes, drafts, pruned] = found.get((nodes, drafts, pruned), 0.0) + self._weight(cell)
        return found

    def _weight(self, cell: _Cell) -> float:
        """How much a cell counts: by its steps, less when they are long past; a single step counts little."""
        count = 0.5 if cell.count < 2 else min(cell.count, _FULL_WEIGHT)
        return count * math.exp((cell.seen - self._steps) / _STALE)

    def _log_regression(self, batch: int, nodes: float, drafts: bool, context: float) -> float:
        return math.log(sum(map(mul, self._weights, _features(batch, nodes, drafts, context))) + _TINY)

    def _residual(self, key: _Key) -> float:
        """What the cells show beyond the regression: the cell itself, or those around it if it was little seen."""
        found = self._residuals.get(key)
        if found is None:
            found = self._residuals[key] = self._residual_of(key)
        return found

    def _residual_of(self, key: _Key) -> float:
        around, weights = 0.0, 0.25  # a little trust in the regression alone
        own_gap, own_weight = 0.0, 0.0
        for other, (gap, weight) in self._gaps.items():
            if other == key:
                own_gap, own_weight = gap, weight
            elif (distance := _distance(key, other)) < _FAR:
                share = min(weight, _FRESH) * math.exp(-2.0 * distance)
                around += share * gap
                weights += share
        around /= weights
        if own_weight == 0.0:
            return around
        return (own_weight * own_gap + _OTHER_CELLS * around) / (own_weight + _OTHER_CELLS)

    def _refit(self) -> None:
        """Fit the regression to the cells, relative errors alike, by coordinate descent with no weight below 0."""
        while len(self._cells) > self._most_cells:
            del self._cells[min(self._cells, key=lambda key: self._cells[key].seen)]
        gram = [[0.0] * _NUM_FEATURES for _ in range(_NUM_FEATURES)]
        goal = [0.0] * _NUM_FEATURES
        for key, cell in self._cells.items():
            scale = math.exp(-cell.level)
            row = [scale * x for x in _features(*key[:3], cell.context)]
            weight = self._weight(cell)
            for i, x in enumerate(row):
                goal[i] += weight * x
                for j in range(_NUM_FEATURES):
                    gram[i][j] += weight * x * row[j]
        weights = self._weights
        for _ in range(_SWEEPS):
            for i in range(_NUM_FEATURES):
                rest = sum(g * w for g, w in zip(gram[i], weights, strict=True)) - gram[i][i] * weights[i]
                weights[i] = max(0.0, (goal[i] - rest) / (gram[i][i] * 1.001 + _TINY))
        for key, cell in self._cells.items():
            cell.regression = self._log_regression(*key[:3], cell.context)
        self._gaps = {key: (cell.level - cell.regression, self._weight(cell)) for key, cell in self._cells.items()}
        self._residuals.clear()
        self.version += 1


_TINY = 1e-12
_NUM_FEATURES = 6


def _key(time: StepTime) -> _Key:
    return time.batch, time.nodes, time.drafts, time.pruned, _octave(time.context)


def _octave(context: float) -> int:
    return max(0, int(context) // 128).bit_length()


def _distance(key: _Key, other: _Key) -> float:
    """How unlike two cells are."""
    steps = abs(math.log2(key[0] / other[0])) + abs(math.log2(key[1] / other[1]))
    return steps + (key[2] != other[2]) + 0.5 * (key[3] != other[3]) + 0.25 * abs(key[4] - other[4])


def _features(batch: int, nodes: float, drafts: bool, context: float) -> tuple[float, ...]:
    """What the cost of a step is made of, scaled to be of like size.

    The step itself, its nodes, what its rows and its nodes read of the cache, drafting, and drafting by row.
    """
    work, cached = batch * nodes / 16, context / 1024
    return (1.0, work, batch * cached / 4, work * cached, float(drafts), drafts * batch / 4)


def _is_time(seconds: float) -> bool:
    return 0.0 < seconds < math.inf


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

    def __init__(self, cost: LatencyModel, options: Sequence[Option], *, drafts: bool = True) -> None:
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
