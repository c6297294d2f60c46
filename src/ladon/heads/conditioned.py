"""Heads that read the tokens before the one they guess, one after the other."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from ladon.heads.base import Heads


class ConditionedHeads(Heads):
    """Heads of which the k-th sees the k tokens before its guess: the root, and then k - 1 of the draft.

    `forward` gives the logits of all of them after the true tokens, as training needs it; `after` those of one of them
    after many partial paths at once, as a tree needs it.
    """

    is_conditioned = True

    @abstractmethod
    def after(self, hidden: Tensor, paths: Tensor) -> Tensor:
        """Logits of one head after partial paths.

        Args:
            hidden: [B, H], the hidden row of each sequence.
            paths: [B, R, k] int64, the k tokens before the guesses of head k (from 1), the root first.

        Returns:
            [B, R, D], with D as in `forward`.
        """

    def draft(self, hidden: Tensor, root: Tensor) -> Tensor:
        """Logits [B, K, D] of hidden rows [B, H] and roots [B]; each head reads the best tokens of those before it."""
        path, logits = root[:, None, None], []
        for _ in range(self.num_heads):
            logits.append(self.after(hidden, path))
            best = logits[-1].argmax(-1, keepdim=True)
            path = torch.cat([path, best if self.token_ids is None else self.token_ids[best]], dim=-1)
        return torch.cat(logits, dim=1)
