"""What a checkpoint of heads is, what it fits and what it costs, as `ladon inspect` shows it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ladon.heads.base import Heads
from ladon.heads.card import history_of, num_parameters
from ladon.heads.checkpoint import find_heads, is_own
from ladon.heads.early_exit import load_early_exit
from ladon.heads.factory import read_heads
from ladon.heads.fingerprint import MIN_AGREEMENT, agreement, fingerprint
from ladon.heads.formats.detect import LAYOUTS, detect
from ladon.heads.formats.files import Checkpoint, open_checkpoint
from ladon.heads.formats.keys import sort_keys
from ladon.heads.model_parts import input_embedding, output_projection

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def describe(path: str, name: str | None = None, model: PreTrainedModel | None = None) -> dict[str, Any]:
    """What lies at a path, as JSON values.

    Args:
        path: a folder, a file or a hub id.
        name: what the path is called in the description, if that is something else.
        model: the target to compare with.

    Raises:
        HeadsError: nothing there, no checkpoint, or a damaged one.
    """
    place, path = find_heads(path), name or path
    kind, layout = "heads", "Ladon"
    if not is_own(place):
        checkpoint = open_checkpoint(place, path)
        keys = list(checkpoint.slots)
        if "model_type" in checkpoint.config and not any(sort_keys(each, keys).blocks for each in LAYOUTS):
            return _model(path, checkpoint)
        found = detect(checkpoint)
        kind, layout = "model with heads" if found.holds_model else "heads", found.layout.name
    heads = read_heads(place, model, force=True)
    return {
        "kind": kind,
        "path": path,
        "format": layout,
        **_sizes(heads),
        "base": {"name": heads.base_name, "has_fingerprint": heads.base_fingerprint is not None},
        "memory": _memory(heads),
        "training": _training(heads),
        "calibration": None if heads.calibration is None else heads.calibration.document(),
        "early_exit": _early_exit(place if place.is_dir() else place.parent),
        "model": None if model is None else _compared(heads, model),
    }


def _model(path: str, checkpoint: Checkpoint) -> dict[str, Any]:
    """A model without heads."""
    config = checkpoint.config
    text = config.get("text_config") or config
    return {
        "kind": "model",
        "path": path,
        "architecture": str((config.get("architectures") or [config["model_type"]])[0]),
        "parameters": sum(slot.shape.numel() for slot in checkpoint.slots.values()),
        "bytes": sum(file.stat().st_size for file in checkpoint.files),
        "dtype": str(text.get("dtype") or text.get("torch_dtype") or ""),
        "layers": next(
            (text[n] for n in ("num_hidden_layers", "n_layer", "n_layers", "num_layers") if n in text), None
        ),
        "hidden_size": next((text[name] for name in ("hidden_size", "n_embd", "d_model") if name in text), None),
        "vocab_size": text.get("vocab_size"),
    }


def _sizes(heads: Heads) -> dict[str, Any]:
    names = ("family", "options", "num_heads", "hidden_size", "vocab_size", "is_conditioned", "weights_hash")
    guessed = heads.vocab_size if heads.token_ids is None else len(heads.token_ids)
    return {name: getattr(heads, name) for name in names} | {"draft_vocab_size": guessed}


def _memory(module: Any) -> dict[str, Any]:
    count, size, dtype = num_parameters(module)
    return {"parameters": count, "bytes": size, "dtype": dtype}


def _training(heads: Heads) -> dict[str, Any] | None:
    record = heads.training_record
    if not record:
        return None
    settings = record.get("settings")
    kept: dict[str, Any] = {name: record[name] for name in ("rows", "skipped_rows", "skipped_steps") if name in record}
    history = [dict(entry) for entry in history_of(record)]
    return {**kept, "settings": settings if isinstance(settings, dict) else {}, "history": history}


def _early_exit(folder: Path) -> dict[str, Any] | None:
    found = load_early_exit(folder)
    if found is None:
        return None
    return {"layer": found.layer, "num_layers": found.num_layers, "width": found.width, **_memory(found)}


def _compared(heads: Heads, model: PreTrainedModel) -> dict[str, Any]:
    """Whether the heads are this model's, and what a draft reads of memory beside a plain step of it."""
    projection = output_projection(model)
    sizes = {"hidden_size": projection.hidden_size, "vocab_size": projection.vocab_size}
    found: dict[str, Any] = {"name": str(model.config._name_or_path), **sizes, "agreement": None, "fits": None}
    if (heads.hidden_size, heads.vocab_size) != (projection.hidden_size, projection.vocab_size):
        return found | {"fits": False}
    if heads.base_fingerprint is not None:
        shares = agreement(heads.base_fingerprint, fingerprint(model))
        known = [share for share in shares.values() if share is not None]
        found |= {"agreement": shares, "fits": min(known) >= MIN_AGREEMENT if known else None}
    own = sum(p.numel() for p in heads.parameters())
    embedding = input_embedding(model)
    in_model = sum(p.numel() for p in model.parameters())
    if embedding is not projection.weight:
        in_model -= embedding.numel()  # a step reads a few rows of it
    heads = heads.bound(model, force=True)
    seen: list[Any] = []
    handle = projection.module.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    with torch.no_grad():
        hidden = torch.zeros(1, heads.hidden_size, dtype=model.dtype, device=next(heads.parameters()).device)
        heads.draft(hidden, torch.zeros(1, dtype=torch.int64, device=hidden.device))
    handle.remove()
    shared = projection.hidden_size * projection.vocab_size if seen else 0
    width = model.dtype.itemsize
    return found | {
        "dtype": str(model.dtype).removeprefix("torch."),
        "heads_bytes": own * width,
        "draft_bytes": (own + shared) * width,
        "step_bytes": in_model * width,
        "uses_projection": bool(seen),
    }
