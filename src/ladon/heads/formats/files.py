"""Files of checkpoints: tensors read one at a time from whatever files there are, and folders that are whole or absent.

Nothing is ever unpickled.

A `Checkpoint` is the tensors of a folder (one file, or shards with an index) or of a single file, and the folder's
config.json if there is one. Shapes come from the files' headers.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ladon.errors import HeadsError

CONFIG_FILE = "config.json"
SAFE, PICKLED = ".safetensors", (".pt", ".pth", ".bin")
# In this order: heads alone before whole models, and what needs no unpickling before what does.
HEADS_FILES = ("medusa_lm_head.safetensors", "medusa_lm_head.pt", "hydra_lm_head.safetensors", "hydra_lm_head.pt")
INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
WHOLE_FILES = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class Slot:
    """Where a tensor lies, and what it is.

    Attributes:
        file: the file that holds it.
        shape: its shape.
        read: gives the tensor, on the CPU, in memory of its own.
        read_row: gives one entry along the first dimension, without reading the others.
    """

    file: Path
    shape: torch.Size
    read: Callable[[], Tensor]
    read_row: Callable[[int], Tensor]


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint whose tensors have not been read yet.

    Attributes:
        name: what the user called it, for messages.
        folder: the folder it is in.
        slots: every tensor, by its key.
        config: what config.json holds; empty without one. A hint, never trusted against keys and shapes.
        files: the files that hold the tensors.
    """

    name: str
    folder: Path
    slots: Mapping[str, Slot]
    config: Mapping[str, Any] = field(default_factory=dict)
    files: tuple[Path, ...] = ()

    def read(self, key: str) -> Tensor:
        """One tensor, on the CPU."""
        slot = self.slots[key]
        try:
            return slot.read()
        except (SafetensorError, OSError, RuntimeError) as error:
            raise _damaged(slot.file, error) from error

    def weight(self, key: str) -> Tensor:
        """The same for a tensor that must hold fractions; `HeadsError` if it holds whole numbers, as packed ones do."""
        found = self.read(key)
        if not found.is_floating_point():
            raise HeadsError(f"{self.name}: {key} is {found.dtype}; quantised heads cannot be read, take the original")
        return found


def open_checkpoint(path: Path, name: str | None = None) -> Checkpoint:
    """The checkpoint in a folder, or the one that a file is.

    Raises:
        HeadsError: no weights, a file that is missing, truncated, no checkpoint, or a pickle with code in it.
    """
    folder = path if path.is_dir() else path.parent
    files = _weight_files(path) if path.is_dir() else [path]
    slots: dict[str, Slot] = {}
    for file in files:
        for key, slot in _slots(file).items():
            if key in slots:
                raise HeadsError(f"{path}: {key} is both in {slots[key].file.name} and in {file.name}; remove one")
            slots[key] = slot
    return Checkpoint(name=name or str(path), folder=folder, slots=slots, config=read_json(folder), files=tuple(files))


def read_json(folder: Path, file: str = CONFIG_FILE) -> dict[str, Any]:
    """A JSON object in a folder; {} if there is no such file.

    Raises:
        HeadsError: the file is no JSON object.
    """
    path = folder / file
    if not path.is_file():
        return {}
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise HeadsError(f"{path} is no JSON ({error}). Save or download the heads again") from error
    if not isinstance(document, dict):
        raise HeadsError(f"{path} holds a {type(document).__name__}, expected an object. Save or download it again")
    return document


def read_versioned(path: Path, form: str, version: int, again: str) -> dict[str, Any]:
    """A JSON document that names its format and version, without these two.

    Args:
        path: the file.
        form: the format that it must name.
        version: likewise.
        again: what to do about a file that is none.

    Raises:
        HeadsError: it cannot be read, or is of another format or version.
    """
    try:
        document: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise HeadsError(f"{path} cannot be read ({error}). {again}") from error
    if not isinstance(document, dict) or (document.get("format"), document.get("version")) != (form, version):
        raise HeadsError(f"{path} is no {form} file of version {version}. {again}")
    return {name: value for name, value in document.items() if name not in ("format", "version")}


def _weight_files(folder: Path) -> list[Path]:
    kinds = {name.split(".")[0] for name in HEADS_FILES if (folder / name).is_file()}
    if len(kinds) > 1:
        raise HeadsError(f"{folder} holds both {' and '.join(sorted(kinds))} files; give the path of the one meant")
    for name in HEADS_FILES:
        if (folder / name).is_file():
            return [folder / name]
    for name in INDEX_FILES:
        weight_map = read_json(folder, name).get("weight_map")
        if isinstance(weight_map, dict) and weight_map:
            shards = [folder / Path(str(shard)).name for shard in sorted(set(weight_map.values()))]
            missing = [shard.name for shard in shards if not shard.is_file()]
            if missing:
                raise HeadsError(f"{folder} lacks {', '.join(missing)}, which {name} names. Download it again")
            return shards
    for name in WHOLE_FILES:
        if (folder / name).is_file():
            return [folder / name]
    found = sorted(folder.glob(f"*{SAFE}")) or sorted(path for end in PICKLED for path in folder.glob(f"*{end}"))
    if not found:
        raise HeadsError(
            f"{folder} holds no weights. Heads are in heads.safetensors, {', '.join((*HEADS_FILES, *WHOLE_FILES))} or "
            "shards with an index"
        )
    return found


def _slots(file: Path) -> dict[str, Slot]:
    if file.suffix == SAFE:
        return _safe_slots(file)
    if file.suffix in PICKLED:
        return _pickled_slots(file)
    raise HeadsError(f"{file} is no checkpoint; give a folder, or a file that ends in {SAFE} or {', '.join(PICKLED)}")


def _safe_slots(file: Path) -> dict[str, Slot]:
    def read(key: str, row: int | None = None) -> Tensor:
        with safe_open(file, framework="pt") as opened:
            # Copied: tensors in the mapped file are not aligned, and products of unaligned ones round differently.
            found: Tensor = opened.get_tensor(key).clone() if row is None else opened.get_slice(key)[row]
            return found

    try:
        with safe_open(file, framework="pt") as opened:
            shapes = {key: torch.Size(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise _damaged(file, error) from error
    return {key: Slot(file, shape, partial(read, key), partial(read, key)) for key, shape in shapes.items()}


def _pickled_slots(file: Path) -> dict[str, Slot]:
    try:
        # Mapped where the file allows it: a shard of a whole model is only read as far as it is used.
        loaded: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        raise HeadsError(
            f"{file} holds more than tensors ({_first_line(error)}), and code in a checkpoint is never run. Ask its "
            "author for a safetensors file"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, AttributeError, IndexError) as error:
        raise _damaged(file, error) from error
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise HeadsError(f"{file} holds no table of tensors; save a state dict, as torch.save(module.state_dict())")

    def slot(value: Tensor) -> Slot:
        return Slot(file, value.shape, lambda: value.detach().clone(), lambda row: value.detach()[row])

    return {str(key): slot(value) for key, value in loaded.items()}


def _damaged(file: Path, error: Exception) -> HeadsError:
    return HeadsError(f"{file} cannot be read ({_first_line(error)}): truncated, or of another kind. Download it again")


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    reason = next((line for line in lines if "WeightsUnpickler error" in line or "Unsupported" in line), lines[0])
    return reason[:200]


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
