"""The lattice of heads that read the path so far: its rows are partial paths.

The guesses of such a head depend on all tokens before them, so every path would need a row of its own. At each depth
the head is asked after some of the paths there are, all at once; the others stay leaves.

Shapes: B rows, R conditioning rows (paths that a head is asked after), K depths, C candidates, D logits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from ladon.fixed_tree import FixedTree
from ladon.lattice import Lattice, from_logits

# Partial paths [B, R, k] int64, the root first, and which path of the depth before each goes on from, [B, R] int64, to
# the logits of head k after each of them, [B, R, D].
After = Callable[[Tensor, Tensor], Tensor]
# Log-probabilities of all paths of a depth [B, R, C], and that depth, from 1, to the places among the R x C of those
# that the next head is asked after, [B, R'] int64.
Rows = Callable[[Tensor, int], Tensor]


def best_rows(num_rows: int) -> Rows:
    """The most probable paths of a depth, `num_rows` of them: a beam.

    With N - 2 rows, growth to N nodes is exact over all paths: what follows a path that has N - 2 better ones at its
    depth has N - 1 better ones itself, and a tree has no room for more. Which of equals are taken makes no difference.
    """

    def choose(log_probs: Tensor, depth: int) -> Tensor:
        flat = log_probs.flatten(1)
        return flat.topk(min(num_rows, flat.shape[1]), dim=1).indices

    return choose


def rows_with_children(tree: FixedTree) -> Rows:
    """The paths that have children in a fixed tree, whatever their probability; in a chain one of each depth."""

    def choose(log_probs: Tensor, depth: int) -> Tensor:
        places = _places_with_children(tree, log_probs.shape[2], log_probs.device)[depth - 1]
        return places.expand(log_probs.shape[0], -1)

    return choose


@lru_cache(maxsize=64)
def _places_with_children(tree: FixedTree, num_candidates: int, device: torch.device) -> tuple[Tensor, ...]:
    """Of each depth but the last, the places [R] of such paths among the rows before times their candidates."""
    have_children = {path[:-1] for path in tree.paths}
    before: list[tuple[int, ...]] = [()]
    places = []
    for depth in range(1, tree.max_depth):
        paths = [path for path in tree.paths if len(path) == depth and path in have_children]
        flat = [before.index(path[:-1]) * num_candidates + path[-1] for path in paths]
        places.append(torch.tensor(flat, dtype=torch.long, device=device))
        before = paths
    return tuple(places)


def along_paths(
    after: After,
    root: Tensor,
    rows: Rows,
    *,
    depth: int,
    num_candidates: int,
    temperatures: Tensor | None = None,
    token_ids: Tensor | None = None,
) -> Lattice:
    """The lattice whose rows at a depth are paths of the depth before.

    Args:
        after: the heads.
        root: the token picked last, [B] int64.
        rows: which paths of a depth lead to rows of the next; all others are leaves.
        depth: K, how many heads are asked.
        num_candidates: C; more than D is cut to D.
        temperatures: of K depths or more, by which the logits are divided first; None leaves them.
        token_ids: the token of each of the D logits, [D] int64; None: entry i is token i.

    Returns:
        A lattice whose R is the most paths that any head was asked after; rows beyond those of a depth are padding.
    """
    paths, path_values = root[:, None, None], torch.zeros_like(root[:, None], dtype=torch.float32)
    parents = torch.zeros_like(root[:, None])
    tokens, log_probs, next_rows = [], [], []
    for level in range(depth):
        temperature = None if temperatures is None else temperatures[level : level + 1]
        # `from_logits` takes each path's row for a depth of its own.
        found = from_logits(after(paths, parents), num_candidates, temperatures=temperature, token_ids=token_ids)
        tokens.append(found.tokens[:, :, 0])
        log_probs.append(found.log_probs[:, :, 0])
        next_rows.append(torch.full_like(tokens[-1], -1))
        if level + 1 < depth:
            values = path_values[:, :, None] + log_probs[-1]
            chosen = rows(values, level + 1)
            numbers = torch.arange(chosen.shape[1], device=root.device).expand_as(chosen)
            next_rows[-1].flatten(1).scatter_(1, chosen, numbers)
            parents = chosen // values.shape[2]
            before = paths.gather(1, parents[:, :, None].expand(-1, -1, level + 1))
            paths = torch.cat([before, tokens[-1].flatten(1).gather(1, chosen)[:, :, None]], dim=2)
            path_values = values.flatten(1).gather(1, chosen)
    return Lattice(
        tokens=_stacked(tokens, 0), log_probs=_stacked(log_probs, -torch.inf), next_row=_stacked(next_rows, -1)
    )


def _stacked(tables: list[Tensor], padding: float) -> Tensor:
    """Tables [B, r, C] of each depth as one, [B, K, R, C]."""
    most = max(table.shape[1] for table in tables)
    padded = [functional.pad(table, (0, 0, 0, most - table.shape[1]), value=padding) for table in tables]
    return torch.stack(padded, dim=1)
