"""The context limit: how far rotary scalings reach, by what transformers makes of their settings."""

from __future__ import annotations

import pytest
import torch
from transformers import Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

import ladon
from greedy import plain
from ladon.target.support import context_limit

YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 1e4}
LONGROPE = {"rope_type": "longrope", "factor": 4.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}


def config(**rope):
    return LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        rope_parameters=rope or None,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )


@pytest.mark.parametrize(
    ("rope", "limit"),
    [
        ({}, 64),
        ({"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}, 256),
        ({"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}, 128),
        ({**YARN, "original_max_position_embeddings": 64}, 256),  # as for Qwen: the model's own limit is the old one
        ({**YARN, "original_max_position_embeddings": 16}, 64),  # as in DeepSeek: it is the new one
        ({**YARN, "original_max_position_embeddings": 8}, 64),
        ({**LLAMA3, "original_max_position_embeddings": 16}, 64),
        ({**LONGROPE, "original_max_position_embeddings": 16, "rope_theta": 1e4}, 64),
    ],
)
def test_limit_of_each_scaling(rope, limit):
    assert context_limit(config(**rope)) == limit


def test_scalings_by_layer_type():
    ropes = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    assert context_limit(Gemma3TextConfig(max_position_embeddings=64, rope_parameters=ropes)) == 512


@pytest.mark.parametrize("rope_type", ["linear", "yarn"])
def test_decoding_goes_on_into_the_scaled_part(rope_type):
    torch.manual_seed(0)
    original = {"original_max_position_embeddings": 64} if rope_type == "yarn" else {}
    model = LlamaForCausalLM(config(rope_type=rope_type, factor=2.0, rope_theta=1e4, **original)).double().eval()
    long = torch.randint(3, 90, (1, 80))
    decoder = ladon.Decoder(model, ladon.new_heads(model, num_heads=3))
    assert torch.equal(decoder.generate(long, max_new_tokens=12), plain(model, long, max_new_tokens=12))
    assert decoder.generate(long, max_new_tokens=99).shape == (1, 128)
    with pytest.raises(ladon.InputError, match="context limit is 128"):
        decoder.generate(torch.randint(3, 90, (1, 128)), max_new_tokens=1)
