"""The size of the trees, learnt while decoding.

It is the bucket edge n with the most expected tokens per second, for all sequences together:

    N = argmax over edges of  sum_b E_b(n) / T(B, n, context)

E comes from the path probabilities of the trees at hand (`acceptance_model`), T from the steps that were run
(`latency_model`). All edges are looked at, because T is a staircase. A decoder that prunes has every edge twice, whole
and pruned. Drafting costs too, and before its outcome is known: whether the next trees are drafted at all is decided by
what trees have been like of late.

Nothing is measured that is not used: a size is tried by decoding with it, which is exact at any size. What trials may
lose against plain decoding is bounded: a few plain steps at a time, and a small share of the time gone by. Heads and
n-grams have an exploration budget each, so that neither pays for what the other one loses. All runs of a decoder share
what was learnt, in several threads if need be.

The idea is ProPD's (arXiv 2402.13485); it stops at the first edge that is worse than the one before.

Shapes: B sequences, K depths, E bucket edges. Sizes are named by their place among the options; place 0 is plain
decoding.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Mapping, Sequence
from copy import copy

from ladon.tree_size.acceptance_model import AcceptanceModel, Sums
from ladon.tree_size.latency_model import Curve, Curves, LatencyModel, StepTime, options_of
from ladon.tree_size.policy import PrunedSteps, Size, StepRecord, are_usable, edges_up_to

_TRIAL_ROWS = 4  # verified rows without which heads are not judged
_ALLOWANCE, _ALLOWANCE_LATER = 4.0, 2.5  # plain steps that trials may lose at a time, until heads are judged and then
_SHARE = 0.01  # share of the time gone by that makes such losses good
_LONGEST = 16.0  # plain steps that a single step may have lost; a machine that slept is no loss
_PROBE_AFTER, _PROBE_AFTER_MOST = 16, 256  # plain steps between two trials of the heads
_PLAIN_AFTER, _PLAIN_AFTER_MOST = 64, 2048  # drafting steps between two looks at plain decoding


class Learnt:
    """The knowledge and the accounts. Whoever touches it holds the lock.

    Attributes:
        lock: of all the rest.
        edges: the numbers of nodes to choose from.
        pruned: what pruning does; None if trees are not pruned, or not to a fixed size.
        options: the sizes to choose from.
        cost: what steps take.
        expectation: what heads achieve.
        widest: the edge that the newest trees of any run were to be grown to.
        try_heads: until the next trial of heads that do not pay.
        try_plain: until the next look at plain decoding while they do.
        has_warned: whether it was said that the heads' probabilities are no numbers.
    """

    def __init__(self, most: int, times: Sequence[StepTime], pruned: PrunedSteps | None) -> None:
        """Trees have `most` nodes at most; `times` are those of a profile of this machine."""
        self.lock = threading.Lock()
        self.edges: Sequence[int] = edges_up_to(most)
        self.pruned = pruned
        self.options = options_of(self.edges, pruned)
        self.cost = LatencyModel(times)
        self.expectation = AcceptanceModel(len(self.edges))
        self.widest = len(self.edges) - 1
        self.try_heads = BackOff(_PROBE_AFTER, _PROBE_AFTER_MOST)
        self.try_plain = BackOff(_PLAIN_AFTER, _PLAIN_AFTER_MOST)
        self.has_warned = False
        self._heads, self._ngrams = ExplorationBudget(_SHARE), ExplorationBudget(_SHARE)

    @property
    def is_new(self) -> bool:
        """Whether too little is known about the heads to judge them."""
        return self.expectation.rows_verified < _TRIAL_ROWS

    def make_good(self, seconds: float) -> None:
        """A step took so long, which makes some of the losses good."""
        self._heads.make_good(seconds)
        self._ngrams.make_good(seconds)

    def book(self, seconds: float, tokens: float, plain: float, *, by_heads: bool) -> None:
        """Book what a trial, perhaps of heads, lost against plain decoding, or gained.

        Args:
            seconds: of the step.
            tokens: per row.
            plain: seconds of a plain step.
            by_heads: whether heads had a part in it.
        """
        loss = (self._heads if by_heads else self._ngrams).book(seconds, tokens, plain)
        if by_heads and loss < 0.0 and tokens > 1:  # a step may be short by chance as well
            self.try_heads.end()  # it paid: the next trial need not wait

    def may_lose(self, plain: float, *, by_heads: bool = True) -> bool:
        """Whether a trial that loses one more plain step stays within what trials may lose."""
        if not by_heads:
            return self._ngrams.may_lose(plain, _ALLOWANCE)
        return self._heads.may_lose(plain, _ALLOWANCE if self.is_new else _ALLOWANCE_LATER)


class ExplorationBudget:
    """Seconds that trials have lost against plain decoding, less what time has made good."""

    def __init__(self, share: float) -> None:
        """`share` of the time gone by makes losses good."""
        self._share, self._lost = share, 0.0

    def make_good(self, seconds: float) -> None:
        """A step took so long."""
        if 0.0 < seconds < math.inf:
            self._lost = max(0.0, self._lost - self._share * seconds)

    def book(self, seconds: float, tokens: float, plain: float) -> float:
        """Book a trial of so many seconds and tokens per row, where a plain step takes `plain`; what it lost."""
        if not (0.0 < plain < math.inf and 0.0 < seconds < math.inf):
            return 0.0
        loss = min(seconds, _LONGEST * plain) - tokens * plain
        self._lost = max(0.0, self._lost + loss)
        return loss

    def may_lose(self, plain: float, allowance: float) -> bool:
        """Whether one more plain step stays within so many of them."""
        return self._lost + plain <= allowance * plain


class BackOff:
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


_PROVED_ROWS = 16  # verified rows without which drafting is not known to pay, whatever it promises
_STAY = 1.01  # another size is taken when it promises this much more than the last one
# Further steps for which it stands that drafting pays, or does not. What pays is learnt from after the last of them.
_STANDS = 3
_WIDER = 2  # trees are grown this many edges further than was chosen of late
# What drafting promises, as a multiple of plain decoding's speed. Where the first is likely, it is done. Where the
# second is possible, it is done while its losses are within bounds, as who does not draft learns nothing. Below, it is
# tried now and then.
_SURE, _UNSURE = 1.05, 0.95
_NARROW, _FASTER = 1.2, 4  # where drafting promises less than the first, its steps count as so many for that
_PLAIN_STEPS = 2  # in a look at plain decoding: the first still verifies a tree


class AutoSizing:
    """Chosen from what steps cost and heads achieve.

    One of these belongs to a decoder, and each of its runs gets one of its own (`for_run`): what a run has learnt, the
    others know; which trees it has just grown is its own affair.

    Attributes:
        edges: the numbers of nodes it chooses from.
        probes: steps so far that were taken to learn something.
    """

    def __init__(
        self,
        most: int,
        times: Sequence[StepTime] = (),
        pruned: PrunedSteps | None = None,
        *,
        has_heads: bool = True,
    ) -> None:
        """Start from what is known.

        Args:
            most: nodes of the largest trees.
            times: those of a profile of this machine, if there is one.
            pruned: what the decoder's pruning does; None if it does not prune, or not to a fixed size.
            has_heads: whether there are any; else n-grams alone draft, which costs next to nothing.
        """
        self._has_heads = has_heads
        self._begin(Learnt(most, times, pruned))

    def _begin(self, learnt: Learnt) -> None:
        self._learnt = learnt
        self.edges: Sequence[int] = learnt.edges
        self.probes = 0
        self._curves = Curves(learnt.cost, learnt.options)
        self._curves_without = Curves(learnt.cost, learnt.options, drafts=False)
        self._pays = False  # whether drafting pays, as far as is known
        self._last = 0  # the option chosen last
        self._is_trial = False  # whether it was chosen to learn something
        self._grown = 0  # the edge that the new trees are grown to
        self._widest = learnt.widest  # the edge that the next ones would be grown to
        self._stands, self._batch = 0, 0  # steps still to come for which it stands whether to draft, of so many rows
        self._plain_steps = 0  # steps still to come in a look at plain decoding
        self._unread: list[StepRecord] = []  # steps not yet learnt from

    def for_run(self) -> AutoSizing:
        """One for another run, which knows what this one knows, now and later."""
        run = copy(self)
        with self._learnt.lock:
            run._begin(self._learnt)
        return run

    @property
    def cost(self) -> LatencyModel:
        """What it knows about the machine."""
        return self._learnt.cost

    @property
    def expectation(self) -> AcceptanceModel:
        """What it knows about the heads."""
        return self._learnt.expectation

    def reach(self, batch: int, context: float) -> int:
        """Most nodes worth growing now, for the step after this one; 1: the heads need not run."""
        if not self._has_heads:
            return 1
        with self._learnt.lock:
            if self._stands > 0 and batch == self._batch:
                self._stands -= 1
                self._grown = self._widest if self._grown > 0 else 0
            else:
                self._stands, self._batch = 0, batch
                self._grown = self._widest if self._should_draft(batch, context) else 0
            return self.edges[self._grown]

    def choose(self, sums: Sums | None, batch: int, context: float, of_heads: Sums | None = None) -> Size:
        """Size of the next step; see `Sizing.choose`."""
        with self._learnt.lock:
            if sums is None:
                self._last, self._is_trial = 0, False
                if self._grown > 0 and self._stands == 0:  # the drafter ran, and had nothing to say
                    self._learnt.expectation.learn_trees([], batch, self._grown + 1)
            elif self._grown == 0:
                self._last = self._best_place_of_ngrams(sums, batch, context)
            else:
                self._last = self._best_place(sums, sums if of_heads is None else of_heads, batch, context)
            if self._last > 0 and self._grown > 0:
                edge = self._learnt.options[self._last].edge
                self._widest = self._learnt.widest = min(max(edge + _WIDER, self._widest - 1), len(self.edges) - 1)
            return self._learnt.options[self._last].size

    def observe(self, record: StepRecord) -> float:
        """Learn from a step; seconds that were predicted for it, NaN if none were."""
        with self._learnt.lock:
            self._unread.append(record)
            can_wait = self._stands > 0 and self._pays if self._has_heads else len(self._unread) <= _STANDS
            if can_wait and not self._is_trial:
                return math.nan  # several steps are cheaper to learn from together
            *unread, newest = self._unread
            self._unread = []
            for known in unread:
                self._learn(known, is_trial=not self._has_heads)
            return self._learn(newest, is_trial=self._is_trial or not self._pays)

    def _learn(self, record: StepRecord, *, is_trial: bool) -> float:
        nodes, drafts = record.nodes, record.grown > 1
        is_cut = record.kept < nodes and self._learnt.pruned is not None  # else what pruning does is not told apart
        self._learnt.make_good(record.seconds)
        if self._stands > 0 and nodes == 1 and not drafts:
            return math.nan
        if (nodes > 1 or drafts) and is_trial:
            by_heads = record.by_heads or drafts
            self.probes += by_heads or self._is_trial
            plain = self._curve(record.batch, record.context, drafts=by_heads).plain
            self._learnt.book(record.seconds, record.tokens / record.batch, plain, by_heads=by_heads)
        work = float(nodes) if self._learnt.pruned is None else self._learnt.pruned.work(nodes, record.kept)
        predicted = self.cost.observe(
            StepTime(
                batch=record.batch,
                nodes=work,
                context=record.context,
                drafts=drafts,
                seconds=record.seconds,
                pruned=is_cut,
            )
        )
        if record.expected and record.by_heads:
            self.expectation.learn_outcome(record.expected, record.accepted, record.batch, pruned=is_cut)
        return predicted

    def _should_draft(self, batch: int, context: float) -> bool:
        """Whether trees for the next step are worth their drafting, or worth a trial."""
        curve = self._curve(batch, context)
        if not curve.has_plain:
            return False  # nothing to compare with
        if self._plain_steps > 0:
            self._plain_steps -= 1
            return False
        if self._learnt.is_new:
            self._pays = False
            return self._learnt.may_lose(curve.plain)
        tokens, most = self.expectation.typical_tokens(batch), len(self.edges)
        gain = max(self._rates(tokens, batch, curve.seconds, most).values()) * curve.plain / batch
        likely = max(self._rates(tokens, batch, curve.likely, most).values(), default=0.0) * curve.likely_plain / batch
        self._pays = likely >= _SURE and self.expectation.rows_verified >= _PROVED_ROWS
        if self._pays:
            self._learnt.try_heads.reset()
        elif not self._may_try(gain, curve.plain):
            self._stands = _STANDS
            return False
        if self._is_time_for_plain(gain):
            return False
        self._stands = _STANDS if self._pays else 0
        return True

    def _may_try(self, gain: float, plain: float) -> bool:
        """Whether heads that are not known to pay are tried now."""
        return self._learnt.may_lose(plain) and (gain >= _UNSURE or self._learnt.try_heads.is_over(_STANDS + 1))

    def _is_time_for_plain(self, gain: float) -> bool:
        """Whether this step and the next shall draft nothing, to see again what plain decoding takes."""
        steps = _STANDS + 1 if self._pays else 1
        if not self._learnt.try_plain.is_over(steps * _FASTER if gain < _NARROW else steps):
            return False
        self._plain_steps = _PLAIN_STEPS - 1
        self.probes += _PLAIN_STEPS
        return True

    def _best_place_of_ngrams(self, sums: Sums, batch: int, context: float) -> int:
        """The option with the most expected tokens per second, for trees that heads have no part in.

        Their probabilities are learnt from each token where they are made; what such steps may lose is bounded here.
        """
        curve = self._curve(batch, context, drafts=False)
        if self._plain_steps > 0 or not curve.has_plain or not self._learnt.may_lose(curve.plain, by_heads=False):
            return 0
        tokens = self.expectation.tokens(sums, batch, corrected=False)
        rates = self._rates(tokens, batch, curve.seconds, len(self.edges))
        best = max(rates, key=rates.__getitem__)
        self._is_trial = best not in curve.known
        return best

    def _best_place(self, sums: Sums, of_heads: Sums, batch: int, context: float) -> int:
        """The option with the most expected tokens per second, for trees that heads have drafted."""
        grown = self._grown + 1
        count = grown if sums is of_heads else len(self.edges)
        if not are_usable(sums):
            self._warn_once()
            self.expectation.learn_trees([[0.0] * len(self.edges) for _ in sums], batch, grown)
            return 0
        if self._stands == 0 and are_usable(of_heads):
            self.expectation.learn_trees(of_heads, batch, grown)
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
        if not self._learnt.has_warned:
            self._learnt.has_warned = True
            warnings.warn("the heads' probabilities are not finite; steps without them decode plainly", stacklevel=2)

    def _rates(
        self, tokens: Sequence[float], batch: int, seconds: Mapping[int, float], num_edges: int
    ) -> dict[int, float]:
        """Tokens per second, by place, of the options whose seconds are given and that have one of the first edges.

        `tokens` are those of whole trees up to each edge, [E].
        """
        rates, kept = {}, self.expectation.kept_by_pruning
        for place, time in seconds.items():
            option = self._learnt.options[place]
            if option.edge < num_edges:
                expected = tokens[option.edge]
                rates[place] = (batch + kept * (expected - batch) if option.is_cut else expected) / time
        return rates

    def _curve(self, batch: int, context: float, *, drafts: bool = True) -> Curve:
        curves = self._curves if drafts else self._curves_without
        return curves.at(batch, context, may_lose=self._learnt.may_lose(curves.newest.plain, by_heads=drafts))
