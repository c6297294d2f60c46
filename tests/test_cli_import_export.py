"""`ladon import` and `ladon export`, and the probe after an import."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from checkpoints import V01, V10, config_of, make_numbers, named, read, same, write
from ladon.calibrate.lattice_trace import TOO_FEW, probe
from ladon.cli.main import run
from ladon.heads import MedusaHeads, load_heads, new_heads
from ladon.heads.formats.export import export_heads
from user_side import Tiny


@pytest.fixture(autouse=True)
def _own_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)


@pytest.fixture(scope="module")
def trained(tiny: Tiny) -> MedusaHeads:
    """MEDUSA's heads of the tiny model, trained for a moment on its own greedy text."""
    torch.manual_seed(0)
    heads = new_heads(tiny.model, 3, "medusa")
    ids = torch.randint(1, len(tiny.tokenizer), (16, 4))
    with torch.no_grad():
        prompts = [tiny.tokenizer(text)["input_ids"] for text in ("The capital", "Once upon", "To make", "def read")]
        ids[: len(prompts), :] = torch.tensor([(prompt * 4)[:4] for prompt in prompts])
        rows = tiny.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)
        hidden = tiny.model.model(rows).last_hidden_state
    optimizer = torch.optim.Adam(heads.parameters(), lr=1e-2)
    length = rows.shape[1] - 4
    for _ in range(60):
        logits = heads(hidden[:, :length])
        targets = torch.stack([rows[:, k + 2 : k + 2 + length] for k in range(3)], dim=-1)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 2), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert isinstance(heads, MedusaHeads)
    return heads


def last_json(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a command ends in with code 2."""
    assert run(arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "warning" not in line]
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.filterwarnings("always:cannot verify")
def test_there_and_back(tiny: Tiny, trained: MedusaHeads, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exported as MEDUSA's first format, imported with the model: the same heads, which now know their model."""
    trained.save(tmp_path / "own")
    model = ["--model", str(tiny.folder / "model")]
    exported = [
        "export",
        str(tmp_path / "own"),
        "--format",
        "medusa",
        "--out",
        str(tmp_path / "medusa"),
        *model,
        "--json",
    ]
    assert run(exported) == 0
    assert last_json(capsys)["files"] == ["config.json", "medusa_lm_head.pt"]
    assert run(["import", str(tmp_path / "medusa"), "--out", str(tmp_path / "back"), *model, "--json"]) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out.splitlines()[-1])
    assert report["format"].startswith("MEDUSA heads") and report["num_heads"] == 3
    assert report["head_1_accuracy"] >= TOO_FEW
    assert "cannot verify" in captured.err
    again = load_heads(tmp_path / "back", tiny.model)  # without a warning: the probe told whose heads they are
    assert same(again.state_dict(), trained.state_dict())
    assert again.base_fingerprint == trained.base_fingerprint


@pytest.mark.filterwarnings("always")
def test_heads_that_guess_nothing_are_reported(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(3)
    numbers = make_numbers(entries=len(tiny.tokenizer), dtype=torch.float32)
    write(tmp_path / "theirs", named(numbers, **V01), "medusa_lm_head.pt")
    arguments = ["import", str(tmp_path / "theirs"), "--out", str(tmp_path / "out")]
    assert run([*arguments, "--model", str(tiny.folder / "model")]) == 0
    told = capsys.readouterr().err
    assert "warning: the heads guess next to nothing right" in told and "wrong base, wrong layout" in told
    assert load_heads(tmp_path / "out").base_fingerprint is None  # nothing says that they are this model's


def test_the_probe_tells_right_heads_from_wrong_ones(tiny: Tiny, trained: MedusaHeads) -> None:
    good = probe(tiny.model, tiny.tokenizer, trained)
    wrong = new_heads(tiny.model, 3, "medusa")
    with torch.no_grad():
        wrong.projection.normal_()  # type: ignore[union-attr, operator]
    assert probe(tiny.model, tiny.tokenizer, wrong) < TOO_FEW < 0.3 < good <= 1


def test_the_probe_reads_draft_vocabularies(tiny: Tiny, trained: MedusaHeads) -> None:
    """The draft's entries in reverse order: the same guesses, if they are read as tokens."""
    size = len(tiny.tokenizer)
    heads = MedusaHeads(num_heads=3, hidden_size=32, vocab_size=size, draft_vocab_size=size)
    order = torch.arange(size).flip(0)
    state = trained.state_dict()
    heads.load_state_dict({**state, "projection": state["projection"][:, order], "token_map": order})
    heads.remember_base(tiny.model)
    expected = probe(tiny.model, tiny.tokenizer, trained)
    assert probe(tiny.model, tiny.tokenizer, heads.bind(tiny.model)) == pytest.approx(expected)


@pytest.mark.parametrize("layout", ["v1.0", "modelopt"])
def test_a_whole_model_is_split(
    tiny: Tiny, trained: MedusaHeads, tmp_path: Path, capsys: pytest.CaptureFixture[str], layout: str
) -> None:
    source = tmp_path / "whole"
    if layout == "modelopt":
        export_heads(trained, "modelopt", source, model=tiny.model)
    else:
        tiny.model.save_pretrained(source)
        export_heads(trained, "modelopt", tmp_path / "for-the-names", model=tiny.model)
        theirs = read(tmp_path / "for-the-names" / "medusa_heads.safetensors")
        tensors = {key.replace("medusa_heads.", "medusa_head."): tensor for key, tensor in theirs.items()}
        assert set(tensors) == set(named(make_numbers(layers=1), **V10))
        save_file(read(source / "model.safetensors") | tensors, source / "model.safetensors")
    tiny.tokenizer.save_pretrained(source)
    assert run(["import", str(source), "--out", str(tmp_path / "out"), "--json"]) == 0
    report = last_json(capsys)
    assert report["model"] == str(tmp_path / "out" / "model") and report["heads"] == str(tmp_path / "out" / "heads")
    assert report["head_1_accuracy"] >= TOO_FEW
    model = AutoModelForCausalLM.from_pretrained(report["model"])
    assert same(model.state_dict(), tiny.model.state_dict())
    assert same(load_heads(report["heads"], model).state_dict(), trained.state_dict())
    assert not [key for key in config_of(tmp_path / "out" / "model") if "medusa" in key]
    arguments = ["--model", report["model"], "--heads", report["heads"], "--max-new-tokens", "4"]
    assert run(["generate", *arguments, "--prompt", "def read"]) == 0


@pytest.mark.filterwarnings("always:the heads were not tried out")
def test_a_model_without_a_tokenizer_is_split_all_the_same(
    tiny: Tiny, trained: MedusaHeads, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export_heads(trained, "modelopt", tmp_path / "whole", model=tiny.model)
    assert run(["import", str(tmp_path / "whole"), "--out", str(tmp_path / "out")]) == 0
    assert "warning: the heads were not tried out" in capsys.readouterr().err
    assert load_heads(tmp_path / "out" / "heads", tiny.model).is_bound


def test_mistakes_are_one_line_and_leave_nothing(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    heads = str(tiny.folder / "heads")
    write(tmp_path / "unknown", {"a": torch.zeros(1)}, "model.safetensors")
    assert "no known format of heads" in refused(["import", str(tmp_path / "unknown"), "--out", str(out)], capsys)
    assert "does not exist" in refused(["import", str(tmp_path / "none"), "--out", str(out)], capsys)
    assert "format 'gguf' is unknown" in refused(["export", heads, "--format", "gguf", "--out", str(out)], capsys)
    line = refused(["export", heads, "--format", "vllm", "--out", str(out)], capsys)
    assert "shared heads cannot be written as vllm" in line
    (tmp_path / "size.json").write_text('{"total_token": 16, "depth": 2, "top_k": 4}', encoding="utf-8")
    arguments = ["export", heads, "--format", "own", "--out", str(out), "--tree", str(tmp_path / "size.json")]
    assert "give rank paths" in refused(arguments, capsys)
    assert not out.exists()
    assert run(["export", heads, "--format", "own", "--out", str(out)]) == 0
    assert "3 shared heads as own" in capsys.readouterr().err
    assert "is there already" in refused(["export", heads, "--format", "own", "--out", str(out)], capsys)


def test_every_notation_is_a_tree_option(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for text in ("[[0], [1]]", "[(0,), (0, 0)]", "[1, 2]", '{"num_steps": 2, "eagle_topk": 2, "num_draft_tokens": 6}'):
        (tmp_path / "tree").write_text(text, encoding="utf-8")
        arguments = ["generate", *tiny.arguments, "--prompt", "def", "--max-new-tokens", "6", "--tree"]
        assert run([*arguments, str(tmp_path / "tree"), "--json"]) == 0
        texts.append(last_json(capsys)["text"])
    assert len(set(texts)) == 1
