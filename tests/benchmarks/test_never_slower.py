from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from ladon import new_heads
from ladon.bench.systems import LadonSystem, Run
from ladon.engine.stats import DecodeStats
from user_side import ROOT


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("never_slower")


@pytest.fixture
def turns(script: ModuleType) -> ModuleType:
    return importlib.import_module("never_slower_turns")


@pytest.fixture
def said(script: ModuleType) -> ModuleType:
    return importlib.import_module("never_slower_goals")


def cell(name: str, batch: int = 1, context: int | None = 64, task: str = "code", **others: Any) -> dict[str, Any]:
    ratios = {"warm_over_plain": 1.2, "cold_over_plain": 1.0, "warm_over_best_fixed": 0.99, "warm_over_medusa": None}
    found = {"cell": name, "batch": batch, "context": context, "task": task, "at_limit": context == 1792}
    found |= {"ratios": ratios | others.pop("ratios", {}), "prediction_error": 0.05, "sizing_share": 0.01}
    return found | {"different": 0, "near_ties": 1} | others


def by_title(goals: list[dict[str, Any]], part: str) -> dict[str, Any]:
    (found,) = [goal for goal in goals if part in goal["goal"]]
    return found


def test_ratios_are_of_the_same_repeat(said: ModuleType) -> None:
    """A slow minute that meets both systems of a repeat moves no ratio."""
    assert said.paired([10.0, 5.0, 30.0], [20.0, 10.0, 20.0]) == 0.5
    speeds = {
        "plain": [100.0, 50.0],
        "cold": [90.0, 45.0],
        "warm": [120.0, 60.0],
        "dynamic-4": [125.0, 62.5],
        "dynamic-8": [110.0, 50.0],
    }
    found = said.ratios(speeds, {"warm": [30.0], "medusa": [10.0]})
    assert found == {
        "warm_over_plain": pytest.approx(1.2),
        "cold_over_plain": pytest.approx(0.9),
        "warm_over_best_fixed": pytest.approx(0.96),
        "warm_over_medusa": pytest.approx(3.0),
    }
    assert said.ratios(speeds | {"warm": [40.0, 40.0]}, {})["warm_over_medusa"] is None


def test_plain_decoding_is_a_fixed_size_too(said: ModuleType) -> None:
    found = said.ratios({"plain": [100.0], "cold": [90.0], "warm": [96.0], "dynamic-4": [50.0]}, {})
    assert found["warm_over_best_fixed"] == pytest.approx(0.96)


def test_goals_that_are_met(said: ModuleType) -> None:
    cells = [
        cell("a", ratios={"warm_over_medusa": 1.1}),
        cell("b", batch=16, context=1792, task="edits", ratios={"warm_over_medusa": 2.5}),
        cell("c", task="humaneval", context=None, prediction_error=None),
    ]
    goals = said.goals(cells)
    json.dumps(goals, allow_nan=False)
    met = {goal["goal"]: goal["met"] for goal in goals}
    assert [title for title, is_met in met.items() if is_met is None] == [
        "at least 1.3 of MEDUSA's fixed tree of 64 nodes at batch 4",
        "at least 1.6 of MEDUSA's fixed tree of 64 nodes at batch 8",
    ]
    assert all(is_met in (True, None) for is_met in met.values())
    assert by_title(goals, "after 50 steps")["cells"] == 2
    assert by_title(goals, "batch 16")["worst"] == 2.5


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("warm: at least 0.98", {"ratios": {"warm_over_plain": 0.979}}),
        ("cold: at least 0.95", {"ratios": {"cold_over_plain": 0.949}}),
        ("best fixed budget", {"ratios": {"warm_over_best_fixed": 0.969}}),
        ("nodes at batch 4", {"batch": 4, "ratios": {"warm_over_medusa": 1.29}}),
        ("after 50 steps", {"prediction_error": 0.101}),
        ("less than 2 %", {"sizing_share": 0.021}),
        ("no output differs", {"different": 1}),
    ],
)
def test_one_cell_misses_a_goal(said: ModuleType, part: str, change: dict[str, Any]) -> None:
    goals = said.goals([cell("good"), cell("bad", **change), cell("fine")])
    missed = by_title(goals, part)
    assert missed["met"] is False and missed["missed"] == ["bad"] and missed["worst_cell"] == "bad"
    others = [goal for goal in goals if goal is not missed and "three kinds" not in goal["goal"]]
    assert not any(goal["missed"] for goal in others)
    (line,) = [line for line in said.lines(goals) if part in line]
    assert line.startswith("MISSED") and "missed: bad" in line


def test_coverage_is_a_goal(said: ModuleType) -> None:
    goal = by_title(said.goals([cell("a"), cell("b", task="edits")]), "three kinds")
    assert goal["met"] is False and goal["missed"] == ["task humaneval", "context at the model's limit"]


def test_cells_hold_what_is_asked(script: ModuleType) -> None:
    cells = script.all_cells(1792, True)
    names = [cell.name for cell in cells]
    assert len(set(names)) == len(names)
    for batch in (1, 2, 4, 8, 16):
        for heads in ("bundled", "untrained"):
            assert {f"demo/{heads}/code/c64/b{batch}", f"demo/{heads}/code/c1024/b{batch}"} <= set(names)
        assert f"large/synthetic/code/c64/b{batch}" in names
    assert {"demo/bundled/humaneval/cown/b1", "demo/bundled/edits/cown/b4", "demo/bundled/code/c1792/b1"} <= set(names)
    assert not any("humaneval" in cell.name for cell in script.all_cells(1792, False))


class FakeRacer:
    """Emits so many tokens per step, ten in all."""

    def __init__(self, name: str, per_step: int, order: list[str]) -> None:
        self.name, self.per_step, self.order = name, per_step, order
        self.tokens = self.steps = 0

    def step(self) -> bool:
        self.steps += 1
        if self.tokens >= 10:
            return False
        self.tokens += self.per_step
        self.order.append(self.name)
        return True

    def run(self) -> Run:
        stats = DecodeStats(tokens=self.tokens, decode_seconds=1.0)
        return Run(outputs=[[1]], stats=stats, seconds=1.0, first_token_seconds=0.0)


def test_who_is_behind_takes_the_next_step(turns: ModuleType) -> None:
    order: list[str] = []
    turns.race([FakeRacer("slow", 1, order), FakeRacer("fast", 3, order)])
    assert "".join(name[0] for name in order) == "sfssfsssfsssfs"


def test_systems_take_turns(turns: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    monkeypatch.setattr(turns, "Racer", lambda name, prompts, tokens: FakeRacer(name, tokens, order))
    makers = {name: (lambda name=name: name) for name in "abc"}
    two = turns.Settings(most_repeats=3, further_seconds=0.0)  # time for a second repeat only
    runs = turns.take_turns(makers, [[[1]]], 10, two)
    assert order == ["a", "b", "c", "b", "c", "a"]  # another one is first each time
    assert [[run.stats.tokens for run in runs[name]] for name in "abc"] == [[10, 10]] * 3
    for settings, repeats in (
        (turns.Settings(most_repeats=3, further_seconds=1e9), 3),
        (turns.Settings(most_repeats=3, second_seconds=0.0), 1),
    ):
        assert len(turns.take_turns(makers, [[[1]]], 10, settings)["a"]) == repeats


def test_a_racer_says_what_a_run_says(turns: ModuleType, tiny_llama: PreTrainedModel) -> None:
    """Step by step beside another one, a system decodes what it decodes alone."""
    prompts, heads = [[1, 2, 3], [4, 5]], new_heads(tiny_llama, num_heads=2).eval()
    tiny_llama.generation_config.eos_token_id = None
    systems = [LadonSystem(tiny_llama, heads, mode=mode, budget=4) for mode in ("plain", "dynamic")]
    racers = [turns.Racer(system, prompts, 12) for system in systems]
    turns.race(racers)
    for system, racer in zip(systems, racers, strict=True):
        found, alone = racer.run(), system.run(prompts, 12)
        assert found.outputs == alone.outputs and found.stats.tokens == alone.stats.tokens == 22
        assert len(found.steps) == found.stats.forwards == alone.stats.forwards
        assert found.seconds >= found.stats.decode_seconds > 0


def test_sweep_ends_when_sizes_are_hopeless(script: ModuleType) -> None:
    tried = []
    speeds = {1: 10.0, 2: 11.0, 4: 20.0, 8: 15.0, 16: 17.0, 24: 15.0, 32: 14.0, 48: 100.0}

    class Fake:
        def __init__(self, mode: str, budget: int) -> None:
            self.budget = budget

        def run(self, prompts: list[list[int]], tokens: int) -> Run:
            tried.append(self.budget)
            stats = DecodeStats(tokens=100, decode_seconds=100 / speeds[self.budget])
            return Run(outputs=[[1]], stats=stats, seconds=1.0, first_token_seconds=0.0)

    found = script.sweep(Fake, [[[1]]], 7)
    assert tried == [1, 2, 4, 8, 16, 24, 32]  # 8 alone is no reason to stop
    assert found["dynamic-4"] == pytest.approx(20.0) and found["plain"] == pytest.approx(10.0)


def test_sizes_that_come_close_go_on(script: ModuleType) -> None:
    screened = {"plain": 10.0, "dynamic-2": 9.0, "dynamic-4": 12.0, "dynamic-8": 11.5, "dynamic-16": 5.0}
    assert script.finalists(screened) == {"dynamic-4": 4, "dynamic-8": 8}
    assert script.finalists(screened | {"plain": 13.9}) == {"dynamic-4": 4}
    assert script.finalists(screened | {"plain": 20.0}) == {}


class Plain:
    """Says 1, 2, 3 and so on after the last token of each prompt; keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[list[int]], int]] = []

    def run(self, prompts: list[list[int]], tokens: int) -> Run:
        self.asked.append((prompts, tokens))
        return said_run([list(range(prompt[-1] + 1, prompt[-1] + 1 + tokens)) for prompt in prompts])


def said_run(outputs: list[list[int]]) -> Run:
    return Run(outputs=outputs, stats=DecodeStats(), seconds=1.0, first_token_seconds=0.0)


def test_every_output_is_compared(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all repeats, which take the groups in turn, and of the duel, which has fewer tokens and further groups."""

    def compare(model: Any, number: int, prompt: list[int], output: list[int], reference: list[int]) -> Any:
        assert reference == list(range(prompt[-1] + 1, prompt[-1] + 1 + len(reference)))
        return None if output == reference else SimpleNamespace(is_near_tie=output[0] == reference[0])

    monkeypatch.setattr(script, "compare", compare)
    groups, plain = [[[10], [20]], [[30], [40]], [[50], [60]]], Plain()
    right = [plain.run(groups[repeat % 2], 4) for repeat in range(2)]
    runs = {"plain": right, "warm": [right[0], said_run([[31, 32, 0, 0], [41, 42, 43, 44]])]}
    plain.asked.clear()

    def differences(duel: dict[str, list[Run]]) -> tuple[int, int]:
        found = script._differences(None, groups, runs, duel, plain, 2)
        return found["near_ties"], found["different"]

    assert differences({}) == (1, 0) and plain.asked == []
    short = [Plain().run(prompts, 2) for prompts in groups]
    assert differences({"warm": short, "medusa": short}) == (1, 0)
    assert plain.asked == [(groups[2], 2)]  # plain decoding had no repeat with this group
    assert differences({"medusa": [*short[:2], said_run([[51, 52], [0, 0]])]}) == (1, 1)
    assert differences({"medusa": [*short[:2], said_run([[51], [61, 62]])]}) == (2, 0), "it is cut short"
    full = [Plain().run(prompts, 4) for prompts in groups]
    runs = {"plain": [*full, *full], "warm": [*full, *full[:2], said_run([[0, 0, 0, 0], [61, 62, 63, 64]])]}
    assert differences({}) == (0, 1), "a repeat after each group has had one"


def test_done_cells_are_taken_from_the_work_file(script: ModuleType, tmp_path: Path) -> None:
    key = {"commit": "abc", "settings": {"tokens": 1}}
    rows = [
        {"key": key, "cell": cell("a")},
        {"key": key | {"commit": "older"}, "cell": cell("b")},
        {"key": key, "cell": cell("c")},
    ]
    work = tmp_path / "work.jsonl"
    work.write_text("".join(json.dumps(row) + "\n" for row in rows)[:-20], encoding="utf-8")  # killed while writing c
    assert list(script.kept_cells(work, key)) == ["a"]
    assert script.kept_cells(tmp_path / "none", key) == {} and script.kept_cells(None, key) == {}


def test_prompts_have_the_length_asked_and_the_large_model_its_size(script: ModuleType) -> None:
    materials = script.Materials(None, None)
    for name in ("demo/bundled/code/c64/b16", "demo/bundled/code/c1024/b16", "demo/bundled/code/c1792/b2"):
        (chosen,) = [cell for cell in script.all_cells(1792, False) if cell.name == name]
        prompts = materials.prompts(chosen)
        assert [len(prompt) for prompt in prompts] == [chosen.context] * chosen.batch
        assert len({tuple(prompt) for prompt in prompts}) == chosen.batch
        assert not {tuple(prompt) for prompt in prompts} & {tuple(prompt) for prompt in materials.prompts(chosen, 1)}
    (large,) = [cell for cell in script.all_cells(1792, False) if cell.name == "large/synthetic/code/c64/b1"]
    count = sum(parameter.numel() for parameter in materials.model(large).parameters())
    own = sum(parameter.numel() for parameter in materials.model(chosen).parameters())
    assert 3.7 < count / own < 4.3 and torch.get_num_threads() == 1
