"""How often the heads are right about what the model itself goes on to say: what fixed trees are chosen by.

Shapes: P positions, K depths, C candidates counted per head. Ranks are those of `LatticeTrace.ranks`: from 0, C for a
token that is no candidate, -1 past the answer's end.
"""

from __future__ import annotations

import torch
from torch import Tensor


def hit_rates(ranks: Tensor, num_candidates: int) -> list[list[float]]:
    """How often each rank of each head is right, given that the shallower heads' counted candidates held the truth.

    Args:
        ranks: [P, K].
        num_candidates: C.

    Returns:
        [K][C], each in [0, 1]; 0 where no position counts.
    """
    return _shares(ranks, on_true_path(ranks, num_candidates), num_candidates)


def marginal_hit_rates(ranks: Tensor, num_candidates: int) -> list[list[float]]:
    """The same over all positions, whatever the shallower heads guessed."""
    return _shares(ranks, ranks >= 0, num_candidates)


def on_true_path(ranks: Tensor, num_candidates: int) -> Tensor:
    """Where the truth of a depth is known, and that of each shallower depth is a candidate: [P, K] bool."""
    held = (ranks >= 0) & (ranks < num_candidates)
    before = torch.cat([torch.ones_like(held[:, :1]), held[:, :-1]], dim=1).cumprod(1).bool()
    return before & (ranks >= 0)


def _shares(ranks: Tensor, counted: Tensor, num_candidates: int) -> list[list[float]]:
    rates = []
    for column, counts in zip(ranks.T, counted.T, strict=True):
        hits = torch.bincount(column[counts], minlength=num_candidates + 1)[:num_candidates]
        rates.append([round(rate, 6) for rate in (hits / counts.sum().clamp(min=1)).tolist()])
    return rates
