"""One sequence being decoded: what it may say, what it has said, and what that took."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from ladon.constraints.state import GrammarState
from ladon.engine.stats import RowStats
from ladon.errors import ConstraintError, InputError, LogitsError
from ladon.sampling.sampling_params import GREEDY, NO_TOKEN, SamplingParams
from ladon.target.prefix_cache import KeptPrefix
from ladon.util.devices import is_out_of_memory


@dataclass(kw_only=True, eq=False)
class Row:
    """One sequence being decoded. It joins an engine once.

    Attributes:
        prompt: its token ids, [T] int64, no padding, at least one.
        max_new_tokens: how many tokens it may get, at least 1.
        is_stop: called with each new token, in order; True ends the row with that token.
        seed: of its noise, where tokens are sampled.
        sampling_params: how its tokens are sampled; greedily if not given.
        grammar: its constraint, as far as it has come; None: it may say anything.
        padded: its prompt as the processors of `generate` see it, [T] with the padding of its batch; None: `prompt`.
        number: its place in that batch.
        end_ids: tokens with which `is_stop` is sure to end it: no callback is asked what may follow them.
        failure: what a callback has raised at a node of its tree, which counts if it gets there.
        keeps: what is kept of its new tokens: "logits", "scores" (after its law), both or nothing.
        kept: that, by name, for each new token [V] float32, on the device.
        past: keys and values of leading tokens of its prompt, which need not be read (`longest_past`); None: none.
        states: hidden states of its prompt's chunks, [n, H] each, while it is read for a proposer that asks for them.
        keeps_past: whether `past` shall be its own, as far as it got, from the step after its end on.
        tokens: what has been emitted so far.
        finished: whether it has ended, in whatever way.
        cancelled: whether `cancel` has ended it.
        error: what its stop rule or a callback has raised, that nothing could be said, that there was no memory to
            read its prompt, or the `ConstraintError` of a constraint that lets it go no further, upon which it was
            cancelled.
        stats: its own counts and times.
    """

    prompt: Tensor
    max_new_tokens: int
    is_stop: Callable[[int], bool]
    seed: int = 0
    sampling_params: SamplingParams = GREEDY
    grammar: GrammarState | None = None
    padded: Tensor | None = None
    number: int = 0
    end_ids: frozenset[int] = frozenset()
    failure: Exception | None = None
    keeps: frozenset[str] = frozenset()
    kept: dict[str, list[Tensor]] = field(default_factory=dict)
    past: KeptPrefix | None = None
    states: list[Tensor] = field(default_factory=list, repr=False)
    keeps_past: bool = False
    tokens: list[int] = field(default_factory=list)
    finished: bool = False
    cancelled: bool = False
    error: Exception | None = None
    stats: RowStats = field(default_factory=RowStats)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)

    @cached_property
    def prompt_ids(self) -> list[int]:
        """The prompt on the host; reads the device when first asked for."""
        ids: list[int] = self.prompt.tolist()
        return ids

    @property
    def num_left(self) -> int:
        """Tokens it may still get."""
        return self.max_new_tokens - len(self.tokens)

    @property
    def complete(self) -> bool | None:
        """Whether its text is whole, as its constraint has it; None without a constraint."""
        return None if self.grammar is None else self.grammar.here.is_complete

    def take_states(self) -> Tensor:
        """The hidden states of its whole prompt, [T, H]; the row lets go of them."""
        states, self.states = torch.cat(self.states), []
        return states

    def take(self, tokens: Sequence[int]) -> list[int]:
        """Append tokens one by one, as if they came alone, up to the first stop or the limit; return those taken.

        `NO_TOKEN`, and `DEAD_END` in a row with a constraint, cancels the row, which keeps what it has.
        """
        taken: list[int] = []
        for token in tokens:
            if token == NO_TOKEN and not self.finished:
                self.fail(self.failure or self._nothing_to_say())
            with self._lock:  # not while the stop rule runs: it may cancel, or wait for who does
                if self.finished or not self._follow(token):
                    break
                self.tokens.append(token)
            if self.stats.first_token is None:
                self.stats.first_token = time.perf_counter()
            taken.append(token)
            if self._stops_with(token) or self.num_left == 0:
                with self._lock:
                    self._end()
        with self._lock:
            if not self.finished:
                self._follow(None)
            self._drop_beyond(len(self.tokens))
        return taken

    def cut(self, count: int) -> None:
        """End the row after its first `count` tokens, at least 1, though it may have got more, or ended later.

        For stop rules that learn of a row's end late, because it hangs on other rows.
        """
        with self._lock:
            surplus = len(self.tokens) - count
            if surplus > 0:
                del self.tokens[count:]
                self._drop_beyond(count)
                self.stats.tokens -= surplus
                if self.past is not None:
                    self.past = self.past.first(min(len(self.past), len(self.prompt) + count))
                if self.grammar is not None:
                    self.grammar.take_anew(self.tokens)
                if isinstance(self.error, ConstraintError):  # of a token that it does not have
                    self.error, self.cancelled = None, False
            self._end()

    def _drop_beyond(self, count: int) -> None:
        for values in self.kept.values():
            del values[count:]

    def _follow(self, token: int | None) -> bool:
        """Take a token as the constraint has it (None: see whether any may come). If none may, the row has ended."""
        if self.grammar is None:
            return True
        try:
            is_over = self.grammar.is_over()
            if token is not None and not is_over:
                self.grammar.take(token)
        except ConstraintError as error:
            self.error, self.cancelled, is_over = error, True, True
        if is_over:
            self._end()
        return not is_over

    def _stops_with(self, token: int) -> bool:
        """What the stop rule says; one that raises cancels this row and no other."""
        try:
            return self.is_stop(token)
        except Exception as error:
            self.fail(error)
            return False

    def _nothing_to_say(self) -> LogitsError:
        return LogitsError(
            f"prompt {self.number}, new token {len(self.tokens) + 1}: the model's logits are NaN, or its processors "
            "leave no token that can be drawn. What came before stands; try another dtype (float32 for float16), and "
            "fewer constraints"
        )

    def fail(self, error: Exception) -> None:
        """End the row with an error."""
        self.error = error
        self.cancel()

    def _end(self) -> None:
        if not self.finished:
            self.finished, self.stats.finished = True, time.perf_counter()

    def keep(self, found: Mapping[str, Tensor], count: int) -> None:
        """Keep what was asked for of the tokens that it will `take`, from what there is of the step's, by name [A, V].

        What belongs to tokens that it does not take is dropped then.
        """
        for name in self.keeps:
            # copies: a view would hold the whole step's table, of all rows and of drafts in vain
            self.kept.setdefault(name, []).extend(one.clone() for one in found[name][:count])

    def cancel(self) -> None:
        """End the row, from any thread: when this returns, it gets no further token. No effect once it has ended."""
        with self._lock:
            self.cancelled |= not self.finished
            self._end()

    def check(self) -> None:
        """Raise `InputError` unless the row can join an engine."""
        if self.stats.submitted is not None:
            raise InputError("this row has been given to an engine before; make a new Row for each answer")
        if self.prompt.ndim != 1 or len(self.prompt) == 0:
            raise InputError(f"the row's prompt has shape {list(self.prompt.shape)}; give [T] token ids, one or more")
        if self.max_new_tokens < 1:
            raise InputError(f"the row's max_new_tokens is {self.max_new_tokens}; ask for 1 or more")
        if self.past is not None and self.past.shared(self.prompt_ids[:-1]) < len(self.past):
            raise InputError(
                f"the row's past holds {len(self.past)} tokens that its prompt does not begin with and go on from; use "
                "ladon.target.prefix_cache.longest_past, or Decoder.rows(..., past=...)"
            )


def raise_error_of(rows: Sequence[Row], *, at_end: bool = False) -> None:
    """Raise what has ended one of the rows before its time, if anything has; a dead end is its row's own affair.

    A row for which there was no memory lets the others go on: that is raised `at_end`.
    """
    for row in rows:
        error = row.error
        if error is None or isinstance(error, ConstraintError) or (is_out_of_memory(error) and not at_end):
            continue
        raise error


def warn_of_dead_ends(rows: Sequence[Row]) -> None:
    """Warn of rows that their constraint let go no further."""
    for number, row in enumerate(rows):
        if isinstance(row.error, ConstraintError):
            warnings.warn(f"row {number} ended after {len(row.tokens)} tokens: {row.error}", stacklevel=2)
