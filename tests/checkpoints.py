"""Checkpoints of other systems, made from their documented layouts, and what their heads compute."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

HEADS, LAYERS, HIDDEN, VOCABULARY = 3, 2, 32, 97


@dataclass(frozen=True)
class Numbers:
    """The tensors of MEDUSA's heads, whatever they are called: weights and biases by head and layer, projections."""

    weights: list[list[Tensor]]
    biases: list[list[Tensor]]
    projections: list[Tensor]

    def logits(self, hidden: Tensor, *, biases: bool = True, shared: Tensor | None = None) -> Tensor:
        """z = x; z = z + SiLU(W z + b) per layer; then U z: [B, H] to [B, K, V]."""
        found = []
        for weights, bias_rows, projection in zip(self.weights, self.biases, self.projections, strict=True):
            z = hidden
            for weight, bias in zip(weights, bias_rows, strict=True):
                z = z + functional.silu(z @ weight.T + (bias if biases else 0))
            found.append(z @ (projection if shared is None else shared).T)
        return torch.stack(found, dim=1)


def make_numbers(layers: int = LAYERS, entries: int = VOCABULARY, dtype: torch.dtype = torch.float64) -> Numbers:
    """Random ones."""

    def random(*shape: int) -> Tensor:
        return (torch.randn(shape, dtype=torch.float64) * 0.2).to(dtype)

    return Numbers(
        weights=[[random(HIDDEN, HIDDEN) for _ in range(layers)] for _ in range(HEADS)],
        biases=[[random(HIDDEN) for _ in range(layers)] for _ in range(HEADS)],
        projections=[random(entries, HIDDEN) for _ in range(HEADS)],
    )


def named(
    numbers: Numbers, block: str, projection: str | None, *, biases: bool = True, bias: str = "bias"
) -> dict[str, Tensor]:
    """The tensors under a layout's names, with {h} the head, {l} the layer, {n} the number of layers."""
    tensors = {}
    for h, (weights, bias_rows, out) in enumerate(
        zip(numbers.weights, numbers.biases, numbers.projections, strict=True)
    ):
        for layer, (weight, row) in enumerate(zip(weights, bias_rows, strict=True)):
            tensors[f"{block.format(h=h, l=layer)}.weight"] = weight
            if biases:
                tensors[f"{block.format(h=h, l=layer)}.{bias}"] = row
        if projection is not None:
            tensors[f"{projection.format(h=h, n=len(weights))}.weight"] = out
    return tensors


V01 = {"block": "{h}.{l}.linear", "projection": "{h}.{n}"}
V2 = {"block": "{h}.{l}.linear", "projection": None}
V10 = {"block": "medusa_head.{h}.{l}.linear", "projection": "medusa_head.{h}.{n}"}
MODELOPT = {"block": "medusa_heads.{h}.{l}.linear", "projection": "medusa_heads.{h}.{n}"}
VLLM = {"block": "blocks.{h}.layers.{l}", "projection": "lm_heads.{h}"}
VLLM_PREFIXED = {"block": "medusa_heads.blocks.{h}.layers.{l}", "projection": "medusa_heads.lm_heads.{h}"}
TENSORRT = {"block": "medusa_heads.{h}.medusa_layers.{l}.linear", "projection": "medusa_heads.{h}.lm_head"}


def write(folder: Path, tensors: Mapping[str, Tensor], file: str, config: Mapping[str, Any] | None = None) -> Path:
    """A folder with one file of tensors, and its config.json if there is one."""
    folder.mkdir(parents=True, exist_ok=True)
    if file.endswith(".safetensors"):
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / file)
    else:
        torch.save(dict(tensors), folder / file)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def read(file: Path) -> dict[str, Tensor]:
    """The tensors of a file."""
    found: dict[str, Tensor] = load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)
    return found


def config_of(folder: Path) -> dict[str, Any]:
    """The folder's config.json."""
    found: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return found


def same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    """Whether two tables hold the same keys, and the same bytes under each."""
    return left.keys() == right.keys() and all(
        left[key].dtype == right[key].dtype and torch.equal(left[key], right[key]) for key in left
    )


def changed(tensors: Mapping[str, Tensor], change: Callable[[dict[str, Tensor]], object]) -> dict[str, Tensor]:
    """A copy with a change made to it."""
    copy = dict(tensors)
    change(copy)
    return copy
