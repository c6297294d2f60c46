"""Every option of `GenerationConfig`: the tokens, scores and warnings of transformers' `generate`, or refused by name.

Alone with several values, and in random pairs; one prompt and three of different lengths; float64. An option that the
installed transformers has and the table below has not fails the tests, so that new ones are noticed.
"""

from __future__ import annotations

import random
import warnings
from functools import cache
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CompileConfig,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    SynthIDTextWatermarkingConfig,
    WatermarkingConfig,
)

import families
import ladon
from ladon.errors import InputError, UnsupportedModelError

PROMPTS = {1: torch.arange(3, 15)[None], 3: torch.tensor([[0, 0, 0, 5, 6, 7], [11, 12, 13, 14, 15, 16], [0, 7, 5, 7, 5, 7]])}
PAIRS, SEED = 400, 20270214
DRAWN, DICT = {"do_sample": True, "seed": 7}, {"return_dict_in_generate": True}

# Each option's values. What else a value needs is given beside it, as in `(value, {other option: its value})`.
VALUES: dict[str, list[Any]] = {
    "max_length": [14, 40, (15, {"max_new_tokens": None})],
    "max_new_tokens": [1, 7, 0, -3],
    "min_length": [0, 9, 30],
    "min_new_tokens": [1, 4, 30],
    "early_stopping": [False, True, "never"],
    "max_time": [1e9, 0.0],
    "stop_strings": ["t7", ["t7", "t40 t41"]],
    "do_sample": [False, (True, {"seed": 7})],
    "num_beams": [1, 2],
    "use_mtp": [False, True],
    "use_cache": [True, False],
    "cache_implementation": ["dynamic", "static", "offloaded", "offloaded_static", "quantized", "hybrid", "paged", "none"],
    "cache_config": [{}, {"nbits": 4}],
    "max_cache_len": [64, 4, (64, {"cache_implementation": "static"})],
    "temperature": [1.0, (0.6, DRAWN), (2.5, DRAWN), 0.6, (0.0, DRAWN)],
    "top_k": [0, (5, DRAWN), (1, DRAWN), 5, (-1, DRAWN)],
    "top_p": [1.0, (0.7, DRAWN), (0.1, DRAWN), 0.7, (0.0, DRAWN), (1.5, DRAWN)],
    "min_p": [(0.2, DRAWN), (0.9, DRAWN), 0.2, (2.0, DRAWN)],
    "top_h": [(0.3, DRAWN), (0.8, DRAWN), 0.3],
    "typical_p": [1.0, (0.3, DRAWN), (0.9, DRAWN), 0.3],
    "epsilon_cutoff": [0.0, (0.02, DRAWN), 0.02],
    "eta_cutoff": [0.0, (0.02, DRAWN), 0.02],
    "repetition_penalty": [1.0, 1.3, 0.5, (1.3, DRAWN), -1.0],
    "encoder_repetition_penalty": [1.0, 1.5, 0.5, (1.5, DRAWN)],
    "length_penalty": [1.0, 2.0, -1.0],
    "no_repeat_ngram_size": [0, 1, 2, 3],
    "bad_words_ids": [[[7]], [[5], [8, 9], [40, 41, 42]], []],
    "renormalize_logits": [True, (True, DRAWN), False],
    "forced_bos_token_id": [5],
    "forced_eos_token_id": [2, [2, 5]],
    "remove_invalid_values": [True, False],
    "exponential_decay_length_penalty": [(3, 1.5), (0, 1.01), (50, 2.0)],
    "suppress_tokens": [[7, 8, 9], list(range(40)), []],
    "begin_suppress_tokens": [[7, 8], list(range(60))],
    "sequence_bias": [[[[7], 5.0], [[8, 9], -3.0]], {(7,): 2.0}],
    "token_healing": [False, True],
    "guidance_scale": [1.0, 1.5, (1.5, DRAWN)],
    "watermarking_config": [
        WatermarkingConfig(bias=4.0, seeding_scheme="selfhash", context_width=2),
        WatermarkingConfig(bias=2.5),
        (SynthIDTextWatermarkingConfig(ngram_len=3, keys=[1, 2, 3]), DRAWN),
    ],
    "num_return_sequences": [1, 2, (2, DRAWN), 0],
    "output_attentions": [False, True, (True, DICT)],
    "output_hidden_states": [False, True, (True, DICT)],
    "output_scores": [False, True, (True, DICT), (True, DICT | DRAWN)],
    "output_logits": [False, True, (True, DICT)],
    "return_dict_in_generate": [False, True],
    "pad_token_id": [0, 5, -1],
    "bos_token_id": [1, 5],
    "eos_token_id": [2, 5, [5, 7, 9], list(range(0, 97, 5)), -1],
    "encoder_no_repeat_ngram_size": [0, 1, 2],
    "decoder_start_token_id": [1, [1, 1, 1]],
    "is_assistant": [False, True],
    "num_assistant_tokens": [3],
    "num_assistant_tokens_schedule": ["constant", "heuristic"],
    "assistant_confidence_threshold": [0.4],
    "prompt_lookup_num_tokens": [3],
    "max_matching_ngram_size": [2],
    "assistant_early_exit": [1],
    "assistant_lookbehind": [5],
    "target_lookbehind": [5],
    "assistant_ensemble_weight": [0.5, 2.0],
    "speculation_type": ["dflash"],
    "compile_config": [CompileConfig(), {"mode": "default"}],
    "disable_compile": [True, False],
    "continuous_batching_config": [{}],
    "low_memory": [True, False],
    "penalty_alpha": [0.6, (0.6, {"top_k": 4})],
    "dola_layers": ["low"],
    "diversity_penalty": [0.5, 0.0],
    "num_beam_groups": [1, 2, (2, {"num_beams": 4})],
    "constraints": [[]],
    "force_words_ids": [[[5, 6]]],
    "prefill_chunk_size": [4, 64],
}
NOT_OPTIONS = {"transformers_version", "_from_model_config", "_commit_hash"}
INSTALLED = sorted(set(GenerationConfig().to_dict()) - NOT_OPTIONS)


@cache
def model() -> PreTrainedModel:
    made = families.build("llama", torch.float64)
    made.generation_config.eos_token_id, made.generation_config.pad_token_id = None, 0
    return made


@cache
def heads() -> ladon.Heads:
    made = ladon.new_heads(model(), num_heads=3)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made


@cache
def decoder(budget: int) -> ladon.Decoder:
    return ladon.Decoder(model(), heads(), budget=budget)


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({f"t{token}": token for token in range(families.VOCAB_SIZE)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="t0")


def settings(name: str, value: Any) -> dict[str, Any]:
    """An option with one of its values, as keyword arguments."""
    has_more = isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], dict)
    own, others = value if has_more else (value, {})
    return {**others, name: own}
