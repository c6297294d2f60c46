"""Ranks and hit rates, against a walk over the greedy text."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ladon.calibrate.ranks import RANKS, answer_ranks, hit_rates
from ladon.config import DecoderOptions
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


def test_logits_are_made_for_one_position_of_the_text(tiny_llama):
    """[T, V] logits of long texts do not fit; only hidden states are needed."""
    shapes = []
    hook = tiny_llama.register_forward_hook(lambda module, args, output: shapes.append(tuple(output.logits.shape)))
    answer_ranks(tiny_llama, new_heads(tiny_llama, 2), torch.arange(3, 9), torch.arange(9, 80))
    hook.remove()
    assert shapes == [(1, 1, 97)]


def test_a_vocabulary_smaller_than_the_ranks():
    config = LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    model = LlamaForCausalLM(config).eval()
    ranks = answer_ranks(model, new_heads(model, 2), torch.tensor([5, 6]), torch.arange(12))
    assert ranks.shape == (10, 2) and ranks.max() < 16, "every token is counted"
    assert len(hit_rates(ranks)[0]) == RANKS


def test_fixed_trees_choose_from_what_dynamic_trees_see():
    assert DecoderOptions().num_candidates == RANKS == 32


def test_an_answer_too_short_for_the_heads_tells_nothing(tiny_llama):
    ranks = answer_ranks(tiny_llama, new_heads(tiny_llama, 3), torch.tensor([5, 6]), torch.tensor([7]))
    assert ranks.shape == (0, 3)
    assert hit_rates(ranks) == [[0.0] * RANKS] * 3


def test_hit_rates_count_only_where_the_path_was_right():
    rates = hit_rates(torch.tensor([[0, 0], [0, 1], [2, 0], [RANKS, 0]]))
    assert rates[0][:3] == [0.5, 0.0, 0.25] and sum(rates[0]) == 0.75
    assert rates[1][:3] == pytest.approx([2 / 3, 1 / 3, 0.0], abs=1e-5)
