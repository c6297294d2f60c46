"""The size of the trees, learnt while decoding.

It is the bucket edge n with the most expected tokens per second, for all rows together:

    N = argmax over edges of  sum_b E_b(n) / T(B, n, context)

E comes from the path probabilities of the trees at hand (`ladon.expectation`), T from the steps that were run
(`ladon.step_cost`). All edges are looked at, because T is a staircase. Drafting costs too, and before its outcome is
known: whether the next trees are drafted at all is decided by what trees have been like of late.

Nothing is measured that is not used: a size is tried by decoding with it, which is exact at any size. What trials may
lose against plain decoding is bounded: a few plain steps at a time, and a small share of the time gone by.

The idea is ProPD's (arXiv 2402.13485); it stops at the first edge that is worse than the one before.

Shapes: B rows, K depths, E bucket edges. Edges are named by their place in `edges`; place 0 is plain decoding.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

from ladon.expectation import Expectation, Sums
from ladon.sizing import StepRecord, are_finite, edges_up_to
from ladon.step_cost import StepCost, StepTime

_FIRST_EDGE = 4  # sizes up to this one may be tried first; beyond, only the next one after a known one
_KNOWN = 0.9  # evidence of a size from which on what it takes is known: two steps, as one may have been an odd one
_PLAIN_FIRST = 2.5  # plain steps before anything is drafted, for something to compare with; old ones count a bit less
_TRIAL_ROWS = 4  # verified rows without which heads are not judged
_PROVED_ROWS = 16  # verified rows without which drafting is not known to pay, whatever it promises
_ALLOWANCE, _ALLOWANCE_LATER = 4.0, 2.5  # plain steps that trials may lose at a time, until heads are judged and then
_SHARE = 0.01  # share of the time gone by that makes such losses good
_LONGEST = 16.0  # plain steps that a single step may have lost; a machine that slept is no loss
_STAY = 1.01  # another size is taken when it promises this much more than the last one
_GAIN_EVERY = 3  # steps for which what drafting promises is not looked at again, unless a trial has ended
_REST = 3  # plain steps after one that shall draft nothing: they are neither asked about nor learnt from
_WIDER = 2  # trees are grown this many edges further than was chosen of late
# What drafting promises, as a multiple of plain decoding's speed. From the first on it is done. From the second on it
# is done while its losses are within bounds, as who does not draft learns nothing. Below, it is tried now and then.
_SURE, _UNSURE = 1.05, 0.95
_PROBE_AFTER, _PROBE_AFTER_MOST = 16, 256  # plain steps between two trials of the heads
_PLAIN_AFTER, _PLAIN_AFTER_MOST = 64, 2048  # drafting steps between two looks at plain decoding
_NARROW, _FASTER = 1.2, 4  # where drafting promises less than the first, its steps count as so many for that
_PLAIN_STEPS = 2  # in a look at plain decoding: the first still verifies a tree


class AutoSizing:
    """Chosen from what steps cost and heads achieve.

    One of these serves one decoder for all its runs, in several threads if need be: what a run has learnt, the next one
    knows.

    Attributes:
        edges: the sizes it chooses from.
        probes: steps so far that were taken to learn something.
        cost: what it knows about the machine.
        expectation: what it knows about the heads.
    """

    def __init__(self, most: int, times: Sequence[StepTime] = ()) -> None:
        """Trees of `most` nodes at most; `times` are those of a profile of this machine, if there is one."""
        self.edges: Sequence[int] = edges_up_to(most)
        self.probes = 0
        self.cost = StepCost(times)
        self.expectation = Expectation(len(self.edges))
        self._lost = 0.0  # seconds that trials have lost against plain decoding, less what time has made good
        self._pays = False  # whether drafting pays, as far as is known
        self._last = 0  # the edge chosen last
        self._grown = 0  # the edge that the new trees are grown to
        self._widest = len(self.edges) - 1  # the edge that the next ones would be grown to
        self._try_heads = _Wait(_PROBE_AFTER, _PROBE_AFTER_MOST)
        self._try_plain = _Wait(_PLAIN_AFTER, _PLAIN_AFTER_MOST)
        self._plain_steps = 0  # steps still to come in a look at plain decoding
        self._kept_curve = _Curve()
        self._kept_gain, self._gain_batch, self._gain_left = 0.0, 0, 0  # with the batch and steps that it holds for
        self._rest = 0  # such steps still to come
        self._has_warned = False
        self._lock = threading.Lock()

    def reach(self, batch: int, context: float) -> int:
        """Most nodes worth growing now, for the step after this one; 1: the heads need not run."""
        with self._lock:
            if self._rest > 0 and batch == self._gain_batch:
                self._rest -= 1
                self._grown = 0
            else:
                self._rest = 0
                self._grown = self._widest if self._should_draft(batch, context) else 0
            return self.edges[self._grown]

    def choose(self, sums: Sums | None, batch: int, context: float) -> int:
        """Nodes of the next step; see `Sizing.choose`."""
        with self._lock:
            self._last = 0 if sums is None or self._grown == 0 else self._best_place(sums, batch, context)
            if self._last > 0:
                self._widest = min(max(self._last + _WIDER, self._widest - 1), len(self.edges) - 1)
            return self.edges[self._last]

    def observe(self, record: StepRecord) -> float:
        """Learn from a step; seconds that were predicted for it, NaN if none were."""
        with self._lock:
            return self._learn(record)

    def _learn(self, record: StepRecord) -> float:
        batch, nodes, context, drafts = record.batch, record.nodes, record.context, record.grown > 1
        if 0.0 < record.seconds < math.inf:
            self._lost = max(0.0, self._lost - _SHARE * record.seconds)
        if self._rest > 0 and nodes == 1 and not drafts:
            return math.nan
        predicted = self.cost.predict(batch, nodes, context, drafts=drafts)
        curve = self._curve(batch, context)
        if (nodes > 1 or drafts) and not (self._pays and nodes in curve.known):
            self.probes += 1
            self._charge(record, curve.plain)
        self.cost.observe(StepTime(batch=batch, nodes=nodes, context=context, drafts=drafts, seconds=record.seconds))
        if record.expected:
            self.expectation.learn_outcome(record.expected, record.accepted, batch)
        return predicted

    def _charge(self, record: StepRecord, plain: float) -> None:
        """Book what a trial lost against plain decoding, or gained."""
        if 0.0 < plain < math.inf and 0.0 < record.seconds < math.inf:
            tokens = 1 + sum(record.accepted) / record.batch
            loss = min(record.seconds, _LONGEST * plain) - tokens * plain
            self._lost = max(0.0, self._lost + loss)
            if loss < 0.0 and tokens > 1:  # a step may be short by chance as well
                self._try_heads.end()  # it paid: the next trial need not wait

    @property
    def _on_trial(self) -> bool:
        """Whether too little is known about the heads to judge them."""
        return self.expectation.rows_verified < _TRIAL_ROWS

    def _may_lose(self, plain: float) -> bool:
        """Whether a trial that loses one more plain step stays within what trials may lose."""
        return self._lost + plain <= (_ALLOWANCE if self._on_trial else _ALLOWANCE_LATER) * plain

    def _should_draft(self, batch: int, context: float) -> bool:
        """Whether trees for the next step are worth their drafting, or worth a trial."""
        curve = self._curve(batch, context)
        if not curve.has_plain:
            return False  # nothing to compare with
        if self._plain_steps > 0:
            self._plain_steps -= 1
            return False
        plain = curve.plain
        if self._on_trial:
            self._pays = False
            return self._may_lose(plain)
        gain = self._gain(batch, context)
        self._pays = gain >= _SURE and self.expectation.rows_verified >= _PROVED_ROWS
        if self._pays:
            self._try_heads.reset()
        elif not self._may_lose(plain) or (gain < _UNSURE and not self._try_heads.is_over(_REST + 1)):
            self._rest = _REST
            return False
        return not self._is_time_for_plain(gain)

    def _gain(self, batch: int, context: float) -> float:
        """Speed that drafting trees like those of late promises, as a multiple of plain decoding's."""
        self._gain_left -= 1
        if self._gain_left < 0 or batch != self._gain_batch:
            self._gain_left, self._gain_batch = _GAIN_EVERY, batch
            promise = self._rates(self.expectation.typical_tokens(batch), batch, context, len(self.edges))
            self._kept_gain = max(promise.values()) * self._curve(batch, context).plain / batch
        return self._kept_gain

    def _is_time_for_plain(self, gain: float) -> bool:
        """Whether this step and the next shall draft nothing, to see again what plain decoding takes."""
        if not self._try_plain.is_over(_FASTER if gain < _NARROW else 1):
            return False
        self._plain_steps = _PLAIN_STEPS - 1
        self.probes += _PLAIN_STEPS
        return True

    def _best_place(self, sums: Sums, batch: int, context: float) -> int:
        """The edge with the most expected tokens per second."""
        count = self._grown + 1
        if not are_finite(sums):
            self._warn_once()
            self.expectation.learn_trees([[0.0] * len(self.edges) for _ in sums], batch, count)
            return 0
        self.expectation.learn_trees(sums, batch, count)
        rates = self._rates(self.expectation.tokens(sums, batch), batch, context, count)
        best = max(rates, key=rates.__getitem__)
        if self._last in rates and rates[best] < _STAY * rates[self._last]:
            best = self._last
        if self._pays:
            return best
        self._gain_left = 0
        if best > 0:
            return best
        # A trial: the smallest size that would pay if the heads were as good as they say shows whether they are.
        claims = self._rates(self.expectation.tokens(sums, batch, corrected=False), batch, context, count)
        plain_rate = batch / self._curve(batch, context).plain
        return next((place for place, rate in claims.items() if place > 0 and rate > plain_rate), 0)

    def _warn_once(self) -> None:
        if not self._has_warned:
            self._has_warned = True
            warnings.warn("the heads' probabilities are not finite; steps without them decode plainly", stacklevel=2)

    def _rates(self, tokens: Sequence[float], batch: int, context: float, count: int) -> dict[int, float]:
        """Tokens per second, by place, of those of the first `count` edges that may be taken."""
        seconds = self._curve(batch, context).seconds
        return {place: tokens[place] / time for place, time in seconds.items() if place < count}

    def _least(self, batch: int, nodes: int, context: float, *, drafts: bool) -> float:
        """Seconds that a step may take at the least: what is little known is tried for this, and is then known."""
        evidence = max(self.cost.evidence(batch, nodes, drafts=drafts), 1.0)
        return self.cost.predict(batch, nodes, context, drafts=drafts) * (1.0 - self.cost.noise / math.sqrt(evidence))

    def _curve(self, batch: int, context: float) -> _Curve:
        """What steps of every size take now; kept until something changes."""
        may_lose = self._may_lose(self._kept_curve.plain)
        state = (batch, int(context) // 64, self.cost.version, may_lose)
        if state != self._kept_curve.state:
            known = {n for n in self.edges if self._steps_seen(batch, n) >= _KNOWN}
            self._kept_curve = _Curve(
                state=state,
                plain=self._least(batch, 1, context, drafts=False),
                has_plain=self.cost.evidence(batch, 1, drafts=False) >= _PLAIN_FIRST,
                seconds=self._seconds_with_drafting(batch, context, known, may_lose),
                known=known,
            )
        return self._kept_curve

    def _steps_seen(self, batch: int, nodes: int) -> float:
        return sum(self.cost.evidence(batch, nodes, drafts=drafts) for drafts in (True, False))

    def _seconds_with_drafting(self, batch: int, context: float, known: set[int], may_lose: bool) -> dict[int, float]:
        """Seconds of a step, by place, of the edges that may be taken."""
        found, least, was_known = {}, math.inf, True
        for place, nodes in enumerate(self.edges):
            is_new = nodes not in known and place > 0
            if is_new and nodes > _FIRST_EDGE and not (was_known and may_lose):
                was_known = False
                continue
            seconds = self._least(batch, nodes, context, drafts=True)
            least = min(seconds, least) if is_new else seconds  # at best, time is flat up to a new one
            was_known, found[place] = not is_new, least
        return found


@dataclass(frozen=True, kw_only=True, slots=True)
class _Curve:
    """What steps take.

    Attributes:
        state: what this holds for.
        plain: seconds of a step of plain decoding.
        has_plain: whether enough steps of plain decoding were seen.
        seconds: of a step that drafts, by place of the edge; edges that may not be taken are left out.
        known: numbers of nodes of which enough steps were seen, with drafting or without.
    """

    state: tuple[object, ...] = ()
    plain: float = math.inf
    has_plain: bool = False
    seconds: dict[int, float] = field(default_factory=dict)
    known: set[int] = field(default_factory=set)


class _Wait:
    """Counts down from a number that doubles each time, up to a bound, until it is reset."""

    def __init__(self, first: int, most: int) -> None:
        self._first, self._most = first, most
        self.reset()

    def reset(self) -> None:
        """Begin with the first number again."""
        self._length = self._left = self._first

    def end(self) -> None:
        """Let the next count be the last, and the one after it a short one."""
        self._length, self._left = self._first // 2, 0

    def is_over(self, count: int = 1) -> bool:
        """Count down; whether the end was passed, upon which the next count begins."""
        self._left -= count
        if self._left >= 0:
            return False
        self._length = self._left = min(2 * self._length, self._most)
        return True
