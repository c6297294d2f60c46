"""Heads written as other systems read them: exactly, but for a correction of theirs, or not at all."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ladon.errors import HeadsError
from ladon.heads.base import Heads
from ladon.heads.formats.files import CONFIG_FILE, SAFE, new_folder, read_json, write_json
from ladon.heads.medusa import MedusaHeads
from ladon.heads.model_parts import OutputProjection, output_projection
from ladon.trees.fixed_tree import FixedTree

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MOST_DRAFTS = 63  # nodes below the root that TensorRT-LLM makes room for unless told otherwise
CHOICES_FILE = "medusa_choices.json"


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What one export works with."""

    heads: MedusaHeads
    name: str
    model: PreTrainedModel | None
    tree: FixedTree | None

    @property
    def base_name(self) -> str:
        """Where the base comes from, for the configs that name it."""
        name = self.heads.base_name or (str(self.model.config._name_or_path) if self.model is not None else "")
        if not name:
            warnings.warn(
                f"these heads do not know the name of their model; put it into {CONFIG_FILE}, base_model_name_or_path",
                stacklevel=2,
            )
        return name


def export_heads(
    heads: Heads, name: str, out: Path, *, model: PreTrainedModel | None = None, tree: FixedTree | None = None
) -> list[str]:
    """Write heads in a format.

    Args:
        heads: in the dtype they are to be written in.
        name: one of `FORMATS`.
        out: a new folder.
        model: the base; needed by formats that hold a copy of its output projection, or the whole of it.
        tree: for `medusa_choices` of TensorRT-LLM; None is the best tree of the heads' calibration, if they have one.

    Returns:
        Names of the files.

    Raises:
        HeadsError: the format cannot hold these heads, or the base is missing or another one's.
    """
    if name not in FORMATS:
        raise HeadsError(f"format {name!r} is unknown; known: {', '.join(FORMATS)}")
    if model is not None:
        heads.check_base(model)
    with new_folder(out) as folder:
        if name == "own":
            heads.save(folder)
        else:
            _WRITERS[name](_Job(heads=_as_medusa(heads, name), name=name, model=model, tree=tree), folder)
    return sorted(path.name for path in out.iterdir())


def _write_medusa(job: _Job, folder: Path) -> None:
    """What MEDUSA's first code loads: a state dict by torch.save, a projection for each head."""
    _write_numbered(job, folder / "medusa_lm_head.pt", own=True)


def _write_medusa_v2(job: _Job, folder: Path) -> None:
    """What MEDUSA's trainer writes: the blocks alone."""
    if job.heads.projection is not None:
        raise HeadsError(
            "medusa-v2 has no projections, and these heads have their own, which would be lost. Use --format medusa"
        )
    _write_numbered(job, folder / f"medusa_lm_head{SAFE}", own=False, version="2")


def _write_tgi(job: _Job, folder: Path) -> None:
    """TGI reads safetensors; projections may be left out only where each head has one block."""
    is_own = job.heads.projection is not None or job.heads.num_blocks > 1
    # In the config no `architectures`: with it TGI drops the heads silently.
    _write_numbered(job, folder / f"medusa_lm_head{SAFE}", own=is_own)


def _write_tensorrt(job: _Job, folder: Path) -> None:
    """What TensorRT-LLM's convert_checkpoint takes as `--medusa_model_dir`; it renames the tensors itself."""
    _write_numbered(job, folder / "medusa_lm_head.pt", own=True, num_medusa_heads=job.heads.num_heads)
    tree = job.tree or _calibrated_tree(job.heads)
    if tree is None:
        warnings.warn(f"no {CHOICES_FILE}: the heads have no calibration; give --tree FILE, or calibrate", stacklevel=2)
    else:
        tree.check_fits(job.heads.num_heads, job.heads.vocab_size)
        tree.save(folder / CHOICES_FILE)


def _write_vllm(job: _Job, folder: Path) -> None:
    """A draft model of vLLM's: blocks, projections or one shared copy of the base's, and the draft vocabulary."""
    heads, tensors = job.heads, dict[str, Tensor]()
    for head in range(heads.num_heads):
        tensors |= _blocks(heads, head, "blocks.{}.layers.{}")
    if heads.projection is None:
        tensors["lm_heads.0.weight"] = _base_projection(job)
    else:
        tensors |= {f"lm_heads.{head}.weight": weight for head, weight in enumerate(heads.projection)}
    if heads.token_map is not None:
        tensors["token_map"] = heads.token_map
    _save(folder / "model.safetensors", tensors)
    write_json(
        folder / CONFIG_FILE,
        {
            "model_type": "medusa",
            "architectures": ["MedusaModel"],
            "hidden_size": heads.hidden_size,
            "vocab_size": heads.vocab_size,
            "num_heads": heads.num_heads,
            "num_hidden_layers": heads.num_blocks,
            "max_paths": 64,
            "topk": 10,
            "truncated_vocab_size": heads.draft_vocab_size or None,
            "medusa_fc_bias": True,  # without it vLLM leaves the biases out and says nothing
            "original_lm_head": heads.projection is None,
            "torch_dtype": str(heads.block_weight.dtype).removeprefix("torch."),
        },
    )


def _write_modelopt(job: _Job, folder: Path) -> None:
    """Model-Optimizer's one folder: the base with the heads beside it."""
    model = _needed_model(job)
    model.save_pretrained(folder)
    config, index = read_json(folder), read_json(folder, "model.safetensors.index.json")
    if not index:
        from safetensors import safe_open

        with safe_open(folder / "model.safetensors", framework="pt") as opened:
            index = {"metadata": {}, "weight_map": dict.fromkeys(opened.keys(), "model.safetensors")}
    tensors = _numbered(job, "medusa_heads.", own=True)
    _save(folder / "medusa_heads.safetensors", tensors)
    index["weight_map"] |= dict.fromkeys(tensors, "medusa_heads.safetensors")
    index["metadata"].pop("total_size", None)  # of the base alone; nothing reads it
    write_json(folder / "model.safetensors.index.json", index)
    heads = {"num_medusa_heads": job.heads.num_heads, "num_medusa_layers": job.heads.num_blocks}
    write_json(folder / CONFIG_FILE, config | {"medusa": heads})


_WRITERS: Mapping[str, Callable[[_Job, Path], None]] = {
    "medusa": _write_medusa,
    "medusa-v2": _write_medusa_v2,
    "tgi": _write_tgi,
    "vllm": _write_vllm,
    "tensorrt-llm": _write_tensorrt,
    "modelopt": _write_modelopt,
}
FORMATS = ("own", *_WRITERS)


def _as_medusa(heads: Heads, name: str) -> MedusaHeads:
    """The heads, if their family and vocabulary fit; every reason why not is one line."""
    if not isinstance(heads, MedusaHeads):
        raise HeadsError(
            f"{heads.family} heads cannot be written as {name}, which holds MEDUSA's blocks of {heads.hidden_size} x "
            f"{heads.hidden_size} alone. Use --format own, or train heads of the family medusa"
        )
    if heads.token_map is not None and name != "vllm":
        raise HeadsError(
            f"these heads guess {heads.draft_vocab_size} of {heads.vocab_size} tokens, and {name} cannot say which. "
            "Use --format vllm or own"
        )
    if heads.own_bias is not None and heads.own_bias.any():
        raise HeadsError(
            f"the projections of these heads have biases, and {name} has no place for them; they would be lost. Use "
            "--format own"
        )
    if heads.correction is not None:
        warnings.warn(
            f"{name} has no place for the {heads.correction.title} of these heads: it is left out, and they guess each "
            "by itself there",
            stacklevel=3,
        )
    return heads


def _write_numbered(job: _Job, path: Path, *, own: bool, **more: Any) -> None:
    """The heads in one file, and beside it a config as MEDUSA's, which says `more`."""
    _save(path, _numbered(job, "", own=own))
    config = {
        "base_model_name_or_path": job.base_name,
        "medusa_num_heads": job.heads.num_heads,
        "medusa_num_layers": job.heads.num_blocks,
        "hidden_size": job.heads.hidden_size,
        "vocab_size": job.heads.vocab_size,
    }
    write_json(path.with_name(CONFIG_FILE), config | more)


def _numbered(job: _Job, prefix: str, *, own: bool) -> dict[str, Tensor]:
    """Blocks, and the projections after them if `own`, as `{head}.{layer}`."""
    heads, tensors = job.heads, dict[str, Tensor]()
    projections: Any = heads.projection
    if own and projections is None:
        projections = [_base_projection(job)] * heads.num_heads
    for head in range(heads.num_heads):
        tensors |= _blocks(heads, head, prefix + "{}.{}.linear")
        if own:
            tensors[f"{prefix}{head}.{heads.num_blocks}.weight"] = projections[head]
    return tensors


def _blocks(heads: MedusaHeads, head: int, name: str) -> dict[str, Tensor]:
    """The blocks of one head, by `name` with its number and that of the block."""
    kinds = {"weight": heads.block_weight, "bias": heads.block_bias}
    return {
        f"{name.format(head, layer)}.{kind}": stack[layer, head]
        for layer in range(heads.num_blocks)
        for kind, stack in kinds.items()
    }


def _base_projection(job: _Job) -> Tensor:
    """The base's output projection [V, H], in the heads' dtype if that loses nothing."""
    target: OutputProjection = output_projection(_needed_model(job))
    if target.weight.shape != (job.heads.vocab_size, job.heads.hidden_size) or target.weight.is_meta:
        raise HeadsError(
            f"the model's output projection is packed to {list(target.weight.shape)} (quantised) and cannot be copied. "
            "Give the unquantised model"
        )
    bias = getattr(target.module, "bias", None)
    if bias is not None and bias.any():
        raise HeadsError(
            f"the model's output projection has a bias, and {job.name} has no place for it. Use --format own"
        )
    weight = target.weight.detach().cpu()
    cast = weight.to(job.heads.block_weight.dtype)
    return cast if torch.equal(cast.to(weight.dtype), weight) else weight


def _needed_model(job: _Job) -> PreTrainedModel:
    if job.model is None:
        holds = "the model and its heads" if job.name == "modelopt" else "a copy of the model's output projection"
        raise HeadsError(f"{job.name} holds {holds}, for these heads at least. Give the model: --model NAME")
    return job.model


def _calibrated_tree(heads: Heads) -> FixedTree | None:
    """The largest tree of the calibration that TensorRT-LLM has room for."""
    trees = heads.calibration.fixed_trees if heads.calibration is not None else {}
    sizes = [int(size) for size in trees if int(size) <= MOST_DRAFTS + 1]
    return FixedTree(tuple(tuple(path) for path in trees[str(max(sizes))])) if sizes else None


def _save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    # Copies: views of one stack would be stored as the whole stack each, and safetensors takes no shared memory.
    copies = {
        key: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()
    }
    if path.suffix == SAFE:
        save_file(copies, path, metadata={"format": "pt"})
        return
    try:
        torch.save(copies, path)
    except RuntimeError as error:  # what torch raises when the disk is full
        raise OSError(str(error).splitlines()[0]) from error
