"""Folders that are whole or absent."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ladon.errors import HeadsError


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to write into, beside `out`, which it becomes at the end; after an error nothing of it is left.

    Raises:
        HeadsError: `out` is there already and holds something, or nothing can be written there.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise HeadsError(f"{out} is there already; give a new folder, so that no two formats mix in one")
    partial = out.parent / f".{out.name}.partial-{os.getpid()}"
    try:
        partial.mkdir(parents=True)
        yield partial
        if out.is_dir():
            out.rmdir()  # empty; renaming onto it works on some systems only
        partial.replace(out)
    except (OSError, SafetensorError) as error:
        raise HeadsError(f"cannot write {out}: {error}. Make room or give another folder") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_json(path: Path, document: dict[str, Any]) -> None:
    """A JSON file, for people to read too."""
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
