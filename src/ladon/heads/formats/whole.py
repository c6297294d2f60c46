"""Whole models with heads in them (MEDUSA v1.0, Model-Optimizer): whose heads they are, and splitting them.

The base in such a folder was trained together with the heads. Put on the model that it was made from, the heads guess
worse, and nothing would say so: hence the fingerprint of the folder's own weights.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ladon.errors import HeadsError
from ladon.heads.fingerprint import PLAIN_DTYPES, Fingerprint, digits, fingerprint, places
from ladon.heads.formats.files import CONFIG_FILE, PICKLED, SAFE, Checkpoint, write_json

_NOT_COPIED = (SAFE, *PICKLED, ".index.json", ".md", ".gitattributes")


def whole_fingerprint(checkpoint: Checkpoint) -> Fingerprint | None:
    """The fingerprint of the base model in a folder, from single rows of its tensors; None if its kind is unknown."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError):  # no such model class here, or one that is code in the folder
        return None
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return fingerprint(model, lambda matrices: _sample(checkpoint, [names[id(matrix)] for matrix in matrices]))


def split_model(
    checkpoint: Checkpoint, keys: Sequence[str], out: Path, report: Callable[[str, int, int], None]
) -> None:
    """Write the base model of a whole model, in transformers' format, one shard in memory at a time.

    Args:
        checkpoint: the whole model.
        keys: the tensors of the base.
        out: a new folder for it.
        report: is told what is being done, and how far it is.

    Raises:
        HeadsError: the whole model has no config.json.
    """
    if not checkpoint.config:
        raise HeadsError(f"{checkpoint.name} has no {CONFIG_FILE}, without which its model cannot be loaded")
    out.mkdir(parents=True)
    shards: dict[Path, list[str]] = {}
    for key in keys:
        shards.setdefault(checkpoint.slots[key].file, []).append(key)
    names = [f"model-{i:05d}-of-{len(shards):05d}{SAFE}" for i in range(1, len(shards) + 1)]
    names = names if len(shards) > 1 else [f"model{SAFE}"]
    weight_map: dict[str, str] = {}
    total = 0
    for i, (name, members) in enumerate(zip(names, shards.values(), strict=True)):
        tensors = {key: checkpoint.read(key).contiguous() for key in members}
        save_file(tensors, out / name, metadata={"format": "pt"})  # transformers reads no file without this
        weight_map |= dict.fromkeys(members, name)
        total += sum(tensor.nbytes for tensor in tensors.values())
        report("writing the model", i + 1, len(shards))
    for path in sorted(checkpoint.folder.iterdir()):
        if path.is_file() and path.name != CONFIG_FILE and not path.name.endswith(_NOT_COPIED):
            shutil.copyfile(path, out / path.name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(out / f"model{SAFE}.index.json", index)
    write_json(out / CONFIG_FILE, _plain_config(checkpoint.config))


def _plain_config(config: Any) -> dict[str, Any]:
    """The base's config without what it says about heads."""
    kept = {key: value for key, value in config.items() if key != "medusa" and not key.startswith("medusa_")}
    if any("Medusa" in str(architecture) for architecture in kept.get("architectures") or ()):
        del kept["architectures"]
    return kept


def _sample(checkpoint: Checkpoint, names: Sequence[str]) -> str:
    """As `fingerprint` samples a model's matrices; "" when one is missing or no plain numbers."""
    if not names or not all(name in checkpoint.slots for name in names):
        return ""
    slots = [checkpoint.slots[name] for name in names]
    values = []
    for matrix, place in places([slot.shape.numel() for slot in slots]):
        per_row = slots[matrix].shape[1:].numel()
        value = slots[matrix].read_row(place // per_row).reshape(-1)[place % per_row]
        if value.dtype not in PLAIN_DTYPES:
            return ""
        values.append(value)
    return digits(values)
