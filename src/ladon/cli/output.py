"""Where results go: files that are whole or absent, JSON documents, and progress on standard error."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from ladon.cli.options import shortened
from ladon.errors import InputError
from ladon.util import files

_SPEED_SECONDS = 600.0  # the time left is estimated from the calls of the last ten minutes: some take one each


class OutConsole(Console):
    """Standard output for people; a reader that goes away, as in `ladon trace | head`, is no error."""

    def on_broken_pipe(self) -> None:
        """Raise what `ladon.cli.main.run` treats as an ordinary end."""
        raise BrokenPipeError


def show(parts: Iterable[RenderableType]) -> None:
    """Print what people look at, part by part, on standard output."""
    console = OutConsole(highlight=False)
    for part in parts:
        console.print(part)


def check_writable(path: Path | None) -> None:
    """Raise `InputError` if `path` cannot be written; called before a long run, not after it."""
    if path is None:
        return
    if os.path.isdir(path):
        raise InputError(f"cannot write {path}: it is a folder; give a file name")
    folder = os.path.dirname(os.path.realpath(path))
    if not os.path.isdir(folder):
        place, missing = shortened(str(path)), shortened(folder)
        raise InputError(f"cannot write {place}: there is no folder {missing}; make it first")
    with _explained(path):
        files.check_writable(path)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file, all of it or nothing; `InputError` if that cannot be."""
    with _explained(path):
        files.write_whole(path, data)


def print_json(document: dict[str, Any]) -> None:
    """One line of JSON on standard output."""
    sys.stdout.write(json.dumps(document, ensure_ascii=False, allow_nan=False) + "\n")
    sys.stdout.flush()


def say(line: str) -> None:
    """A line for people on standard error."""
    print(line, file=sys.stderr)


class Bars(Protocol):
    """Shows how far something is."""

    def __call__(self, what: str, done: int, total: int, note: str = "") -> None:
        """`done` of `total` calls of `what`; `note` stands beside them."""


@contextmanager
def progress_bar(line_seconds: float | None = None) -> Iterator[Bars]:
    """Bars on standard error that show what is being done.

    They are drawn only when told of progress, between two calls: a thread of their own would disturb the timings.

    What is done when a bar first shows is not counted as fast: it was there before, or took no time.

    Args:
        line_seconds: where standard error is no terminal, a line stands for the bars, at least so many seconds after
            the one before; None is silent there.

    Yields:
        A function of (what, calls done, calls in all, a note).
    """
    if not sys.stderr.isatty():
        yield _lines(line_seconds)
        return
    counts, note_column = TextColumn("{task.completed}/{task.total}"), TextColumn("{task.fields[note]}")
    columns = (TextColumn("{task.description}"), BarColumn(), counts, TimeRemainingColumn(), note_column)
    options: dict[str, Any] = {"transient": True, "auto_refresh": False}
    with Progress(*columns, console=Console(stderr=True), speed_estimate_period=_SPEED_SECONDS, **options) as bar:
        tasks: dict[str, TaskID] = {}

        def show(what: str, done: int, total: int, note: str = "") -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, completed=done, total=total, note=note)
            bar.update(tasks[what], completed=done, total=total, note=note, refresh=True)

        yield show


def _lines(seconds: float | None) -> Bars:
    """Progress as lines: one when something begins or ends, and in between after so many seconds."""
    last: dict[str, float] = {}

    def show(what: str, done: int, total: int, note: str = "") -> None:
        now = time.monotonic()
        if seconds is not None and (what not in last or done == total or now - last[what] >= seconds):
            last[what] = now
            say(f"ladon: {what}: {done} of {total}" + (f", {note}" if note else ""))

    return show


def _explained(path: Path) -> AbstractContextManager[None]:
    """Say in one line why `path` cannot be written."""
    return files.explained(f"cannot write {shortened(str(path))}", InputError, "give another place")
