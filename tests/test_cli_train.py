"""`ladon train` on the command line: a run, its report, its defaults, and one line for each mistake."""

from __future__ import annotations

import inspect
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from ladon.cli.main import run
from ladon.cli.train import train
from ladon.heads import load_heads
from ladon.train.config import TrainOptions
from user_side import TEXT, Tiny, write_jsonl

QUICK = ["--steps", "2", "--batch-size", "1", "--length", "48", "--no-speedup", "--threads", "1"]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    prompted: list[dict[str, object]] = [{"id": f"row {i}", "prompt": f"# {i}\n", "answer": TEXT[i:]} for i in range(5)]
    return write_jsonl(tmp_path / "rows.jsonl", prompted)


def arguments(tiny: Tiny, rows: Path, *more: str) -> list[str]:
    out = rows.parent / "out"
    return ["train", str(rows), "--out", str(out), "--model", str(tiny.folder / "model"), *QUICK, *more]


def refusal(capsys: pytest.CaptureFixture[str], given: list[str]) -> str:
    """The line that a command is refused with."""
    assert run(given) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("ladon: ")
    return lines[-1]


def test_a_run_writes_heads_and_a_report(tiny: Tiny, rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments(tiny, rows, "--family", "lowrank", "--family-option", "rank=4", "--json")) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out.splitlines()[-1])
    heads = load_heads(rows.parent / "out", tiny.model)
    assert (heads.family, heads.options["rank"], heads.num_heads) == ("lowrank", 4, TrainOptions().num_heads)
    assert report["steps"] == 2
    assert [entry["after"] for entry in report["history"]] == ["10%", "100%"]
    assert "learned is what stands between « and »:\n# " in captured.err
    assert "held-out rows, after" in captured.err
    assert "rows.jsonl" in (rows.parent / "out" / "README.md").read_text(encoding="utf-8")


def test_a_joint_run_writes_the_tuned_model(tiny: Tiny, rows: Path) -> None:
    assert run(arguments(tiny, rows, "--joint", "full", "--early-exit", "1")) == 0
    out = rows.parent / "out"
    tuned = ["--model", str(out / "model"), "--heads", str(out / "heads")]
    assert run(["generate", *tuned, "--prompt", "def", "--max-new-tokens", "4"]) == 0


def test_a_model_that_is_spread_by_a_map(tiny: Tiny, rows: Path) -> None:
    assert run(arguments(tiny, rows, "--device-map", "cpu")) == 0


def test_defaults_are_those_of_the_options() -> None:
    parameters = inspect.signature(train).parameters
    for setting in fields(TrainOptions):
        if setting.name != "family_options":
            assert parameters[setting.name].default == setting.default


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (["--labels", "hard"], "labels is 'hard'; give text, target"),
        (["--joint", "half"], "joint is 'half'; give off, full, lora"),
        (["--steps", "0"], "steps is 0; give 1 or more"),
        (["--warmup", "1.5"], "warmup is 1.5; give a share"),
        (["--learning-rate", "0"], "learning_rate is 0.0; give a number above 0"),
        (["--family", "tree"], "head family 'tree' is unknown"),
        (["--family-option", "rank"], "--family-option is 'rank'; give name=value"),
        (["--early-exit", "9"], "early exit is after layer 9 of 2; give 1 to 1"),
        (["--held-out", "2"], "held_out is 2; give a share of the rows, below 1, or a file"),
        (["--held-out", "none.jsonl"], "none.jsonl"),
        (["--markov-gate"], "markov_gate and markov_start are of a Markov correction; give markov_rank too"),
        (["--load-in-4bit", "--load-in-8bit"], "exclude each other"),
        (["--init-heads", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_one_line(
    tiny: Tiny, rows: Path, capsys: pytest.CaptureFixture[str], more: list[str], line: str
) -> None:
    assert line in refusal(capsys, arguments(tiny, rows, *more))


def test_quantising_without_bitsandbytes(
    tiny: Tiny, rows: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ladon.cli.train.find_spec", lambda _: None)
    assert "needs bitsandbytes" in refusal(capsys, arguments(tiny, rows, "--load-in-8bit"))


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ([], "no row"),
        ([{"prompt_ids": [1, 2], "answer_ids": [3]}], "no row has anything to learn (1 dropped: fewer than two"),
        ([{"prompt_ids": [1, 2], "answer_ids": [5000, 5]}], "vocabulary"),
    ],
)
def test_rows_that_teach_nothing_are_one_line(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: list[dict[str, Any]], line: str
) -> None:
    assert line in refusal(capsys, arguments(tiny, write_jsonl(tmp_path / "rows.jsonl", content)))


def test_a_tracker_that_is_not_installed(
    tiny: Tiny, rows: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ladon.train.trainer.find_spec", lambda _: None)
    assert "pip install wandb" in refusal(capsys, arguments(tiny, rows, "--report-to", "wandb"))


def test_other_settings_than_those_of_the_checkpoint(
    tiny: Tiny, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments(tiny, rows)) == 0
    assert "holds a training with seed 0, this one has 1" in refusal(capsys, arguments(tiny, rows, "--seed", "1"))
    assert run(arguments(tiny, rows, "--seed", "1", "--no-resume")) == 0
