"""Step times on disk: what a model's decode steps take on a machine, so that a run need not find it out again.

A profile is one JSON file per model and machine in the cache folder: `$LADON_CACHE`, else `$XDG_CACHE_HOME/ladon`, else
`~/.cache/ladon`. `ladon calibrate` writes it; a decoder reads it when it is made. It decides how many nodes a step
verifies and nothing else: a wrong one costs time, never a token. So one that cannot be used is left aside, with a
warning.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from ladon.errors import InputError
from ladon.heads.fingerprint import fingerprint
from ladon.tree_size.latency_model import StepTime
from ladon.util.devices import input_device
from ladon.util.files import explained, write_whole
from ladon.util.machine import CACHE_VARIABLE, cache_folder, cpu_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ladon.heads import Heads

FORMAT = "ladon-step-times"
VERSION = 1
_MOST = 10_000_000
_BOUNDS = {"batch": (1, _MOST), "nodes": (1, _MOST), "context": (0, _MOST), "seconds": (1e-7, 1e4)}  # of real steps


def machine_of(model: PreTrainedModel) -> dict[str, Any]:
    """Where a model runs and in which dtype, JSON values named as in `ladon.util.machine`."""
    device = input_device(model)
    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
    }


def place_of(model: PreTrainedModel, heads: Heads) -> dict[str, Any]:
    """All that step times depend on, JSON values: the target, the size of the heads, the machine and the libraries."""
    config = model.config.get_text_config(decoder=True)
    return {
        "model": fingerprint(model).as_dict(),
        "heads": {"family": heads.family, "num_heads": heads.num_heads, **heads.options},
        "attention": config._attn_implementation,
        **machine_of(model),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def profile_path(place: Mapping[str, Any]) -> Path:
    """The file for a place: another model or another machine has another one."""
    digest = hashlib.sha256(json.dumps(place, sort_keys=True).encode()).hexdigest()
    return cache_folder() / f"step-times-{digest[:24]}.json"


def write_profile(place: Mapping[str, Any], times: Sequence[StepTime]) -> Path:
    """Write the times of a place; whoever looks sees the old file or the new one.

    Raises:
        InputError: the folder cannot be written to.
    """
    path = profile_path(place)
    document = {"format": FORMAT, "version": VERSION, "place": dict(place), "times": [asdict(time) for time in times]}
    with explained(f"cannot write {path}", InputError, f"set {CACHE_VARIABLE} to another folder"):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(document, indent=1, allow_nan=False) + "\n")
    return path


def read_profile(place: Mapping[str, Any]) -> list[StepTime]:
    """The times of a place; none if there is no profile of it, or one that cannot be used (which warns)."""
    path = profile_path(place)
    try:
        document: Any = json.loads(path.read_text(encoding="utf-8"))
        return _times_of(document, place)
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        warnings.warn(f"{path} is left aside: {error}. Run `ladon calibrate` again, or remove it", stacklevel=2)
        return []


def _times_of(document: Any, place: Mapping[str, Any]) -> list[StepTime]:
    """What a profile's JSON holds; `ValueError` says what is wrong with it."""
    if not isinstance(document, dict) or (document.get("format"), document.get("version")) != (FORMAT, VERSION):
        raise ValueError(f"it is no {FORMAT} file of version {VERSION}")
    if document.get("place") != json.loads(json.dumps(dict(place))):
        raise ValueError("it was measured with another model or on another machine")
    entries = document.get("times")
    names = {field.name for field in fields(StepTime)}
    if not isinstance(entries, list) or not all(isinstance(entry, dict) and set(entry) == names for entry in entries):
        raise ValueError("its times are damaged")
    for entry in entries:
        flags, numbers = [entry["drafts"], entry["pruned"]], [entry["context"], entry["seconds"], entry["nodes"]]
        if type(entry["batch"]) is not int or not all(type(flag) is bool for flag in flags):
            raise ValueError("its times are damaged")
        if not all(type(number) in (int, float) for number in numbers):
            raise ValueError("its times are damaged")
        if not all(least <= entry[name] <= most for name, (least, most) in _BOUNDS.items()):
            raise ValueError("it has a time that cannot be")
    return [StepTime(**entry) for entry in entries]
