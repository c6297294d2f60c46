"""What the model is asked: prompts and chats of a data set, as token ids."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ladon.train.data.chats import CHAT_FIELDS, Message, chat_text, messages_of, question_of
from ladon.train.data.records import Record, UnusableRow, read_records

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TEXT_FIELDS = ("prompt", "text")
_FIELDS = ("prompt_ids", "prompt", *CHAT_FIELDS, "text")


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """One prompt.

    Attributes:
        id: the data set's own id, or the row's index and a hash of the prompt; no two prompts of a set share one.
        index: the row's place in the data set, from 0.
        token_ids: what the model reads; empty if the row asks nothing, such as a chat without a user message.
        text: the same as text, written by the chat template if it is a chat; None for one given as token ids.
        messages: a prompt given as a chat, up to its last user message; None otherwise.
        refused: why the row cannot be used; empty if it can.
    """

    id: str
    index: int
    token_ids: list[int]
    text: str | None = None
    messages: list[Message] | None = None
    refused: str = ""


def read_prompts(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    field: str | None = None,
    system: str | None = None,
    limit: int | None = None,
    split: str = "train",
) -> list[Prompt]:
    """The prompts of a data set.

    Args:
        source: what `ladon.train.data.records.read_records` takes.
        tokenizer: the model's own.
        field: the field to take instead of the first of `prompt_ids`, `prompt`, `messages`, `conversations`, `turns`,
            `question`, `instruction`, `text`. A text in it is continued, a list of messages goes through the template.
        system: the system message of every chat.
        limit: rows to read at most.
        split: of a hub id or a folder.

    Raises:
        InputError: what `read_records` raises; a row without a prompt; a chat where the tokenizer has no template;
            `system` for a prompt that is no chat.
    """
    taken: set[str] = set()
    prompts = []
    for record in read_records(source, limit=limit, split=split):
        name = prompt_field(record, field)
        try:
            content = _content(record, name, tokenizer, system, is_text=name in (field, *_TEXT_FIELDS))
        except UnusableRow as error:
            content = {"token_ids": [], "refused": error.reason}
        prompts.append(Prompt(id=_unused(_id_of(record, content["token_ids"]), taken), index=record.index, **content))
    return prompts


def prompt_field(record: Record, field: str | None) -> str:
    """The field that holds the prompt; `InputError` if there is none."""
    names = _FIELDS if field is None else (field,)
    found = next((name for name in names if record.fields.get(name) is not None), None)
    if found is None:
        has = ", ".join(record.fields) or "nothing"
        raise record.wrong(f"no {' or '.join(names)}, it has {has}; name the field of the prompts with --field")
    return found


def _content(
    record: Record, name: str, tokenizer: PreTrainedTokenizerBase, system: str | None, *, is_text: bool
) -> dict[str, Any]:
    """The rest of a `Prompt`: token ids, and the text or messages that they come from."""
    value = record.fields[name]
    is_ids = name == "prompt_ids" or (isinstance(value, list) and value and isinstance(value[0], int))
    if system is not None and (is_ids or (is_text and isinstance(value, str))):
        raise record.wrong("--system is for chats, but this prompt is continued as it stands; leave --system out")
    if is_ids:
        return {"token_ids": token_list(record, name)}
    if is_text and isinstance(value, str):
        return {"token_ids": [int(token) for token in tokenizer(value)["input_ids"]] if value else [], "text": value}
    messages = question_of(messages_of(record, name), system)
    if not messages:
        return {"token_ids": [], "text": "", "messages": []}
    text = chat_text(tokenizer, messages, record, add_generation_prompt=True)
    ids = [int(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
    return {"token_ids": ids, "text": text, "messages": messages}


def token_list(record: Record, name: str) -> list[int]:
    """Token ids in a field; `InputError` if it holds anything else."""
    value = record.fields[name]
    if not isinstance(value, list) or not all(type(token) is int and token >= 0 for token in value):
        raise record.wrong(f"`{name}` must be a list of token ids, whole numbers from 0")
    return list(value)


def _id_of(record: Record, token_ids: Sequence[int]) -> str:
    """The row's own id, or its index with a hash of the prompt."""
    digest = hashlib.sha256(",".join(map(str, token_ids)).encode()).hexdigest()[:12]
    return record.own_id or f"{record.index}-{digest}"


def _unused(name: str, taken: set[str]) -> str:
    """`name`, or `name#2` and so on where rows share an id."""
    unique, count = name, 1
    while unique in taken:
        count += 1
        unique = f"{name}#{count}"
    taken.add(unique)
    return unique
