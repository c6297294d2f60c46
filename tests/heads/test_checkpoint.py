"""Heads on disk: what is saved comes back, and whatever does not fit is named."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM, PreTrainedModel

from ladon.errors import HeadsError
from ladon.heads import Heads, load_heads, new_heads

FAMILIES = [
    ("shared", {"expansion": 2}),
    ("medusa", {"num_blocks": 2}),
    ("medusa", {"projection": "shared"}),
    ("medusa", {"draft_vocab_size": 11}),
    ("medusa", {"projection": "shared", "draft_vocab_size": 11}),
    ("medusa", {"projection_bias": 1}),
    ("hydra", {"num_blocks": 1}),
    ("hydra", {"num_blocks": 3}),
]


@pytest.fixture
def saved(tiny_llama: PreTrainedModel, tmp_path: Path) -> Path:
    """A folder with shared heads of `tiny_llama`."""
    new_heads(tiny_llama, 3).save(tmp_path / "heads")
    return tmp_path / "heads"


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(document | changes), encoding="utf-8")


@pytest.mark.parametrize(("family", "options"), FAMILIES)
def test_round_trip(tiny_llama: PreTrainedModel, tmp_path: Path, family: str, options: dict[str, Any]) -> None:
    heads = new_heads(tiny_llama, 3, family, **options)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.normal_()
    heads.training_record = {"steps": 7}
    heads.save(tmp_path)
    loaded = load_heads(tmp_path, tiny_llama)
    assert type(loaded) is type(heads) and loaded.config == heads.config
    hidden, root = torch.randn(2, 32, dtype=torch.float64), torch.tensor([3, 90])
    assert torch.equal(loaded.draft(hidden, root), heads.draft(hidden, root))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "heads.safetensors"]


def test_saving_again_replaces(tiny_llama: PreTrainedModel, saved: Path) -> None:
    new_heads(tiny_llama, 2, "medusa").save(saved)
    assert load_heads(saved, tiny_llama).config["family"] == "medusa"


def test_loading_without_a_model_keeps_the_saved_dtype(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    new_heads(tiny_llama.bfloat16(), 2).save(tmp_path)
    heads = load_heads(tmp_path)
    assert not heads.is_bound and {p.dtype for p in heads.parameters()} == {torch.bfloat16}
    assert heads.bind(tiny_llama.float())(torch.randn(1, 32)).dtype == torch.float32


def test_loaded_heads_can_be_trained_on(tiny_llama: PreTrainedModel, saved: Path) -> None:
    heads = load_heads(saved, tiny_llama)
    heads(torch.randn(1, 32, dtype=torch.float64)).square().sum().backward()
    assert all(p.grad is not None for p in heads.parameters())


def test_every_tensor_that_does_not_fit_is_named(saved: Path) -> None:
    weights = load_file(saved / "heads.safetensors")
    del weights["up_bias"]
    weights["extra.weight"] = torch.zeros(2)
    weights["down_weight"] = torch.zeros(3, 5, 32)
    save_file(weights, saved / "heads.safetensors")
    with pytest.raises(HeadsError) as caught:
        load_heads(saved)
    for problem in (
        "missing up_bias [3, 64]",
        "unexpected extra.weight [2]",
        "down_weight is [3, 5, 32], expected [3, 64, 32]",
    ):
        assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, "format 'other', expected 'ladon-heads'"),
        ({"version": 2}, "version 2, this Ladon reads 1"),
        ({"family": "eagle"}, "'eagle' is unknown; known: shared, medusa, lowrank, hydra"),
        ({"family": None}, "family is None, expected str"),
        ({"num_heads": 0}, "num_heads is 0, expected an integer >= 1"),
        ({"num_heads": True}, "num_heads is True"),
        ({"num_heads": "3"}, "num_heads is '3'"),
        ({"hidden_size": -1}, "hidden_size is -1"),
        ({"vocab_size": 1.5}, "vocab_size is 1.5"),
        ({"options": {"width": 2}}, "no option width; they take expansion"),
        ({"options": {"expansion": 0}}, "expansion is 0"),
        ({"options": []}, r"options is \[\], expected dict"),
        ({"base": None}, "base is None, expected dict"),
        ({"base": {"name": ""}}, None),
        ({"base": {"name": "", "fingerprint": {"embedding": "zz"}}}, "fingerprint is damaged"),
        ({"training": 3}, "training is 3, expected dict"),
        ({"num_heads": 2}, r"up_weight is \[3, 64, 32\], expected \[2, 64, 32\]"),
    ],
)
def test_config_is_validated(saved: Path, changes: dict[str, Any], message: str | None) -> None:
    edit_config(saved, **changes)
    if message is None:
        assert load_heads(saved).base_fingerprint is None
    else:
        with pytest.raises(HeadsError, match=message):
            load_heads(saved)


def test_damaged_and_missing_files(saved: Path, tmp_path: Path) -> None:
    weights = (saved / "heads.safetensors").read_bytes()
    (saved / "heads.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(HeadsError, match="is no safetensors file"):
        load_heads(saved)
    (saved / "heads.safetensors").unlink()
    with pytest.raises(HeadsError, match=r"heads\.safetensors cannot be read"):
        load_heads(saved)
    for content in (b"{", b"\xff\xfe"):
        (saved / "config.json").write_bytes(content)
        with pytest.raises(HeadsError, match="is no JSON"):
            load_heads(saved)
    (saved / "config.json").write_text("[]", encoding="utf-8")
    with pytest.raises(HeadsError, match="holds a list, expected an object"):
        load_heads(saved)
    (saved / "heads.safetensors").write_bytes(weights)
    with pytest.raises(HeadsError, match="format 'list'"):
        load_heads(saved)
    (saved / "config.json").unlink()
    with pytest.raises(HeadsError, match=r"config\.json cannot be read"):
        load_heads(saved)


def test_a_pickle_is_never_opened(saved: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (pytest.fail, ("unpickled",))

    (saved / "heads.safetensors").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(HeadsError, match="is no safetensors file"):
        load_heads(saved)


def test_another_model_is_refused_unless_forced(tiny_llama: PreTrainedModel, saved: Path) -> None:
    torch.manual_seed(1)
    other = LlamaForCausalLM(tiny_llama.config).double()
    with pytest.raises(HeadsError, match="weights differ"):
        load_heads(saved, other)
    assert load_heads(saved, other, force=True).is_bound
    assert load_heads(saved, tiny_llama.bfloat16()).is_bound


def test_paths_that_are_no_heads(tmp_path: Path) -> None:
    with pytest.raises(HeadsError, match="does not exist"):
        load_heads(tmp_path / "missing")
    with pytest.raises(HeadsError, match="does not exist"):
        load_heads("./missing")
    with pytest.raises(HeadsError, match="does not exist"):
        load_heads("a/b/c")
    (tmp_path / "file").touch()
    with pytest.raises(HeadsError, match="is no checkpoint; give a folder, or a file that ends in"):
        load_heads(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(HeadsError, match="holds no weights"):
        load_heads(tmp_path / "empty")


def test_hub_ids_go_through_the_hub_client(
    tiny_llama: PreTrainedModel, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def download(repo_id: str, **options: Any) -> str:
        calls.append((repo_id, options))
        return str(saved)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert isinstance(load_heads("someone/some-heads", tiny_llama, revision="v1"), Heads)
    assert calls == [
        (
            "someone/some-heads",
            {
                "revision": "v1",
                "allow_patterns": [
                    "config.json",
                    "heads.safetensors",
                    "calibration.json",
                    "early_exit.json",
                    "early_exit.safetensors",
                    "medusa_lm_head.safetensors",
                    "medusa_lm_head.pt",
                    "hydra_lm_head.safetensors",
                    "hydra_lm_head.pt",
                    "model.safetensors.index.json",
                    "pytorch_model.bin.index.json",
                ],
            },
        )
    ]


def test_a_whole_model_is_fetched_only_if_it_speaks_of_heads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def download(repo_id: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    with pytest.raises(HeadsError, match="'someone/model' holds no heads"):
        load_heads("someone/model")
    assert len(asked) == 1
    (tmp_path / "config.json").write_text('{"medusa_num_heads": 3}', encoding="utf-8")
    with pytest.raises(HeadsError, match="holds no weights"):
        load_heads("someone/model")
    assert [patterns for patterns in asked[2:] if "*.safetensors" in patterns or "*.bin" in patterns] == asked[2:]


def test_the_path_of_the_weights_stands_for_their_folder(tiny_llama: PreTrainedModel, saved: Path) -> None:
    assert load_heads(saved / "heads.safetensors", tiny_llama).weights_hash == load_heads(saved).weights_hash


def test_files_written_before_medusa_had_options_still_load(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    heads = new_heads(tiny_llama, 2, "medusa")
    heads.save(tmp_path)
    edit_config(tmp_path, options={"num_blocks": 1})
    assert load_heads(tmp_path, tiny_llama).config == heads.config
    assert set(load_file(tmp_path / "heads.safetensors")) == {"block_weight", "block_bias", "projection"}


@pytest.mark.parametrize(
    ("ids", "problem"),
    [([0, 1, 1], "2 of them distinct"), ([0, 1, 97], "from 0 to 97"), ([-1, 0, 1], "from -1 to 1")],
)
def test_a_token_map_must_name_tokens(
    tiny_llama: PreTrainedModel, tmp_path: Path, ids: list[int], problem: str
) -> None:
    heads = new_heads(tiny_llama, 2, "medusa", draft_vocab_size=3)
    heads.token_map.copy_(torch.tensor(ids))  # type: ignore[union-attr, operator]
    heads.save(tmp_path)
    with pytest.raises(HeadsError, match=problem):
        load_heads(tmp_path)


def test_hub_ids_that_cannot_be_read_are_one_line() -> None:
    with pytest.raises(HeadsError, match="'someone/no-such-heads' are neither a folder") as caught:
        load_heads("someone/no-such-heads")  # the tests run offline, so this is the client's own error
    assert "\n" not in str(caught.value)
