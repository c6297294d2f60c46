"""Other systems' heads: files made from the documented layouts load and compute the documented formula."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from checkpoints import (
    HEADS,
    HIDDEN,
    MODELOPT,
    TENSORRT,
    V01,
    V2,
    V10,
    VLLM,
    VLLM_PREFIXED,
    VOCABULARY,
    make_numbers,
    named,
    write,
)
from ladon.errors import HeadsError
from ladon.heads import HydraHeads, MedusaHeads, load_heads

UNVERIFIED = pytest.mark.filterwarnings("ignore:cannot verify")
CONFIG = {"base_model_name_or_path": "someone/base", "medusa_num_heads": 2, "medusa_num_layers": 1}  # both wrong


def hidden_rows() -> Tensor:
    return torch.randn(4, HIDDEN, dtype=torch.float64)


@UNVERIFIED
@pytest.mark.parametrize("file", ["medusa_lm_head.pt", "medusa_lm_head.safetensors", "model.safetensors"])
@pytest.mark.parametrize("names", [V01, V10, MODELOPT, TENSORRT], ids=["v0.1", "v1.0", "modelopt", "tensorrt"])
def test_heads_with_projections_of_their_own(
    tiny_llama: PreTrainedModel, tmp_path: Path, names: dict[str, str], file: str
) -> None:
    numbers, hidden = make_numbers(), hidden_rows()
    heads = load_heads(write(tmp_path, named(numbers, **names), file, CONFIG), tiny_llama)
    assert isinstance(heads, MedusaHeads) and (heads.num_heads, heads.num_blocks) == (HEADS, 2)
    assert heads.base_name == "someone/base"
    torch.testing.assert_close(heads(hidden), numbers.logits(hidden))


@UNVERIFIED
@pytest.mark.parametrize("path", ["medusa_lm_head.pt", ""])
def test_neither_a_model_nor_a_config_is_needed(tiny_llama: PreTrainedModel, tmp_path: Path, path: str) -> None:
    numbers, hidden = make_numbers(dtype=torch.bfloat16), hidden_rows()
    write(tmp_path, named(numbers, **V01), "medusa_lm_head.pt")
    heads = load_heads(tmp_path / path)
    assert not heads.is_bound and heads.vocab_size == VOCABULARY
    assert {parameter.dtype for parameter in heads.parameters()} == {torch.bfloat16}
    assert heads.bind(tiny_llama)(hidden).shape == (4, HEADS, VOCABULARY)


def test_heads_without_a_fingerprint_say_so(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    write(tmp_path, named(make_numbers(), **V01), "medusa_lm_head.pt")
    with pytest.warns(UserWarning, match="cannot verify .* no fingerprint"):
        load_heads(tmp_path, tiny_llama)


@UNVERIFIED
def test_version_2_reads_the_models_own_projection(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    numbers, hidden = make_numbers(layers=1), hidden_rows()
    write(tmp_path, named(numbers, **V2), "medusa_lm_head.safetensors", CONFIG | {"version": "2"})
    heads = load_heads(tmp_path, tiny_llama)
    assert {name for name, _ in heads.named_parameters()} == {"block_weight", "block_bias"}
    torch.testing.assert_close(heads(hidden), numbers.logits(hidden, shared=tiny_llama.lm_head.weight))
    with pytest.raises(HeadsError, match=r"does not tell the size of the vocabulary.*load_heads\(path, model\)"):
        load_heads(tmp_path)


@UNVERIFIED
@pytest.mark.parametrize("names", [VLLM, VLLM_PREFIXED])
def test_vllm(tiny_llama: PreTrainedModel, tmp_path: Path, names: dict[str, str]) -> None:
    numbers, hidden = make_numbers(), hidden_rows()
    config = {"model_type": "medusa", "num_heads": 9, "num_hidden_layers": 9, "medusa_fc_bias": False}
    write(tmp_path, named(numbers, **names), "model.safetensors", config)
    torch.testing.assert_close(load_heads(tmp_path, tiny_llama)(hidden), numbers.logits(hidden))


@UNVERIFIED
def test_biases_that_a_file_has_lost_are_zero_and_said(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    numbers, hidden = make_numbers(), hidden_rows()
    write(tmp_path, named(numbers, **VLLM, biases=False), "model.safetensors")
    with pytest.warns(UserWarning, match="holds no biases .* zeros stand for them"):
        heads = load_heads(tmp_path, tiny_llama)
    torch.testing.assert_close(heads(hidden), numbers.logits(hidden, biases=False))


@UNVERIFIED
@pytest.mark.parametrize("key", ["lm_heads.0.weight", "lm_head.weight", "medusa_heads.lm_head.weight"])
def test_vllm_with_one_shared_projection(tiny_llama: PreTrainedModel, tmp_path: Path, key: str) -> None:
    numbers, hidden = make_numbers(), hidden_rows()
    tensors = named(numbers, VLLM["block"], None) | {key: tiny_llama.lm_head.weight.detach()}
    write(tmp_path, tensors, "model.safetensors", {"original_lm_head": True})
    heads = load_heads(tmp_path, tiny_llama)
    assert heads.options["projection"] == "shared"
    torch.testing.assert_close(heads(hidden), numbers.logits(hidden, shared=tiny_llama.lm_head.weight))
    assert load_heads(tmp_path).vocab_size == VOCABULARY
    with torch.no_grad():
        tiny_llama.lm_head.weight.normal_()
    with pytest.raises(HeadsError, match=r"weights differ .*projection \d+%"):
        load_heads(tmp_path, tiny_llama)


@UNVERIFIED
@pytest.mark.parametrize("kept", ["rows", "whole"])
@pytest.mark.parametrize("shared", [False, True])
def test_vllm_with_a_draft_vocabulary(tiny_llama: PreTrainedModel, tmp_path: Path, kept: str, shared: bool) -> None:
    """Projections of the draft's tokens only, or of all tokens, of which vLLM takes rows when it loads them."""
    numbers, hidden, ids = make_numbers(), hidden_rows(), torch.tensor([90, 3, 41, 0, 17])
    own = tiny_llama.lm_head.weight.detach()
    tensors = named(numbers, **VLLM) if not shared else named(numbers, VLLM["block"], None) | {"lm_heads.0.weight": own}
    if kept == "rows":
        tensors = {key: tensor[ids] if key.startswith("lm_heads") else tensor for key, tensor in tensors.items()}
    config = {"vocab_size": VOCABULARY, "truncated_vocab_size": 5, "original_lm_head": shared}
    write(tmp_path, tensors | {"token_map": ids}, "model.safetensors", config)
    heads = load_heads(tmp_path, tiny_llama)
    assert heads.token_ids is not None and heads.token_ids.tolist() == ids.tolist()
    torch.testing.assert_close(heads(hidden), numbers.logits(hidden, shared=own if shared else None)[..., ids])


def hydra_tensors(layers: int = 2) -> dict[str, Tensor]:
    tensors = {}
    for h in range(HEADS):
        width = (h + 2) * HIDDEN
        tensors[f"hydra_mlp.{h}.0.linear.weight"] = torch.randn(HIDDEN, width, dtype=torch.float64) * 0.1
        tensors[f"hydra_mlp.{h}.0.linear.bias"] = torch.randn(HIDDEN, dtype=torch.float64)
        tensors[f"hydra_mlp.{h}.0.res_connection.weight"] = torch.randn(HIDDEN, width, dtype=torch.float64) * 0.1
        tensors[f"hydra_mlp.{h}.0.res_connection.bias"] = torch.randn(HIDDEN, dtype=torch.float64)
        for j in range(1, layers):
            tensors[f"hydra_mlp.{h}.{j}.linear.weight"] = torch.randn(HIDDEN, HIDDEN, dtype=torch.float64) * 0.1
            tensors[f"hydra_mlp.{h}.{j}.linear.bias"] = torch.randn(HIDDEN, dtype=torch.float64)
        tensors[f"hydra_lm_head.{h}.weight"] = torch.randn(VOCABULARY, HIDDEN, dtype=torch.float64)
        tensors[f"hydra_lm_head.{h}.bias"] = torch.randn(VOCABULARY, dtype=torch.float64)
    return tensors


@UNVERIFIED
@pytest.mark.parametrize("layers", [1, 3])
def test_hydra(tiny_llama: PreTrainedModel, tmp_path: Path, layers: int) -> None:
    tensors, hidden, following = hydra_tensors(layers), hidden_rows(), torch.randint(VOCABULARY, (4, HEADS))
    embedding = tiny_llama.model.embed_tokens.weight.detach()
    write(tmp_path, tensors | {"input_embed_fn.weight": embedding}, "hydra_lm_head.pt", {"hydra_head_arch": "mlp"})
    heads = load_heads(tmp_path, tiny_llama)
    assert isinstance(heads, HydraHeads) and "input_embed_fn.weight" not in heads.state_dict()
    for h in range(HEADS):
        x = torch.cat([hidden, *(embedding[following[:, i]] for i in range(h + 1))], dim=-1)
        for j in range(layers):
            inner = functional.silu(
                x @ tensors[f"hydra_mlp.{h}.{j}.linear.weight"].T + tensors[f"hydra_mlp.{h}.{j}.linear.bias"]
            )
            if j == 0:
                x = x @ tensors[f"hydra_mlp.{h}.0.res_connection.weight"].T
                x = x + tensors[f"hydra_mlp.{h}.0.res_connection.bias"]
            x = x + inner
        expected = x @ tensors[f"hydra_lm_head.{h}.weight"].T + tensors[f"hydra_lm_head.{h}.bias"]
        torch.testing.assert_close(heads(hidden, following)[:, h], expected)
    with torch.no_grad():
        embedding.normal_()
    with pytest.raises(HeadsError, match=r"weights differ .*embedding \d+%"):
        load_heads(tmp_path, tiny_llama)
