"""Files that are written whole or not at all, and numbers as JSON files have them."""

from __future__ import annotations

import errno
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_whole(path: Path, data: bytes | str) -> None:
    """Write a file, text in UTF-8; whoever looks sees the old one or the new one, also while others write it too.

    A link stays and the file it leads to is written; a pipe or a device is written to as it is.

    Raises:
        OSError: it cannot be written; the old one stays, and nothing is left beside it.
    """
    data = data.encode() if isinstance(data, str) else data
    if _is_special(path):
        path.write_bytes(data)
        return
    target = Path(os.path.realpath(path))
    with _beside(target) as partial:
        partial.write_bytes(data)
        if target.exists():
            shutil.copymode(target, partial)
        partial.replace(target)


def check_writable(path: Path) -> None:
    """Raise `OSError` if `write_whole` could not write to this place now; nothing changes there."""
    if not _is_special(path):
        with _beside(Path(os.path.realpath(path))) as partial:
            partial.touch()
    elif not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def _is_special(path: Path) -> bool:
    """Whether something is there that is no ordinary file, such as a pipe or a device."""
    return os.path.exists(path) and not os.path.isfile(path)


@contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """A name for the unfinished `target`, in a new folder beside it that goes away with all it holds."""
    with tempfile.TemporaryDirectory(prefix=".ladon-", dir=target.parent) as folder:
        yield Path(folder, target.name)


@contextmanager
def explained(what: str, kind: type[Exception], advice: str) -> Iterator[None]:
    """Raise an error of this kind where the system refuses something: what cannot be done, why, and what to do then."""
    try:
        yield
    except OSError as error:
        raise kind(f"{what}: {error.strerror}; {advice}") from error


def finite(value: float) -> float | None:
    """The value, or None where JSON has no number for it."""
    return value if math.isfinite(value) else None


def rounded(value: Any) -> Any:
    """A value, or tables and lists of values: numbers to 4 places, None where JSON has no number for one."""
    if isinstance(value, dict):
        return {name: rounded(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(part) for part in value]
    if isinstance(value, float):
        return finite(round(value, 4))
    return value
