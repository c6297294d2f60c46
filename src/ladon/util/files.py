"""Text files that are written whole or not at all, and numbers as JSON files have them."""

from __future__ import annotations

import math
import os
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any


def write_whole(path: Path, text: str) -> None:
    """Write a file; whoever looks sees the old one or the new one, also while other processes and threads write it.

    Raises:
        OSError: it cannot be written; the old one stays, and nothing is left beside it.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError:
        with suppress(OSError):
            partial.unlink()
        raise


def rounded(value: Any) -> Any:
    """A value, or tables and lists of values: numbers to 4 places, None where JSON has no number for one."""
    if isinstance(value, dict):
        return {name: rounded(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(part) for part in value]
    if isinstance(value, float):
        return round(value, 4) if math.isfinite(value) else None
    return value
