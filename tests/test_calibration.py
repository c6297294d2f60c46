"""The calibration file beside heads: written whole, read strictly, used only with its own heads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from ladon import lattice
from ladon.calibration import CALIBRATION_FILE, Calibration, read_calibration
from ladon.errors import HeadsError
from ladon.heads import load_heads, new_heads


def calibration(heads: str, num_heads: int = 2) -> Calibration:
    return Calibration(heads=heads, temperatures=[1.5] * num_heads, hit_rates=[[0.5, 0.2]] * num_heads)


def test_round_trip(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    heads = new_heads(tiny_llama, 2)
    heads.save(tmp_path)
    saved = calibration(heads.weights_hash)
    saved.save(tmp_path)
    assert json.loads((tmp_path / CALIBRATION_FILE).read_text(encoding="utf-8"))["temperatures"] == [1.5, 1.5]
    assert load_heads(tmp_path, tiny_llama).calibration == read_calibration(tmp_path)


def test_none_without_the_file(tmp_path: Path) -> None:
    assert read_calibration(tmp_path) is None


def test_other_heads_calibration_is_left_aside(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    new_heads(tiny_llama, 2).save(tmp_path)
    calibration("0123456789abcdef").save(tmp_path)
    with pytest.warns(UserWarning, match="made for other heads"):
        assert load_heads(tmp_path, tiny_llama).calibration is None


@pytest.mark.parametrize(
    "text",
    ["{", "[]", '{"format": "ladon-calibration", "version": 2}', '{"format": "ladon-calibration", "version": 1}'],
)
def test_damaged_files_are_named(tmp_path: Path, text: str) -> None:
    (tmp_path / CALIBRATION_FILE).write_text(text, encoding="utf-8")
    with pytest.raises(HeadsError, match="ladon calibrate"):
        read_calibration(tmp_path)


def test_temperatures_flatten_or_sharpen_each_depth() -> None:
    logits = torch.tensor([[[2.0, 1.0, 0.0], [2.0, 1.0, 0.0]]])
    found = lattice.from_logits(logits, 3, temperatures=torch.tensor([1.0, 2.0]))
    torch.testing.assert_close(found.log_probs[0, 0, 0], logits[0, 0].log_softmax(-1))
    torch.testing.assert_close(found.log_probs[0, 1, 0], (logits[0, 1] / 2).log_softmax(-1))


def test_tokens_of_a_vocabulary_of_the_heads_own() -> None:
    logits = torch.tensor([[[0.0, 3.0, 1.0]]])
    found = lattice.from_logits(logits, 2, token_ids=torch.tensor([40, 7, 99]))
    assert found.tokens.tolist() == [[[[7, 99]]]]
