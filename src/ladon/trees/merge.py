"""Two trees of one root made one: the union of their paths, with probabilities that mix both, the best nodes kept.

Shapes: B rows, N node slots of the first tree, M of the second.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ladon.trees.token_tree import TokenTree, ancestor_mask, node_depths

_UNIT = 2**32  # logarithms are summed as integers: exact in any order, so that no child exceeds its parent
_LEAST = -(2.0**20)  # logarithm that stands for -inf
_TOKENS = 2**40  # more than there are tokens in any vocabulary


def merge(tree: TokenTree, other: TokenTree, share: Tensor, num_nodes: int) -> TokenTree:
    """The best nodes of two trees together.

    Nodes with the same path of tokens are one. Below a node that both trees continue, an edge has the probability
    share x p + (1 - share) x q, where p and q are what the trees say of it, 0 if they lack it. A tree that ends at a
    node, or does not have it, says nothing of what follows: there the other one is taken at its word. So the children
    of a node have no more probability than it has itself.

    Args:
        tree: one tree per row, [B, N]; slots may be in any order in which parents precede children.
        other: the other one, [B, M], with the same roots.
        share: of `tree` in the edges below each node of `other`, [B, M], 0 to 1.
        num_nodes: slots of the outcome, root included; those beyond what both trees have are padding.

    Returns:
        [B, `num_nodes`], best first; of nodes that are as probable, those of `tree` come first, each in its order.
        A row where one tree is its root alone comes out as the other tree, its nodes sorted.

    Cost: no loop over nodes or rows; O((N + M) log (N + M)) per row and depth of the shallower tree.
    """
    place = _places(tree, other)
    size, width = tree.num_nodes, tree.num_nodes + other.num_nodes
    own_slots = torch.arange(size, width, device=place.device)
    home = torch.where(place < 0, own_slots, place)  # slot of each node of `other` among the nodes of both

    def of_other(values: Tensor) -> Tensor:
        return values.new_zeros(values.shape[0], width).scatter_(1, home, values)

    first, second = pad(_edges(tree), (0, other.num_nodes)), of_other(_edges(other))
    parents = torch.cat([tree.parents, home.gather(1, other.parents.clamp(min=0))], dim=1).clamp_(min=0)
    first_speaks, second_speaks = _continued(first, parents), _continued(second, parents)
    share = of_other(share.to(first.dtype)).masked_fill_(~first_speaks, 0.0).masked_fill_(~second_speaks, 1.0)
    share = share.gather(1, parents)
    log_probs = _path_sums(share * first + (1 - share) * second, parents, max(tree.max_depth, other.max_depth))
    return _best(log_probs, parents, tree, other, num_nodes)


def _places(tree: TokenTree, other: TokenTree) -> Tensor:
    """The slot in `tree` of each node of `other`, [B, M]; -1 where it has no such path. Depth by depth."""
    is_real = tree.log_probs > -torch.inf
    is_real[:, 0] = False  # the root is found without
    keys = torch.where(is_real, tree.parents * _TOKENS + tree.tokens, -2 * _TOKENS)
    keys, slots = keys.sort(dim=1)
    is_wanted = other.log_probs > -torch.inf
    is_wanted[:, 0] = False
    parents = other.parents.clamp(min=0)
    place = torch.full_like(other.tokens, -1)
    place[:, 0] = 0
    for _ in range(min(tree.max_depth, other.max_depth)):
        above = place.gather(1, parents)
        wanted = above * _TOKENS + other.tokens
        at = torch.searchsorted(keys, wanted).clamp(max=keys.shape[1] - 1)
        found = (keys.gather(1, at) == wanted) & (above >= 0) & is_wanted
        place = torch.where(found, slots.gather(1, at), place)
    return place


def _edges(tree: TokenTree) -> Tensor:
    """Probability of each node given its parent, [B, N] float64; 0 for the root, which has none, and for padding."""
    log_probs = tree.log_probs.double()
    above = log_probs.gather(1, tree.parents.clamp(min=0))
    edges = torch.where(log_probs > -torch.inf, log_probs - above, -torch.inf).exp_().clamp_(max=1.0)
    edges[:, 0] = 0.0
    return edges


def _continued(edges: Tensor, parents: Tensor) -> Tensor:
    """Of each node, whether one of these edges leads on from it."""
    return torch.zeros_like(edges).scatter_add_(1, parents, edges) > 0.0


def _path_sums(edges: Tensor, parents: Tensor, max_depth: int) -> Tensor:
    """Log-probability of each node's path, [B, W] float32; -inf where an edge is 0. The root's own is left out."""
    sums = (edges.log().clamp_(min=_LEAST) * _UNIT).long()
    sums[:, 0] = 0
    above, span = parents, 1
    while span < max_depth:
        sums = sums + sums.gather(1, above)
        above, span = above.gather(1, above), 2 * span
    return torch.where(sums > _LEAST * _UNIT, sums.double() / _UNIT, -torch.inf).float()


def _best(log_probs: Tensor, parents: Tensor, tree: TokenTree, other: TokenTree, num_nodes: int) -> TokenTree:
    """One stable sort: among both trees' nodes, parents precede their children, and so they do among equals."""
    log_probs, order = log_probs.sort(dim=1, descending=True, stable=True)
    new_slot = order.argsort(dim=1)
    kept = order[:, :num_nodes]
    log_probs = log_probs[:, :num_nodes]
    is_padding = log_probs == -torch.inf
    new_parents = new_slot.gather(1, parents.gather(1, kept)).masked_fill_(is_padding, 0)
    new_parents[:, 0] = -1
    depths = torch.cat([_depths(tree), _depths(other)], dim=1).gather(1, kept).masked_fill_(is_padding, 0)
    missing = (0, max(0, num_nodes - kept.shape[1]))
    return TokenTree(
        tokens=pad(torch.cat([tree.tokens, other.tokens], dim=1).gather(1, kept), missing),
        parents=pad(new_parents, missing),
        log_probs=pad(log_probs, missing, value=-torch.inf),
        max_depth=min(max(tree.max_depth, other.max_depth), num_nodes - 1),
        depths=pad(depths, missing),
    )


def _depths(tree: TokenTree) -> Tensor:
    return node_depths(ancestor_mask(tree.parents, tree.max_depth)) if tree.depths is None else tree.depths
