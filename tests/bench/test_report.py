"""From findings to numbers and to files: medians, fields, definitions, answers for MT-Bench's tools."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from bench_runs import silent, subject, workload
from ladon.bench import report, table
from ladon.bench import report as answers
from ladon.bench.findings import Findings, Measured, Request
from ladon.bench.runner import run_bench
from ladon.bench.systems import Run
from ladon.bench.workloads import Question, make_workload
from ladon.cli.bench import measure
from ladon.cli.main import run as run_command
from ladon.config import BenchOptions
from ladon.engine.stats import DecodeStats
from user_side import ROOT, Tiny, write_jsonl


def test_profiled_runs_are_repeated_as_the_timed_ones(findings: Findings) -> None:
    for entry in findings.measured:
        assert len(entry.timed) == 2 and len(entry.profiled) == (0 if entry.system == "transformers" else 2)
    for result in report.results(findings):
        assert result["overhead"] is not None and 0 < result["overhead"] < 1
        assert (
            result["forward_ms"] is not None
            and result["profiled_step_ms"] is not None
            and result["step_ms"] is not None
        )
        # of two repeats, the median is the mean
        assert 0 < result["forward_ms"] < result["profiled_step_ms"]
        drafting = {"heads", "growth"} if result["mode"] != "plain" else set()
        always = {"verify", "forward", "pick", "accept", "commit", "transfer"}
        if result["mode"] == "auto":  # which may find that drafting does not pay
            assert always <= result["stages"].keys() <= always | drafting
        else:
            assert result["stages"].keys() == always | drafting
        shares = {name: share for name, share in result["stages"].items() if share is not None}
        assert shares["forward"] < shares["verify"]
        assert sum(share for name, share in shares.items() if name not in ("forward", "heads", "growth")) < 1
        assert shares["forward"] == pytest.approx(1 - result["overhead"])
        assert shares.get("growth") == result["growth_share"]


def crafted(timed: Sequence[float], profiled: Sequence[tuple[float, float]]) -> Findings:
    """One system whose timed and profiled runs took so many seconds; of the profiled also the forward's."""

    def run(stats: DecodeStats) -> Run:
        return Run(outputs=[[1] * 11], stats=stats, seconds=1.0, first_token_seconds=0.1)

    def stats(seconds: float, **stages: float) -> DecodeStats:
        return DecodeStats(tokens=10, row_steps=10, forwards=10, decode_seconds=seconds, stage_seconds=dict(stages))

    question = Question.to_continue("a", 1)
    groups = [[Request(number=0, question=question, ids=[1], reference=[1] * 11)]]
    both = {"batch": 1, "groups": groups, "timed": [[run(stats(seconds))] for seconds in timed]}
    found = Findings(
        measured=[
            Measured(
                system="plain",
                budget=1,
                profiled=[[run(stats(seconds, forward=forward, growth=0.01))] for seconds, forward in profiled],
                **both,  # type: ignore[arg-type]
            ),
            Measured(system="transformers", budget=None, profiled=[], **both),  # type: ignore[arg-type]
        ]
    )
    found.differences["plain", 1, 1] = found.float32_differences["plain", 1, 1] = []
    return found


def test_medians_are_over_repeats() -> None:
    (result,) = report.results(crafted([0.1, 0.2, 0.9], [(0.2, 0.1), (0.4, 0.3), (1.0, 0.95)]))
    assert result["step_ms"] == pytest.approx(20.0) and result["tokens_per_second"] == pytest.approx(50.0)
    assert result["profiled_step_ms"] == pytest.approx(40.0) and result["forward_ms"] == pytest.approx(30.0)
    assert result["overhead"] == pytest.approx(0.25)  # of 0.5, 0.25 and 0.05
    assert result["stages"] == {"forward": pytest.approx(0.75), "growth": pytest.approx(0.025)}
    assert result["growth_share"] == pytest.approx(0.025) and result["first_token_ms"] == pytest.approx(100.0)
    assert "took 2.00 to 2.00 times as long" in table.profile_line([result])


def test_categories_apart(findings: Findings) -> None:
    for result in report.results(findings):
        assert {name: row["prompts"] for name, row in result["categories"].items()} == {"a": 1, "b": 3}
        assert all(row["acceptance_length"] and row["tokens_per_second"] for row in result["categories"].values())


def test_report_is_json_with_the_promised_fields(findings: Findings) -> None:
    found = report.results(findings)
    rows = [dict(result) for result in found]
    json.dumps(rows, allow_nan=False)
    promised = {
        *("mode", "batch", "budget", "acceptance_length", "tokens_per_second", "step_ms", "forward_ms"),
        *("overhead", "speedup_vs_plain", "speedup_vs_transformers", "identical", "near_ties"),
    }
    assert all(promised <= row.keys() for row in rows)
    baselines = report.baselines(findings)
    assert [row["batch"] for row in baselines] == [1, 2]
    assert table.table(found, baselines, 2).row_count == 8
    assert table.identity_line(found, findings.unchecked).startswith("identical: yes (")
    assert table.difference_lines(findings, "float32") == []


def test_every_key_is_defined_in_the_docs(tiny: Tiny) -> None:
    options = BenchOptions(modes=("dynamic",), budgets=(4,), max_new_tokens=4, repeats=1, diagnose=True)
    document, _ = measure(subject(tiny), workload("a", "b", "b", "b"), options, silent)
    pages = [ROOT / "docs" / "reference" / name for name in ("metrics.md", "benchmark-files.md")]
    defined = set(re.findall(r"`(\w+)`", "\n".join(page.read_text(encoding="utf-8") for page in pages)))
    keys = set(document) | set(document["environment"]) | set(document["transformers"][0]) | set(document["workload"])
    keys |= set(document["results"][1]) | set(document["results"][1]["stages"])
    diagnosis = document["results"][1]["diagnosis"]
    keys |= set(diagnosis) | set(diagnosis["known"]) | set(diagnosis["error"])
    assert not keys - defined


def load_model_answers(folder: Path) -> dict[str, dict[int, dict[str, object]]]:
    """As FastChat's function of this name reads them: a model per file, the last row per question."""
    return {
        file.name[:-6]: {row["question_id"]: row for row in map(json.loads, file.read_text("utf-8").split("\n")[:-1])}
        for file in sorted(folder.glob("*.jsonl"))
    }


def test_answers_are_read_by_mt_bench_tools(tiny: Tiny, tmp_path: Path) -> None:
    questions = [
        Question(question_id=81, category="writing", turns=("def read", "return"), is_chat=True),
        Question(question_id=82, category="math", turns=("for line",), is_chat=True),
    ]
    options = BenchOptions(modes=("dynamic",), budgets=(4,), max_new_tokens=10, repeats=1)
    asked = subject(tiny)
    found = run_bench(asked, make_workload("chat", questions), options, silent)
    for file, text in answers.answer_files(tmp_path / "out.jsonl", asked, found.measured, 1.5).items():
        file.write_text(text, encoding="utf-8")
    read = load_model_answers(tmp_path)
    assert read.keys() == {"out-plain-1", "out-dynamic-4", "out-transformers"}
    rows = [row for model in read.values() for row in model.values()]
    assert len({row["answer_id"] for row in rows}) == len(rows) == 6
    for name, model in read.items():
        assert list(model) == [81, 82]
        for question_id, row in model.items():
            assert row["tstamp"] == 1.5 and row["model_id"] == name.replace("out", "tiny")
            (choice,) = row["choices"]  # type: ignore[misc]
            turns = 2 if question_id == 81 else 1
            assert choice["index"] == 0
            assert {len(choice[key]) for key in ("turns", "idxs", "new_tokens", "wall_time")} == {turns}
            assert choice["new_tokens"] == [10] * turns
            assert choice["turns"] == read["out-plain-1"][question_id]["choices"][0]["turns"]  # type: ignore[index]
            if name == "out-plain-1":
                assert choice["idxs"] == [9] * turns  # the first token is the prefill's
    (only,) = answers.answer_files(tmp_path / "one.jsonl", asked, found.measured[1:2], 1.5)
    assert only == tmp_path / "one.jsonl"


@pytest.mark.parametrize(
    ("modes", "names"),
    [("dynamic", ["a.jsonl"]), ("plain,chain", ["a-chain-4.jsonl", "a-plain-1.jsonl", "a-transformers.jsonl"])],
)
def test_one_mode_goes_to_the_file_named(
    tiny: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    modes: str,
    names: list[str],
) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    prompts = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "def read"}])
    options = ["--prompts", str(prompts), "--modes", modes, "--max-new-tokens", "4", "--repeats", "1"]
    folder = tmp_path / "answers"
    folder.mkdir()
    assert run_command(["bench", *tiny.arguments, *options, "--answers", str(folder / "a.jsonl")]) == 0
    assert sorted(path.name for path in folder.iterdir()) == names
    assert all(name in capsys.readouterr().err for name in names[:1])
