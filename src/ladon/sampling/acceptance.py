"""Acceptance: which path of the verified tree the target itself would have said.

Shapes: B rows, N nodes, D the tree's greatest depth.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ladon.sampling.lossy import Admitted
from ladon.trees.token_tree import TokenTree, ancestor_mask, node_depths


@dataclass(frozen=True, kw_only=True, slots=True)
class Accepted:
    """The accepted path of each row.

    Attributes:
        root: token id of the tree's root, [B]: what stands before `tokens`.
        path: node indices, root first, [B, D + 1]; slots past `count` repeat the last accepted node.
        count: number of accepted nodes, root included, [B]: 1 to D + 1. Also the number of tokens emitted.
        tokens: what is said after each node of the path, [B, D + 1]: the accepted tokens after the root, then the bonus
            token at `count` - 1; slots past it are meaningless.
        last: index of the last accepted node, [B].
        bonus: the pick after it, [B]: the next root.
    """

    root: Tensor
    path: Tensor
    count: Tensor
    tokens: Tensor
    last: Tensor
    bonus: Tensor


def accepted_path(tree: TokenTree, tokens: Tensor, ancestors: Tensor, admitted: Admitted | None = None) -> Accepted:
    """The path that is accepted: what the target says, or the longest that a lossy rule admits.

    Args:
        tree: the verified tree.
        tokens: what the target says after each node, [B, N] int64.
        ancestors: the tree's ancestor mask [B, N, N].
        admitted: which nodes a lossy rule admits; None for exact acceptance.
    """
    if admitted is None:
        return longest_match(tree, tokens, ancestors)
    return longest_admitted(tree, tokens, admitted, ancestors)


def longest_match(tree: TokenTree, picks: Tensor, ancestors: Tensor | None = None) -> Accepted:
    """Follow the picks down the tree as far as it holds them.

    A node is accepted when every node on its path from the root is what the target picked after its parent. Siblings
    have distinct tokens, so the accepted nodes are one path; parents precede children, so the path is the accepted
    nodes in slot order. Padding slots are never accepted, whatever token they hold (a reference implementation pads
    with token 0 and then accepts it).

    Args:
        tree: the verified tree.
        picks: what the target says after each node, [B, N] int64.
        ancestors: the tree's ancestor mask [B, N, N], if it is at hand.

    Returns:
        The accepted paths; no host transfer.
    """
    if tree.num_nodes == 1:
        return _root_alone(tree.tokens, picks)
    if ancestors is None:
        ancestors = ancestor_mask(tree.parents, tree.max_depth)
    said = picks.gather(1, tree.parents[:, 1:])
    right = (tree.tokens[:, 1:] == said) & (tree.log_probs[:, 1:] > -torch.inf)
    accepted = (ancestors[:, :, 1:] <= right[:, None]).all(-1)  # on booleans, <= is "implies"
    nodes = torch.arange(tree.num_nodes, device=picks.device)
    last = (accepted * nodes).amax(1, keepdim=True)
    path = torch.where(accepted, nodes, last).topk(tree.max_depth + 1, largest=False).values
    return Accepted(
        root=tree.tokens[:, 0],
        path=path,
        count=accepted.sum(1),
        tokens=picks.gather(1, path),
        last=last[:, 0],
        bonus=picks.gather(1, last)[:, 0],
    )


def longest_admitted(tree: TokenTree, picks: Tensor, admitted: Admitted, ancestors: Tensor) -> Accepted:
    """The longest path of admitted nodes; of several, the likeliest, then the first. Not exact (`lossy`).

    Args:
        tree: the verified tree.
        picks: what the target says after each node, [B, N] int64; only the one after the last node is said.
        admitted: which nodes may be accepted.
        ancestors: the tree's ancestor mask [B, N, N].
    """
    may = admitted.nodes[:, 1:] & (tree.log_probs[:, 1:] > -torch.inf)
    reached = (ancestors[:, :, 1:] <= may[:, None]).all(-1)
    depths = node_depths(ancestors)
    longest = (depths * reached).amax(1, keepdim=True)
    on_path = ancestors[:, :, 1:] & reached[:, :, None]
    likelihood = torch.where(on_path, admitted.log_probs[:, None, 1:], 0.0).sum(-1)
    last = likelihood.masked_fill(~reached | (depths < longest), -torch.inf).argmax(1, keepdim=True)
    nodes = torch.arange(tree.num_nodes, device=picks.device)
    mine = ancestors.gather(1, last[:, :, None].expand(-1, -1, tree.num_nodes))[:, 0]
    path = torch.where(mine, nodes, last).topk(tree.max_depth + 1, largest=False).values
    following = torch.cat([path[:, 1:], last], dim=1)
    tokens = torch.where(path == last, picks.gather(1, path), tree.tokens.gather(1, following))
    return Accepted(
        root=tree.tokens[:, 0],
        path=path,
        count=longest[:, 0] + 1,
        tokens=tokens,
        last=last[:, 0],
        bonus=picks.gather(1, last)[:, 0],
    )


def _root_alone(root: Tensor, picks: Tensor) -> Accepted:
    """Plain decoding's case, where there is nothing to compare: its steps are short, and 15 small operations show."""
    first = torch.zeros_like(picks)
    return Accepted(
        root=root[:, 0],
        path=first,
        count=torch.ones_like(picks[:, 0]),
        tokens=picks,
        last=first[:, 0],
        bonus=picks[:, 0],
    )
