"""Acceptance: which path of the verified tree the target itself would have said.

Shapes: B rows, N nodes, D the tree's greatest depth.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ladon.tree import TokenTree, ancestor_mask, node_depths


@dataclass(frozen=True, kw_only=True, slots=True)
class Accepted:
    """The accepted path of each row.

    Attributes:
        path: node indices, root first, [B, D + 1]; slots past `count` repeat the last accepted node.
        count: number of accepted nodes, root included, [B]: 1 to D + 1. Also the number of tokens emitted.
        tokens: the picks along the path, [B, D + 1]: the accepted tokens after the root, then the bonus token at
            `count` - 1; slots past it are meaningless.
        last: index of the last accepted node, [B].
        bonus: the pick after it, [B]: the next root.
    """

    path: Tensor
    count: Tensor
    tokens: Tensor
    last: Tensor
    bonus: Tensor


def longest_match(
    tree: TokenTree, picks: Tensor, ancestors: Tensor | None = None, depths: Tensor | None = None
) -> Accepted:
    """Follow the picks down the tree as far as it holds them.

    A node is accepted when every node on its path from the root is what the target picked after its parent. Siblings
    have distinct tokens, so the accepted nodes are one path. Padding slots are never accepted, whatever token they
    hold (a reference implementation pads with token 0 and then accepts it).

    Args:
        tree: the verified tree.
        picks: what the target says after each node, [B, N] int64.
        ancestors: the tree's ancestor mask [B, N, N], if it is at hand.
        depths: depth of each node [B, N], likewise.

    Returns:
        The accepted paths; no host transfer.
    """
    if tree.num_nodes == 1:
        return _root_alone(picks)
    if ancestors is None:
        ancestors = ancestor_mask(tree.parents, tree.max_depth)
    if depths is None:
        depths = node_depths(ancestors)
    batch_size, num_nodes = picks.shape
    said = picks.gather(1, tree.parents.clamp(min=0))
    wrong = (tree.tokens != said) | (tree.log_probs == -torch.inf)
    wrong[:, 0] = False
    accepted = ~(ancestors & wrong[:, None, :]).any(-1)
    count = accepted.sum(1)
    # Accepted nodes have depths 0, 1, ...: each is written to the slot of its depth, all others to a slot thrown away.
    slots = depths.masked_fill(~accepted, tree.max_depth + 1)
    nodes = torch.arange(num_nodes, device=picks.device).expand(batch_size, -1)
    path = nodes.new_zeros(batch_size, tree.max_depth + 2).scatter_(1, slots, nodes)[:, :-1]
    last = path.gather(1, count[:, None] - 1)
    steps = torch.arange(tree.max_depth + 1, device=picks.device)
    path = torch.where(steps < count[:, None], path, last)
    tokens = picks.gather(1, path)
    return Accepted(path=path, count=count, tokens=tokens, last=last[:, 0], bonus=picks.gather(1, last)[:, 0])


def _root_alone(picks: Tensor) -> Accepted:
    """Plain decoding's case, where there is nothing to compare: its steps are short, and 25 small operations show."""
    first = torch.zeros_like(picks)
    return Accepted(path=first, count=torch.ones_like(picks[:, 0]), tokens=picks, last=first[:, 0], bonus=picks[:, 0])
