"""Whole models with heads in them: the heads belong to that model, and the two can be taken apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from checkpoints import HEADS, MODELOPT, V10, Numbers, config_of, make_numbers, named, read, same
from ladon.errors import HeadsError
from ladon.heads import load_heads, new_heads
from ladon.heads.factory import read_heads
from ladon.heads.fingerprint import fingerprint
from ladon.heads.formats.detect import detect
from ladon.heads.formats.export import export_heads
from ladon.heads.formats.files import open_checkpoint
from ladon.heads.formats.whole import split_model

LAYOUTS = {
    "v1.0": (V10, {"medusa_num_heads": 9, "medusa_num_layers": 1}),
    "v1.0 without a word in the config": (V10, {}),
    "modelopt": (MODELOPT, {"medusa": {"num_medusa_heads": HEADS, "num_medusa_layers": 2}}),
}


def llama(seed: int, tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=97,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            tie_word_embeddings=tied,
        )
    ).eval()


def whole(folder: Path, model: PreTrainedModel, layout: str, shards: int = 1, pickled: bool = False) -> Numbers:
    """A folder with the model and heads in it, in one file or in shards over which the heads are spread."""
    names, config = LAYOUTS[layout]
    numbers = make_numbers(dtype=torch.float32)
    model.save_pretrained(folder)
    tensors = read(folder / "model.safetensors") | named(numbers, **names)
    (folder / "model.safetensors").unlink()
    end, stem = (".bin", "pytorch_model") if pickled else (".safetensors", "model")
    keys, weight_map = sorted(tensors), {}
    for i in range(shards):
        file = f"{stem}{end}" if shards == 1 else f"{stem}-{i + 1:05d}-of-{shards:05d}{end}"
        part = {key: tensors[key] for key in keys[i::shards]}
        weight_map |= dict.fromkeys(part, file)
        if pickled:
            torch.save(part, folder / file)
        else:
            save_file(part, folder / file)
    if shards > 1:
        index: dict[str, Any] = {"metadata": {}, "weight_map": weight_map}
        (folder / f"{stem}{end}.index.json").write_text(json.dumps(index), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(config_of(folder) | config), encoding="utf-8")
    (folder / "README.md").write_text("heads inside", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text("{}", encoding="utf-8")
    return numbers


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shards", [1, 3])
def test_the_heads_load_onto_their_own_model(tmp_path: Path, layout: str, shards: int) -> None:
    model, hidden = llama(0), torch.randn(4, 32)
    numbers = whole(tmp_path, model, layout, shards)
    heads = load_heads(tmp_path, model)
    torch.testing.assert_close(heads(hidden), numbers.logits(hidden))
    assert read_heads(tmp_path).base_fingerprint == fingerprint(model)  # without the model being loaded
    assert load_heads(tmp_path, llama(0).bfloat16()).is_bound


@pytest.mark.parametrize("layout", LAYOUTS)
def test_another_base_is_refused(tmp_path: Path, layout: str) -> None:
    """The model that it was made from has the same embedding and projection; the layers in between were tuned."""
    model, original = llama(0), llama(0)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight.mul_(1.05)
            layer.self_attn.q_proj.weight.mul_(1.05)
    whole(tmp_path, model, layout)
    with pytest.raises(HeadsError, match=r"together with their own model.*body \d+%.*ladon import .* --out DIR"):
        load_heads(tmp_path, original)
    assert load_heads(tmp_path, original, force=True).is_bound
    with pytest.raises(HeadsError, match="weights differ"):
        load_heads(tmp_path).bind(original)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("shards", "pickled"), [(1, False), (3, False), (2, True)])
def test_a_split_model_is_the_model(tmp_path: Path, tied: bool, shards: int, pickled: bool) -> None:
    model = llama(0, tied)
    whole(tmp_path / "whole", model, "v1.0", shards, pickled)
    found = detect(open_checkpoint(tmp_path / "whole"))
    assert found.holds_model
    told: list[tuple[str, int, int]] = []
    split_model(found.checkpoint, found.parts.beside, tmp_path / "model", lambda *told_now: told.append(told_now))
    assert told[-1][1:] == (shards, shards)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert same(loaded.state_dict(), model.state_dict())
    assert not [key for key in config_of(tmp_path / "model") if "medusa" in key]
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert "README.md" not in names and {"tokenizer_config.json", "generation_config.json"} <= names
    assert ("model.safetensors" in names) == (shards == 1)


def test_a_whole_model_of_an_unknown_kind_cannot_be_verified(tmp_path: Path) -> None:
    model = llama(0)
    whole(tmp_path, model, "v1.0")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "of-the-future"}), encoding="utf-8")
    with pytest.warns(UserWarning, match="cannot verify"):
        load_heads(tmp_path, model)


def test_quantised_heads_are_refused(tmp_path: Path) -> None:
    whole(tmp_path, llama(0), "modelopt")
    tensors = read(tmp_path / "model.safetensors") | {"medusa_heads.0.0.linear.weight_scale": torch.ones(())}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(HeadsError, match=r"no part of it: medusa_heads\.0\.0\.linear\.weight_scale"):
        load_heads(tmp_path)


@pytest.mark.parametrize("projection", ["own", "shared"])
def test_modelopt_export(tmp_path: Path, projection: str) -> None:
    model, hidden = llama(0), torch.randn(4, 32)
    heads = new_heads(model, 2, "medusa", projection=projection)
    torch.nn.init.normal_(heads.block_weight)  # type: ignore[arg-type]
    with pytest.raises(HeadsError, match="modelopt holds the model and its heads"):
        export_heads(heads, "modelopt", tmp_path / "out")
    files = export_heads(heads, "modelopt", tmp_path / "out", model=model)
    assert {"config.json", "model.safetensors", "medusa_heads.safetensors", "model.safetensors.index.json"} <= set(
        files
    )
    assert config_of(tmp_path / "out")["medusa"] == {"num_medusa_heads": 2, "num_medusa_layers": 1}
    keys = {f"medusa_heads.{h}.{end}" for h in (0, 1) for end in ("0.linear.weight", "0.linear.bias", "1.weight")}
    assert set(read(tmp_path / "out" / "medusa_heads.safetensors")) == keys
    again = load_heads(tmp_path / "out", model)
    torch.testing.assert_close(again(hidden), heads(hidden))
    found = detect(open_checkpoint(tmp_path / "out"))
    split_model(found.checkpoint, found.parts.beside, tmp_path / "model", lambda *_: None)
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict(), model.state_dict())
