from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import torch

from ladon.bench import answers, check, report, table
from ladon.bench.calibration import calibrate
from ladon.bench.check import in_float32, is_out_of_memory
from ladon.bench.findings import Findings, Measured, Request, Subject
from ladon.bench.identity import Difference, compare, examine, first_difference, near_tie_bound, replayed_logits
from ladon.bench.repetition import Repetition, repeated_tokens
from ladon.bench.runner import run_bench
from ladon.bench.systems import LadonSystem, Run, System, TransformersSystem, cut, merged
from ladon.bench.workloads import Question, Workload, make_workload, prompt_ids, read_workload
from ladon.cli.bench import measure, tree_source
from ladon.cli.loading import Loaded
from ladon.cli.main import run as run_command
from ladon.config import BenchOptions
from ladon.engine.stats import DecodeStats
from ladon.errors import HeadsError, InputError, TreeError, UnsupportedModelError
from ladon.heads.calibration import Calibration
from ladon.trees.fixed_tree import FixedTree, best_fixed_tree
from ladon.util import machine as environment
from user_side import CONTEXT, ROOT, Tiny, write_jsonl

TREE = FixedTree(((0,), (0, 0), (1,), (0, 0, 0), (0, 1)))
TEXTS = ["def read", "for line in self.lines:\n", "return", "class Reader:"]


def silent(what: str, done: int, total: int) -> None:
    assert 0 < done <= total


def workload(*categories: str) -> Workload:
    names = categories or ("",) * len(TEXTS)
    return make_workload(
        "test",
        [
            Question(question_id=number, category=name, turns=(text,), is_chat=False)
            for number, (text, name) in enumerate(zip(TEXTS, names, strict=False))
        ],
    )


def subject(tiny: Tiny) -> Subject:
    return Subject(
        name="tiny", model=tiny.model, tokenizer=tiny.tokenizer, heads=tiny.heads, fixed_tree=lambda size: TREE
    )


@pytest.fixture(scope="module")
def findings(tiny: Tiny) -> Findings:
    options = BenchOptions(budgets=(4, 6), batches=(1, 2), max_new_tokens=20, repeats=2)
    return run_bench(subject(tiny), workload("a", "b", "b", "b"), options, silent)


def test_repeated_tokens_end_an_8_gram_seen_before() -> None:
    once = list(range(8))
    assert repeated_tokens(once + once) == [False] * 15 + [True]
    assert repeated_tokens([7] * 10) == [False] * 8 + [True, True]
    assert repeated_tokens(list(range(30))) == [False] * 30
    assert repeated_tokens([]) == []


def test_acceptance_where_nothing_repeats() -> None:
    counts = Repetition()
    counts.add([0, *[7] * 10], [2, 2, 4, 2])  # the 8-gram of sevens ends at 8 first, and again at 9 and 10
    assert (counts.steps, counts.tokens) == (3, 8)
    assert counts.acceptance_length == pytest.approx(8 / 3)
    assert counts.share == pytest.approx(2 / 4)
    counts.add([1, 2, 3], [1, 1])  # too short for an 8-gram
    assert (counts.ngrams, counts.steps, counts.tokens) == (4, 5, 10)
    assert math.isnan(Repetition().share) and math.isnan(Repetition().acceptance_length)


def test_workload_of_prompts_and_turns(tmp_path: Path) -> None:
    path = write_jsonl(
        tmp_path / "w.jsonl",
        [
            {"prompt": "one"},
            {"turns": ["two", "three"], "category": "writing", "question_id": 81},
            {"prompt": "four", "other": 1},
        ],
    )
    found = read_workload(path)
    assert [question.turns for question in found.questions] == [("one",), ("two", "three"), ("four",)]
    assert [question.question_id for question in found.questions] == [1, 81, 3]
    assert [question.is_chat for question in found.questions] == [False, True, False]
    assert found.questions[1].category == "writing"
    assert len(read_workload(path, limit=2).questions) == 2
    assert read_workload(path, limit=2).sha256 != found.sha256 == read_workload(path).sha256


def test_lines_end_at_line_feeds_only(tmp_path: Path) -> None:
    """JSON texts may hold what Python takes for line ends; a byte order mark and CRLF do no harm."""
    texts = ["a\u2028b", "c\x85d", "e\u2029f"]
    lines = [json.dumps({"prompt": text}, ensure_ascii=False) for text in texts]
    path = tmp_path / "w.jsonl"
    path.write_bytes("\r\n".join(["\ufeff" + lines[0], "", *lines[1:]]).encode())
    found = read_workload(path)
    assert [question.turns[0] for question in found.questions] == texts
    assert [question.question_id for question in found.questions] == [1, 3, 4]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "holds no prompts"),
        (b"{]\n", "line 1: no JSON"),
        (b'{"prompt": "a"}\n{"question": "b"}\n', "line 2: neither"),
        (b'{"prompt": ""}\n', "none may be empty"),
        (b'{"turns": []}\n', "must be a list"),
        (b'{"turns": "text"}\n', "must be a list"),
        (b'{"prompt": "a", "category": 3}\n', "category"),
        (b'{"prompt": "\xff"}\n', "not UTF-8"),
        (b'{"prompt": "a", "question_id": 7}\n{"prompt": "b", "question_id": 7}\n', "line 2: an earlier .* id 7"),
        (b'{"prompt": "a", "question_id": 2}\n{"prompt": "b"}\n', "line 2: an earlier question has the id 2 too"),
    ],
)
def test_bad_workloads_are_refused(tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "w.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match=problem):
        read_workload(path)


def test_second_turn_contains_the_first_answer(tiny: Tiny) -> None:
    question = Question(question_id=1, category="", turns=("def read", "return"), is_chat=True)
    tokenizer = tiny.tokenizer
    assert tokenizer.decode(prompt_ids(tokenizer, question, [])) == "def read\n"
    assert tokenizer.decode(prompt_ids(tokenizer, question, ["ANSWER"])) == "def read\nANSWER\nreturn\n"
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    try:
        text = tokenizer.decode(prompt_ids(tokenizer, question, ["ANSWER"]))
    finally:
        tokenizer.chat_template = None
    assert text == "[user] def read\n[assistant] ANSWER\n[user] return\n[assistant]"


def test_cut_ends_with_the_first_stop() -> None:
    assert cut([5, 6, 0, 7, 0], frozenset([0])) == [5, 6, 0]
    assert cut([5, 6], frozenset([0])) == [5, 6]
    assert cut([5, 6], frozenset()) == [5, 6]


def test_merged_adds_counts_and_stages() -> None:
    one = DecodeStats(tokens=3, row_steps=2, forwards=2, decode_seconds=0.5, stage_seconds={"forward": 0.4})
    two = DecodeStats(
        tokens=5, row_steps=2, forwards=1, decode_seconds=0.5, stage_seconds={"forward": 0.1, "pick": 0.2}
    )
    total = merged([one, two])
    assert (total.tokens, total.row_steps, total.forwards, total.decode_seconds) == (8, 4, 3, 1.0)
    assert total.stage_seconds == {"forward": 0.5, "pick": 0.2}
    assert total.acceptance_length == 2.0 and total.tokens_per_second == 8.0


def test_generate_is_timed_without_prefill(tiny: Tiny) -> None:
    prompts = [tiny.tokenizer(text)["input_ids"] for text in TEXTS[:2]]
    run = TransformersSystem(tiny.model).run(prompts, 12)
    stats = run.stats
    assert [len(output) for output in run.outputs] == [12, 12]
    assert (stats.tokens, stats.row_steps, stats.forwards) == (22, 22, 11)
    assert stats.prefill_tokens == sum(map(len, prompts))
    assert 0 < stats.prefill_seconds < run.seconds and 0 < stats.decode_seconds < run.seconds
    assert stats.prefill_seconds + stats.decode_seconds <= run.seconds


@pytest.mark.parametrize("batch", [1, 2])
def test_first_tokens_are_timed_from_the_call(tiny: Tiny, batch: int) -> None:
    prompts = [tiny.tokenizer(text)["input_ids"] for text in TEXTS[:batch]]
    system = LadonSystem(tiny.model, tiny.heads, mode="dynamic", budget=6)
    run = system.run(prompts, 12)
    assert run.stats.prefill_seconds < run.first_token_seconds  # before it, transformers prepares the inputs
    assert run.first_token_seconds + run.stats.decode_seconds == pytest.approx(run.seconds)
    run = TransformersSystem(tiny.model).run(prompts, 12)
    assert run.first_token_seconds == run.stats.prefill_seconds


def test_steps_of_single_rows_are_recorded(tiny: Tiny) -> None:
    system = LadonSystem(tiny.model, tiny.heads, mode="dynamic", budget=6, profile=True)
    prompts = [tiny.tokenizer(text)["input_ids"] for text in TEXTS[:2]]
    run = system.run(prompts[:1], 20)
    assert sum(run.step_counts) == run.stats.tokens == len(run.outputs[0]) - 1
    assert len(run.step_counts) == run.stats.row_steps
    assert system.run(prompts, 20).step_counts == []


def test_every_mode_says_the_same(findings: Findings) -> None:
    found = report.results(findings)
    budgets: list[tuple[str, int | str]] = [("plain", 1), ("chain", 4), ("fixed", 4), ("fixed", 6)]
    budgets += [("dynamic", 4), ("dynamic", 6), ("auto", "auto")]
    assert [(result.mode, result.budget, result.batch) for result in found] == [
        (*entry, batch) for batch in (1, 2) for entry in budgets
    ]
    for result in found:
        assert result.identical and result.float32_near_ties == result.near_ties == result.different == 0
        assert result.prompts == 4
        assert result.speedup_vs_plain is not None and result.speedup_vs_transformers is not None
        if result.mode == "plain":
            assert result.acceptance_length == 1.0 and result.speedup_vs_plain == 1.0
        else:  # the size chosen may be 1
            assert result.acceptance_length is not None
            assert result.acceptance_length > 1.0 or (result.mode == "auto" and result.acceptance_length == 1.0)
        assert (result.acceptance_length_non_repeated is not None) == (result.batch == 1)
        low, high = result.tokens_per_second_range
        assert low is not None and high is not None and result.tokens_per_second is not None
        assert 0 < low <= result.tokens_per_second <= high
    dynamic = {r.budget: r for r in found if r.mode == "dynamic" and r.batch == 1}
    chain = next(r for r in found if r.mode == "chain" and r.batch == 1)
    assert dynamic[6].acceptance_length >= chain.acceptance_length  # type: ignore[operator]


def test_profiled_runs_are_repeated_as_the_timed_ones(findings: Findings) -> None:
    for entry in findings.measured:
        assert len(entry.timed) == 2 and len(entry.profiled) == (0 if entry.system == "transformers" else 2)
    for result in report.results(findings):
        assert result.overhead is not None and 0 < result.overhead < 1
        assert result.forward_ms is not None and result.profiled_step_ms is not None and result.step_ms is not None
        # of two repeats, the median is the mean
        assert 0 < result.forward_ms < result.profiled_step_ms
        drafting = {"heads", "growth"} if result.mode != "plain" else set()
        always = {"verify", "forward", "pick", "accept", "commit", "transfer"}
        if result.mode == "auto":  # which may find that drafting does not pay
            assert always <= result.stages.keys() <= always | drafting
        else:
            assert result.stages.keys() == always | drafting
        shares = {name: share for name, share in result.stages.items() if share is not None}
        assert shares["forward"] < shares["verify"]
        assert sum(share for name, share in shares.items() if name not in ("forward", "heads", "growth")) < 1
        assert shares["forward"] == pytest.approx(1 - result.overhead)
        assert shares.get("growth") == result.growth_share


def crafted(timed: Sequence[float], profiled: Sequence[tuple[float, float]]) -> Findings:
    """One system whose timed and profiled runs took so many seconds; of the profiled also the forward's."""

    def run(stats: DecodeStats) -> Run:
        return Run(outputs=[[1] * 11], stats=stats, seconds=1.0, first_token_seconds=0.1, step_counts=[1] * 10)

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
    assert result.step_ms == pytest.approx(20.0) and result.tokens_per_second == pytest.approx(50.0)
    assert result.profiled_step_ms == pytest.approx(40.0) and result.forward_ms == pytest.approx(30.0)
    assert result.overhead == pytest.approx(0.25)  # of 0.5, 0.25 and 0.05
    assert result.stages == {"forward": pytest.approx(0.75), "growth": pytest.approx(0.025)}
    assert result.growth_share == pytest.approx(0.025) and result.first_token_ms == pytest.approx(100.0)
    assert "took 2.00 to 2.00 times as long" in table.profile_line([result])


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


def test_categories_apart(findings: Findings) -> None:
    for result in report.results(findings):
        assert {name: row["prompts"] for name, row in result.categories.items()} == {"a": 1, "b": 3}
        assert all(row["acceptance_length"] and row["tokens_per_second"] for row in result.categories.values())


def test_report_is_json_with_the_promised_fields(findings: Findings) -> None:
    found = report.results(findings)
    rows = [asdict(result) for result in found]
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
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    defined = set(re.findall(r"`(\w+)`", page))
    keys = set(document) | set(document["environment"]) | set(document["transformers"][0]) | set(document["workload"])
    keys |= {field.name for field in fields(report.Result)} | set(document["results"][1]["stages"])
    diagnosis = document["results"][1]["diagnosis"]
    keys |= set(diagnosis) | set(diagnosis["known"]) | set(diagnosis["error"])
    assert not keys - defined


def test_diagnosis_is_of_the_modes_whose_trees_come_from_one_lattice(tiny: Tiny) -> None:
    modes = ("chain", "fixed", "dynamic", "auto", "dynamic+ngrams", "ngrams")
    options = BenchOptions(modes=modes, budgets=(4,), batches=(1, 2), max_new_tokens=12, repeats=1, diagnose=True)
    found = report.results(run_bench(subject(tiny), workload(), options, silent))
    looked_at = {result.mode for result in found if result.diagnosis is not None}
    assert looked_at == {"chain", "fixed", "dynamic", "auto"}
    for result in found:
        if result.diagnosis is not None and result.mode != "auto":  # the steps of a fixed size are always the same
            assert result.diagnosis["undrafted"] == 0
            assert result.acceptance_length == pytest.approx(1 + result.diagnosis["accepted"]["mean"], abs=1e-3)
    json.dumps([asdict(result) for result in found], allow_nan=False)
    assert table.diagnosis_table(found).row_count == 8
    (line,) = table.diagnosis_lines(found)
    assert "coverage" in line and "ranking" in line


def test_nothing_is_looked_at_unasked(findings: Findings) -> None:
    found = report.results(findings)
    assert all(result.diagnosis is None for result in found) and table.diagnosis_lines(found) == []


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
    results = {result.mode: result for result in report.results(found)}
    assert results["chain"].identical is False
    assert (results["chain"].near_ties, results["chain"].different) == (0, len(TEXTS))
    assert results["chain"].float32_near_ties == 0
    assert results["chain"].largest_margin is not None and results["chain"].largest_margin > 1e-4
    assert results["dynamic"].identical and results["plain"].identical
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
    assert result.identical is False and (result.near_ties, result.different) == (0, len(TEXTS))
    assert result.largest_margin is None  # it is infinite
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
    assert [result.identical for result in report.results(found)] == [None, False]


def test_other_errors_of_the_check_are_errors(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(check, "in_float32", fail)
    options = BenchOptions(modes=("plain",), max_new_tokens=2, repeats=1)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        run_bench(subject(tiny), workload(), options, silent)
    assert not is_out_of_memory(ValueError("out of memory"))


def test_first_difference() -> None:
    assert first_difference([1, 2, 3], [1, 2, 3]) is None
    assert first_difference([1, 9, 3], [1, 2, 3]) == 1
    assert first_difference([1, 2], [1, 2, 3]) == 2  # an output cut short is not equal
    assert first_difference([1, 2, 3], [1, 2]) == 2


@pytest.mark.parametrize(
    ("margin", "deviation", "near"),
    [
        (5e-5, 5e-5, True),
        (5e-5, 5e-4, False),
        (5e-4, 5e-5, False),
        (5e-5, None, True),
        (5e-4, None, False),
        (0.0, 0.0, True),
        (5e-5, math.inf, False),
        (math.inf, None, False),
    ],
)
def test_near_tie_needs_a_small_margin_and_equal_logits(margin: float, deviation: float | None, near: bool) -> None:
    found = Difference(prompt=0, position=1, margin=margin, bound=1e-4, deviation=deviation)
    assert found.is_near_tie is near


def test_bounds_follow_the_dtype() -> None:
    logits = torch.tensor([-20.0, 3.0, 15.0])
    assert near_tie_bound(torch.float64, logits) == 0.0
    assert near_tie_bound(torch.float32, logits) == 1e-4
    assert near_tie_bound(torch.bfloat16, logits) == 4 * 2**-7 * 20
    assert near_tie_bound(torch.float16, logits) == 4 * 2**-10 * 20
    assert not Difference(prompt=0, position=1, margin=0.0, bound=0.0).is_near_tie  # in float64 nothing is


def test_what_is_a_near_tie_in_half_precision(tiny: Tiny) -> None:
    """The token that was written counts, not how close the best two are."""
    model = copy.deepcopy(tiny.model).to(torch.bfloat16)
    prompt = tiny.tokenizer("def read")["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[0, -1].float()
    order = logits.argsort(descending=True).tolist()
    bound = near_tie_bound(torch.bfloat16, logits)
    assert compare(model, 0, prompt, [order[0]], [order[0]]) is None
    for rank in (1, len(order) // 2, len(order) - 1):
        found = compare(model, 7, prompt, [order[rank]], [order[0]])
        assert found is not None and (found.prompt, found.position) == (7, 0)
        assert found.margin == pytest.approx(float(logits[order[0]] - logits[order[rank]]), abs=bound / 4)
        assert found.bound == pytest.approx(bound, rel=0.02)
        assert found.is_near_tie == (found.margin < found.bound)
    assert not found.is_near_tie
    swapped = compare(model, 7, prompt, [order[0]], [order[-1]])  # the margin is that of the worse of the two
    assert swapped is not None and swapped.margin == found.margin


@pytest.mark.parametrize("mode", ["plain", "chain", "dynamic"])
def test_examine_compares_the_logits_of_the_very_step(tiny: Tiny, mode: str) -> None:
    """At every position of an equal output, the replayed tree's logits are those of `generate` up to rounding."""
    system = LadonSystem(tiny.model, tiny.heads, mode=mode, budget=6)
    prompt = tiny.tokenizer("def read")["input_ids"]
    output = system.run([prompt], 16).outputs[0]
    assert examine(tiny.model, system, 0, prompt, output, output) is None
    for position in range(16):
        wrong = [*output[:position], (output[position] + 1) % 200, *output[position + 1 :]]
        found = examine(tiny.model, system, 3, prompt, wrong, output)
        assert found is not None and (found.prompt, found.position) == (3, position)
        assert found.deviation is not None and found.deviation < 1e-4
        simple = compare(tiny.model, 3, prompt, wrong, output)
        assert simple is not None and found.margin == pytest.approx(simple.margin, abs=2e-4)
        assert found.margin > 1e-4 and not found.is_near_tie
    assert replayed_logits(tiny.model, system, prompt, 16, max_new_tokens=16) is None


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
        assert result.identical and result.different == 0
        assert (result.largest_margin is None) == (result.near_ties == 0)
    assert model.dtype == torch.bfloat16


def test_pruned_mode_prunes_as_calibrated(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a clock in it and without a profile, sizes are 16: more than are kept."""
    monkeypatch.setenv("LADON_DETERMINISTIC", "1")
    model, heads = copy.deepcopy((tiny.model, tiny.heads))
    heads.bind(model, force=True)
    best = {"trained": False, "layer": 1, "keep": 4, "criterion": "siblings", "weight": 0.3, "top_k": 8}
    heads.calibration = Calibration(heads="", temperatures=[1.0] * 3, hit_rates=[[0.5]] * 3, pruning={"best": best})
    pruned = replace(subject(tiny), model=model, heads=heads)
    options = BenchOptions(modes=("auto", "pruned"), budgets=(4,), max_new_tokens=12, repeats=1)
    found = {result.mode: result for result in report.results(run_bench(pruned, workload(), options, silent))}
    assert [(mode, result.budget) for mode, result in found.items()][1:] == [("auto", "auto"), ("pruned", "auto")]
    assert found["pruned"].identical and found["pruned"].different == 0
    assert found["auto"].pruned_share == 0.0 and found["pruned"].pruned_share == pytest.approx(0.75, abs=0.15)
    with pytest.raises(InputError, match="mode pruned: no pruning is known to pay"):
        run_bench(subject(tiny), workload(), options, silent)


def test_pruned_mode_prunes_as_it_is_told(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """These heads have no calibration."""
    monkeypatch.setenv("LADON_DETERMINISTIC", "1")
    options = BenchOptions(modes=("pruned",), budgets=(4,), max_new_tokens=12, repeats=1, prune="1:8")
    found = {result.mode: result for result in report.results(run_bench(subject(tiny), workload(), options, silent))}
    assert found["pruned"].identical and found["pruned"].pruned_share == pytest.approx(0.5, abs=0.1)
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
    assert [(result.mode, result.budget) for result in found] == [("plain", 1), ("fixed", 4), ("fixed", 6)]


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
