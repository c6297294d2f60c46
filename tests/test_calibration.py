"""Ranks and hit rates, against a walk over the greedy text."""

from __future__ import annotations

import pytest
import torch

from ladon.calibration import RANKS, answer_ranks, hit_rates
from ladon.heads import new_heads


def test_ranks_are_those_of_the_greedy_text(tiny_llama):
    heads = new_heads(tiny_llama, 2)
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter)
    prompt = torch.tensor([5, 6, 7, 8])
    text = tiny_llama.generate(
        prompt[None], attention_mask=torch.ones(1, 4), max_new_tokens=90, do_sample=False, eos_token_id=None
    )[0]
    ranks = answer_ranks(tiny_llama, heads, prompt, text[4:])
    assert len(ranks) == len(text) - 4 - 2
    with torch.no_grad():
        for row, position in enumerate(range(3, len(text) - 3)):
            hidden = tiny_llama.base_model(input_ids=text[None, : position + 1]).last_hidden_state[0, -1]
            for k in (1, 2):
                logits = heads(hidden)[k - 1]
                rank = int((logits > logits[text[position + k + 1]]).sum())
                assert ranks[row, k - 1] == min(rank, RANKS)
    assert 0 < (ranks < RANKS).float().mean() < 1
    assert not tiny_llama.get_output_embeddings()._forward_pre_hooks


def test_an_answer_too_short_for_the_heads_tells_nothing(tiny_llama):
    ranks = answer_ranks(tiny_llama, new_heads(tiny_llama, 3), torch.tensor([5, 6]), torch.tensor([7]))
    assert ranks.shape == (0, 3)
    assert hit_rates(ranks) == [[0.0] * RANKS] * 3


def test_hit_rates_count_only_where_the_path_was_right():
    rates = hit_rates(torch.tensor([[0, 0], [0, 1], [2, 0], [RANKS, 0]]))
    assert rates[0][:3] == [0.5, 0.0, 0.25] and sum(rates[0]) == 0.75
    assert rates[1][:3] == pytest.approx([2 / 3, 1 / 3, 0.0], abs=1e-5)
