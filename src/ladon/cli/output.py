"""Where results go: files that are whole or absent, JSON documents, and progress on standard error."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from ladon.errors import InputError


class OutConsole(Console):
    """Standard output for people; a reader that goes away, as in `ladon trace | head`, is no error."""

    def on_broken_pipe(self) -> None:
        """Raise what `ladon.cli.main.run` treats as an ordinary end."""
        raise BrokenPipeError


def check_writable(path: Path | None) -> None:
    """Raise `InputError` if `path` cannot become a file; called before a long run, not after it."""
    if path is None:
        return
    if path.is_dir():
        raise InputError(f"cannot write {path}: it is a folder; give a file name")
    if not path.parent.is_dir():
        raise InputError(f"cannot write {path}: there is no folder {path.parent}; make it first")
    partial = _partial(path)
    try:
        partial.write_bytes(b"")
        partial.unlink()
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}; give another place") from error


def write_whole(path: Path, data: bytes) -> None:
    """Write a file beside its place, then rename it: whoever looks sees all of it or nothing."""
    partial = _partial(path)
    try:
        partial.write_bytes(data)
        partial.replace(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}; give another place") from error
    finally:
        partial.unlink(missing_ok=True)


def print_json(document: dict[str, Any]) -> None:
    """One line of JSON on standard output."""
    sys.stdout.write(json.dumps(document, ensure_ascii=False, allow_nan=False) + "\n")
    sys.stdout.flush()


def say(line: str) -> None:
    """A line for people on standard error."""
    print(line, file=sys.stderr)


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """Bars on standard error that show what is being done; silent where that is no terminal.

    They are drawn only when told of progress, between two calls: a thread of their own would disturb the timings.

    Yields:
        A function of (what, calls done, calls in all).
    """
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    options: dict[str, Any] = {"transient": True, "auto_refresh": False, "disable": not sys.stderr.isatty()}
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), **options) as bar:
        tasks: dict[str, TaskID] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, total=total, refresh=True)

        yield show


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".partial")
