"""Rows of training data: the answers that `ladon distill` writes, and what `ladon train` reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ladon.train.data.chats import encode_chat, messages_of
from ladon.train.data.prompts import token_list
from ladon.train.data.records import Record, UnusableRow, read_records

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ANSWERS = ("answer", "response", "completion", "output")
_FORMS = "prompt_ids and answer_ids, messages, conversations, prompt with answer, response or completion, or text"


@dataclass(frozen=True)
class Example:
    """What heads are trained on.

    Attributes:
        id: the row's own, or its place in the data set.
        token_ids: the whole sequence.
        learned: for each token, whether it is one that the model would have to say.
        refused: why the row cannot be used; empty if it can.
    """

    id: str
    token_ids: list[int]
    learned: list[bool]
    refused: str = ""


def read_rows(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    field: str | None = None,
    limit: int | None = None,
    split: str = "train",
) -> list[Example]:
    """Training examples of a data set.

    Rows may hold `prompt_ids` and `answer_ids` (what `ladon distill` writes), `messages` or `conversations` (the
    assistant's turns are learned), `prompt` with `answer`, `response`, `completion` or `output`, or `text` (all of it
    is learned). An answer given as text ends with the tokenizer's end-of-sequence token.

    Args:
        source: what `ladon.train.data.records.read_records` takes.
        tokenizer: the model's own.
        field: a field with text, all of which is learned, instead of these.
        limit: rows to read at most.
        split: of a hub id or a folder.

    Raises:
        InputError: what `read_records` raises; a row of another form; a chat that cannot be encoded or marked.
    """
    examples = []
    for record in read_records(source, limit=limit, split=split):
        name = record.own_id or str(record.index)
        try:
            examples.append(Example(name, *_encode(record, tokenizer, field)))
        except UnusableRow as error:
            examples.append(Example(name, [], [], error.reason))
    return examples


def _encode(record: Record, tokenizer: PreTrainedTokenizerBase, field: str | None) -> tuple[list[int], list[bool]]:
    """A row's tokens, and which of them are learned."""
    row = {name for name, value in record.fields.items() if value is not None}
    if field is not None:
        return _text(record, tokenizer, field)
    if {"prompt_ids", "answer_ids"} <= row:
        return _joined(token_list(record, "prompt_ids"), token_list(record, "answer_ids"))
    for name in ("messages", "conversations"):
        if name in row:
            return encode_chat(tokenizer, messages_of(record, name), record)
    answer = next((name for name in _ANSWERS if name in row), None)
    if "prompt" in row and answer is not None:
        prompt_ids, said = _text(record, tokenizer, "prompt")[0], _text(record, tokenizer, answer, special=False)[0]
        end = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
        return _joined(prompt_ids, [*said, *end])
    if "text" in row:
        return _text(record, tokenizer, "text")
    raise record.wrong(f"it has {', '.join(record.fields) or 'nothing'}; give {_FORMS}, or name a text with --field")


def _text(
    record: Record, tokenizer: PreTrainedTokenizerBase, name: str, *, special: bool = True
) -> tuple[list[int], list[bool]]:
    text = record.fields.get(name)
    if not isinstance(text, str):
        raise record.wrong(f"`{name}` is a {type(text).__name__}; give a text")
    ids = [int(token) for token in tokenizer(text, add_special_tokens=special)["input_ids"]] if text else []
    return ids, [True] * len(ids)


def _joined(prompt_ids: Sequence[int], answer_ids: Sequence[int]) -> tuple[list[int], list[bool]]:
    return [*prompt_ids, *answer_ids], [False] * len(prompt_ids) + [True] * len(answer_ids)
