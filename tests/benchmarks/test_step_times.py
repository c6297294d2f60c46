"""The table of step times for a GPU, on a model that a CPU can run, and the prediction made from one."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from pytest import approx

from ladon.tree_size.policy import EDGES
from user_side import ROOT


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("step_times")


@pytest.fixture
def predicted(script: ModuleType) -> ModuleType:
    return importlib.import_module("predicted_speedup")


def times(ms: dict[int, float], drafting_ms: float = 0.0, batch: int = 1) -> dict[str, Any]:
    drafting = drafting_ms or ms[1]
    return {"batch": batch, "context": 512, "nodes": [*ms], "ms": [*ms.values()], "drafting_ms": drafting}


def test_rates_of_ranks_go_through_both_published_numbers(predicted: ModuleType) -> None:
    rates = predicted.rank_rates(0.56, 0.78)
    assert rates[0] == approx(0.56) and sum(rates[:5]) == approx(0.78)
    assert rates == sorted(rates, reverse=True) and len(rates) == predicted.RANKS


def test_expected_tokens_of_the_chain_are_the_products_of_the_best_rates(predicted: ModuleType) -> None:
    """All of the probability mass of two depths whose second candidates are hopeless lies on the chain."""
    sums = predicted.tree_sums([(0.5, 0.5001), (0.4, 0.4001)], (1, 2, 3))
    assert sums[0] == approx([0.0, 0.5, 0.5], abs=1e-3) and sums[1] == approx([0.0, 0.0, 0.2], abs=1e-3)


@pytest.mark.parametrize("batch", [1, 8])
def test_where_nodes_are_free_the_largest_tree_is_chosen(predicted: ModuleType, batch: int) -> None:
    rows = predicted.predict([times(dict.fromkeys(EDGES, 10.0), batch=batch)])
    assert [row["model"] for row in rows] == list(predicted.VICUNA)
    assert all(row["nodes"] == EDGES[-1] and row["speedup"] == approx(row["tokens"], abs=1e-3) for row in rows)
    assert all(row["medusa_speedup"] < row["speedup"] for row in rows)


def test_where_nodes_cost_as_much_as_steps_nothing_is_drafted(predicted: ModuleType) -> None:
    rows = predicted.predict([times({edge: 10.0 * edge for edge in EDGES}, drafting_ms=11.0)])
    assert all(row["nodes"] == 1 and row["speedup"] == 1.0 for row in rows)


def test_no_size_beyond_a_step_in_the_times_is_chosen(predicted: ModuleType) -> None:
    """The last sizes before it may be taken to be slower than they were, as their neighbours count a little."""
    stairs = {edge: 10.0 if edge <= 16 else 40.0 for edge in EDGES}
    assert {row["nodes"] for row in predicted.predict([times(stairs)])} <= {8, 16}


def test_measures_a_small_model_and_draws_it(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(script.SHAPES, "small", (32, 64, 2, 2, 64))
    output, plot = tmp_path / "times.json", tmp_path / "times.png"
    options = ["--shape", "small", "--device", "cpu", "--dtype", "float32", "--batches", "1,2", "--contexts", "8"]
    monkeypatch.setattr(sys, "argv", ["step_times.py", *options, "--nodes", "2,4", "--output", str(output)])
    script.main()
    document = json.loads(output.read_text(encoding="utf-8"))
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == document
    assert [(found["batch"], found["nodes"]) for found in document["measured"]] == [(1, [1, 2, 4]), (2, [1, 2, 4])]
    assert document["left_out"] == [] and len(document["predicted"]) == 2 * 3

    monkeypatch.setattr(sys, "argv", ["step_times.py", "--from", str(output), "--plot", str(plot)])
    script.main()
    assert plot.read_bytes().startswith(b"\x89PNG")
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert again["predicted"] == document["predicted"]


def test_a_combination_that_does_not_fit_is_left_out(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def no_room(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    model, heads = script.random_model("small", torch.device("cpu"), torch.float32, 64)
    monkeypatch.setattr(script, "measure_step_times", no_room)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    assert script.measure(model, heads, [1], [8], [2]) == ([], [{"batch": 1, "context": 8}])


@pytest.mark.skipif("__import__('torch').cuda.is_available()", reason="there is a GPU here")
def test_without_a_gpu_it_says_what_to_do(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["step_times.py"])
    with pytest.raises(SystemExit, match="no CUDA device here; give --device cpu"):
        script.main()
