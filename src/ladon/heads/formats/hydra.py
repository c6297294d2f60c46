"""Hydra's checkpoints (arXiv 2402.05109): the grounded `mlp` architecture; the others are named and refused."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ladon.errors import HeadsError
from ladon.heads.fingerprint import Fingerprint, samples_of
from ladon.heads.formats.files import Checkpoint
from ladon.heads.formats.keys import HEAD, KIND, LAYER, Layout, Parts, check_shapes, counts, some
from ladon.heads.hydra import HydraHeads

LAYOUT = Layout(
    name="Hydra",
    block=rf"hydra_mlp\.{HEAD}\.{LAYER}\.linear\.{KIND}",
    projection=rf"hydra_lm_head\.{HEAD}\.{KIND}",
    residual=rf"hydra_mlp\.{HEAD}\.{LAYER}\.res_connection\.{KIND}",
    single={"embedding": r"input_embed_fn\.weight"},
)


def refuse_other_archs(name: str, config: Mapping[str, Any], keys: Iterable[str]) -> None:
    """Raise `HeadsError` for an architecture of Hydra's that is not supported."""
    offset = config.get("hidden_state_offset") or 0
    if offset != 0:
        raise HeadsError(
            f"{name} holds Hydra heads with hidden_state_offset {offset}, which read another hidden state than the "
            "last; supported is 0"
        )
    arch = config.get("hydra_head_arch")
    if arch is None:
        marks = {"prefix_embeding_layer.": "prefix-mlp", "cross_attn": "cross-attn", "eagle": "eagle-attn"}
        arch = next((arch for mark, arch in marks.items() if any(mark in key for key in keys)), "mlp")
    if arch == "mlp" and config.get("grounded_heads") is not False:
        return
    kind = "mlp with ungrounded heads" if arch == "mlp" else repr(arch)
    raise HeadsError(f"{name} holds Hydra heads of the architecture {kind}; supported is 'mlp' with grounded heads")


def build(checkpoint: Checkpoint, layout: Layout, parts: Parts, vocab_size: int | None) -> HydraHeads:
    """The heads, on the CPU, in the file's dtype; the sizes come from the file.

    Raises:
        HeadsError: tensors missing or of a wrong shape, or heads that are not grounded.
    """
    num_heads, num_blocks = counts(checkpoint.name, parts.blocks)
    if not parts.residuals:
        raise HeadsError(
            f"{checkpoint.name} holds Hydra heads that are not grounded (they read no tokens: there is no "
            "res_connection); supported is 'mlp' with grounded heads"
        )
    projection = checkpoint.slots.get("hydra_lm_head.0.weight")
    vocab_size, hidden_size = projection.shape if projection is not None and len(projection.shape) == 2 else (0, 0)
    heads_in = [(head, (head + 2) * hidden_size) for head in range(num_heads)]
    blocks = {
        f"hydra_mlp.{head}.{layer}.linear": (hidden_size, hidden_size if layer else width)
        for head, width in heads_in
        for layer in range(num_blocks)
    }
    residuals = {f"hydra_mlp.{head}.0.res_connection": (hidden_size, width) for head, width in heads_in}
    projections = {f"hydra_lm_head.{head}": (vocab_size, hidden_size) for head, _ in heads_in}
    wanted = {
        f"{name}.{kind}": shape[:dims]
        for name, shape in (blocks | residuals | projections).items()
        for kind, dims in (("weight", 2), ("bias", 1))
    }
    missing = [key for key in wanted if key not in checkpoint.slots]
    extra = sorted({*parts.residuals.values(), *parts.projections.values()} - wanted.keys())
    if missing or extra:
        problems = [f"lacks {some(missing)}"] * bool(missing) + [f"should not hold {some(extra)}"] * bool(extra)
        raise HeadsError(f"{checkpoint.name} {' and '.join(problems)}; the file is incomplete or of another layout")
    check_shapes(checkpoint, wanted)
    with torch.device("meta"):
        heads = HydraHeads(num_heads=num_heads, hidden_size=hidden_size, vocab_size=vocab_size, num_blocks=num_blocks)
    heads.load_state_dict(_tensors(checkpoint, heads), assign=True)
    if "embedding" in parts.single:
        copy = checkpoint.read(parts.single["embedding"])
        heads.base_fingerprint = Fingerprint(embedding=samples_of([copy]))
    return heads


def _tensors(checkpoint: Checkpoint, heads: HydraHeads) -> dict[str, Tensor]:
    """What the file holds under the names of `HydraHeads`."""
    all_heads, read = range(heads.num_heads), checkpoint.weight

    def stacked(pattern: str) -> Tensor:
        return torch.stack([read(pattern.format(head)) for head in all_heads])

    tensors = {
        "first_bias": stacked("hydra_mlp.{}.0.linear.bias"),
        "residual_bias": stacked("hydra_mlp.{}.0.res_connection.bias"),
        "projection": stacked("hydra_lm_head.{}.weight"),
        "projection_bias": stacked("hydra_lm_head.{}.bias"),
    }
    for head in all_heads:
        tensors[f"first_weight.{head}"] = read(f"hydra_mlp.{head}.0.linear.weight")
        tensors[f"residual_weight.{head}"] = read(f"hydra_mlp.{head}.0.res_connection.weight")
    if heads.num_blocks > 1:
        layers = range(1, heads.num_blocks)
        for name, kind in (("block_weight", "weight"), ("block_bias", "bias")):
            tensors[name] = torch.stack([stacked(f"hydra_mlp.{{}}.{layer}.linear.{kind}") for layer in layers])
    return tensors
