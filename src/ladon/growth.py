"""Lattice -> token tree: grown best first at every step, or filled into a fixed shape.

Dynamic growth follows MEDUSA+ (arXiv 2502.05947): the tree is made of the paths with the greatest joint probability.
As a path is never more probable than its prefix, the best paths are closed under taking prefixes: they are a tree.

Shapes: B rows, N nodes (root included), K depths, R conditioning rows, C candidates.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ladon.fixed_tree import FixedTree
from ladon.lattice import Lattice
from ladon.tree import TokenTree, root_tree


def grow_dynamic(lattice: Lattice, root: Tensor, num_nodes: int) -> TokenTree:
    """The `num_nodes` - 1 most probable paths of the lattice, exactly, as a tree with its nodes best first.

    Depth by depth the best paths are extended and the best of those kept (a path outside the best n of its depth has n
    better ones, and so have all its extensions). One stable sort over all depths then picks the tree: shallow depths
    come first in it, so a parent precedes a child that ties with it, and no child is kept without its parent.

    Args:
        lattice: the candidates.
        root: the token picked last, [B] int64.
        num_nodes: N, root included; fewer slots come back when the lattice has fewer paths.

    Returns:
        A tree whose first n nodes are the best tree of n nodes, for every n.

    Cost: no loop over nodes or rows, no host transfer, no table larger than [B, N x C].
    Source: the definition in arXiv 2502.05947, section 3; the algorithm is ours.
    """
    num_paths = num_nodes - 1
    if num_paths == 0:
        return root_tree(root)
    depth = min(lattice.depth, num_paths)
    level_values, level_tokens, level_parents = [], [], []
    beam = _first_level(lattice, num_paths)
    offset = 0  # slot of the first node of the depth above, in the list of all levels; the root has slot 0
    for level in range(depth):
        if level > 0:
            offset = 1 + sum(v.shape[1] for v in level_values[:-1])
            beam = _next_level(lattice, level, beam, num_paths - level)
        values, tokens, parents, _ = beam
        level_values.append(values)
        level_tokens.append(tokens)
        level_parents.append(parents + offset if offset else parents)
    return _best_overall(root, level_values, level_tokens, level_parents, num_nodes, depth)


# A beam: path log-probabilities [B, m], greatest first; tokens [B, m]; index of the parent in the beam before [B, m];
# row of the next depth [B, m], or None when R = 1.
_Beam = tuple[Tensor, Tensor, Tensor, "Tensor | None"]


def _first_level(lattice: Lattice, num_paths: int) -> _Beam:
    width = min(lattice.num_candidates, num_paths)
    tokens = lattice.tokens[:, 0, 0, :width]
    rows = None if lattice.next_row is None else lattice.next_row[:, 0, 0, :width]
    return lattice.log_probs[:, 0, 0, :width], tokens, torch.zeros_like(tokens), rows


def _next_level(lattice: Lattice, level: int, beam: _Beam, width: int) -> _Beam:
    """The best `width` extensions of the beam by the candidates of depth `level` + 1."""
    if beam[3] is None:
        return _extend_by_shared_row(lattice, level, beam[0], width)
    return _extend_by_rows(lattice, level, beam[0], beam[3], width)


def _extend_by_shared_row(lattice: Lattice, level: int, path_values: Tensor, width: int) -> _Beam:
    """R = 1: all paths share one sorted row, so only pairs that few others dominate can be among the best."""
    parent_of_pair, rank_of_pair = _undominated_pairs(
        path_values.shape[1], lattice.num_candidates, width + level, level, path_values.device
    )
    values = path_values[:, parent_of_pair] + lattice.log_probs[:, level, 0, rank_of_pair]
    values, pairs = values.topk(min(width, values.shape[1]), dim=1)
    return values, lattice.tokens[:, level, 0].gather(1, rank_of_pair[pairs]), parent_of_pair[pairs], None


def _extend_by_rows(lattice: Lattice, level: int, path_values: Tensor, rows: Tensor, width: int) -> _Beam:
    """R > 1: every path has a row of its own, or none (-1: it stays a leaf)."""
    assert lattice.next_row is not None
    num_candidates = min(lattice.num_candidates, width)
    row_index = rows.clamp(min=0)[:, :, None].expand(-1, -1, num_candidates)
    steps = lattice.log_probs[:, level, :, :num_candidates].gather(1, row_index)
    values = (path_values[:, :, None] + steps).masked_fill(rows[:, :, None] < 0, -torch.inf).flatten(1)
    values, pairs = values.topk(min(width, values.shape[1]), dim=1)
    tokens = lattice.tokens[:, level, :, :num_candidates].gather(1, row_index).flatten(1).gather(1, pairs)
    next_rows = lattice.next_row[:, level, :, :num_candidates].gather(1, row_index).flatten(1).gather(1, pairs)
    return values, tokens, pairs // num_candidates, next_rows


@lru_cache(maxsize=256)
def _undominated_pairs(
    num_parents: int, num_candidates: int, num_paths: int, level: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Pairs (parent i, rank c), both counted from 0 and best first, that can be among the best `num_paths` paths.

    Every pair (i' <= i, c' <= c) is at least as probable, and so are the parents i' <= i, and one path of each
    shallower depth: together (i + 1)(c + 2) + level - 1 paths, the pair included. Where that exceeds `num_paths`, the
    pair is not needed. This leaves about N ln N pairs instead of N x C.

    Returns:
        Two index tensors [P] int64.
    """
    pairs = [
        (parent, rank)
        for parent in range(num_parents)
        for rank in range(num_candidates)
        if (parent + 1) * (rank + 2) + level - 1 <= num_paths
    ]
    table = torch.tensor(pairs, dtype=torch.long, device=device).reshape(-1, 2)
    return table[:, 0].contiguous(), table[:, 1].contiguous()


def _best_overall(
    root: Tensor,
    level_values: list[Tensor],
    level_tokens: list[Tensor],
    level_parents: list[Tensor],
    num_nodes: int,
    depth: int,
) -> TokenTree:
    """One stable sort over the root and all levels; parents are renumbered to the sorted order."""
    root_values = level_values[0].new_zeros(root.shape[0], 1)
    values = torch.cat([root_values, *level_values], dim=1)
    tokens = torch.cat([root[:, None], *level_tokens], dim=1)
    parents = torch.cat([torch.zeros_like(root[:, None]), *level_parents], dim=1)
    values, order = values.sort(dim=1, descending=True, stable=True)
    new_index = order.argsort(dim=1)
    kept = order[:, :num_nodes]
    parents = new_index.gather(1, parents.gather(1, kept))
    parents[:, 0] = -1
    return TokenTree(tokens=tokens.gather(1, kept), parents=parents, log_probs=values[:, :num_nodes], max_depth=depth)


def grow_fixed(lattice: Lattice, root: Tensor, shape: FixedTree) -> TokenTree:
    """Fill a fixed shape (MEDUSA's rank paths) with the lattice's tokens.

    Args:
        lattice: the candidates; needs at least the depth and the ranks that the shape uses (`FixedTree.check_fits`).
        root: the token picked last, [B] int64.
        shape: the rank paths.

    Returns:
        A tree with its nodes in the shape's order. A node whose conditioning row does not exist is padding.
    """
    batch_size = root.shape[0]
    plan = shape.plan(root.device)
    tokens = root[:, None].repeat(1, shape.num_nodes)
    log_probs = torch.zeros(batch_size, shape.num_nodes, dtype=torch.float32, device=root.device)
    next_rows = torch.zeros_like(tokens)
    for level, (nodes, parents, ranks) in enumerate(plan.levels):
        rows = next_rows[:, parents]
        flat = rows.clamp(min=0) * lattice.num_candidates + ranks
        steps = lattice.log_probs[:, level].flatten(1).gather(1, flat).masked_fill(rows < 0, -torch.inf)
        tokens[:, nodes] = lattice.tokens[:, level].flatten(1).gather(1, flat)
        log_probs[:, nodes] = log_probs[:, parents] + steps
        if lattice.next_row is not None:
            next_rows[:, nodes] = lattice.next_row[:, level].flatten(1).gather(1, flat)
    return TokenTree(
        tokens=tokens,
        parents=plan.parents.expand(batch_size, -1),
        log_probs=log_probs,
        max_depth=shape.max_depth,
    )


def grow_chain(lattice: Lattice, root: Tensor, num_nodes: int) -> TokenTree:
    """The chain of each depth's best candidate: [B, min(K + 1, num_nodes)]."""
    return grow_fixed(lattice, root, FixedTree.chain(min(lattice.depth, num_nodes - 1)))
