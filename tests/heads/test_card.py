"""The model card: what it says, and that it never takes the place of somebody else's text."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from ladon import load_heads, new_heads
from ladon.errors import HeadsError
from ladon.heads import Heads
from ladon.heads.calibration import Calibration
from ladon.heads.card import MARKER, in_bytes, model_card, shown_base, write_card
from ladon.heads.early_exit import new_early_exit


def report(after: str, top1: float, length: float) -> dict[str, Any]:
    return {
        "step": 7,
        "after": after,
        "loss": [2.5, None],
        "accuracy": [[top1, 0.5, 0.6, 0.7, 0.8], [0.1, 0.2, 0.3, 0.4, 0.5]],
        "chain_length": length - 0.1,
        "tree_length": length,
        "budget": 16,
    }


@pytest.fixture
def heads(tiny_llama: PreTrainedModel) -> Heads:
    """Heads with everything that can be known about them."""
    tiny_llama.config._name_or_path = "someone/tiny-llama"
    made = new_heads(tiny_llama, num_heads=2).to(torch.bfloat16)
    made.training_record = {
        "settings": {
            "optimizer": "muon",
            "length": 512,
            "updates": 1200,
            "init_heads": "/a/b",
            "model": {"body": "00"},
        },
        "rows": 54321,
        "skipped_rows": 3,
        "skipped_steps": 0,
        "history": [report("1%", 0.31, 1.5), report("10%", 0.42, 1.9), report("100%", 0.53, 2.4)],
    }
    made.calibration = Calibration(
        heads=made.weights_hash,
        temperatures=[1.25, 1.5],
        hit_rates=[[0.5, 0.1], [0.3, 0.1]],
        error={"before": {"all": [0.08, 0.09]}, "after": {"all": [0.01, None]}},
        simulated=[{"tree": "dynamic", "nodes": 32, "temperatures": True, "acceptance_length": 2.61, "accepted": []}],
    )
    return made


def test_card_says_what_is_known(heads: Heads, tiny_llama: PreTrainedModel) -> None:
    text = model_card(heads, early_exit=new_early_exit(tiny_llama, 1), data="chats", licence="apache-2.0")
    _, matter, body = text.split("---\n", 2)
    assert matter.splitlines() == [
        "library_name: ladon",
        'base_model: "someone/tiny-llama"',
        'license: "apache-2.0"',
        "tags:",
        "- ladon",
        "- medusa",
        "- speculative-decoding",
    ]
    count = sum(p.numel() for p in heads.parameters())
    for part in (
        "# Decoding heads for someone/tiny-llama",
        f"{count:,} parameters, {in_bytes(2 * count)} in bfloat16",
        "| early exit | after layer 1 of 2: 320 parameters, 2.6 kB in float64 |",
        "shared (expansion 2, activation silu)",
        "Learned from chats. 54,321 rows, 1,200 updates. Skipped rows: 3 (not finite).",
        "optimizer muon, length 512",
        "| 1 | 2.50 | 53.0 % | 50.0 % | 60.0 % | 70.0 % | 80.0 % |",
        "| 2 | - | 10.0 % |",
        "| after | top-1, head 1 | top-1, head 2 | chain | tree of 16 |",
        "| 1% | 31.0 % | 10.0 % | 1.40 | 1.50 |",
        "| 100% | 53.0 % | 10.0 % | 2.30 | 2.40 |",
        "| 1 | 1.250 | 50.0 % | 8.0 % → 1.0 % |",
        "| 2 | 1.500 | 30.0 % | 9.0 % → - |",
        "2.61 tokens per step with a dynamic tree of 32 nodes",
        "ladon generate --model someone/tiny-llama --heads HEADS",
        "They belong to one model",
    ):
        assert part in body, part
    assert "Skipped steps" not in body and "/a/b" not in body  # nothing skipped; no paths of this machine


def test_card_of_bare_heads_invents_nothing(tiny_llama: PreTrainedModel) -> None:
    tiny_llama.config._name_or_path = "/srv/someone/models/tiny"
    text = model_card(new_heads(tiny_llama))
    assert "base_model" not in text and "license" not in text and "/someone" not in text
    assert "Decoding heads for tiny" in text and 'from_pretrained("MODEL"' in text
    for heading in ("## Training", "## Accuracy", "## Calibration"):
        assert heading not in text
    tiny_llama.config._name_or_path = ""
    assert "an unnamed model" in model_card(new_heads(tiny_llama))


@pytest.mark.parametrize(
    "record",
    [
        {"settings": "x", "history": [1, {}, {"loss": [1.0]}, {"loss": [], "accuracy": []}]},
        {"history": [{"loss": ["bad"], "accuracy": [["bad"]], "tree_length": "bad"}], "rows": None},
        {"history": {"loss": [1.0]}},
    ],
)
def test_records_of_another_form_are_no_error(record: dict[str, Any], tiny_llama: PreTrainedModel) -> None:
    heads = new_heads(tiny_llama)
    heads.training_record = record
    assert "## Limits" in model_card(heads)


def test_write_replaces_its_own_text_alone(heads: Heads, tmp_path: Path) -> None:
    heads.save(tmp_path)
    path = tmp_path / "README.md"
    assert write_card(tmp_path, load_heads(tmp_path))
    first = path.read_text()
    assert MARKER in first and "bfloat16" in first and "2.61 tokens" in first
    heads.training_record["rows"] = 99
    assert write_card(tmp_path, heads) and "99 rows" in path.read_text()
    path.write_text("mine")
    assert not write_card(tmp_path, heads)
    assert path.read_text() == "mine"
    path.write_bytes(b"\xff\xfe mine")  # not UTF-8
    assert not write_card(tmp_path, heads)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "README.md",
        "calibration.json",
        "config.json",
        "heads.safetensors",
    ]


def test_no_room_leaves_the_old_card(heads: Heads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_card(tmp_path, heads)
    before = (tmp_path / "README.md").read_text()

    def full(path: Path, data: bytes) -> int:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(HeadsError, match="No space left on device; make room"):
        write_card(tmp_path, heads)
    assert (tmp_path / "README.md").read_text() == before
    assert [p.name for p in tmp_path.iterdir()] == ["README.md"]


def test_front_matter_is_yaml(heads: Heads) -> None:
    """Strings are JSON strings, whatever is in them."""
    line = next(line for line in model_card(heads, licence='a: "b"').splitlines() if line.startswith("license"))
    assert json.loads(line.removeprefix("license: ")) == 'a: "b"'


def test_names_and_sizes_for_people() -> None:
    assert [in_bytes(n) for n in (12, 2600, 123_456, 4_200_000, 1_480_000_000)] == [
        "12 bytes",
        "2.6 kB",
        "123 kB",
        "4.2 MB",
        "1.48 GB",
    ]
    assert (
        shown_base("a/b") == "a/b" and shown_base("~/x/model") == "model" and shown_base("some words") == "some words"
    )
