"""4-D attention masks for token trees and for prefill, by position and never by slot.

Shapes: B rows, N new tokens (tree nodes or a chunk of the prompt), S visible cache slots. True means "may attend".
A committed token's slot equals its position; a node's slot is its row's length plus its index, while its position is
the row's length plus its depth, so windows and chunks are cut by position.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Locality:
    """What a layer type may see besides causality.

    Attributes:
        window: a token sees itself and the `window` - 1 positions before it; None: no window.
        chunk: a token sees only its own block of `chunk` positions; None: no blocks.
    """

    window: int | None = None
    chunk: int | None = None

    def allowed(self, sight: Sight) -> Tensor:
        """What a forward's new tokens may see: `sight.visible` and nothing outside the window or block, [B, N, S]."""
        if self.window is not None:
            return sight.visible & (sight.keys[:, None, :] > sight.queries[:, :, None] - self.window)
        if self.chunk is not None:
            keys = torch.div(sight.keys, self.chunk, rounding_mode="floor")
            queries = torch.div(sight.queries, self.chunk, rounding_mode="floor")
            return sight.visible & (keys[:, None, :] == queries[:, :, None])
        return sight.visible

    def binds(self, reach: int) -> bool:
        """Whether this can hide anything from a token when no position reaches `reach`."""
        limit = self.window if self.window is not None else self.chunk
        return limit is not None and reach > limit


@dataclass(frozen=True, kw_only=True)
class Sight:
    """Who may see what in one forward, before windows.

    Attributes:
        visible: which slot each new token may see by causality and tree, [B, N, S] bool.
        queries: positions of the new tokens, [B|1, N], by which windows and blocks are cut.
        tree: depths of the nodes [B, N] and committed tokens [B] while a tree is verified, None for a prompt.
    """

    visible: Tensor
    queries: Tensor
    tree: tuple[Tensor, Tensor] | None = None

    @property
    def reach(self) -> int:
        """S, the number of visible slots."""
        return self.visible.shape[2]

    @cached_property
    def keys(self) -> Tensor:
        """Positions of the visible slots, [B|1, S]; made only where something depends on them."""
        slots = torch.arange(self.reach, device=self.visible.device)
        if self.tree is None:
            return slots[None]
        depths, lengths = self.tree
        padded = torch.nn.functional.pad(depths, (0, 1))  # slots after a row's tree get the root's; they are masked
        nodes = lengths[:, None] + padded.gather(1, _node_of_slot(lengths, depths.shape[1], self.reach))
        return torch.where(_is_committed(lengths, self.reach), slots, nodes)


_FULL = Locality()
LAYER_TYPES = ("full_attention", "sliding_attention", "chunked_attention", "indexed_attention")


def localities(config: Any) -> dict[str, Locality]:
    """What each layer type of a model may see, from its text config; one entry when all layers are alike."""
    window = Locality(window=getattr(config, "sliding_window", None))
    chunk = Locality(chunk=getattr(config, "attention_chunk_size", None))
    kinds = dict(zip(LAYER_TYPES, (_FULL, window, chunk, _FULL), strict=True))
    types = getattr(config, "layer_types", None)
    return {"full_attention": window} if types is None else {name: kinds[name] for name in sorted(set(types))}


def tree_mask(ancestors: Tensor, lengths: Tensor, start: int | None, reach: int) -> Tensor:
    """Who sees which slot while a tree is verified: the whole committed row, then the node's own path.

    Args:
        ancestors: who sees whom inside the tree, [B, N, N] bool.
        lengths: committed tokens of each row, [B].
        start: the length of every row if all are equal, else None.
        reach: S, the number of visible slots.
    """
    batch_size, num_nodes, _ = ancestors.shape
    if start is not None:
        prefix = ancestors.new_ones(()).expand(batch_size, num_nodes, start)
        return torch.cat((prefix, ancestors), dim=2)
    padded = torch.nn.functional.pad(ancestors, (0, 1))  # one more column: the slots after a short row's tree
    seen = padded.gather(2, _node_of_slot(lengths, num_nodes, reach)[:, None, :].expand(-1, num_nodes, -1))
    return seen | _is_committed(lengths, reach)[:, None, :]


def causal_mask(positions: Tensor, reach: int) -> Tensor:
    """Who sees which slot in a chunk of a prompt, [B|1, N, S]: right-padded rows have slot = position."""
    return torch.arange(reach, device=positions.device) <= positions[:, :, None]


def _is_committed(lengths: Tensor, reach: int) -> Tensor:
    return torch.arange(reach, device=lengths.device) < lengths[:, None]


def _node_of_slot(lengths: Tensor, num_nodes: int, reach: int) -> Tensor:
    """The node in each slot, [B, S], and `num_nodes` for slots that hold none."""
    nodes = torch.arange(reach, device=lengths.device) - lengths[:, None]
    return nodes.masked_fill(nodes < 0, num_nodes).clamp_(max=num_nodes)


def model_masks(
    sight: Sight, localities: Mapping[str, Locality], additive: torch.dtype | None
) -> Tensor | dict[str, Tensor]:
    """What the model's forward takes as `attention_mask`: one 4-D mask, or one per layer type.

    Args:
        sight: who sees which slot without windows.
        localities: what each layer type may see; one entry: a single mask is returned.
        additive: the dtype of the scores the mask is added to (eager attention); None: the mask stays bool (sdpa).
    """
    masks: dict[str, Tensor] = {}
    made: dict[Locality, Tensor] = {}
    for name, locality in localities.items():
        bound = locality if locality.binds(sight.reach) else _FULL
        if bound not in made:
            mask = bound.allowed(sight)
            made[bound] = (mask if additive is None else as_additive(mask, additive))[:, None]
        masks[name] = made[bound]
    return masks if len(masks) > 1 else next(iter(masks.values()))


def as_additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where the mask is True, the dtype's most negative finite number elsewhere (-inf would make NaN rows)."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)
