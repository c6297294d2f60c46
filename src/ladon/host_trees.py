"""Trees on the host: their way there, with the one transfer of a step, and back.

Shapes: B rows, N node slots.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ladon.tree import TokenTree, ancestor_mask, node_depths

_FIELDS = 4


def flat(tree: TokenTree) -> Tensor:
    """A tree for the transfer, [4 x B x N] int64."""
    return _as_integers(tree).flatten()


def flat_size(tree: TokenTree) -> int:
    """How many numbers `flat` gives."""
    return _FIELDS * tree.batch_size * tree.num_nodes


def on_host(values: Sequence[int], tree: TokenTree) -> TokenTree:
    """The tree, from what the host got of `flat`."""
    table = torch.tensor(values).reshape(_FIELDS, tree.batch_size, tree.num_nodes)
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
