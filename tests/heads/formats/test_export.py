"""Heads written for other systems: the documented keys and bytes, and back again; what does not fit is refused."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from checkpoints import HEADS, HIDDEN, V01, V2, VLLM, VOCABULARY, config_of, read, same
from ladon.errors import HeadsError
from ladon.heads import MedusaHeads, load_heads, new_heads
from ladon.heads.factory import read_heads
from ladon.heads.formats.export import FORMATS, export_heads
from ladon.trees.fixed_tree import FixedTree

UNVERIFIED = pytest.mark.filterwarnings("ignore:cannot verify")


def hidden_rows() -> Tensor:
    return torch.randn(4, HIDDEN, dtype=torch.float64)


def make_heads(model: PreTrainedModel, **options: Any) -> MedusaHeads:
    heads = new_heads(model, HEADS, "medusa", **options)
    assert isinstance(heads, MedusaHeads)
    heads.base_name = "someone/base"
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return heads


def tensors_of(heads: MedusaHeads, names: dict[str, Any], shared: Tensor | None = None) -> dict[str, Tensor]:
    """What a layout should hold for these heads."""
    tensors = {}
    for h in range(heads.num_heads):
        for layer in range(heads.num_blocks):
            tensors[f"{names['block'].format(h=h, l=layer)}.weight"] = heads.block_weight[layer, h].detach()
            tensors[f"{names['block'].format(h=h, l=layer)}.bias"] = heads.block_bias[layer, h].detach()
        if names["projection"] is not None:
            own = heads.projection[h].detach() if heads.projection is not None else shared
            assert own is not None
            tensors[f"{names['projection'].format(h=h, n=heads.num_blocks)}.weight"] = own
    return tensors


EXPORTS = [("medusa", "medusa_lm_head.pt", V01), ("tgi", "medusa_lm_head.safetensors", V01)]
EXPORTS += [("tensorrt-llm", "medusa_lm_head.pt", V01), ("vllm", "model.safetensors", VLLM)]


@UNVERIFIED
@pytest.mark.filterwarnings("ignore:no medusa_choices")
@pytest.mark.parametrize(("name", "file", "names"), EXPORTS)
def test_heads_survive_export_and_import(
    tiny_llama: PreTrainedModel, tmp_path: Path, name: str, file: str, names: dict[str, Any]
) -> None:
    heads = make_heads(tiny_llama, num_blocks=2)
    export_heads(heads, name, tmp_path / name)
    assert same(read(tmp_path / name / file), tensors_of(heads, names))
    again = read_heads(tmp_path / name)
    assert same(again.state_dict(), heads.state_dict())
    export_heads(again, name, tmp_path / "again")
    assert (tmp_path / "again" / file).read_bytes() == (tmp_path / name / file).read_bytes()


SHARED_EXPORTS = [
    ("medusa-v2", "medusa_lm_head.safetensors", V2, False),
    ("tgi", "medusa_lm_head.safetensors", V2, False),
]
SHARED_EXPORTS += [("medusa", "medusa_lm_head.pt", V01, True), ("tensorrt-llm", "medusa_lm_head.pt", V01, True)]


@UNVERIFIED
@pytest.mark.filterwarnings("ignore:no medusa_choices")
@pytest.mark.parametrize(("name", "file", "names", "copies"), SHARED_EXPORTS)
def test_shared_projections_are_left_out_or_copied(
    tiny_llama: PreTrainedModel, tmp_path: Path, name: str, file: str, names: dict[str, Any], copies: bool
) -> None:
    heads, hidden = make_heads(tiny_llama, projection="shared"), hidden_rows()
    if copies:
        with pytest.raises(HeadsError, match=f"{name} holds a copy of the model's output projection.*--model"):
            export_heads(heads, name, tmp_path / name)
        assert not (tmp_path / name).exists()
    export_heads(heads, name, tmp_path / name, model=tiny_llama if copies else None)
    weight = tiny_llama.lm_head.weight.detach()
    assert same(read(tmp_path / name / file), tensors_of(heads, names, weight))
    torch.testing.assert_close(load_heads(tmp_path / name, tiny_llama)(hidden), heads(hidden))


def test_tgi_needs_projections_where_a_head_has_several_blocks(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    heads = make_heads(tiny_llama, projection="shared", num_blocks=2)
    with pytest.raises(HeadsError, match="--model"):
        export_heads(heads, "tgi", tmp_path / "tgi")
    export_heads(heads, "tgi", tmp_path / "tgi", model=tiny_llama)
    assert "0.2.weight" in read(tmp_path / "tgi" / "medusa_lm_head.safetensors")


def test_configs_say_what_each_system_needs(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    heads = make_heads(tiny_llama, num_blocks=2)
    tree = FixedTree(((0,), (0, 0), (1,)))
    for name in ("medusa", "tgi", "vllm", "tensorrt-llm"):
        export_heads(heads, name, tmp_path / name, tree=tree)
    tgi = config_of(tmp_path / "tgi")
    assert "architectures" not in tgi and tgi["base_model_name_or_path"] == "someone/base"
    assert (tgi["medusa_num_heads"], tgi["medusa_num_layers"]) == (3, 2)
    vllm = config_of(tmp_path / "vllm")
    assert vllm["medusa_fc_bias"] is True and vllm["original_lm_head"] is False
    assert (vllm["num_heads"], vllm["num_hidden_layers"], vllm["truncated_vocab_size"]) == (3, 2, None)
    assert config_of(tmp_path / "tensorrt-llm")["num_medusa_heads"] == 3
    choices = json.loads((tmp_path / "tensorrt-llm" / "medusa_choices.json").read_text(encoding="utf-8"))
    assert choices == [[0], [0, 0], [1]]


@UNVERIFIED
@pytest.mark.parametrize("projection", ["own", "shared"])
def test_vllm_keeps_the_draft_vocabulary(tiny_llama: PreTrainedModel, tmp_path: Path, projection: str) -> None:
    heads, hidden = make_heads(tiny_llama, projection=projection, draft_vocab_size=7), hidden_rows()
    export_heads(heads, "vllm", tmp_path / "vllm", model=tiny_llama)
    tensors = read(tmp_path / "vllm" / "model.safetensors")
    assert tensors["token_map"].tolist() == list(range(7))
    assert len(tensors["lm_heads.0.weight"]) == (7 if projection == "own" else VOCABULARY)
    assert config_of(tmp_path / "vllm")["truncated_vocab_size"] == 7
    again = load_heads(tmp_path / "vllm", tiny_llama)
    assert again.config["options"] == heads.config["options"]
    torch.testing.assert_close(again(hidden), heads(hidden))


@pytest.mark.parametrize(("option", "title"), [("markov_rank", "Markov"), ("hidden_correction", "hidden")])
def test_heads_are_exported_without_their_correction(
    tiny_llama: PreTrainedModel, tmp_path: Path, option: str, title: str
) -> None:
    corrected = new_heads(tiny_llama, 2, "medusa", projection="shared", **{option: 2})
    corrected.base_name = "the tiny one"
    with pytest.warns(UserWarning, match=f"medusa-v2 has no place for the {title} correction of these heads"):
        export_heads(corrected, "medusa-v2", tmp_path / "out", model=tiny_llama)
    found = load_heads(tmp_path / "out", tiny_llama, force=True)
    assert found.correction is None
    hidden = hidden_rows()
    torch.testing.assert_close(found(hidden), corrected(hidden))


def test_a_format_that_cannot_hold_the_heads_says_why(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    wide, out = new_heads(tiny_llama, 2, "shared"), tmp_path / "out"
    for name in FORMATS[1:]:
        with pytest.raises(HeadsError, match=f"shared heads cannot be written as {name}, .*--format own"):
            export_heads(wide, name, out, model=tiny_llama)
    with pytest.raises(HeadsError, match=r"medusa-v2 has no projections.*--format medusa"):
        export_heads(make_heads(tiny_llama), "medusa-v2", out)
    with pytest.raises(HeadsError, match="guess 5 of 97 tokens, and tgi cannot say which"):
        export_heads(make_heads(tiny_llama, draft_vocab_size=5), "tgi", out)
    with pytest.raises(HeadsError, match="have biases, and vllm has no place"):
        export_heads(make_heads(tiny_llama, projection_bias=1), "vllm", out)
    with pytest.raises(HeadsError, match="'gguf' is unknown; known: own, medusa"):
        export_heads(wide, "gguf", out)
    assert not out.exists() and not list(tmp_path.iterdir())


def test_a_base_is_checked_before_its_weights_are_copied(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    heads = make_heads(tiny_llama, projection="shared")
    with torch.no_grad():
        tiny_llama.lm_head.weight.normal_()
    with pytest.raises(HeadsError, match="weights differ"):
        export_heads(heads, "medusa", tmp_path / "out", model=tiny_llama)


def test_own_format_is_the_whole_of_the_heads(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    heads = new_heads(tiny_llama, 2, "shared")
    assert export_heads(heads, "own", tmp_path / "own") == ["config.json", "heads.safetensors"]
    assert same(load_heads(tmp_path / "own", tiny_llama).state_dict(), heads.state_dict())
    with pytest.raises(HeadsError, match="is there already; give a new folder"):
        export_heads(heads, "own", tmp_path / "own")


def test_nothing_is_left_when_the_disk_is_full(
    tiny_llama: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ladon.heads.formats.export.save_file", full)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(HeadsError, match=r"cannot write .*No space left on device"):
            export_heads(make_heads(tiny_llama), "vllm", tmp_path / "out")
    assert not list(tmp_path.iterdir())
