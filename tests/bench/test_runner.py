"""The measurement: modes in turns on the same prompts, each as it was asked for."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench_runs import TEXTS, TREE, silent, subject, workload
from ladon.bench import report, table
from ladon.bench.findings import Findings, Subject
from ladon.bench.runner import calibrate, run_bench
from ladon.bench.systems import LadonSystem, Run, System, TransformersSystem
from ladon.bench.workloads import Question, make_workload
from ladon.cli.bench import tree_source
from ladon.cli.loading import Loaded
from ladon.cli.main import run as run_command
from ladon.config import BenchOptions
from ladon.errors import HeadsError, InputError, TreeError
from ladon.heads.calibration import Calibration
from ladon.trees.fixed_tree import FixedTree, best_fixed_tree
from ladon.util import machine as environment
from user_side import CONTEXT, Tiny, write_jsonl


def test_every_mode_says_the_same(findings: Findings) -> None:
    found = report.results(findings)
    budgets: list[tuple[str, int | str]] = [("plain", 1), ("chain", 4), ("fixed", 4), ("fixed", 6)]
    budgets += [("dynamic", 4), ("dynamic", 6), ("auto", "auto")]
    assert [(result["mode"], result["budget"], result["batch"]) for result in found] == [
        (*entry, batch) for batch in (1, 2) for entry in budgets
    ]
    for result in found:
        assert result["identical"] and result["float32_near_ties"] == result["near_ties"] == result["different"] == 0
        assert result["prompts"] == 4
        assert result["speedup_vs_plain"] is not None and result["speedup_vs_transformers"] is not None
        if result["mode"] == "plain":
            assert result["acceptance_length"] == 1.0 and result["speedup_vs_plain"] == 1.0
        else:  # the size chosen may be 1
            assert result["acceptance_length"] is not None
            assert result["acceptance_length"] > 1.0 or (
                result["mode"] == "auto" and result["acceptance_length"] == 1.0
            )
        assert (result["acceptance_length_non_repeated"] is not None) == (result["batch"] == 1)
        low, high = result["tokens_per_second_range"]
        assert low is not None and high is not None and result["tokens_per_second"] is not None
        assert 0 < low <= result["tokens_per_second"] <= high
    dynamic = {r["budget"]: r for r in found if r["mode"] == "dynamic" and r["batch"] == 1}
    chain = next(r for r in found if r["mode"] == "chain" and r["batch"] == 1)
    assert dynamic[6]["acceptance_length"] >= chain["acceptance_length"]  # type: ignore[operator]


def test_modes_take_turns(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """No system runs twice in a row, profiled or not, and each is as often first as any other."""
    order: list[tuple[str, int]] = []
    for kind in (LadonSystem, TransformersSystem):
        own = kind.run

        def run(self: System, prompts: Sequence[Sequence[int]], tokens: int, own: Callable[..., Run] = own) -> Run:
            order.append((self.name, id(self)))
            return own(self, prompts, tokens)

        monkeypatch.setattr(kind, "run", run)
    options = BenchOptions(modes=("plain", "chain", "dynamic"), budgets=(4,), max_new_tokens=2, repeats=2)
    run_bench(subject(tiny), workload(), options, silent)
    names = ["plain", "chain", "dynamic", "plain", "chain", "dynamic", "transformers"]
    width = len(names)
    rounds = [order[at : at + width] for at in range(len(TEXTS), len(TEXTS) + (1 + 2 * len(TEXTS)) * width, width)]
    assert [name for name, _ in rounds[0]] == names  # the warm-up
    assert all(sorted(part) == sorted(rounds[0]) for part in rounds) and len(set(rounds[0])) == width
    first = [part[0] for part in rounds[1:]]
    assert {first.count(system) for system in rounds[0]} == {1, 2}  # 8 rounds, 7 systems


def test_diagnosis_is_of_the_modes_whose_trees_come_from_one_lattice(tiny: Tiny) -> None:
    modes = ("chain", "fixed", "dynamic", "auto", "dynamic+ngrams", "ngrams")
    options = BenchOptions(modes=modes, budgets=(4,), batches=(1, 2), max_new_tokens=12, repeats=1, diagnose=True)
    found = report.results(run_bench(subject(tiny), workload(), options, silent))
    looked_at = {result["mode"] for result in found if result["diagnosis"] is not None}
    assert looked_at == {"chain", "fixed", "dynamic", "auto"}
    for result in found:
        if (
            result["diagnosis"] is not None and result["mode"] != "auto"
        ):  # the steps of a fixed size are always the same
            assert result["diagnosis"]["undrafted"] == 0
            assert result["acceptance_length"] == pytest.approx(1 + result["diagnosis"]["accepted"]["mean"], abs=1e-3)
    json.dumps([dict(result) for result in found], allow_nan=False)
    assert table.diagnosis_table(found).row_count == 8
    (line,) = table.diagnosis_lines(found)
    assert "coverage" in line and "ranking" in line


def test_nothing_is_looked_at_unasked(findings: Findings) -> None:
    found = report.results(findings)
    assert all(result["diagnosis"] is None for result in found) and table.diagnosis_lines(found) == []


def test_pruned_mode_prunes_as_calibrated(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a clock in it and without a profile, sizes are 16: more than are kept."""
    monkeypatch.setenv("LADON_DETERMINISTIC", "1")
    model, heads = copy.deepcopy((tiny.model, tiny.heads))
    heads.bind(model, force=True)
    best = {"trained": False, "layer": 1, "keep": 4, "criterion": "siblings", "weight": 0.3, "top_k": 8}
    heads.calibration = Calibration(heads="", temperatures=[1.0] * 3, hit_rates=[[0.5]] * 3, pruning={"best": best})
    pruned = replace(subject(tiny), model=model, heads=heads)
    options = BenchOptions(modes=("auto", "pruned"), budgets=(4,), max_new_tokens=12, repeats=1)
    found = {result["mode"]: result for result in report.results(run_bench(pruned, workload(), options, silent))}
    assert [(mode, result["budget"]) for mode, result in found.items()][1:] == [("auto", "auto"), ("pruned", "auto")]
    assert found["pruned"]["identical"] and found["pruned"]["different"] == 0
    assert found["auto"]["pruned_share"] == 0.0 and found["pruned"]["pruned_share"] == pytest.approx(0.75, abs=0.15)
    with pytest.raises(InputError, match="mode pruned: no pruning is known to pay"):
        run_bench(subject(tiny), workload(), options, silent)


def test_pruned_mode_prunes_as_it_is_told(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """These heads have no calibration."""
    monkeypatch.setenv("LADON_DETERMINISTIC", "1")
    options = BenchOptions(modes=("pruned",), budgets=(4,), max_new_tokens=12, repeats=1, prune="1:8")
    found = {result["mode"]: result for result in report.results(run_bench(subject(tiny), workload(), options, silent))}
    assert found["pruned"]["identical"] and found["pruned"]["pruned_share"] == pytest.approx(0.5, abs=0.1)
    with pytest.raises(HeadsError, match="layer"):
        run_bench(subject(tiny), workload(), replace(options, prune="9:8"), silent)


def test_calibration_gives_a_tree(tiny: Tiny) -> None:
    rates = calibrate(tiny.model, tiny.heads, tiny.tokenizer, workload().questions, 20, silent)
    tree = best_fixed_tree(rates, 6)
    assert tree.num_nodes == 6
    system = LadonSystem(tiny.model, tiny.heads, mode="fixed", budget=6, fixed_tree=tree)
    assert system.run([tiny.tokenizer("def")["input_ids"]], 8).stats.nodes_verified > 8


def loaded(tiny: Tiny, is_demo: bool = False) -> Loaded:
    return Loaded(name="tiny", model=tiny.model, tokenizer=tiny.tokenizer, heads=tiny.heads, is_demo=is_demo)


def test_calibration_answers_every_prompt_of_its_file(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    others = write_jsonl(tmp_path / "o.jsonl", [{"prompt": text} for text in TEXTS * 7])
    done: list[int] = []

    def note(what: str, count: int, total: int) -> None:
        done.append(count)
        assert total == 4 * 7

    tree_of = tree_source(loaded(tiny), workload(), None, others, bundled_heads=False, max_new_tokens=6, progress=note)
    assert [tree_of(size).num_nodes for size in (4, 7)] == [4, 7]
    assert done == [16, 28]  # once, for both sizes
    assert capsys.readouterr().err == ""


def test_where_fixed_trees_come_from_without_calibration(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    from ladon.demo.bundled import demo_fixed_tree

    bundled = tree_source(
        loaded(tiny, is_demo=True), workload(), None, None, bundled_heads=True, max_new_tokens=6, progress=silent
    )
    assert bundled(9) == demo_fixed_tree(9) and capsys.readouterr().err == ""
    other_heads = tree_source(
        loaded(tiny, is_demo=True), workload(), None, None, bundled_heads=False, max_new_tokens=6, progress=silent
    )
    assert other_heads(9).num_nodes == 9 and "calibrated on the measured prompts" in capsys.readouterr().err


def test_budgets_are_what_is_verified(tiny: Tiny) -> None:
    options = BenchOptions(modes=("fixed",), budgets=(4, 8, 16), max_new_tokens=4, repeats=1)
    found = report.results(run_bench(subject(tiny), workload(), options, silent))
    assert [(result["mode"], result["budget"]) for result in found] == [("plain", 1), ("fixed", 4), ("fixed", 6)]


def test_budgets_and_batches_are_measured_once(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    prompts = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "def read"}])
    options = ["--prompts", str(prompts), "--modes", "dynamic", "--max-new-tokens", "4", "--repeats", "1", "--json"]
    assert run_command(["bench", *tiny.arguments, *options, "--budget", "6,4,6", "--batch", "2,2"]) == 0
    results = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    assert [(row["budget"], row["batch"]) for row in results] == [(1, 2), (6, 2), (4, 2)]


def test_the_demo_has_one_budget(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["demo", "--budget", "8,16"]) == 2
    assert "--budget is '8,16'; give a whole number" in capsys.readouterr().err


def test_prompts_that_leave_no_room_are_refused(tiny: Tiny) -> None:
    options = BenchOptions(modes=("dynamic",), max_new_tokens=CONTEXT, repeats=1)
    with pytest.raises(InputError, match=f"context limit of {CONTEXT}"):
        run_bench(subject(tiny), workload(), options, silent)


def test_long_prompts_are_refused_before_the_first_is_answered(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LadonSystem, "run", lambda *_: pytest.fail("decoded before checking"))
    questions = [Question.to_continue("def", 1), Question.to_continue("def read" * CONTEXT, 2)]
    options = BenchOptions(modes=("plain",), max_new_tokens=4, repeats=1)
    with pytest.raises(InputError, match=f"question 2 .* context limit of {CONTEXT}"):
        run_bench(subject(tiny), make_workload("long", questions), options, silent)


def test_mistakes_show_before_the_first_run(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> Run:
        raise AssertionError("decoded before checking")

    monkeypatch.setattr(LadonSystem, "run", never)
    deep = FixedTree(((0,), (0, 0), (0, 0, 0), (0, 0, 0, 0)))
    too_deep = Subject(
        name="tiny", model=tiny.model, tokenizer=tiny.tokenizer, heads=tiny.heads, fixed_tree=lambda size: deep
    )
    with pytest.raises(TreeError, match="4 deep but there are 3 heads"):
        run_bench(too_deep, workload(), BenchOptions(modes=("fixed",)), silent)
    headless = Subject(
        name="tiny", model=tiny.model, tokenizer=tiny.tokenizer, heads=None, fixed_tree=lambda size: TREE
    )
    with pytest.raises(InputError, match="mode dynamic needs heads"):
        run_bench(headless, workload(), BenchOptions(modes=("dynamic",)), silent)


def test_environment_says_what_ran_where() -> None:
    place = environment.environment(torch.device("cpu"))
    json.dumps(place, allow_nan=False)
    assert place["cpu"] and place["torch"] == torch.__version__ and place["threads"] == torch.get_num_threads()
    assert {"transformers", "ladon", "commit", "python", "cpu_count", "cpu_bf16"} <= place.keys()
    assert place["memory_gib"] is None or place["memory_gib"] > 0.1
    assert re.fullmatch(r"\w+( [\d.]+)?", place["system"])
    assert not environment.is_busy({"load_average": [0.0, 9.0, 9.0]})
    assert environment.is_busy({"load_average": [1e3, 0.0, 0.0]})
    assert not environment.is_busy({"load_average": None})
    json.dumps(environment.load(), allow_nan=False)
