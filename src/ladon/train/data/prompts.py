"""What the model is asked: prompts and chats of a data set, as texts and token ids."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from ladon.errors import InputError
from ladon.train.data.records import Record, UnusableRow, read_records

Message = dict[str, Any]  # role and content; what else a data set gives goes to the template as it is
CHAT_FIELDS = ("messages", "conversations", "turns", "question", "instruction")
_ROLES = {
    "system": "system",
    **dict.fromkeys(("user", "human"), "user"),
    **{role: role for role in ("developer", "tool", "function")},
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model"), "assistant"),
}
_ASKING = ("user", "tool", "function")  # the roles that an answer follows
_TEXT_FIELDS = ("prompt", "text")
_FIELDS = ("prompt_ids", "prompt", *CHAT_FIELDS, "text")


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
    """A message with `role` and `content` whatever they were called; its other fields stay as they are."""
    given = entry if isinstance(entry, dict) else {}
    role, content = given.get("role", given.get("from")), given.get("content", given.get("value"))
    is_parts = isinstance(content, list) and all(isinstance(part, dict) for part in content)
    is_call = content is None and bool(given.get("tool_calls"))
    if not isinstance(role, str) or not (isinstance(content, str) or is_parts or is_call):
        raise record.unusable(
            "a message without role and content",
            f"those of `{name}` need them (or from and value): a text, a list of parts, or tool_calls",
        )
    if role not in _ROLES:
        raise record.unusable(f"a message of the role {role!r}", f"known in `{name}` are {', '.join(_ROLES)}")
    others = {key: value for key, value in given.items() if key not in ("role", "from", "content", "value")}
    has_content = content is not None or "content" in given
    return {"role": _ROLES[role], **({"content": content} if has_content else {}), **others}


def template_options(record: Record) -> dict[str, Any]:
    """What a row gives its chat template besides the messages: `tools`, and what `chat_template_kwargs` holds.

    Either may be JSON text, as data sets keep it. `UnusableRow` for anything else.
    """
    tools, options = (_parsed(record, name) for name in ("tools", "chat_template_kwargs"))
    if not isinstance(tools or [], list) or not all(isinstance(tool, dict) for tool in tools or []):
        raise record.unusable("tools that are no list of objects", "give them as `apply_chat_template` takes them")
    if not isinstance(options or {}, dict):
        raise record.unusable("chat_template_kwargs that are no object", 'give one, such as {"enable_thinking": false}')
    return {**({"tools": tools} if tools else {}), **(options or {})}


def _parsed(record: Record, name: str) -> Any:
    value = record.fields.get(name)
    try:
        return json.loads(value) if isinstance(value, str) and value else value
    except ValueError as error:
        raise record.unusable(f"{name} that are no JSON", str(error)) from error


def refuse_template_options(record: Record) -> None:
    """Raise `UnusableRow` for a row that is no chat and yet has what only a chat template could use."""
    if options := template_options(record):
        raise record.unusable("tools or template options without a chat", f"no template reads {', '.join(options)}")


def question_of(messages: Sequence[Message], system: str | None = None) -> list[Message]:
    """The chat up to its last message of a user or a tool; [] if there is none. `system` replaces its system's."""
    last = max((place for place, message in enumerate(messages) if message["role"] in _ASKING), default=-1)
    asked = list(messages[: last + 1])
    if system is None or not asked:
        return asked
    return [{"role": "system", "content": system}, *(m for m in asked if m["role"] != "system")]


def chat_text(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], record: Record, *, add_generation_prompt: bool
) -> str:
    """A chat as the tokenizer's template writes it, with what its row gives the template besides.

    Raises:
        InputError: the tokenizer has no template.
        UnusableRow: the template refuses the chat; or as `template_options`.
    """
    if not tokenizer.chat_template:
        raise record.wrong(
            "a chat, but the tokenizer has no chat template; give rows with `prompt` or `text`, name a text field "
            "with --field, or use a chat model"
        )
    options = template_options(record)
    try:
        text = tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=add_generation_prompt, tokenize=False, **options
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """One prompt.

    Attributes:
        id: the data set's own id, or the row's index and a hash of the prompt; no two prompts of a set share one.
        index: the row's place in the data set, from 0.
        token_ids: what the model reads; empty if the row asks nothing, such as a chat without a user message.
        text: the same as text, written by the chat template if it is a chat; None for one given as token ids.
        messages: a prompt given as a chat, up to its last message of a user or a tool; None otherwise.
        tools: what a chat may call, as the template was given them; None for none.
        template_options: the row's `chat_template_kwargs`.
        refused: why the row cannot be used; empty if it can.
    """

    id: str
    index: int
    token_ids: list[int]
    text: str | None = None
    messages: list[Message] | None = None
    tools: list[dict[str, Any]] | None = None
    template_options: dict[str, Any] = field(default_factory=dict)
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
    if name == "prompt" and isinstance(value, str):
        refuse_template_options(record)
    if is_text and isinstance(value, str):
        return {"token_ids": [int(token) for token in tokenizer(value)["input_ids"]] if value else [], "text": value}
    messages = question_of(messages_of(record, name), system)
    if not messages:
        return {"token_ids": [], "text": "", "messages": []}
    text = chat_text(tokenizer, messages, record, add_generation_prompt=True)
    ids = [int(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
    options = template_options(record)
    tools = options.pop("tools", None)
    return {"token_ids": ids, "text": text, "messages": messages, "tools": tools, "template_options": options}


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
