from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest

from ladon.bench import plots, table
from ladon.bench.systems import NotedSizing, StepFacts, by_size, prediction_error
from ladon.cli.main import run as run_command
from ladon.tree_size.adaptive import AutoSizing
from ladon.tree_size.latency_model import StepTime
from ladon.tree_size.policy import Size, StepRecord
from ladon.viz import png
from user_side import Tiny, write_jsonl


def step(nodes: int, seconds: float, predicted: float = math.nan, batch: int = 1, tokens: float = 1.0) -> StepFacts:
    """A step that emitted so many tokens per row, half a token less than expected."""
    did = {"batch": batch, "context": 10.0, "nodes": nodes, "kept": nodes, "grown": nodes, "seconds": seconds}
    expected = () if nodes == 1 else ((tokens - 0.5) * batch,)
    return StepFacts(StepRecord(tokens=int(tokens * batch), expected=expected, **did), predicted)  # type: ignore[arg-type]


def test_sizes_are_counted_with_their_means() -> None:
    steps = [step(8, 0.002, 0.003, batch=1, tokens=2.0), step(1, 0.001), step(8, 0.004, batch=3, tokens=3.0)]
    one, eight = by_size(steps)
    assert one == {
        "nodes": 1,
        "steps": 1,
        "tokens": 1.0,
        "expected_tokens": None,
        "step_ms": pytest.approx(1.0),
        "predicted_ms": None,
    }
    assert (eight["nodes"], eight["steps"]) == (8, 2)
    assert eight["tokens"] == pytest.approx(2.75)  # of four row-steps
    assert eight["expected_tokens"] == pytest.approx(3.25)
    assert eight["step_ms"] == pytest.approx(3.0) and eight["predicted_ms"] == pytest.approx(3.0)
    assert by_size([]) == []


def test_prediction_error_is_relative_to_each_step() -> None:
    assert prediction_error([step(1, 0.010, 0.012), step(1, 0.030, 0.027)]) == pytest.approx(0.15)
    assert prediction_error([step(1, 0.010, 0.010), step(1, 1.0)]) == 0.0  # a step that nobody predicted
    assert math.isnan(prediction_error([step(1, 0.010)])) and math.isnan(prediction_error([]))


class Sizing:
    """Chooses and predicts what it is told."""

    edges = (1, 4, 8)
    probes = 3

    def for_run(self) -> Sizing:
        return self

    def reach(self, batch: int, context: float) -> int:
        return 8

    def choose(self, sums: object, batch: int, context: float, of_heads: object = None) -> Size:
        return Size(4, False)

    def observe(self, record: StepRecord) -> float:
        return 0.25 if record.nodes > 1 else math.nan


def test_steps_are_noted_and_decisions_stay_the_same() -> None:
    noted = NotedSizing(Sizing())
    assert (noted.edges, noted.probes) == ((1, 4, 8), 3)
    assert (noted.reach(2, 5.0), noted.choose(None, 2, 5.0)) == (8, (4, False))
    asked = {"batch": 2, "context": 5.0, "kept": 4, "grown": 8, "seconds": 0.5}
    assert noted.observe(StepRecord(nodes=4, expected=[1.5, 0.5], accepted=[2, 1], tokens=5, **asked)) == 0.25  # type: ignore[arg-type]
    assert math.isnan(noted.observe(StepRecord(nodes=1, tokens=2, **asked)))  # type: ignore[arg-type]
    noted.observe(StepRecord(nodes=4, tokens=6, **asked))  # type: ignore[arg-type]
    tree, plain, cut = noted.taken()
    assert (tree.record.nodes, tree.record.batch, tree.record.seconds, tree.predicted_seconds) == (4, 2, 0.5, 0.25)
    assert (tree.tokens, tree.expected_tokens) == (2.5, 2.0)
    assert plain.tokens == 1.0 and math.isnan(plain.expected_tokens)
    assert cut.tokens == 3.0 and math.isnan(cut.expected_tokens)  # nobody asked what was expected
    assert noted.taken() == [] and noted.fit([tree]) == []
    run = noted.for_run()
    run.observe(StepRecord(nodes=4, tokens=6, **asked))  # type: ignore[arg-type]
    assert len(noted.taken()) == 1 and run.taken() == []


def test_the_fit_is_what_the_sizing_knows() -> None:
    times = [StepTime(batch=2, nodes=n, context=50.0, drafts=n > 1, seconds=0.001 * (3 + n)) for n in (1, 2, 4, 8, 16)]
    noted = NotedSizing(AutoSizing(16, times))
    fit = noted.fit([step(4, 0.007, batch=2), step(4, 0.007, batch=1)])
    assert [size["nodes"] for size in fit] == [1, 2, 4, 8, 16]
    assert all(size["ms"] == pytest.approx(3 + size["nodes"], rel=0.1) for size in fit)
    assert noted.fit([]) == []


def result(mode: str, batch: int, budget: int | str, sizes: list[dict[str, Any]], **others: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {"mode": mode, "batch": batch, "budget": budget, "sizes": sizes, "fitted_step_ms": []}
    fields |= {"speedup_vs_plain": 1.5, "speedup_vs_transformers": 2.0, "rows_per_step": float(batch)}
    fields["prediction_error"] = None
    return fields | others


SIZES = by_size([step(1, 0.001)] + [step(4, 0.002, 0.0021, tokens=2.0)] * 3)


def document(results: list[dict[str, Any]]) -> dict[str, Any]:
    place = {"cpu": "a processor", "threads": 1, "device": "cpu"}
    return {
        "model": "tiny",
        "dtype": "float32",
        "environment": place,
        "results": [copy.deepcopy(result) for result in results],
    }


FULL = [
    result("plain", 1, 1, by_size([step(1, 0.001)])),
    result("dynamic", 1, 8, by_size([step(8, 0.003)])),
    result("auto", 1, "auto", SIZES, fitted_step_ms=[{"nodes": 1, "ms": 1.0}, {"nodes": 8, "ms": 3.0}]),
    result("plain", 4, 1, by_size([step(1, 0.002)]), rows_per_step=3.2),
    result("auto", 4, "auto", SIZES),
]


def test_pictures_of_a_whole_document() -> None:
    files = plots.pictures(document(FULL))
    assert list(files) == ["speedup.png", "tokens-per-step.png", "step-times.png"]
    for data in files.values():
        assert data.startswith(b"\x89PNG\r\n\x1a\n") and len(data) > 10_000


def test_only_what_was_measured_is_drawn() -> None:
    """Without noted steps there is no time to draw, and without a mode that chooses there are no chosen sizes."""
    bare = [result("plain", 2, 1, []), result("fixed", 2, 8, [], speedup_vs_plain=None)]
    assert list(plots.pictures(document(bare))) == ["speedup.png"]
    fixed = [result("plain", 2, 1, SIZES), result("fixed", 2, 8, SIZES)]
    assert list(plots.pictures(document(fixed))) == ["speedup.png", "step-times.png"]


def test_lines_are_where_the_numbers_are() -> None:
    """A line per mode and budget over the batches, beside plain decoding at 1."""
    rows = document(FULL)["results"]
    rows[4]["speedup_vs_plain"] = 1.25
    (axes,) = plots._speedups(rows, "title").axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}  # type: ignore[union-attr]
    assert lines["auto"] == [[1, 1.5], [4, 1.25]] and lines["dynamic, 8 nodes"] == [[1, 1.5]]
    assert lines["transformers' generate"] == [[1, 0.5], [4, 0.5]]
    assert axes.get_xlabel() and axes.get_ylabel() and axes.get_legend() is not None
    panels = plots._step_times(rows, "title").axes
    assert [axes.get_title() for axes in panels] == ["batch 1", "batch 4"]
    fit = next(line for line in panels[0].lines if line.get_label() == "auto: fit")
    assert fit.get_xydata().tolist() == [[1, 1.0], [8, 3.0]]  # type: ignore[union-attr]


def test_what_is_said_about_sizes_and_full_batches() -> None:
    (first, _) = table.size_lines([*FULL[:2], result("auto", 2, "auto", SIZES, prediction_error=0.034), FULL[4]])
    assert first == ("auto, batch 2, nodes per step: 1 (25%), 4 (75%); its steps took 3.4% more or less than predicted")
    (line,) = table.filling_lines(FULL)
    assert line.startswith("rows in a plain step, on average: batch 4 had 3.2 (groups hold")
    assert table.filling_lines(FULL[:3]) == []


def test_pictures_are_written_where_asked(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.set_num_threads", lambda threads: None)
    prompts = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "def read"}, {"prompt": "for line"}])
    options = ["--prompts", str(prompts), "--modes", "auto", "--max-new-tokens", "8", "--repeats", "1", "--json"]
    folder = tmp_path / "new" / "folder"
    assert run_command(["bench", *tiny.arguments, *options, "--batch", "1,4", "--plots", str(folder)]) == 0
    captured = capsys.readouterr()
    assert (folder / "speedup.png").read_bytes().startswith(b"\x89PNG")
    assert f"pictures are in {folder}: speedup.png" in captured.err
    assert "batch 4 had 2.0" in captured.out  # there are two prompts
    rows = json.loads(captured.out.splitlines()[-1])["results"]
    assert [(row["mode"], row["budget"]) for row in rows[:2]] == [("plain", 1), ("auto", "auto")]
    assert rows[0]["nodes_per_step"] == 1.0 and rows[1]["nodes_per_step"] >= 1.0


def test_pictures_that_cannot_be_are_refused_before_the_run(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    arguments = ["bench", *tiny.arguments, "--plots"]
    assert run_command([*arguments, str(tmp_path / "file")]) == 2
    assert "cannot make the folder" in capsys.readouterr().err

    def missing() -> None:
        from ladon.errors import InputError

        raise InputError("PNG pictures need matplotlib")

    monkeypatch.setattr(png, "check_available", missing)
    assert run_command([*arguments, str(tmp_path / "there")]) == 2
    assert "need matplotlib" in capsys.readouterr().err and not (tmp_path / "there").exists()
