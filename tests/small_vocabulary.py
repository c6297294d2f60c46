"""A random model over a small vocabulary, and a test of how well counts follow a law."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

Text = tuple[int, ...]
Law = Mapping[Text, float]


def tiny_vocabulary(vocab_size: int) -> PreTrainedModel:
    """A random model in float64 that is neither sure of anything nor indifferent."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).double().eval()
    for parameter in model.parameters():
        parameter.data *= 4.0 if parameter.ndim == 2 else 1.0
    model.lm_head.weight.data *= 3.0
    return model


def p_value(counts: Mapping[Text, int], law: Law) -> float:
    """Of Pearson's chi-square, rare texts together; the law's support must hold all counts."""
    num = sum(counts.values())
    assert all(law.get(text, 0.0) > 0 for text in counts)
    common = [text for text, p in law.items() if p * num >= 8]
    expected = torch.tensor([law[text] * num for text in common], dtype=torch.float64)
    seen = torch.tensor([counts.get(text, 0) for text in common], dtype=torch.float64)
    if num - float(expected.sum()) >= 8:
        expected, seen = (torch.cat([part, (num - part.sum())[None]]) for part in (expected, seen))
    statistic = ((seen - expected) ** 2 / expected).sum()
    freedom = torch.tensor((len(expected) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, statistic / 2))
