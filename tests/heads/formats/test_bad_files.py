"""Files that are no heads, or not these: one line each, and no code of theirs is run."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from checkpoints import TENSORRT, V01, V2, V10, VLLM, changed, make_numbers, named, write
from ladon.errors import HeadsError
from ladon.heads import load_heads

PT, SAFE = "medusa_lm_head.pt", "medusa_lm_head.safetensors"


def v01() -> dict[str, Tensor]:
    return named(make_numbers(), **V01)


def refusal(folder: Path, model: PreTrainedModel | None = None) -> str:
    """The one line that loading ends in."""
    with pytest.raises(HeadsError) as caught:
        load_heads(folder, model)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_unknown_format_names_what_was_found_and_what_is_known(tmp_path: Path) -> None:
    tensors = {f"decoder.{i}.weight": torch.zeros(2) for i in range(9)}
    message = refusal(write(tmp_path, tensors, "model.safetensors"))
    assert "is no known format of heads" in message
    assert "Found 9 tensors: decoder.0.weight" in message and "and 3 more" in message
    for known in ("MEDUSA", "vLLM", "TensorRT-LLM", "Model-Optimizer", "Hydra", "Ladon's own"):
        assert known in message


def test_tensors_of_another_kind(tmp_path: Path) -> None:
    whole = {key: value.to(torch.int8) for key, value in v01().items()}
    assert "is torch.int8; quantised heads cannot be read" in refusal(write(tmp_path / "int", whole, SAFE))
    key = next(key for key in v01() if "linear" not in key)
    scalar = {**v01(), key: torch.zeros(())}
    assert "expected" in refusal(write(tmp_path / "scalar", scalar, SAFE))


@pytest.mark.parametrize("token_map", [[], [-1, 2], [0.5, 1.0], [[1, 2]], [0, 10_000]])
def test_a_token_map_that_is_none(tiny_llama: PreTrainedModel, tmp_path: Path, token_map: list[Any]) -> None:
    tensors = {**named(make_numbers(), **VLLM), "token_map": torch.tensor(token_map)}
    message = refusal(write(tmp_path, tensors, "model.safetensors"), tiny_llama)
    assert "token_map" in message


@pytest.mark.parametrize("file", [PT, SAFE])
@pytest.mark.parametrize("kept", [0, 7, 0.5, 0.99])
def test_truncated_files(tmp_path: Path, file: str, kept: float) -> None:
    path = write(tmp_path, v01(), file) / file
    data = path.read_bytes()
    path.write_bytes(data[: int(kept if kept > 1 else kept * len(data))])
    assert f"{file} " in refusal(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write(tmp_path, v01(), "model-00001-of-00002.safetensors")
    index = '{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}'
    (tmp_path / "model.safetensors.index.json").write_text(index, encoding="utf-8")
    assert "lacks model-00002-of-00002.safetensors" in refusal(tmp_path)


class Bomb:
    """A pickle that makes a file when it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("container", ["torch", "bare", "in a table"])
def test_code_in_a_pickle_is_not_run(tmp_path: Path, container: str) -> None:
    mark, file = tmp_path / "mark", tmp_path / "heads" / PT
    file.parent.mkdir()
    if container == "torch":
        torch.save(Bomb(mark), file)
    elif container == "bare":
        file.write_bytes(pickle.dumps(Bomb(mark), protocol=2))
    else:
        torch.save({**v01(), "0.0.linear.weight": Bomb(mark)}, file)
    message = refusal(file.parent)
    assert "never run" in message and "safetensors" in message
    assert not mark.exists()
    pickle.loads(pickle.dumps(Bomb(mark)))
    assert mark.exists()  # the bomb does work


def test_a_pickle_that_is_no_table_of_tensors(tmp_path: Path) -> None:
    torch.save({"state_dict": v01(), "step": 3}, tmp_path / PT)
    assert "holds no table of tensors" in refusal(tmp_path)


BREAKS: list[tuple[Callable[[dict[str, Tensor]], object], str]] = [
    (lambda t: [t.pop(key) for key in list(t) if key.startswith("1.")], "head indices are 0, 2, but 1 is missing"),
    (lambda t: [t.pop(f"2.0.linear.{kind}") for kind in ("weight", "bias")], "head 2, layer indices are 1, but 0 is"),
    (lambda t: [t.pop(f"2.1.linear.{kind}") for kind in ("weight", "bias")], "different numbers of layers"),
    (lambda t: t.pop("1.2.weight"), "mixes two layouts: heads 0, 2 have a projection weight of their own, heads 1"),
    (lambda t: t.pop("1.0.linear.bias"), "lacks the bias of head 1, layer 0"),
    (lambda t: t.pop("1.0.linear.weight"), "lacks the weight of head 1, layer 0"),
    (lambda t: t.update({"0.3.weight": t.pop("0.2.weight")}), "0.3.weight would be the projection after 3 layers"),
    (lambda t: t.update({"1.1.linear.weight": torch.zeros(32, 31)}), "1.1.linear.weight is [32, 31], expected [32"),
    (lambda t: t.update({"2.2.weight": torch.zeros(96, 32)}), "2.2.weight is [96, 32], expected [97, 32]"),
    (lambda t: t.update({"extra": torch.zeros(2)}), "tensors that are no part of it: extra"),
    (lambda t: t.update({"5.2.weight": torch.zeros(97, 32)}), "head 5 has a projection and no layers"),
    (lambda t: t.update(named(make_numbers(), **VLLM)), "mixes layouts: MEDUSA heads"),
    (lambda t: t.update(named(make_numbers(), **TENSORRT)), "mixes layouts"),
    (lambda t: t.update(named(make_numbers(), **V10)), "mixes layouts"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), BREAKS, ids=[message[:30] for _, message in BREAKS])
@pytest.mark.parametrize("file", [PT, SAFE])
def test_tensors_that_do_not_fit_are_named(
    tmp_path: Path, file: str, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    assert message in refusal(write(tmp_path, changed(v01(), change), file))


def test_a_model_of_other_sizes(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    write(tmp_path, named(make_numbers(entries=96), **V01), PT)
    assert "hidden size 32 and vocabulary 96 do not fit a model with hidden size 32 and vocabulary 97" in refusal(
        tmp_path, tiny_llama
    )


def test_broken_numbers_are_a_warning(tmp_path: Path) -> None:
    tensors = v01()
    tensors["1.0.linear.bias"][3] = torch.nan
    with pytest.warns(UserWarning, match=r"block_bias hold NaN or infinite numbers"):
        load_heads(write(tmp_path, tensors, PT))


def test_a_config_that_is_no_json(tmp_path: Path) -> None:
    write(tmp_path, v01(), PT)
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    assert "is no JSON" in refusal(tmp_path)


def test_two_kinds_of_heads_in_one_folder(tmp_path: Path) -> None:
    write(tmp_path, v01(), PT)
    write(tmp_path, v01(), "hydra_lm_head.pt")
    assert "holds both hydra_lm_head and medusa_lm_head files" in refusal(tmp_path)


@pytest.mark.filterwarnings("ignore:cannot verify")
def test_a_token_map_out_of_range(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    tensors = named(make_numbers(entries=3), **VLLM) | {"token_map": torch.tensor([0, 4, 97])}
    write(tmp_path, tensors, "model.safetensors")
    assert "from 0 to 97; expected distinct ids below 97" in refusal(tmp_path, tiny_llama)
    assert "does not tell the size of the vocabulary" in refusal(tmp_path)
    tensors["lm_heads.2.weight"] = torch.zeros(4, 32)
    write(tmp_path, tensors, "model.safetensors")
    assert "lm_heads.2.weight is [4, 32], expected [3, 32]" in refusal(tmp_path, tiny_llama)


HYDRA = {
    "hydra_mlp.0.0.linear.weight": torch.zeros(32, 64),
    "hydra_mlp.0.0.linear.bias": torch.zeros(32),
    "hydra_mlp.0.0.res_connection.weight": torch.zeros(32, 64),
    "hydra_mlp.0.0.res_connection.bias": torch.zeros(32),
    "hydra_lm_head.0.weight": torch.zeros(97, 32),
    "hydra_lm_head.0.bias": torch.zeros(97),
}
WITHOUT = [key for key in HYDRA if "res_connection" in key]


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        ({"hydra_head_arch": "prefix-mlp"}, lambda t: None, "'prefix-mlp'; supported is 'mlp' with grounded heads"),
        ({"hydra_head_arch": "eagle-attn"}, lambda t: None, "'eagle-attn'; supported is 'mlp'"),
        (None, lambda t: t.update({"prefix_embeding_layer.x": torch.zeros(1)}), "'prefix-mlp'; supported"),
        ({"grounded_heads": False}, lambda t: None, "mlp with ungrounded heads; supported"),
        (None, lambda t: [t.pop(key) for key in WITHOUT], "not grounded"),
        (None, lambda t: t.pop("hydra_lm_head.0.bias"), "lacks hydra_lm_head.0.bias"),
        (None, lambda t: t.pop("hydra_mlp.0.0.res_connection.bias"), "lacks hydra_mlp.0.0.res_connection.bias"),
        (
            None,
            lambda t: t.update({"hydra_mlp.0.0.linear.weight": torch.zeros(32, 96)}),
            "hydra_mlp.0.0.linear.weight is [32, 96], expected [32, 64]",
        ),
        (None, lambda t: t.update({"hydra_lm_head.1.weight": torch.zeros(97, 32)}), "should not hold hydra_lm_head.1"),
    ],
)
def test_hydra_files_that_are_not_supported_say_why(
    tmp_path: Path, config: dict[str, Any] | None, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    assert load_heads(write(tmp_path / "good", HYDRA, "hydra_lm_head.pt")).num_heads == 1
    assert message in refusal(write(tmp_path, changed(HYDRA, change), "hydra_lm_head.pt", config))


def test_version_2_without_biases_warns(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    write(tmp_path, named(make_numbers(), **V2, biases=False), SAFE, {"vocab_size": 97})
    with pytest.warns(UserWarning, match="holds no biases"):
        assert load_heads(tmp_path).options["projection"] == "shared"
