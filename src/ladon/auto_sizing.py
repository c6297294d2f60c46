"""The size of the trees, learnt while decoding.

It is the bucket edge n with the most expected tokens per second, for all rows together:

    N = argmax over edges of  sum_b E_b(n) / T(B, n, context)

E comes from the path probabilities of the trees at hand (`ladon.expectation`), T from the steps that were run
(`ladon.step_cost`, `ladon.curve`). All edges are looked at, because T is a staircase. A decoder that prunes has every
edge twice, whole and pruned. Drafting costs too, and before its outcome is known: whether the next trees are drafted at
all is decided by what trees have been like of late.

Nothing is measured that is not used: a size is tried by decoding with it, which is exact at any size. What trials may
lose against plain decoding is bounded: a few plain steps at a time, and a small share of the time gone by.

The idea is ProPD's (arXiv 2402.13485); it stops at the first edge that is worse than the one before.

Shapes: B rows, K depths, E bucket edges. Sizes are named by their place among the options; place 0 is plain decoding.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Mapping, Sequence

from ladon.curve import Curve, Curves, options_of
from ladon.expectation import Expectation, Sums
from ladon.sizing import PrunedSteps, Size, StepRecord, are_finite, edges_up_to
from ladon.step_cost import StepCost, StepTime

_TRIAL_ROWS = 4  # verified rows without which heads are not judged
_PROVED_ROWS = 16  # verified rows without which drafting is not known to pay, whatever it promises
_ALLOWANCE, _ALLOWANCE_LATER = 4.0, 2.5  # plain steps that trials may lose at a time, until heads are judged and then
_SHARE = 0.01  # share of the time gone by that makes such losses good
_LONGEST = 16.0  # plain steps that a single step may have lost; a machine that slept is no loss
_STAY = 1.01  # another size is taken when it promises this much more than the last one
_STANDS = (
    3  # further steps for which it stands that drafting pays, or does not: nothing is asked or summed up meanwhile
)
_WIDER = 2  # trees are grown this many edges further than was chosen of late
# What drafting promises, as a multiple of plain decoding's speed. Where the first is likely, it is done. Where the
# second is possible, it is done while its losses are within bounds, as who does not draft learns nothing. Below, it is
# tried now and then.
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

    def __init__(self, most: int, times: Sequence[StepTime] = (), pruned: PrunedSteps | None = None) -> None:
        """Start from what is known.

        Args:
            most: nodes of the largest trees.
            times: those of a profile of this machine, if there is one.
            pruned: what the decoder's pruning does; None if it does not prune, or not to a fixed size.
        """
        self.edges: Sequence[int] = edges_up_to(most)
        self.probes = 0
        self.cost = StepCost(times)
        self.expectation = Expectation(len(self.edges))
        self._pruned = pruned
        self._options = options_of(self.edges, pruned)
        self._curves = Curves(self.cost, self._options)
        self._lost = 0.0  # seconds that trials have lost against plain decoding, less what time has made good
        self._pays = False  # whether drafting pays, as far as is known
        self._last = 0  # the option chosen last
        self._is_trial = False  # whether it was chosen to learn something
        self._grown = 0  # the edge that the new trees are grown to
        self._widest = len(self.edges) - 1  # the edge that the next ones would be grown to
        self._stands, self._batch = 0, 0  # steps still to come for which it stands whether to draft, of so many rows
        self._try_heads = _Wait(_PROBE_AFTER, _PROBE_AFTER_MOST)
        self._try_plain = _Wait(_PLAIN_AFTER, _PLAIN_AFTER_MOST)
        self._plain_steps = 0  # steps still to come in a look at plain decoding
        self._unread: list[StepRecord] = []  # steps not yet learnt from
        self._has_warned = False
        self._lock = threading.Lock()

    def reach(self, batch: int, context: float) -> int:
        """Most nodes worth growing now, for the step after this one; 1: the heads need not run."""
        with self._lock:
            if self._stands > 0 and batch == self._batch:
                self._stands -= 1
                self._grown = self._widest if self._grown > 0 else 0
            else:
                self._stands, self._batch = 0, batch
                self._grown = self._widest if self._should_draft(batch, context) else 0
            return self.edges[self._grown]

    def choose(self, sums: Sums | None, batch: int, context: float) -> Size:
        """Size of the next step; see `Sizing.choose`."""
        with self._lock:
            drafted = sums is not None and self._grown > 0
            self._last = self._best_place(sums, batch, context) if sums is not None and drafted else 0
            if self._last > 0:
                edge = self._options[self._last].edge
                self._widest = min(max(edge + _WIDER, self._widest - 1), len(self.edges) - 1)
            return self._options[self._last].size

    def observe(self, record: StepRecord) -> float:
        """Learn from a step; seconds that were predicted for it, NaN if none were."""
        with self._lock:
            self._unread.append(record)
            if self._stands > 0 and self._pays and not self._is_trial:
                return math.nan  # nothing is asked before the next step: several are cheaper to learn from together
            unread, self._unread = self._unread, []
            return [self._learn(record) for record in unread][-1]

    def _learn(self, record: StepRecord) -> float:
        nodes, drafts, cut = record.nodes, record.grown > 1, record.kept < record.nodes
        if 0.0 < record.seconds < math.inf:
            self._lost = max(0.0, self._lost - _SHARE * record.seconds)
        if self._stands > 0 and nodes == 1 and not drafts:
            return math.nan
        if (nodes > 1 or drafts) and (self._is_trial or not self._pays):
            self.probes += 1
            self._charge(record)
        work = float(nodes) if self._pruned is None else self._pruned.work(nodes, record.kept)
        predicted = self.cost.observe(
            StepTime(
                batch=record.batch,
                nodes=work,
                context=record.context,
                drafts=drafts,
                seconds=record.seconds,
                pruned=cut and self._pruned is not None,
            )
        )
        if record.expected:
            self.expectation.learn_outcome(record.expected, record.accepted, record.batch, pruned=cut)
        return predicted

    def _charge(self, record: StepRecord) -> None:
        """Book what a trial lost against plain decoding, or gained."""
        plain = self._curve(record.batch, record.context).plain
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
        if self._on_trial:
            self._pays = False
            return self._may_lose(curve.plain)
        tokens, most = self.expectation.typical_tokens(batch), len(self.edges)
        gain = max(self._rates(tokens, batch, curve.seconds, most).values()) * curve.plain / batch
        likely = max(self._rates(tokens, batch, curve.likely, most).values(), default=0.0) * curve.likely_plain / batch
        self._pays = likely >= _SURE and self.expectation.rows_verified >= _PROVED_ROWS
        if self._pays:
            self._try_heads.reset()
        elif not self._may_lose(curve.plain) or (gain < _UNSURE and not self._try_heads.is_over(_STANDS + 1)):
            self._stands = _STANDS
            return False
        if self._is_time_for_plain(gain):
            return False
        self._stands = _STANDS if self._pays else 0
        return True

    def _is_time_for_plain(self, gain: float) -> bool:
        """Whether this step and the next shall draft nothing, to see again what plain decoding takes."""
        steps = _STANDS + 1 if self._pays else 1
        if not self._try_plain.is_over(steps * _FASTER if gain < _NARROW else steps):
            return False
        self._plain_steps = _PLAIN_STEPS - 1
        self.probes += _PLAIN_STEPS
        return True

    def _best_place(self, sums: Sums, batch: int, context: float) -> int:
        """The option with the most expected tokens per second."""
        count = self._grown + 1
        if not are_finite(sums):
            self._warn_once()
            self.expectation.learn_trees([[0.0] * len(self.edges) for _ in sums], batch, count)
            return 0
        if self._stands == 0:
            self.expectation.learn_trees(sums, batch, count)
        curve = self._curve(batch, context)
        rates = self._rates(self.expectation.tokens(sums, batch), batch, curve.seconds, count)
        best = max(rates, key=rates.__getitem__)
        if self._last in rates and rates[best] < _STAY * rates[self._last]:
            best = self._last
        self._is_trial = best not in curve.known
        if best > 0 or self._pays:
            return best
        # A trial: the smallest size that would pay if the heads were as good as they say shows whether they are.
        claims = self._rates(self.expectation.tokens(sums, batch, corrected=False), batch, curve.seconds, count)
        return next((place for place, rate in claims.items() if place > 0 and rate > batch / curve.plain), 0)

    def _warn_once(self) -> None:
        if not self._has_warned:
            self._has_warned = True
            warnings.warn("the heads' probabilities are not finite; steps without them decode plainly", stacklevel=2)

    def _rates(
        self, tokens: Sequence[float], batch: int, seconds: Mapping[int, float], num_edges: int
    ) -> dict[int, float]:
        """Tokens per second, by place, of the options whose seconds are given and that have one of the first edges.

        `tokens` are those of whole trees up to each edge, [E].
        """
        rates, kept = {}, self.expectation.kept_by_pruning
        for place, time in seconds.items():
            option = self._options[place]
            if option.edge < num_edges:
                expected = tokens[option.edge]
                rates[place] = (batch + kept * (expected - batch) if option.is_cut else expected) / time
        return rates

    def _curve(self, batch: int, context: float) -> Curve:
        return self._curves.at(batch, context, may_lose=self._may_lose(self._curves.newest.plain))


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
