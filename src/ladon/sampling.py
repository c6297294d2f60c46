"""Logits -> picks: what the target itself says."""

from __future__ import annotations

from torch import Tensor


def pick(logits: Tensor) -> Tensor:
    """Greedy picks, [...] int64, of logits [..., V]; the first of equal maxima, as `transformers` takes it."""
    return logits.argmax(-1)
