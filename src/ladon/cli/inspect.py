"""`ladon inspect`: what a checkpoint of heads is, what it fits, what it costs, and what is known about it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from ladon.cli import options
from ladon.cli.output import OutConsole, print_json
from ladon.config import AUTO_BUDGET
from ladon.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ladon.heads import Heads
    from ladon.heads.formats.files import Checkpoint
    from ladon.trees.fixed_tree import FixedTree, TreeSize

_PathArgument = Annotated[
    str | None,
    Argument(
        metavar="PATH",
        help="Folder, file or hub id of heads in any format that Ladon reads, or of a model; demo: the bundled heads.",
        show_default=False,
    ),
]
_BaseOption = Annotated[
    str | None,
    Option("--model", metavar="NAME", help="Also say whether the heads are this model's (demo, a folder or a hub id)."),
]
_NodesOption = Annotated[
    int, Option("--nodes", metavar="N", min=1, help="Size of the best fixed tree that is drawn, root included.")
]
_TreeOption = Annotated[
    Path | None,
    Option("--tree", metavar="FILE", help="Draw the tree in this file, in any notation of trees; it needs no PATH."),
]


def inspect(
    path: _PathArgument = None,
    model: _BaseOption = None,
    nodes: _NodesOption = AUTO_BUDGET,
    tree: _TreeOption = None,
    dtype: options.DtypeOption = "auto",
    trust_remote_code: options.TrustOption = False,
    as_json: options.JsonOption = False,
) -> None:
    """Say what a checkpoint of heads is: format, sizes, memory, training, calibration, and its best fixed tree.

    For example:

        ladon inspect demo
        ladon inspect path/to/heads --model path/to/model --nodes 32
        ladon inspect --tree tree.json
    """
    if path is None and tree is None:
        raise InputError("nothing to inspect; give PATH, a folder of heads or of a model, or --tree FILE")
    shape = None if tree is None else _read_tree(tree)
    about: dict[str, Any] = {"kind": "tree"}
    if path is not None:
        base = None if model is None else _load_base(model, dtype, trust_remote_code)
        about = describe(path, base)
    elif model is not None:
        raise InputError("--model is the model of heads; give PATH, their folder, too")
    rates = (about.get("calibration") or {}).get("hit_rates", ())
    about["tree"] = _tree(shape, rates, nodes)
    from ladon.cli.inspect_view import show

    if not as_json:
        show(about, OutConsole(highlight=False))
    else:
        print_json(about)


def _read_tree(path: Path) -> FixedTree | TreeSize:
    from ladon.trees.fixed_tree import read_tree

    if not path.is_file():
        raise InputError(f"there is no tree file {options.shortened(str(path))}; give a JSON file of rank paths")
    return read_tree(path)


def _load_base(model: str, dtype: str, trust_remote_code: bool) -> PreTrainedModel:
    from ladon.cli.loading import load

    return load(model, None, dtype=dtype, device="cpu", trust_remote_code=trust_remote_code).model


def describe(path: str, model: PreTrainedModel | None = None) -> dict[str, Any]:
    """What lies at a path, as JSON values.

    Args:
        path: "demo", a folder, a file or a hub id.
        model: the target to compare with.

    Raises:
        HeadsError: nothing there, no checkpoint, or a damaged one.
    """
    from ladon.cli.loading import DEMO
    from ladon.demo.bundled import demo_path
    from ladon.heads.checkpoint import find_heads, is_own
    from ladon.heads.factory import read_heads
    from ladon.heads.formats.detect import LAYOUTS, detect
    from ladon.heads.formats.files import open_checkpoint
    from ladon.heads.formats.keys import sort_keys

    place = demo_path() / "heads" if path == DEMO else find_heads(path)
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
    return {
        "family": heads.family,
        "options": heads.options,
        "num_heads": heads.num_heads,
        "hidden_size": heads.hidden_size,
        "vocab_size": heads.vocab_size,
        "draft_vocab_size": heads.vocab_size if heads.token_ids is None else len(heads.token_ids),
        "is_conditioned": heads.is_conditioned,
        "weights_hash": heads.weights_hash,
    }


def _memory(module: Any) -> dict[str, Any]:
    from ladon.heads.card import num_parameters

    count, size, dtype = num_parameters(module)
    return {"parameters": count, "bytes": size, "dtype": dtype}


def _training(heads: Heads) -> dict[str, Any] | None:
    from ladon.heads.card import history_of

    record = heads.training_record
    if not record:
        return None
    settings = record.get("settings")
    kept: dict[str, Any] = {name: record[name] for name in ("rows", "skipped_rows", "skipped_steps") if name in record}
    history = [dict(entry) for entry in history_of(record)]
    return {**kept, "settings": settings if isinstance(settings, dict) else {}, "history": history}


def _early_exit(folder: Path) -> dict[str, Any] | None:
    from ladon.heads.early_exit import load_early_exit

    found = load_early_exit(folder)
    if found is None:
        return None
    return {"layer": found.layer, "num_layers": found.num_layers, "width": found.width, **_memory(found)}


def _compared(heads: Heads, model: PreTrainedModel) -> dict[str, Any]:
    """Whether the heads are this model's, and what a draft reads of memory beside a plain step of it."""
    import torch

    from ladon.heads.fingerprint import MIN_AGREEMENT, agreement, fingerprint
    from ladon.heads.model_parts import input_embedding, output_projection
    from ladon.target.hooks import projection_inputs

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
    heads.bind(model, force=True)
    with torch.no_grad(), projection_inputs(projection.module) as seen:
        heads.draft(torch.zeros(1, heads.hidden_size, dtype=model.dtype), torch.zeros(1, dtype=torch.int64))
    shared = projection.weight.numel() if seen else 0
    width = model.dtype.itemsize
    return found | {
        "dtype": str(model.dtype).removeprefix("torch."),
        "heads_bytes": own * width,
        "draft_bytes": (own + shared) * width,
        "step_bytes": in_model * width,
        "uses_projection": bool(seen),
    }


def _tree(shape: FixedTree | TreeSize | None, rates: Any, nodes: int) -> dict[str, Any] | None:
    """The tree to draw: that of the file, or the best one for the hit rates."""
    from ladon.trees.fixed_tree import FixedTree, best_fixed_tree
    from ladon.viz.fixed_tree import path_values

    is_best = shape is None
    if shape is None:
        if not rates:
            return None
        shape = best_fixed_tree(rates, nodes)
    if not isinstance(shape, FixedTree):
        return {"budget": shape.budget, "num_candidates": shape.num_candidates, "depth": shape.depth, "paths": None}
    expected = round(1 + sum(path_values(shape, rates).values()), 4) if rates else None
    paths = [list(path) for path in shape.paths]
    sizes = {"budget": shape.num_nodes, "depth": shape.max_depth}
    return {**sizes, "is_best": is_best, "expected_tokens": expected, "paths": paths}
