"""Which nodes of a token tree go on when it is pruned in the middle of a forward, and the tree that they are.

Shapes: B rows, N nodes before, M nodes after. A score is the log of how likely a node is, given its parent: 0 for the
root, at most 0 for others, -inf for padding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ladon.tree import TokenTree

LOWEST = -1e4  # the score of a real node, however unlikely: padding is below it, and a sum of them is finite
_REJECTED = -1e8  # below every sum of scores


def node_scores(scores: Tensor, tree: TokenTree) -> Tensor:
    """Scores [B, N] that compare: NaN and -inf of real nodes become `LOWEST`, padding -inf, the root 0."""
    scores = scores.float().nan_to_num(nan=LOWEST, neginf=LOWEST).clamp(LOWEST, 0.0)
    scores = scores.masked_fill(tree.log_probs == -torch.inf, -torch.inf)
    scores[:, 0] = 0.0
    return scores


def path_scores(scores: Tensor, ancestors: Tensor, passed: Tensor | None = None) -> Tensor:
    """Sums of the scores from the root to each node, [B, N]; never above the parent's, not even by rounding.

    Args:
        scores: as `node_scores` gives them, [B, N].
        ancestors: who sees whom, [B, N, N] bool.
        passed: nodes that are not rejected, [B, N]. A rejected node goes with its subtree: whatever is below it comes
            after every node that has no rejected ancestor.
    """
    if passed is not None:
        scores = torch.where(passed, scores, scores + _REJECTED)
    sums = torch.where(ancestors, scores[:, None], 0.0).sum(-1)
    return torch.where(ancestors, sums[:, None], torch.inf).amin(-1)


def best_nodes(paths: Tensor, num_nodes: int) -> Tensor:
    """The best M nodes of each row by path score, in the order of the tree, [B, M] int64.

    A parent's score is at least its child's and its index is smaller, so the stable order puts it first: no node is
    kept without its parent. The root is always kept; padding only where there is nothing else.
    """
    order = paths.sort(dim=1, descending=True, stable=True).indices
    return order[:, :num_nodes].sort(dim=1).values


def is_accepted(paths: Tensor, least: float | None) -> Tensor:
    """Which nodes have a path score of at least `least`, or, with None, no rejected node on their path, [B, N] bool."""
    return paths >= (_REJECTED / 2 if least is None else least)


def cut_tree(tree: TokenTree, ancestors: Tensor, nodes: Tensor) -> tuple[TokenTree, Tensor]:
    """The tree of the nodes [B, M] that `best_nodes` chose, parents renumbered, and its ancestor mask [B, M, M]."""
    num_nodes = nodes.shape[1]
    numbers = torch.arange(num_nodes, device=nodes.device).expand_as(nodes)
    new_number = torch.zeros_like(tree.parents).scatter_(1, nodes, numbers)
    parents = new_number.gather(1, tree.parents.gather(1, nodes).clamp(min=0))
    parents[:, 0] = -1
    survivors = TokenTree(
        tokens=tree.tokens.gather(1, nodes),
        parents=parents,
        log_probs=tree.log_probs.gather(1, nodes),
        max_depth=min(tree.max_depth, num_nodes - 1),
    )
    rows = ancestors.gather(1, nodes[:, :, None].expand(-1, -1, ancestors.shape[2]))
    return survivors, rows.gather(2, nodes[:, None].expand(-1, num_nodes, -1))
