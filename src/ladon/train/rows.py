"""Rows of training data: the answers that `ladon distill` writes, and what `ladon train` reads."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ladon.errors import InputError
from ladon.train.chats import encode_chat, messages_of
from ladon.train.prompts import token_list
from ladon.train.records import Record, UnusableRow, read_records

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ANSWERS = ("answer", "response", "completion", "output")
_FORMS = "prompt_ids and answer_ids, messages, conversations, prompt with answer, response or completion, or text"


@dataclass(frozen=True, kw_only=True, slots=True)
class DistilledRow:
    """One answer, as it stands in the file.

    Attributes:
        id: of the prompt.
        prompt_ids: what the model read.
        answer_ids: what it said, an end-of-sequence token included if it ended with one.
        answer: the same as text, without special tokens.
        finish: "stop" if it ended by itself, "length" if it was cut.
        seed: of its noise; None if it is greedy.
        sampling: temperature, top_p, top_k and max_new_tokens.
        model: whose answer it is.
        dtype: the model's.
        weights: a short hash of some of its weights; None if they are out of reach.
    """

    id: str
    prompt_ids: list[int]
    answer_ids: list[int]
    answer: str
    finish: str
    seed: int | None
    sampling: dict[str, float | int]
    model: str
    dtype: str
    weights: str | None = None

    def to_json(self) -> str:
        """One line, its line break included."""
        return json.dumps(asdict(self)) + "\n"

    @classmethod
    def from_json(cls, line: bytes, where: str) -> DistilledRow:
        """The row in a line; `InputError` if it is none."""
        try:
            values: Any = json.loads(line)
        except ValueError as error:  # UnicodeDecodeError among them
            raise InputError(f"{where}: no JSON ({error}); is this a file of ladon distill?") from error
        names = {field.name for field in fields(cls)}
        if not isinstance(values, dict) or not names - {"weights"} <= set(values):
            raise InputError(
                f"{where}: no row of ladon distill, which has {', '.join(sorted(names))}; give another file"
            )
        return cls(**{name: values[name] for name in names if name in values})


@contextmanager
def only_writer(path: Path) -> Iterator[None]:
    """While this lasts, no other run can write `path`: two that append to one file would double its rows.

    Raises:
        InputError: another run is at it, or the file cannot be made.
    """
    try:
        import fcntl
    except ImportError:  # not a POSIX system: no lock
        yield
        return
    with ExitStack() as stack:
        try:
            file = stack.enter_context(path.open("ab"))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"another run is writing {path}; wait for its end, or give another file") from error
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror}; give another place") from error
        yield


def repair(path: Path) -> int:
    """Cut off a last line that was not written to its end.

    Returns:
        The number of bytes cut, 0 if there is no such line, or no file.

    Raises:
        InputError: the file cannot be changed.
    """
    try:
        with path.open("r+b") as file:
            size = file.seek(0, os.SEEK_END)
            end = _end_of_lines(file, size)
            if end < size:
                file.truncate(end)
                os.fsync(file.fileno())
            return size - end
    except FileNotFoundError:
        return 0
    except OSError as error:
        raise InputError(f"cannot go on with {path}: {error.strerror}; give another place") from error


def _end_of_lines(file: Any, size: int, block: int = 1 << 16) -> int:
    """Where the last whole line ends, searched from the end of the file."""
    stop = size
    while stop > 0:
        start = max(0, stop - block)
        file.seek(start)
        found = file.read(stop - start).rfind(b"\n")
        if found >= 0:
            return int(start + found + 1)
        stop = start
    return 0


def read_distilled(path: Path) -> list[DistilledRow]:
    """All rows of a file of whole lines; [] if there is no file."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        return [DistilledRow.from_json(line, f"{path} line {number}") for number, line in enumerate(file, start=1)]


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
        source: what `ladon.train.records.read_records` takes.
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
