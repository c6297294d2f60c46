"""Checkpoints of a training: whole or absent, and gone on from only with the settings they were made with."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.trainer_utils import get_last_checkpoint

from ladon.errors import InputError

SETTINGS_FILE = "settings.json"
STATE_FILE = "trained.safetensors"
PARTIAL = ".partial"
_BUFFERS = ("skipped_rows", "skipped_steps")


def trained_state(module: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint keeps of a module: each parameter that is trained, and the counts of what was skipped."""
    state = {name: parameter.detach() for name, parameter in module.named_parameters() if parameter.requires_grad}
    return state | {name: buffer for name, buffer in module.named_buffers() if name.rpartition(".")[2] in _BUFFERS}


def write_state(folder: Path, module: nn.Module, settings: dict[str, Any]) -> None:
    """Write the state and the settings that it was made with."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.cpu().contiguous() for name, tensor in trained_state(module).items()}
    save_file(state, folder / STATE_FILE)
    (folder / SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


@torch.no_grad()
def read_state(folder: Path, module: nn.Module) -> None:
    """Put the state in `folder` into the module.

    Raises:
        InputError: the file is damaged, or of another module.
    """
    own = trained_state(module)
    try:
        with safe_open(folder / STATE_FILE, framework="pt") as file:
            names = set(file.keys())
            if names != set(own):
                raise InputError(
                    f"{folder} holds another module (differing: {', '.join(sorted(names ^ set(own))[:3])}); start over "
                    "with --no-resume"
                )
            for name, tensor in own.items():
                tensor.copy_(file.get_tensor(name))
    except (OSError, SafetensorError) as error:
        raise InputError(f"{folder / STATE_FILE} cannot be read ({error}); start over with --no-resume") from error


def latest(out: Path) -> Path | None:
    """The checkpoint with the most updates; None if there is none."""
    found = get_last_checkpoint(str(out))
    return None if found is None else Path(found)


def to_resume(out: Path, settings: dict[str, Any]) -> Path | None:
    """The checkpoint to go on from; None if there is none.

    Raises:
        InputError: its settings are others; the first that differs is named.
    """
    folder = latest(out)
    if folder is None:
        return None
    try:
        saved = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} has no settings that can be read ({error}); start over with --no-resume") from error
    for name in [*settings, *(saved.keys() - settings.keys())]:
        if saved.get(name) != settings.get(name):
            raise InputError(
                f"{out} holds a training with {name} {_brief(saved.get(name))}, this one has "
                f"{_brief(settings.get(name))}; give the same settings, another --out, or --no-resume to start over"
            )
    return folder


def remove_checkpoints(out: Path, but: Path | None = None) -> None:
    """Remove all checkpoints in `out` except one."""
    for path in out.glob("checkpoint-*"):
        if re.fullmatch(r"checkpoint-\d+", path.name) and path != but:
            shutil.rmtree(path)
    shutil.rmtree(out / PARTIAL, ignore_errors=True)


@contextmanager
def whole(out: Path, name: str, is_writer: bool) -> Iterator[Path]:
    """A folder to write a checkpoint below; at the end `name` in it takes the place of all older ones in `out`.

    Args:
        out: where checkpoints are.
        name: the checkpoint's.
        is_writer: whether this process moves it; the others only write below.

    Raises:
        InputError: it cannot be written, as on a full disk. The older checkpoint stays as it is.
    """
    partial = out / PARTIAL
    before = latest(out)
    try:
        if is_writer:
            shutil.rmtree(partial, ignore_errors=True)
        _meet()  # before anyone writes there
        yield partial
        _meet()
        if is_writer and not (out / name).exists():
            (partial / name).rename(out / name)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch.save raises RuntimeError on a full disk
        shutil.rmtree(partial, ignore_errors=True)
        kept = f"{before.name} is intact" if before else "nothing was saved yet"
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0][:200]
        raise InputError(
            f"cannot write a checkpoint to {out}: {reason}; {kept}. Make room and run the same command again"
        ) from error
    if is_writer:
        remove_checkpoints(out, but=out / name)


def _meet() -> None:
    """Wait for the other processes, if there are any."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:59] + "…"
