"""When rows end: transformers' stopping criteria, asked as `generate` asks them, token by token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ladon.engine.sequence import Row
from ladon.errors import InputError

if TYPE_CHECKING:
    from transformers import StoppingCriteriaList


@dataclass(frozen=True, kw_only=True, slots=True)
class StopRules:
    """Stopping criteria, sorted by how they are applied. A subclass of a criterion may mean anything: it is called.

    Attributes:
        max_length: the least `MaxLengthCriteria`, in tokens of the whole padded sequence; None if there is none.
        end_ids: the tokens of all `EosTokenCriteria`.
        called: the other criteria.
        pads: whether a row that has ended gets padding: without a criterion that has `eos_token_id`, `generate` lets
            all rows go on until each has had its end.
        is_known: whether those that are called are all of transformers, and look at each row by itself.
    """

    max_length: int | None
    end_ids: frozenset[int]
    called: StoppingCriteriaList
    pads: bool
    is_known: bool

    @classmethod
    def of(cls, criteria: StoppingCriteriaList | None) -> StopRules:
        """The rules in `generate`'s prepared criteria, where the user's own have replaced the defaults of their class.

        Reads the end-of-sequence tokens from the device.
        """
        from transformers.generation import stopping_criteria as kinds

        lengths: list[int] = []
        end_ids: set[int] = set()
        called = kinds.StoppingCriteriaList()
        for criterion in criteria or []:
            if type(criterion) is kinds.MaxLengthCriteria:
                lengths.append(criterion.max_length)
            elif type(criterion) is kinds.EosTokenCriteria:
                end_ids.update(criterion.eos_token_id.reshape(-1).tolist())
            else:
                called.append(criterion)
        return cls(
            max_length=min(lengths, default=None),
            end_ids=frozenset(end_ids),
            called=called,
            pads=any(hasattr(criterion, "eos_token_id") for criterion in criteria or []),
            is_known=all(type(own) in (kinds.StopStringCriteria, kinds.MaxTimeCriteria) for own in called),
        )

    def judges(self, prompts: Tensor, pad_id: int, *, together: bool) -> list[Judge]:
        """Who asks the criteria: one judge for all rows, or one for each; none if there is nothing to ask.

        Args:
            prompts: what criteria see before a row's new tokens, [B, T].
            pad_id: what they see after a row's end.
            together: whether the rows are one call of `generate`. Where each of them ends by itself, it is judged so.
        """
        if not self.called:
            return []
        if together and not (self.is_known and self.pads):
            return [Judge(prompts, self, pad_id)]
        return [Judge(prompt[None], self, pad_id) for prompt in prompts]


class Judge:
    """Asks criteria about rows as `generate` does: about all of them, [B, T + new], a token of each at a time.

    Rows get their tokens at different speeds, so that one may be ahead when its end is found: it is cut back. A row
    that has ended shows padding, and scores of 0.

    The answers are read from the device, once for each token: what users' criteria say is for the host to act on.

    Attributes:
        rows: the rows; whoever makes them adds them, in order, before they decode.
    """

    def __init__(self, prompts: Tensor, rules: StopRules, pad_id: int = 0) -> None:
        """Judge rows with these prompts, [B, T], padding included; on their device."""
        self.rows: list[Row] = []
        self._rules, self._pad_id = rules, pad_id
        self._ids, self._length = prompts.clone(), prompts.shape[1]
        self._unfinished = torch.ones(len(prompts), dtype=torch.int64, device=prompts.device)
        self._scores: tuple[Tensor, ...] = ()
        self._ends: list[int | None] = [None] * len(prompts)  # new tokens of the rows that have ended
        self._step = 0  # new tokens of each row that the criteria have seen

    def rule(self) -> Callable[[int], bool]:
        """`is_stop` of the row that is added next."""
        return partial(self._ends_with, len(self.rows))

    def _ends_with(self, number: int, token: int) -> bool:
        """Whether a row ends with this token, its newest."""
        row = self.rows[number]
        if token in self._rules.end_ids or row.num_left == 0:
            self._ends[number] = len(row.tokens)
        self.settle()
        return self._ends[number] is not None

    def settle(self) -> None:
        """Ask about all that rows have said, as far as the slowest of them has come."""
        for number, row in enumerate(self.rows):
            if row.finished and self._ends[number] is None:  # in whatever way: it may have been cancelled
                self._ends[number] = len(row.tokens)
        while self._step < self._reach():
            self._ask()

    def _reach(self) -> int:
        ends = [end for end in self._ends if end is not None]
        going = [len(row.tokens) for row, end in zip(self.rows, self._ends, strict=True) if end is None]
        return min(going) if going else max(ends)

    def _ask(self) -> None:
        """Show the criteria one more token of each row. Every one is asked, as in `generate`: some keep count."""
        step, num_rows = self._step, len(self.rows)
        self._step += 1
        if self._length == self._ids.shape[1]:
            self._ids = torch.cat([self._ids, torch.zeros_like(self._ids)], dim=1)  # room, twice as much
        has = [end is None or step < end for end in self._ends]
        said = [row.tokens[step] if own else self._pad_id for row, own in zip(self.rows, has, strict=True)]
        self._ids[:, self._length] = torch.tensor(said, dtype=self._ids.dtype, device=self._ids.device)
        self._length += 1
        scores = None
        if any("scores" in row.keeps for row in self.rows):
            found = [row.kept["scores"][step] if own else None for row, own in zip(self.rows, has, strict=True)]
            nothing = torch.zeros_like(next(values for values in found if values is not None))
            self._scores += (torch.stack([nothing if values is None else values for values in found]),)
            scores = self._scores
        done = self._rules.called(self._ids[:, : self._length], scores)
        self._unfinished = self._unfinished & ~done
        if self._unfinished.shape != (num_rows,):
            raise InputError(
                f"the stopping criteria gave answers of shape {list(done.shape)} about {num_rows} "
                f"row{'s' * (num_rows > 1)}; return one for each row"
            )
        goes_on: list[int] = self._unfinished.tolist()
        for number, (row, end) in enumerate(zip(self.rows, self._ends, strict=True)):
            is_over = not goes_on[number] if self._rules.pads else not any(goes_on)
            if is_over and (end is None or end > step + 1):
                self._ends[number] = step + 1
                row.cut(step + 1)


def stop_string_rule(stop_strings: str | list[str], tokenizer: Any) -> Callable[..., Any]:
    """The criterion of transformers for stop strings; raises `InputError` without a tokenizer that it can use."""
    from transformers.generation.stopping_criteria import StopStringCriteria

    if tokenizer is None:
        raise InputError("stop_strings needs the tokenizer; pass tokenizer=... as well")
    try:
        criterion: Callable[..., Any] = StopStringCriteria(tokenizer, stop_strings)
    except ValueError as error:
        raise InputError(f"stop_strings cannot be used with this tokenizer: {error}") from error
    return criterion
