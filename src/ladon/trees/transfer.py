"""The one place where the host reads the device, and the way of trees to the host and back.

Shapes: B sequences, N node slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ladon.trees.token_tree import TokenTree, ancestor_mask, node_depths


def to_host(values: Tensor) -> list[list[int]]:
    """An int64 table [B, n] as lists. Waits for the device; everything else that decoding does must not."""
    rows: list[list[int]] = values.tolist()
    return rows


def host_values(values: Tensor) -> list[Any]:
    """The numbers of a tensor that the host itself has made, [n] or nested: nothing is waited for."""
    assert values.device.type == "cpu"
    found: list[Any] = values.tolist()
    return found


_FIELDS = 4


def flat(tree: TokenTree) -> Tensor:
    """A tree for the transfer, [4 x B x N] int64."""
    return _as_integers(tree).flatten()


def flat_size(tree: TokenTree) -> int:
    """How many numbers `flat` gives."""
    return _FIELDS * tree.batch_size * tree.num_nodes


def on_host(values: Sequence[int], tree: TokenTree) -> TokenTree:
    """The tree, from what the host got of `flat`."""
    table = torch.tensor(values, device="cpu").reshape(_FIELDS, tree.batch_size, tree.num_nodes)
    return _from_integers(table, tree.max_depth)


def to_device(tree: TokenTree, device: torch.device) -> TokenTree:
    """Trees from the host, in one copy."""
    if device.type == "cpu":
        return tree
    return _from_integers(_as_integers(tree).to(device, non_blocking=True), tree.max_depth)


def _as_integers(tree: TokenTree) -> Tensor:
    """All about a tree, [4, B, N] int64."""
    depths = node_depths(ancestor_mask(tree.parents, tree.max_depth)) if tree.depths is None else tree.depths
    bits = tree.log_probs.float().contiguous().view(torch.int32).long()
    return torch.stack([tree.tokens, tree.parents, depths, bits])


def _from_integers(values: Tensor, max_depth: int) -> TokenTree:
    tokens, parents, depths, bits = values.unbind()
    log_probs = bits.to(torch.int32).view(torch.float32)
    return TokenTree(tokens=tokens, parents=parents, log_probs=log_probs, max_depth=max_depth, depths=depths)
