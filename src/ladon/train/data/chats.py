"""Chats: their forms in data sets, and what a tokenizer's template makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ladon.errors import InputError
from ladon.train.data.records import Record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, str]

CHAT_FIELDS = ("messages", "conversations", "turns", "question", "instruction")
_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
}


def messages_of(record: Record, name: str) -> list[Message]:
    """The messages in a field: a list of role/content or from/value, a list of turns, or one question.

    Of turns, as in MT-Bench, only the first is taken: what comes after it is asked about an answer.

    Raises:
        InputError: the field is none of these.
        UnusableRow: a message lacks its text, or has an unknown role.
    """
    value = record.fields[name]
    if isinstance(value, str):
        extra = record.fields.get("input") if name == "instruction" else None
        return [{"role": "user", "content": f"{value}\n\n{extra}" if isinstance(extra, str) and extra else value}]
    if not isinstance(value, list):
        raise record.wrong(f"`{name}` is a {type(value).__name__}; give a list of messages or a text")
    if value and all(isinstance(turn, str) for turn in value):
        return [{"role": "user", "content": value[0]}]
    return [_message(record, name, entry) for entry in value]


def _message(record: Record, name: str, entry: Any) -> Message:
    role, content = None, None
    if isinstance(entry, dict):
        role, content = entry.get("role", entry.get("from")), entry.get("content", entry.get("value"))
    if not isinstance(content, str) or not isinstance(role, str):
        raise record.unusable(
            "a message without role and content", f"those of `{name}` need them (or from and value), both texts"
        )
    if role not in _ROLES:
        raise record.unusable(f"a message of the role {role!r}", f"known in `{name}` are {', '.join(_ROLES)}")
    return {"role": _ROLES[role], "content": content}


def question_of(messages: Sequence[Message], system: str | None = None) -> list[Message]:
    """The chat up to its last user message; [] if there is none. `system` replaces the chat's own system message."""
    last = max((place for place, message in enumerate(messages) if message["role"] == "user"), default=-1)
    asked = list(messages[: last + 1])
    if system is None or not asked:
        return asked
    return [{"role": "system", "content": system}, *(m for m in asked if m["role"] != "system")]


def chat_text(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], record: Record, *, add_generation_prompt: bool
) -> str:
    """A chat as the tokenizer's template writes it.

    Raises:
        InputError: the tokenizer has no template.
        UnusableRow: the template refuses the chat.
    """
    if not tokenizer.chat_template:
        raise record.wrong(
            "a chat, but the tokenizer has no chat template; give rows with `prompt` or `text`, name a text field "
            "with --field, or use a chat model"
        )
    try:
        text = tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=add_generation_prompt, tokenize=False
        )
    except Exception as error:  # of another type for every way in which a template can refuse
        detail = " ".join(str(error).split())[:300]
        raise record.unusable("the chat template refuses the chat", detail) from error
    return str(text)


def encode_chat(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], record: Record
) -> tuple[list[int], list[bool]]:
    """A whole chat as tokens, and which of them the model would have to say: those of the assistant's turns.

    A turn runs from the end of the generation prompt before it to its end-of-sequence token, or to where the template
    goes on. A token that lies only partly in it is not learned.

    Raises:
        InputError: the template rewrites earlier turns, so that the assistant's own words cannot be found; or the
            tokenizer does not say where in the text its tokens lie.
    """
    whole = chat_text(tokenizer, messages, record, add_generation_prompt=False)
    spans = []
    for place, message in enumerate(messages):
        if message["role"] == "assistant":
            before = chat_text(tokenizer, messages[:place], record, add_generation_prompt=True)
            after = chat_text(tokenizer, messages[: place + 1], record, add_generation_prompt=False)
            if not (whole.startswith(after) and after.startswith(before)):
                raise record.wrong(
                    "the chat template writes earlier turns differently once later ones follow, so the assistant's "
                    "part cannot be marked; let `ladon distill` answer the chats, or give rows with one answer each"
                )
            spans.append((len(before), len(after)))
    if not tokenizer.is_fast:
        raise InputError(
            f"{type(tokenizer).__name__} does not say where in the text its tokens lie, which chats need; use a fast "
            "tokenizer, or rows with `prompt` and `answer`"
        )
    encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    ids = [int(token) for token in encoded["input_ids"]]
    learned = [False] * len(ids)
    for start, stop in spans:
        inside = [place for place, (left, _) in enumerate(encoded["offset_mapping"]) if start <= left < stop]
        ends = [place for place in inside if ids[place] == tokenizer.eos_token_id]
        for place in inside:
            learned[place] = not ends or place <= ends[-1]
    return ids, learned


def turn_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that ends the assistant's turn: the template's own, as Gemma's, else the end of the sequence."""
    said = "yes"
    chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": said}]
    try:
        text = str(tokenizer.apply_chat_template(chat, tokenize=False))
    except Exception:  # of another type for every way in which a template can refuse
        return _end_of_sequence(tokenizer)
    ids = tokenizer(text[text.rfind(said) + len(said) :], add_special_tokens=False)["input_ids"]
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    return next((int(token) for token in ids if token in special), _end_of_sequence(tokenizer))


def _end_of_sequence(tokenizer: PreTrainedTokenizerBase) -> int | None:
    return None if tokenizer.eos_token_id is None else int(tokenizer.eos_token_id)
