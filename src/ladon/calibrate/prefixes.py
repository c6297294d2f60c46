"""How far the truth is followed: by the lattice, by the tree grown from it, by what is accepted in the end.

The truth of a step is what the target itself says after the root. Where it leaves the lattice, the heads did not have
it (coverage); where it leaves the tree, they ranked it too low for the budget (ranking).

Shapes: B row-steps, K depths, R conditioning rows, C candidates, N nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ladon.trees.lattice import Lattice
from ladon.trees.token_tree import TokenTree


@dataclass(frozen=True, kw_only=True, slots=True)
class TrueRows:
    """Of each depth, the conditioning row that the true path leads to.

    Attributes:
        log_probs: of its candidates, best first, [B, K, C]; -inf where the true path has no row.
        right: which of them is the truth, if any, [B, K, C] bool. None is, from the first depth that lacks it.
    """

    log_probs: Tensor
    right: Tensor

    @property
    def oracle(self) -> Tensor:
        """How many leading depths have their true token among the candidates, [B]."""
        return self.right.any(-1).sum(1)

    @property
    def top(self) -> Tensor:
        """How many leading depths have it as the best candidate: what the chain holds, [B]."""
        return self.right[:, :, 0].long().cumprod(1).sum(1)


def true_rows(lattice: Lattice, truth: Tensor) -> TrueRows:
    """Follow the truth [B, K] (-1 where it is not known) through a lattice, from row to row, until it leaves it."""
    row = torch.zeros_like(truth[:, 0])
    log_probs, right = [], []
    for depth in range(lattice.depth):
        index = row.clamp(min=0)[:, None, None].expand(-1, 1, lattice.num_candidates)
        found = lattice.log_probs[:, depth].gather(1, index)[:, 0].masked_fill(row[:, None] < 0, -torch.inf)
        is_true = lattice.tokens[:, depth].gather(1, index)[:, 0] == truth[:, depth, None]
        is_true &= found > -torch.inf  # padding is no candidate, whatever token it holds
        place = is_true.int().argmax(1, keepdim=True)
        if lattice.next_row is None:
            following = torch.zeros_like(row)
        else:
            following = lattice.next_row[:, depth].gather(1, index)[:, 0].gather(1, place)[:, 0]
        row = torch.where(is_true.any(1), following, -1)
        log_probs.append(found)
        right.append(is_true)
    return TrueRows(log_probs=torch.stack(log_probs, dim=1), right=torch.stack(right, dim=1))


def true_slots(tree: TokenTree, truth: Tensor, missing: int) -> Tensor:
    """Slots of the nodes on the true path [B, K] of each tree; `missing` from the first depth that has none."""
    slots = torch.full_like(truth, missing)
    parent = torch.zeros_like(truth[:, :1])
    for depth in range(min(tree.max_depth, truth.shape[1])):
        right = (tree.parents == parent) & (tree.tokens == truth[:, depth : depth + 1]) & (tree.log_probs > -torch.inf)
        right[:, 0] = False  # the root is no draft
        found, place = right.max(1)
        slots[:, depth] = torch.where(found, place, missing)
        parent = torch.where(found, place, -2)[:, None]  # no node has the parent -2
    return slots


def reached(prefixes: Tensor, num_depths: int) -> dict[str, Any]:
    """The mean of prefixes [B], and of each depth, [K], the share of them that reach it; None where there is none."""
    if len(prefixes) == 0:
        return {"mean": None, "shares": [None] * num_depths}
    shares = (prefixes[:, None] > torch.arange(num_depths, device="cpu")).double().mean(0)
    return {"mean": round(float(prefixes.double().mean()), 4), "shares": [round(share, 4) for share in shares.tolist()]}


def mean_leaf_mass(found: Sequence[Tensor], num_depths: int) -> list[float | None]:
    """The mean over all row-steps of `Lattice.leaf_mass`, [b, k - 1] each, of all depths but the last, [K - 1].

    Where lattices are not all as deep, each depth's mean is over those that have it; None where none does.
    """
    columns = [[mass[:, depth] for mass in found if mass.shape[1] > depth] for depth in range(num_depths - 1)]
    return [round(float(torch.cat(column).double().mean()), 4) if column else None for column in columns]
