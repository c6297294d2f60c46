"""Logits -> picks: what the target itself says."""

from __future__ import annotations

from torch import Tensor


def pick(logits: Tensor) -> Tensor:
    """Greedy picks, [...] int64, of logits [..., V]; the first of equal maxima, as `transformers` takes it.

    The float32 copy changes no order and is what `generate` compares; in bfloat16 itself argmax is five times slower
    on a CPU.
    """
    return logits.float().argmax(-1)
