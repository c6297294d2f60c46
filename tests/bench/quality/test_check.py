"""Every output compared: mistakes are found, and a check that cannot be made costs nothing else."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from bench_runs import TEXTS, TREE, silent, subject, workload
from ladon.bench import report, table
from ladon.bench.findings import Difference, Subject
from ladon.bench.quality import identity as check
from ladon.bench.quality.identity import in_float32, is_out_of_memory
from ladon.bench.runner import run_bench
from ladon.bench.systems import LadonSystem, Run
from ladon.cli.bench import measure
from ladon.cli.main import run as run_command
from ladon.config import BenchOptions
from ladon.errors import UnsupportedModelError
from user_side import Tiny, write_jsonl


def breaking(monkeypatch: pytest.MonkeyPatch, mode: str, spoil: Callable[[list[int]], None]) -> None:
    """From now on, `mode` hands out its answers spoilt."""
    own = LadonSystem.run

    def run(self: LadonSystem, prompts: Sequence[Sequence[int]], tokens: int) -> Run:
        done = own(self, prompts, tokens)
        for output in done.outputs if self.name == mode else []:
            spoil(output)
        return done

    monkeypatch.setattr(LadonSystem, "run", run)


def another_token(output: list[int]) -> None:
    output[5] = (output[5] + 1) % 200


def test_a_wrong_token_is_found_and_is_no_near_tie(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    breaking(monkeypatch, "chain", another_token)
    options = BenchOptions(modes=("chain", "dynamic"), budgets=(4,), max_new_tokens=12, repeats=2)
    found = run_bench(subject(tiny), workload(), options, silent)
    results = {result["mode"]: result for result in report.results(found)}
    assert results["chain"]["identical"] is False
    assert (results["chain"]["near_ties"], results["chain"]["different"]) == (0, len(TEXTS))
    assert results["chain"]["float32_near_ties"] == 0
    assert results["chain"]["largest_margin"] is not None and results["chain"]["largest_margin"] > 1e-4
    assert results["dynamic"]["identical"] and results["plain"]["identical"]
    said = table.identity_line(list(results.values()), found.unchecked)
    assert said == "identical: NO (chain 4 left transformers' generate in float32)"
    lines = table.difference_lines(found, "float32")
    assert len(lines) == 2 * len(TEXTS)  # from plain decoding, and from generate
    assert all("at token 5: margin " in line and "NOT a near-tie (bound 1.0e-04)" in line for line in lines)


def test_an_answer_cut_short_is_wrong(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    breaking(monkeypatch, "dynamic", lambda output: output.pop())
    options = BenchOptions(modes=("dynamic",), budgets=(4,), max_new_tokens=12, repeats=1)
    found = run_bench(subject(tiny), workload(), options, silent)
    result = report.results(found)[1]
    assert result["identical"] is False and (result["near_ties"], result["different"]) == (0, len(TEXTS))
    assert result["largest_margin"] is None  # it is infinite
    assert all("margin inf" in line for line in table.difference_lines(found, "float32"))


def test_bench_ends_with_1_if_a_mode_is_wrong(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    prompts = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "def read"}])
    options = ["--prompts", str(prompts), "--modes", "dynamic", "--max-new-tokens", "8", "--repeats", "1", "--json"]
    breaking(monkeypatch, "dynamic", another_token)
    assert run_command(["bench", *tiny.arguments, *options]) == 1
    captured = capsys.readouterr()
    assert "identical: NO (dynamic 16" in captured.out and "internal error" not in captured.err
    results = json.loads(captured.out.splitlines()[-1])["results"]
    assert [row["identical"] for row in results] == [True, False]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MemoryError(), "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "out of memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"), "out of memory"),
        (UnsupportedModelError("the model is refused"), "the model is refused"),
    ],
)
def test_results_outlive_a_check_that_cannot_be_made(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(check, "in_float32", fail)
    options = BenchOptions(modes=("dynamic",), budgets=(4,), max_new_tokens=4, repeats=1)
    document, found = measure(subject(tiny), workload(), options, silent)
    assert reason in document["identity_unchecked"]
    json.dumps(document, allow_nan=False)
    for row in document["results"]:
        assert row["identical"] is None and row["float32_near_ties"] is None and row["tokens_per_second"] > 0
    results = report.results(found)
    assert table.identity_line(results, found.unchecked).startswith("identical: not known, the check in float32 could")
    table.table(results, document["transformers"], 1)
    wrong = Difference(prompt=0, position=1, margin=3.0, bound=1e-4)
    found.float32_differences["dynamic", 4, 1].append(wrong)  # found before memory ran out
    assert [result["identical"] for result in report.results(found)] == [None, False]


def test_other_errors_of_the_check_are_errors(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(check, "in_float32", fail)
    options = BenchOptions(modes=("plain",), max_new_tokens=2, repeats=1)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        run_bench(subject(tiny), workload(), options, silent)
    assert not is_out_of_memory(ValueError("out of memory"))


def test_in_float32_keeps_weights_and_leaves_the_model_alone(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    half, half_heads = in_float32(tiny.model, tiny.heads)
    assert half is tiny.model and half_heads is tiny.heads
    model = copy.deepcopy(tiny.model).to(torch.bfloat16)
    heads = copy.deepcopy(tiny.heads).bind(model, force=True)
    copied: list[torch.nn.Parameter] = []
    own = torch.nn.Parameter.__deepcopy__

    def count(self: torch.nn.Parameter, memo: dict[int, object]) -> torch.nn.Parameter:
        copied.append(self)
        return own(self, memo)

    monkeypatch.setattr(torch.nn.Parameter, "__deepcopy__", count)
    single, single_heads = in_float32(model, heads)
    assert len(copied) == len([*model.parameters(), *heads.parameters()])  # the projection once
    assert single.dtype == torch.float32 and model.dtype == torch.bfloat16
    assert single_heads is not None and {p.dtype for p in single_heads.parameters()} == {torch.float32}
    assert {p.dtype for p in heads.parameters()} == {torch.bfloat16}
    for ours, theirs in zip(single.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs.float())
    hidden = torch.randn(2, model.config.hidden_size)
    assert single_heads(hidden).dtype == torch.float32
    assert single_heads.project(hidden).equal(single.get_output_embeddings()(hidden))


def test_half_precision_is_measured_and_checked_in_float32(tiny: Tiny) -> None:
    model = copy.deepcopy(tiny.model).to(torch.bfloat16)
    heads = copy.deepcopy(tiny.heads).bind(model, force=True)
    half = Subject(name="half", model=model, tokenizer=tiny.tokenizer, heads=heads, fixed_tree=lambda size: TREE)
    options = BenchOptions(modes=("dynamic",), budgets=(4,), max_new_tokens=20, repeats=1)
    found = run_bench(half, workload(), options, silent)
    for result in report.results(found):
        assert result["identical"] and result["different"] == 0
        assert (result["largest_margin"] is None) == (result["near_ties"] == 0)
    assert model.dtype == torch.bfloat16
