"""What a decoder has learnt about sizes: its runs share it, in several threads if need be.

Besides what steps cost and heads achieve, that is an account for heads and one for n-grams: what trials of either may
lose against plain decoding is bounded, a few plain steps at a time and a small share of the time gone by, whoever runs
them. Neither pays for what the other one loses.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

from ladon.curve import options_of
from ladon.expectation import Expectation
from ladon.sizing import PrunedSteps, edges_up_to
from ladon.step_cost import StepCost, StepTime

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
        self.cost = StepCost(times)
        self.expectation = Expectation(len(self.edges))
        self.widest = len(self.edges) - 1
        self.try_heads = Wait(_PROBE_AFTER, _PROBE_AFTER_MOST)
        self.try_plain = Wait(_PLAIN_AFTER, _PLAIN_AFTER_MOST)
        self.has_warned = False
        self._heads, self._ngrams = Account(_SHARE), Account(_SHARE)

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


class Account:
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


class Wait:
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
