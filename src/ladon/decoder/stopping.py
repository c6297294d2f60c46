"""When rows end: transformers' stopping criteria, asked as if each row were alone and its tokens came one by one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

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
    """

    max_length: int | None
    end_ids: frozenset[int]
    called: StoppingCriteriaList

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
        return cls(max_length=min(lengths, default=None), end_ids=frozenset(end_ids), called=called)

    def for_row(self, padded_prompt: Tensor) -> Callable[[int], bool]:
        """A row's own `is_stop`; `padded_prompt` [T] is what criteria see before its new tokens."""
        return _CalledRule(padded_prompt, self) if self.called else self.end_ids.__contains__


class _CalledRule:
    """Hands each new token to the criteria, with the row so far, [1, T + new], on the prompt's device.

    The answers are read from the device, once for each token: what users' criteria say is for the host to act on.
    """

    def __init__(self, padded_prompt: Tensor, rules: StopRules) -> None:
        self._rules = rules
        self._tokens, self._length = padded_prompt[None].clone(), len(padded_prompt)

    def __call__(self, token: int) -> bool:
        """Whether the row ends with this token. Every criterion is asked, as in `generate`: some keep count."""
        if self._length == self._tokens.shape[1]:
            self._tokens = torch.cat([self._tokens, torch.zeros_like(self._tokens)], dim=1)  # room, twice as much
        self._tokens[:, self._length].fill_(token)
        self._length += 1
        done = self._rules.called(self._tokens[:, : self._length], None)
        return bool(done.any()) or token in self._rules.end_ids


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
