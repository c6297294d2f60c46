"""Greedy picks."""

from __future__ import annotations

import pytest
import torch

from ladon.sampling import pick


@pytest.mark.parametrize("shape", [(4096,), (1, 1, 4096), (1, 64, 4096), (2, 32, 4096), (3, 7, 1000)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_is_the_first_of_equal_maxima(shape, dtype):
    """Few distinct values, so that every row has many equal maxima, in one block and in several."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(-3, 4, shape, generator=generator).to(dtype)
    expected = (logits == logits.amax(-1, keepdim=True)).to(torch.uint8).argmax(-1)
    assert torch.equal(pick(logits), expected)


@pytest.mark.parametrize("vocab_size", [4096, 1000])
def test_agrees_with_argmax_on_ordinary_logits_and_on_masked_ones(vocab_size):
    logits = torch.randn(4, 64, vocab_size, generator=torch.Generator().manual_seed(1))
    assert torch.equal(pick(logits), logits.argmax(-1))
    logits[..., vocab_size // 2 :] = -torch.inf
    assert torch.equal(pick(logits), logits.argmax(-1))
    logits[0, 3, 77] = torch.nan
    assert torch.equal(pick(logits), logits.argmax(-1)), "NaN counts as the greatest, as in argmax"
