"""Tiny random models of every decoder family: what the tests of the target and of losslessness run on.

Two layers, a few thousand parameters, windows far smaller than the sequences of the tests, so that every rule about
who sees whom matters. `build(name, dtype)` makes one; a family that the installed transformers does not know is
skipped with that reason.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, modeling_layers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ladon.heads.mtp import MtpHeads

RELEASE = ".".join(transformers.__version__.split(".")[:2])
VOCAB_SIZE = 97
WINDOW = 8
LIMIT = 256  # positions

_BASE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": LIMIT,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_MOE = {"num_experts": 4, "n_routed_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
_GROUPED_MOE = {**_MOE, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
_MLA = {
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 4,
    "num_key_value_heads": 4,
}
_WINDOW = {"sliding_window": WINDOW}
_MIXED = {**_WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
_INDEXER = {**_MLA, **_GROUPED_MOE, "index_head_dim": 16, "index_n_heads": 2, "index_topk": LIMIT}


@dataclass(frozen=True)
class Family:
    """How to make a tiny model.

    Attributes:
        mask_class: the letter of the reference's table: A, A', B, C, C', D, E, F, or G for families that are refused.
        options: what differs from the common tiny configuration.
        model_type: the config's name; the family's own name unless said.
        float64: False for a family whose own code cannot run in float64.
    """

    mask_class: str
    options: Mapping[str, Any] = field(default_factory=dict)
    model_type: str = ""
    float64: bool = True


FAMILIES: dict[str, Family] = {
    "llama": Family("A"),
    "gpt_neox": Family("A"),
    "gpt2": Family("A"),
    "opt": Family("A", {"word_embed_proj_dim": 32, "ffn_dim": 48}),
    "olmo": Family("A"),
    "olmo2": Family("A"),
    "granite": Family("A", {"residual_multiplier": 0.5, "logits_scaling": 2.0, "embedding_multiplier": 3.0}),
    "granitemoe": Family("A", _MOE),
    "granitemoeshared": Family("A", {**_MOE, "shared_intermediate_size": 16}),
    "glm": Family("A"),
    "glm4": Family("A"),
    "glm4_moe": Family("A", _GROUPED_MOE),
    "glm4_moe_lite": Family("A", {**_MLA, **_GROUPED_MOE}),
    "falcon": Family("A", {"alibi": False, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "deepseek_v2": Family("A", {**_MLA, **_GROUPED_MOE}),
    "deepseek_v3": Family("A", {**_MLA, **_GROUPED_MOE}),
    "minicpm3": Family("A", _MLA),
    "youtu": Family("A", _MLA),
    "axk1": Family("A", {**_MLA, **_GROUPED_MOE}),
    "gemma": Family("A"),
    "phi": Family("A", {"num_key_value_heads": 4}),
    "persimmon": Family("A"),
    "stablelm": Family("A"),
    "cohere": Family("A", {"logit_scale": 1.0}),
    "nemotron": Family("A"),
    "apertus": Family("A"),
    "arcee": Family("A"),
    "aria_text": Family("A", {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1}),
    "biogpt": Family("A"),
    "bitnet": Family("A"),
    "ctrl": Family("A", {"dff": 48}),
    "dbrx": Family(
        "A",
        {
            "d_model": 32,
            "n_heads": 4,
            "n_layers": 2,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
            "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
        },
    ),
    "diffllama": Family("A"),
    "ernie4_5": Family("A"),
    "ernie4_5_moe": Family("A", {**_MOE, "moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 1}),
    "flex_olmo": Family("A", _MOE),
    "olmoe": Family("A", _MOE),
    "gpt_bigcode": Family("A"),
    "helium": Family("A"),
    "hunyuan_v1_dense": Family("A"),
    "hunyuan_v1_moe": Family("A", {"num_experts": 4, "moe_topk": 2}),
    "hy_v3": Family("A", _GROUPED_MOE),
    "hyperclovax": Family("A"),
    "internlm3": Family("A"),
    "jais2": Family("A"),
    "jetmoe": Family(
        "A", {"num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 8, "num_key_value_heads": 2}
    ),
    "minimax_m3_vl_text": Family("A", _MOE),  # its attention knows no windows; its sparse layers are refused
    "minimax_m2": Family("A", _MOE),
    "nanochat": Family("A"),
    "seed_oss": Family("A"),
    "solar_open": Family("A", _GROUPED_MOE),
    "bert": Family("A", {"is_decoder": True}),
    "gptj": Family("A'", {"rotary_dim": 4}),
    "codegen": Family("A'", {"rotary_dim": 4}),
    "gpt_neox_japanese": Family("A'", {"intermediate_multiple_size": 2}),
    "xglm": Family("A'", {"ffn_dim": 48}, float64=False),  # it puts the dtype's lowest number into a float32
    "mistral": Family("B", _WINDOW),
    "mixtral": Family("B", {**_WINDOW, **_MOE}),
    "qwen3_moe": Family("B", {**_WINDOW, **_MOE, "use_sliding_window": True}),
    "phi3": Family("B", _WINDOW),
    "phimoe": Family("B", {**_WINDOW, **_MOE}),
    "starcoder2": Family("B", _WINDOW),
    "ministral3": Family("B", _WINDOW),
    "doge": Family("B", {**_WINDOW, "keep_window_size": LIMIT}),
    "qwen2": Family("C", {**_MIXED, "use_sliding_window": True}),
    "qwen2_moe": Family("C", {**_MIXED, **_MOE, "use_sliding_window": True, "shared_expert_intermediate_size": 16}),
    "qwen3": Family("C", {**_MIXED, "use_sliding_window": True}),
    "gemma3_text": Family("C", _MIXED),
    "gemma3n_text": Family(
        "C",
        {
            **_MIXED,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCAB_SIZE,
            "altup_num_inputs": 2,
            "laurel_rank": 4,
            "num_kv_shared_layers": 0,
            "activation_sparsity_pattern": [0.0, 0.0],
        },
    ),
    "gemma4_text": Family("C", {**_MIXED, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB_SIZE}),
    "gemma4_text-shared": Family(
        "C",
        {
            **_WINDOW,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCAB_SIZE,
        },
        "gemma4_text",
    ),
    "smollm3": Family("C", {**_MIXED, "use_sliding_window": True, "no_rope_layers": [1, 0]}),
    "cohere2": Family("C", {**_MIXED, "logit_scale": 1.0}),
    "cohere2_moe": Family("C", {**_MIXED, **_MOE}),
    "olmo3": Family("C", _MIXED),
    "llama4_text": Family(
        "C",
        {
            **_MOE,
            "intermediate_size_mlp": 48,
            "attention_chunk_size": WINDOW,
            "no_rope_layers": [1, 0],
            "layer_types": ["chunked_attention", "full_attention"],
        },
    ),
    "exaone4": Family("C", _MIXED),
    "exaone_moe": Family("C", {**_MIXED, **_GROUPED_MOE}),
    "afmoe": Family("C", {**_MIXED, **_MOE, "num_dense_layers": 1, "num_shared_experts": 1}),
    "beam": Family("C", _MIXED),
    "cwm": Family("C", _MIXED),
    "dots1": Family("C", {**_MIXED, **_GROUPED_MOE}),
    "kolibri1": Family("C", _MIXED),
    "laguna": Family("C", {**_MIXED, **_MOE}),
    "mellum": Family("C", {**_MIXED, **_MOE}),
    "ministral": Family("C", _MIXED),
    "modernbert-decoder": Family(
        "C", {"local_attention": 2 * WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
    ),
    "gemma2": Family("C'", _MIXED),
    "gpt_oss": Family("C'", {**_MIXED, **_MOE}),
    "vaultgemma": Family("C'", _MIXED),
    "mimo_v2_flash": Family("C'", {**_MIXED, **_GROUPED_MOE}),
    "flint": Family("C'", _MIXED),
    "granite_swa": Family("C'", _MIXED),
    "granitemoe_swa": Family("C'", {**_MIXED, **_MOE}),
    "deepseek_v32": Family("D", _INDEXER),
    "glm_moe_dsa": Family("D", _INDEXER),
    "axk2": Family("D", _INDEXER),
    "hy_v4": Family("D", _INDEXER),
    "bloom": Family("E"),
    "mpt": Family("E", {"max_seq_len": LIMIT, "n_heads": 4, "d_model": 32}, float64=RELEASE != "5.0"),
    "falcon-alibi": Family("E", {"alibi": True, "new_decoder_architecture": False, "multi_query": True}, "falcon"),
    "gpt_neo": Family("F", {"attention_types": [[["local", "global"], 1]], "window_size": WINDOW, "num_layers": 2}),
}
_RECURRENT: dict[str, dict[str, Any]] = {
    "mamba2": {"num_heads": 8, "expand": 2},
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8},
    "falcon_h1": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_ssm": 64},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 8, "layer_types": ["mamba", "attention"], **_MOE},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "zamba": {"num_hidden_layers": 9},
    "zamba2": {"layer_types": ["mamba", "hybrid"], "layers_block_type": ["mamba", "hybrid"]},
}
_REFUSED = (
    "mamba mamba2 falcon_mamba qwen3_next qwen3_5_text qwen3_5_moe_text bamba jamba falcon_h1 granitemoehybrid lfm2 "
    "recurrent_gemma olmo_hybrid kimi_linear bailing_hybrid nemotron_h zamba zamba2 minimax lfm2_moe lfm3 "
    "qwen4_exp_text inkling_text rwkv xlstm zaya deepseek_v4"
)
FAMILIES.update({name: Family("G", _RECURRENT.get(name, {})) for name in _REFUSED.split()})

WORKABLE = tuple(name for name, family in FAMILIES.items() if family.mask_class != "G")
REFUSED = tuple(name for name, family in FAMILIES.items() if family.mask_class == "G")
FAST = ("llama", "gptj", "mistral", "gemma3_text", "gemma2", "deepseek_v32", "bloom", "gpt_neo")  # one of each class


# What the families' own code gets wrong in an old release, so that there is nothing to compare with.
_BROKEN = {
    ("doge", "5.0"): "its short prompts are not causal",
}


def config_of(name: str, **options: Any) -> PreTrainedConfig:
    """The tiny config of a family; skips the test where transformers does not have it."""
    family = FAMILIES[name]
    model_type = family.model_type or name
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"{model_type} is not in the installed transformers")
    if (name, RELEASE) in _BROKEN:
        pytest.skip(f"{name} in transformers {RELEASE}: {_BROKEN[name, RELEASE]}")
    config_class = CONFIG_MAPPING[model_type]
    known = set(inspect.signature(config_class.__init__).parameters) | set(config_class.attribute_map)
    base = {key: value for key, value in _BASE.items() if key in known or key.endswith("token_id")}
    return config_class(**{**base, **family.options, **options})


def build(name: str, dtype: torch.dtype = torch.float64, **options: Any) -> PreTrainedModel:
    """A tiny random model of a family, in evaluation mode; the same weights at every call.

    `options` are settings of its config beside those of the family.
    """
    config = config_of(name, **options)
    torch.manual_seed(0)
    with warnings.catch_warnings():  # some older model files use torch.jit
        warnings.simplefilter("ignore", DeprecationWarning)
        model = AutoModelForCausalLM.from_config(config)
    if dtype == torch.float64 and hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the grouped kernels have no float64
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:  # large enough that the context decides the logits
                nn.init.normal_(parameter, std=0.2)
    return model.to(dtype).eval()


def random_mtp(
    name: str, num_layers: int, dtype: torch.dtype = torch.float64, **options: Any
) -> tuple[PreTrainedModel, MtpHeads]:
    """A family's tiny model with random MTP modules; skips the test where transformers has none."""
    if not hasattr(modeling_layers, "MtpModel"):
        pytest.skip(f"transformers {RELEASE} has no MTP modules")
    model = build(name, dtype, num_mtp_layers=num_layers, **options)
    torch.manual_seed(1)
    mtp = modeling_layers.MtpModel(model, num_layers)
    for parameter in mtp.layers.parameters():
        nn.init.normal_(parameter, mean=0.0 if parameter.ndim > 1 else 1.0, std=0.2)
    return model, MtpHeads(model, mtp)


def skeleton(name: str) -> PreTrainedModel:
    """A family's model without weights, for what can be told from the outside."""
    config = config_of(name)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config).eval()
