"""Where rows come from: JSONL, JSON, Parquet, folders and hub ids, as one stream of records."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ladon.errors import InputError
from ladon.util.files import explained

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")
_FILES = (".jsonl", ".json", ".ndjson", ".parquet", ".txt", ".csv")
_KINDS = "a JSONL or Parquet file, a JSON file with a list of objects, or the id of a data set on the hub"
_OWN_IDS = ("id", "question_id", "task_id")


class UnusableRow(InputError):
    """A row that cannot be used, where others of its data set can.

    Attributes:
        reason: the same for all rows of the kind, so that they can be counted.
    """

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One row of a data set.

    Attributes:
        index: its place in the data set, from 0; blank lines of a file do not count.
        where: the same for people, such as "prompts.jsonl line 3".
        fields: its columns.
    """

    index: int
    where: str
    fields: dict[str, Any]

    @property
    def own_id(self) -> str | None:
        """The id that the data set itself gives it, if any."""
        found = (self.fields.get(name) for name in _OWN_IDS)
        return next((str(value) for value in found if isinstance(value, int | str) and value != ""), None)

    def wrong(self, problem: str) -> InputError:
        """The error that says what is wrong with it."""
        return InputError(f"{self.where}: {problem}")

    def unusable(self, reason: str, detail: str) -> UnusableRow:
        """The same where the other rows may still be good."""
        return UnusableRow(f"{self.where}: {reason}: {detail}", reason)


def read_records(source: str, *, limit: int | None = None, split: str = "train") -> Iterator[Record]:
    """The rows of a data set, in order, at most `limit` of them.

    Args:
        source: a file of JSON lines, a JSON file with a list of objects, a Parquet file, a folder that `datasets` can
            read, or a hub id, `owner/name` or `owner/name:config`.
        limit: rows to read at most; None for all.
        split: of a folder or a hub id.

    Raises:
        InputError: there is no such data set, a line is no JSON object, or there is no row at all.
    """
    return islice(_at_least_one(_open(source, limit, split), source), limit)


def _at_least_one(records: Iterable[Record], source: str) -> Iterator[Record]:
    empty = True
    for record in records:
        empty = False
        yield record
    if empty:
        raise InputError(f"{source} holds no rows; give {_KINDS}")


def _open(source: str, limit: int | None, split: str) -> Iterator[Record]:
    path = Path(source)
    if path.is_file():
        if path.suffix == ".parquet":
            return _of_dataset(source, split="train", name="parquet", data_files=source, streaming=True)
        return _of_json(path) if _starts_list(path) else _of_lines(path)
    if path.is_dir():
        return _of_dataset(source, split=split, name=source, streaming=True)
    if path.suffix in _FILES or not _HUB_ID.fullmatch(source):
        raise InputError(f"there is no file {source}; give {_KINDS}")
    name, _, config = source.partition(":")
    part = split if limit is None else f"{split}[:{limit}]"
    return _of_dataset(source, split=part, name=name, config=config or None)


def _starts_list(path: Path) -> bool:
    with explained(f"cannot read {path}", InputError, f"give {_KINDS}"), path.open("rb") as file:
        return file.read(256).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["


def _of_lines(path: Path) -> Iterator[Record]:
    """JSON lines. Read as bytes: JSON texts may hold U+2028, which is no line end."""
    index = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                where = f"{path} line {number}"
                yield Record(index=index, where=where, fields=_object(_parsed(line, where), where))
                index += 1


def _of_json(path: Path) -> Iterator[Record]:
    rows = _parsed(path.read_bytes(), str(path))
    for index, row in enumerate(rows):
        where = f"{path} entry {index + 1}"
        yield Record(index=index, where=where, fields=_object(row, where))


def _parsed(data: bytes, where: str) -> Any:
    try:
        return json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 (byte {error.start}); give UTF-8 text") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(f'{where}: no JSON ({error}); each line is like {{"prompt": "..."}}') from error


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f'{where}: a {type(value).__name__}, no JSON object; each row is like {{"prompt": "..."}}')
    return value


def _of_dataset(source: str, *, split: str, name: str, config: str | None = None, **options: Any) -> Iterator[Record]:
    """Rows through `datasets`, whose errors become one line."""
    try:
        import datasets
    except ImportError as error:
        raise InputError(f"reading {source} needs the package datasets; pip install 'ladon-llm[train]'") from error
    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity_error()
    try:
        for index, row in enumerate(datasets.load_dataset(name, config, split=split, **options)):
            yield Record(index=index, where=f"{source} row {index}", fields=dict(row))
    except Exception as error:  # of another type for every way in which a data set can be wrong or out of reach
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise InputError(f"cannot read the data set {source}: {reason}; give {_KINDS}") from error
