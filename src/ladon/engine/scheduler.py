"""Who is in flight: rows wait, join, change places and leave, and the cache follows.

Rows stand in the cache in one order: first those that decode, then those whose prompts are being read. A row that
leaves is overwritten by the last of its kind; nothing else moves.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence

from ladon.engine.sequence import Row
from ladon.errors import InputError
from ladon.target.kv_cache import TreeCache
from ladon.target.target import Target


class Scheduler:
    """The rows of one engine. Any thread may submit.

    Attributes:
        rows: those in flight, in the order of the cache.
        drafted: places of the rows that decode, in the order of their trees; between `settle` and the end of the step
            the first ones, 0, 1, ...
    """

    def __init__(self, target: Target, max_rows: int | None, *, reuses_prefixes: bool = True) -> None:
        """`reuses_prefixes`: whether a row may start from its past; else its prompt is read whole."""
        if max_rows is not None and max_rows < 1:
            raise InputError(f"max_rows is {max_rows}; give how many rows may be in flight, 1 or more, or None")
        self._target, self._max_rows, self._reuses_prefixes = target, max_rows, reuses_prefixes
        self._waiting: deque[Row] = deque()
        self._cache: TreeCache | None = None
        self.rows: list[Row] = []
        self.drafted: list[int] = []

    @property
    def cache(self) -> TreeCache:
        """The keys and values of the rows in flight; there is none while there is no row."""
        assert self._cache is not None
        return self._cache

    @property
    def nbytes(self) -> int:
        """Bytes that the cache holds."""
        return 0 if self._cache is None else self._cache.nbytes

    @property
    def decoding(self) -> list[Row]:
        """The rows that have a tree, in its order."""
        return [self.rows[place] for place in self.drafted]

    @property
    def joining(self) -> list[Row]:
        """After `settle`, the rows whose prompts are being read."""
        return self.rows[len(self.drafted) :]

    def submit(self, row: Row) -> None:
        """Let a row wait for its turn; `InputError` if it cannot be decoded. Reads the device for a row with a past."""
        row.check()
        if row.past is not None:
            row.past.check(self._target.model)
        if row.keeps_past:
            _ = row.prompt_ids  # needed at its end, when reading the device would keep the others waiting
        row.stats.submitted = time.perf_counter()
        self._waiting.append(row)

    def settle(self) -> list[int] | None:
        """Let rows that have ended leave, put those with a tree first, and fill the gaps with few moves.

        Returns:
            The trees that stay, by their old places, in their new order; None if all stay as they are.
        """
        for place, row in enumerate(self.rows):
            if row.finished:
                row.states.clear()  # it may have been cancelled while its prompt was read
            if row.finished and row.keeps_past:
                row.past = self._target.keep(row.prompt_ids, row.tokens, self.cache, place)
        tree_of = {place: index for index, place in enumerate(self.drafted)}
        kept = [place for place, row in enumerate(self.rows) if not row.finished]
        decoding = [place for place in kept if place in tree_of]
        order = _compacted(decoding, [place for place in kept if place not in tree_of])
        trees = [tree_of[place] for place in order[: len(decoding)]]
        if order != list(range(len(self.rows))):
            self.cache.keep(order)
            self.rows = [self.rows[place] for place in order]
        self.drafted = list(range(len(decoding)))
        if not self.rows:
            self._cache = None
        return None if trees == list(range(len(tree_of))) else trees

    def admit(self) -> list[Row]:
        """Let waiting rows join behind the others, as far as there is room, each from its past if it has one."""
        room = len(self._waiting) if self._max_rows is None else self._max_rows - len(self.rows)
        new: list[Row] = []
        while self._waiting and len(new) < room:
            row = self._waiting.popleft()
            if not row.finished:
                new.append(row)
        if not new:
            return []
        first = len(self.rows)
        self.rows += new
        if self._cache is None:
            self._cache = self._target.new_cache(0)  # tests the model, which is no part of the prefill
        self._cache.append(len(new))
        for place, row in enumerate(new, start=first):
            row.stats.joined = time.perf_counter()
            if self._reuses_prefixes:
                row.stats.reused_tokens = self._target.resume(row.past, len(row.prompt), self._cache, place)
        return new

    def drop(self) -> None:
        """Cancel the rows in flight, whatever state they are in."""
        for row in self.rows:
            row.cancel()
            row.states.clear()
        self.rows, self.drafted, self._cache = [], [], None


def _compacted(decoding: Sequence[int], joining: Sequence[int]) -> list[int]:
    """Rows by their old places, those that decode first; who stands in the right stretch already stays there."""
    order: list[int] = []
    for group in (decoding, joining):
        stretch = range(len(order), len(order) + len(group))
        movers = iter([place for place in group if place not in stretch])
        staying = set(group)
        order += [place if place in staying else next(movers) for place in stretch]
    return order
