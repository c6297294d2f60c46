"""Heads on disk: a folder (or a hub repository) with `heads.safetensors` and `config.json`, read strictly.

Nothing here is ever unpickled. What does not fit is named: each missing, unexpected or wrong-shaped tensor, each field
of the config that is absent or out of range.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ladon.errors import HeadsError
from ladon.heads.calibration import CALIBRATION_FILE
from ladon.heads.fingerprint import SAMPLES, Fingerprint
from ladon.heads.formats.files import CONFIG_FILE, HEADS_FILES, INDEX_FILES, read_json

WEIGHTS_FILE = "heads.safetensors"
EARLY_EXIT_FILES = ("early_exit.json", "early_exit.safetensors")
FORMAT = "ladon-heads"
VERSION = 1


def write_pair(
    folder: Path, weights: str, tensors: Mapping[str, Tensor], config: str, form: str, document: Mapping[str, Any]
) -> None:
    """Write a safetensors file and its JSON, of the format `form`, into `folder`, which is made if needed.

    Both are written beside their places and then renamed, the config last: if there is no room, the old ones stay.

    Raises:
        HeadsError: the folder cannot be written to.
    """
    document = {"format": form, "version": VERSION, **document}
    weights_part, config_part = folder / f"{weights}.partial", folder / f"{config}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, weights_part)
        config_part.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        weights_part.replace(folder / weights)
        config_part.replace(folder / config)
    except (OSError, SafetensorError) as error:
        for part in (weights_part, config_part):
            with suppress(OSError):
                part.unlink()
        raise HeadsError(f"cannot write {folder}: {error}. Make room or give another folder") from error


def check_token_ids(name: str, ids: Tensor, vocab_size: int) -> None:
    """A draft vocabulary must name tokens of the target, each once: the heads would index past its end otherwise."""
    values = ids.tolist()
    distinct = set(values)
    if ids.is_floating_point() or len(distinct) < len(values) or not 0 <= min(values) <= max(values) < vocab_size:
        raise HeadsError(
            f"{name}: token_map has {len(values)} ids, {len(distinct)} of them distinct, from {min(values)} to "
            f"{max(values)}; expected distinct ids below {vocab_size}. Save or download the heads again"
        )


def find_heads(path: str | Path, revision: str | None = None) -> Path:
    """The folder or file of that name, or the local copy of the hub repository of that name.

    Of a repository, files of heads alone are fetched; a whole model only if its config or index says that heads are in
    it.
    """
    local = Path(os.path.expanduser(path))  # Path.expanduser raises for an unknown user
    if local.exists():
        return local
    name = str(path)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
        raise HeadsError(f"heads folder {name!r} does not exist. Give a folder, a file or the id of a hub repository")
    own = [CONFIG_FILE, WEIGHTS_FILE, CALIBRATION_FILE, *EARLY_EXIT_FILES]
    folder = _fetch(name, revision, [*own, *HEADS_FILES, *INDEX_FILES])
    if any((folder / file).is_file() for file in (WEIGHTS_FILE, *HEADS_FILES)):
        return folder
    if not _speaks_of_heads(folder):
        raise HeadsError(
            f"hub repository {name!r} holds no heads: none of {', '.join((WEIGHTS_FILE, *HEADS_FILES))}, and its "
            f"{CONFIG_FILE} names none. Give the id of a repository with heads"
        )
    folder = _fetch(name, revision, ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"])
    if not any(folder.glob("*.safetensors")):
        folder = _fetch(name, revision, ["*.bin"])
    return folder


def find_folder(path: str | Path, revision: str | None = None) -> Path:
    """The folder of the heads that `find_heads` finds."""
    found = find_heads(path, revision)
    return found.parent if found.is_file() else found


def is_own(path: Path) -> bool:
    """Whether a folder or file is in Ladon's own format; then its folder is to be read."""
    if path.is_file():
        return path.name == WEIGHTS_FILE
    return (path / WEIGHTS_FILE).is_file() or "format" in read_json(path)


def _speaks_of_heads(folder: Path) -> bool:
    config = read_json(folder)
    keys = [str(key) for file in INDEX_FILES for key in read_json(folder, file).get("weight_map", {})]
    named = any(re.match("medusa|hydra", key) for key in (*config, *keys))
    return named or config.get("model_type") == "medusa" or "Medusa" in str(config.get("architectures"))


def _fetch(name: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (OSError, HFValidationError) as error:  # every network and hub error of huggingface_hub is an OSError
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise HeadsError(
            f"heads {name!r} are neither a folder here nor a hub repository that can be read ({reason}). Check the "
            "name, the network and your hub login"
        ) from error


def read_config(folder: Path) -> dict[str, Any]:
    """What config.json says of the heads in `folder`, validated, with the base's `fingerprint` as a `Fingerprint`."""
    path = folder / CONFIG_FILE
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise HeadsError(f"{path} cannot be read. A heads folder holds {CONFIG_FILE} and {WEIGHTS_FILE}") from error
    except ValueError as error:
        raise HeadsError(f"{path} is no JSON ({error}). Save or download the heads again") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        found = document.get("format") if isinstance(document, dict) else type(document).__name__
        raise HeadsError(f"{path} has format {found!r}, expected {FORMAT!r}: these are not heads saved by Ladon")
    if document.get("version") != VERSION:
        raise HeadsError(f"{path} has version {document.get('version')!r}, this Ladon reads {VERSION}. Update Ladon")
    _check_type(document, "base", dict, path)
    _check_type(document, "family", str, path)
    for name in ("num_heads", "hidden_size", "vocab_size"):
        value = document.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise HeadsError(f"{path}: {name} is {value!r}, expected an integer >= 1. Save or download the heads again")
    _check_type(document, "options", dict, path)
    _check_type(document["base"], "name", str, path)
    document["base"]["fingerprint"] = _fingerprint(document["base"].get("fingerprint"), path)
    _check_type(document, "training", dict, path)
    return document


def read_tensors(
    folder: Path, expected: Mapping[str, torch.Size], weights: str = WEIGHTS_FILE, config: str = CONFIG_FILE
) -> dict[str, Tensor]:
    """The tensors named in `expected`, on the CPU; every name or shape that differs is listed in the error."""
    path = folder / weights
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: torch.Size(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            _check_names_and_shapes(path, expected, found, config)
            # Copied: tensors in the mapped file are not aligned, and products of unaligned ones round differently.
            return {name: file.get_tensor(name).clone() for name in expected}
    except OSError as error:
        raise HeadsError(f"{path} cannot be read. A heads folder holds {config} and {weights}") from error
    except SafetensorError as error:
        raise HeadsError(f"{path} is no safetensors file ({error}). Save or download the heads again") from error


def _check_names_and_shapes(
    path: Path, expected: Mapping[str, torch.Size], found: Mapping[str, torch.Size], config: str
) -> None:
    problems = [f"missing {name} {list(shape)}" for name, shape in expected.items() if name not in found]
    problems += [f"unexpected {name} {list(shape)}" for name, shape in found.items() if name not in expected]
    problems += [
        f"{name} is {list(found[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    if problems:
        raise HeadsError(f"{path} does not fit its {config}: {'; '.join(problems)}. Save or download it again")


def _check_type(document: Mapping[str, Any], name: str, kind: type, path: Path) -> None:
    value = document.get(name)
    if not isinstance(value, kind):
        raise HeadsError(f"{path}: {name} is {value!r}, expected {kind.__name__}. Save or download the heads again")


def _fingerprint(value: object, path: Path) -> Fingerprint | None:
    if value is None:
        return None
    names = ("embedding", "projection", "body")
    samples = re.compile(f"([0-9a-f]{{{4 * SAMPLES}}})?")
    if (
        not isinstance(value, dict)
        or value.keys() != {*names, "body_matrices"}
        or any(not samples.fullmatch(str(value[name])) for name in names)
    ):
        raise HeadsError(f"{path}: the base's fingerprint is damaged. Save or download the heads again")
    return Fingerprint(**value)
