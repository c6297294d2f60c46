"""Lattice -> token tree: grown best first at every step, or filled into a fixed shape.

Dynamic growth follows MEDUSA+ (arXiv 2502.05947): the tree is made of the paths with the greatest joint probability.
As a path is never more probable than its prefix, the best paths are closed under taking prefixes: they are a tree.

Shapes: B rows, N nodes (root included), K depths, R conditioning rows, C candidates.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from ladon.trees.fixed_tree import FixedTree
from ladon.trees.lattice import Lattice
from ladon.trees.token_tree import TokenTree, root_tree


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
    levels = [_first_level(lattice, num_paths)]
    for level in range(1, min(lattice.depth, num_paths)):
        levels.append(_next_level(lattice, level, levels[-1], num_paths - level))
    return _best_overall(root, levels, num_nodes)


@dataclass(frozen=True, slots=True)
class _Level:
    """The best paths of one depth, greatest log-probability first, m of them.

    Attributes:
        values: their log-probabilities, [B, m].
        tokens: their last tokens, [B, m].
        parents: place of each one's parent in the level before, [B, m].
        rows: the conditioning row each leads to, [B, m], -1 for none; None when R = 1.
    """

    values: Tensor
    tokens: Tensor
    parents: Tensor
    rows: Tensor | None = None


def _first_level(lattice: Lattice, num_paths: int) -> _Level:
    width = min(lattice.num_candidates, num_paths)
    tokens = lattice.tokens[:, 0, 0, :width]
    rows = None if lattice.next_row is None else lattice.next_row[:, 0, 0, :width]
    return _Level(lattice.log_probs[:, 0, 0, :width], tokens, torch.zeros_like(tokens), rows)


def _next_level(lattice: Lattice, level: int, above: _Level, width: int) -> _Level:
    """The best `width` extensions of the level above by the candidates of depth `level` + 1."""
    if above.rows is None or lattice.next_row is None:
        return _extend_by_shared_row(lattice, level, above.values, width)
    return _extend_by_rows(lattice.tokens, lattice.log_probs, lattice.next_row, level, above.values, above.rows, width)


def _extend_by_shared_row(lattice: Lattice, level: int, path_values: Tensor, width: int) -> _Level:
    """R = 1: all paths share one sorted row, so only pairs that few others dominate can be among the best."""
    parent_of_pair, rank_of_pair = _undominated_pairs(
        path_values.shape[1], lattice.num_candidates, width + level, level, path_values.device
    )
    values = path_values[:, parent_of_pair] + lattice.log_probs[:, level, 0, rank_of_pair]
    values, pairs = values.topk(min(width, values.shape[1]), dim=1)
    return _Level(values, lattice.tokens[:, level, 0].gather(1, rank_of_pair[pairs]), parent_of_pair[pairs])


def _extend_by_rows(
    tokens: Tensor, log_probs: Tensor, next_row: Tensor, level: int, path_values: Tensor, rows: Tensor, width: int
) -> _Level:
    """R > 1: every path has a row of its own, or none (-1: it stays a leaf)."""
    num_candidates = min(tokens.shape[3], width)
    row_index = rows.clamp(min=0)[:, :, None].expand(-1, -1, num_candidates)

    def of_rows(table: Tensor) -> Tensor:
        return table[:, level, :, :num_candidates].gather(1, row_index)

    values = path_values[:, :, None] + of_rows(log_probs)
    values = values.masked_fill(rows[:, :, None] < 0, -torch.inf).flatten(1)
    values, pairs = values.topk(min(width, values.shape[1]), dim=1)
    return _Level(
        values,
        of_rows(tokens).flatten(1).gather(1, pairs),
        pairs // num_candidates,
        of_rows(next_row).flatten(1).gather(1, pairs),
    )


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


def _best_overall(root: Tensor, levels: list[_Level], num_nodes: int) -> TokenTree:
    """One stable sort over the root and all levels; parents are renumbered to the sorted order."""
    first = torch.zeros_like(root[:, None])
    parents = [first, levels[0].parents]
    offset = 1  # slot of the first node of the level above in the list of all nodes; the root has slot 0
    for above, level in pairwise(levels):
        parents.append(level.parents + offset)
        offset += above.parents.shape[1]
    values = torch.cat([first.to(levels[0].values.dtype), *(level.values for level in levels)], dim=1)
    tokens = torch.cat([root[:, None], *(level.tokens for level in levels)], dim=1)
    values, order = values.sort(dim=1, descending=True, stable=True)
    new_index = order.argsort(dim=1)
    kept = order[:, :num_nodes]
    kept_parents = new_index.gather(1, torch.cat(parents, dim=1).gather(1, kept))
    kept_parents[:, 0] = -1
    depths = _depth_of_slots(tuple(level.parents.shape[1] for level in levels), root.device)
    return TokenTree(
        tokens=tokens.gather(1, kept),
        parents=kept_parents,
        log_probs=values[:, :num_nodes],
        max_depth=len(levels),
        depths=depths[kept],
    )


@lru_cache(maxsize=256)
def _depth_of_slots(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """Depth of each slot of the root and levels of these sizes, one after the other, [1 + sum of sizes] int64."""
    depths = [depth for depth, size in enumerate((1, *sizes)) for _ in range(size)]
    return torch.tensor(depths, dtype=torch.long, device=device)


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
        depths=plan.depths.expand(batch_size, -1),
    )


def grow_chain(lattice: Lattice, root: Tensor, num_nodes: int) -> TokenTree:
    """The chain of each depth's best candidate: [B, min(K + 1, num_nodes)]."""
    return grow_fixed(lattice, root, FixedTree.chain(min(lattice.depth, num_nodes - 1)))
