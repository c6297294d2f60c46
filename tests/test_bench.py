from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from ladon.bench import answers, environment, report
from ladon.bench.calibration import calibrate
from ladon.bench.identity import Difference, examine, first_difference, margin
from ladon.bench.repetition import Repetition, repeated_tokens
from ladon.bench.runner import Findings, Subject, in_float32, run_bench
from ladon.bench.systems import LadonSystem, Run, TransformersSystem, cut, merged
from ladon.bench.workloads import Question, Workload, make_workload, prompt_ids, read_workload
from ladon.config import BenchOptions
from ladon.errors import InputError, TreeError
from ladon.fixed_tree import FixedTree, best_fixed_tree
from ladon.stats import DecodeStats
from user_side import CONTEXT, Tiny, write_jsonl

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


def test_steps_of_single_rows_are_recorded(tiny: Tiny) -> None:
    system = LadonSystem(tiny.model, tiny.heads, mode="dynamic", budget=6, profile=True)
    prompts = [tiny.tokenizer(text)["input_ids"] for text in TEXTS[:2]]
    run = system.run(prompts[:1], 20)
    assert sum(run.step_counts) == run.stats.tokens == len(run.outputs[0]) - 1
    assert len(run.step_counts) == run.stats.row_steps
    assert system.run(prompts, 20).step_counts == []


def test_every_mode_says_the_same(findings: Findings) -> None:
    found = report.results(findings)
    budgets = [("plain", 1), ("chain", 4), ("fixed", 4), ("fixed", 6), ("dynamic", 4), ("dynamic", 6)]
    assert [(result.mode, result.budget, result.batch) for result in found] == [
        (*entry, batch) for batch in (1, 2) for entry in budgets
    ]
    for result in found:
        assert result.identical and result.float32_near_ties == result.near_ties == 0
        assert result.prompts == 4
        assert result.speedup_vs_plain is not None and result.speedup_vs_transformers is not None
        if result.mode == "plain":
            assert result.acceptance_length == 1.0 and result.speedup_vs_plain == 1.0
        else:
            assert result.acceptance_length is not None and result.acceptance_length > 1.0
        assert (result.acceptance_length_non_repeated is not None) == (result.batch == 1)
        low, high = result.tokens_per_second_range
        assert low is not None and high is not None and result.tokens_per_second is not None
        assert 0 < low <= result.tokens_per_second <= high
        assert result.overhead is not None and 0 < result.overhead < 1
        assert result.forward_ms is not None and result.forward_ms > 0
    dynamic = {r.budget: r for r in found if r.mode == "dynamic" and r.batch == 1}
    chain = next(r for r in found if r.mode == "chain" and r.batch == 1)
    assert dynamic[6].acceptance_length >= chain.acceptance_length  # type: ignore[operator]


def test_modes_take_turns(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the timed part no system runs twice in a row, and each is as often first as any other."""
    order: list[str] = []
    for kind in (LadonSystem, TransformersSystem):
        own = kind.run

        def run(self: object, prompts: Sequence[Sequence[int]], tokens: int, own: object = own) -> Run:
            order.append(self.name)  # type: ignore[attr-defined]
            return own(self, prompts, tokens)  # type: ignore[operator]

        monkeypatch.setattr(kind, "run", run)
    options = BenchOptions(modes=("plain", "chain", "dynamic"), budgets=(4,), max_new_tokens=2, repeats=2)
    run_bench(subject(tiny), workload(), options, silent)
    names = ["plain", "chain", "dynamic", "transformers"]
    timed = order[len(TEXTS) + len(names) :][: 2 * len(TEXTS) * len(names)]
    rounds = [timed[at : at + 4] for at in range(0, len(timed), 4)]
    assert all(sorted(part) == sorted(names) for part in rounds)
    assert {name: [part[0] for part in rounds].count(name) for name in names} == dict.fromkeys(names, 2)


def test_categories_apart(findings: Findings) -> None:
    for result in report.results(findings):
        assert {name: row["prompts"] for name, row in result.categories.items()} == {"a": 1, "b": 3}
        assert all(row["acceptance_length"] and row["tokens_per_second"] for row in result.categories.values())


def test_report_is_json_with_the_promised_fields(findings: Findings) -> None:
    rows = [report.result_json(result) for result in report.results(findings)]
    json.dumps(rows, allow_nan=False)
    promised = {
        *("mode", "batch", "budget", "acceptance_length", "tokens_per_second", "step_ms", "forward_ms"),
        *("overhead", "speedup_vs_plain", "speedup_vs_transformers", "identical"),
    }
    assert all(promised <= row.keys() for row in rows)
    baselines = report.baselines(findings)
    assert [row["batch"] for row in baselines] == [1, 2]
    assert report.table(report.results(findings), baselines, 2).row_count == 7
    assert report.identity_line(report.results(findings)).startswith("identical: yes (")


def test_a_wrong_token_is_found(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    own = LadonSystem.run

    def run(self: LadonSystem, prompts: Sequence[Sequence[int]], tokens: int) -> Run:
        done = own(self, prompts, tokens)
        if self.name == "chain":
            for output in done.outputs:
                output[5] += 1
        return done

    monkeypatch.setattr(LadonSystem, "run", run)
    options = BenchOptions(modes=("chain", "dynamic"), budgets=(4,), max_new_tokens=12, repeats=1)
    found = run_bench(subject(tiny), workload(), options, silent)
    results = {result.mode: result for result in report.results(found)}
    assert not results["chain"].identical and results["chain"].near_ties == len(TEXTS)
    assert results["dynamic"].identical and results["plain"].identical
    assert report.identity_line(list(results.values())).startswith("identical: NO (chain 4 left")
    lines = report.float32_lines(found)
    assert len(lines) == len(TEXTS) and all("NOT a near-tie" in line and "token 5" in line for line in lines)
    assert len(report.near_tie_lines(list(results.values()), "float32")) == 1


def test_first_difference() -> None:
    assert first_difference([1, 2, 3], [1, 2, 3]) is None
    assert first_difference([1, 9, 3], [1, 2, 3]) == 1
    assert first_difference([1, 2], [1, 2, 3]) == 2  # an output cut short is not equal
    assert first_difference([1, 2, 3], [1, 2]) == 2


@pytest.mark.parametrize(
    ("margin", "deviation", "near"),
    [(5e-5, 5e-5, True), (5e-5, 5e-4, False), (5e-4, 5e-5, False), (5e-5, None, False), (0.0, 0.0, True)],
)
def test_near_tie_needs_both_a_small_margin_and_equal_logits(
    margin: float, deviation: float | None, near: bool
) -> None:
    found = Difference(mode="chain", prompt=0, position=1, margin=margin, deviation=deviation)
    assert found.is_near_tie is near


@pytest.mark.parametrize("mode", ["plain", "chain", "dynamic"])
def test_examine_compares_the_logits_of_the_very_step(tiny: Tiny, mode: str) -> None:
    """At every position of an equal output, the replayed tree's logits are those of `generate` up to rounding."""
    system = LadonSystem(tiny.model, tiny.heads, mode=mode, budget=6)
    prompt = tiny.tokenizer("def read")["input_ids"]
    output = system.run([prompt], 16).outputs[0]
    for position in range(16):
        found = examine(tiny.model, system, prompt, position, 0, 16)
        assert found.deviation is not None and found.deviation < 1e-4
        assert found.margin == pytest.approx(margin(tiny.model, prompt, output, position), abs=2e-4)
        assert not found.is_near_tie


def test_in_float32_keeps_weights_and_leaves_the_model_alone(tiny: Tiny) -> None:
    half, half_heads = in_float32(tiny.model, tiny.heads)
    assert half is tiny.model and half_heads is tiny.heads
    model = copy.deepcopy(tiny.model).to(torch.bfloat16)
    heads = copy.deepcopy(tiny.heads).bind(model, force=True)
    single, single_heads = in_float32(model, heads)
    assert single.dtype == torch.float32 and model.dtype == torch.bfloat16
    assert single_heads is not None and {p.dtype for p in single_heads.parameters()} == {torch.float32}
    assert {p.dtype for p in heads.parameters()} == {torch.bfloat16}
    for ours, theirs in zip(single.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs.float())
    hidden = torch.randn(2, model.config.hidden_size)
    assert single_heads(hidden).dtype == torch.float32


def test_half_precision_is_measured_and_checked_in_float32(tiny: Tiny) -> None:
    model = copy.deepcopy(tiny.model).to(torch.bfloat16)
    heads = copy.deepcopy(tiny.heads).bind(model, force=True)
    half = Subject(name="half", model=model, tokenizer=tiny.tokenizer, heads=heads, fixed_tree=lambda size: TREE)
    options = BenchOptions(modes=("dynamic",), budgets=(4,), max_new_tokens=20, repeats=1)
    found = run_bench(half, workload(), options, silent)
    for result in report.results(found):
        assert result.identical
        assert (result.largest_margin is None) == (result.near_ties == 0)
    assert model.dtype == torch.bfloat16


def test_calibration_gives_a_tree(tiny: Tiny) -> None:
    rates = calibrate(tiny.model, tiny.heads, tiny.tokenizer, workload().questions, 20, silent)
    tree = best_fixed_tree(rates, 6)
    assert tree.num_nodes == 6
    system = LadonSystem(tiny.model, tiny.heads, mode="fixed", budget=6, fixed_tree=tree)
    assert system.run([tiny.tokenizer("def")["input_ids"]], 8).stats.nodes_verified > 8


def test_answers_are_mt_bench_rows(tiny: Tiny) -> None:
    questions = [
        Question(question_id=81, category="writing", turns=("def read", "return"), is_chat=True),
        Question(question_id=82, category="math", turns=("for line",), is_chat=True),
    ]
    options = BenchOptions(modes=("dynamic",), budgets=(4,), max_new_tokens=10, repeats=1)
    asked = subject(tiny)
    found = run_bench(asked, make_workload("chat", questions), options, silent)
    rows = [json.loads(line) for line in answers.answer_rows(asked, found.measured, 1.5)]
    assert [(row["question_id"], row["model_id"]) for row in rows] == [
        (number, f"tiny-{mode}") for mode in ("plain-1", "dynamic-4", "transformers") for number in (81, 82)
    ]
    assert len({row["answer_id"] for row in rows}) == len(rows)
    for row in rows:
        assert row["tstamp"] == 1.5
        (choice,) = row["choices"]
        turns = 2 if row["question_id"] == 81 else 1
        assert choice["index"] == 0
        assert {len(choice[name]) for name in ("turns", "idxs", "new_tokens", "wall_time")} == {turns}
        assert choice["new_tokens"] == [10] * turns
        if "plain" in row["model_id"]:
            assert choice["idxs"] == [9] * turns  # the first token is the prefill's
    texts = {row["question_id"]: row["choices"][0]["turns"] for row in rows[:2]}
    assert all(row["choices"][0]["turns"] == texts[row["question_id"]] for row in rows)


def test_prompts_that_leave_no_room_are_refused(tiny: Tiny) -> None:
    options = BenchOptions(modes=("dynamic",), max_new_tokens=CONTEXT, repeats=1)
    with pytest.raises(InputError, match=f"context limit of {CONTEXT}"):
        run_bench(subject(tiny), workload(), options, silent)


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
    assert {"transformers", "ladon", "commit", "python", "system", "cpu_count", "cpu_bf16"} <= place.keys()
    assert not environment.is_busy({"load_average": [0.0, 9.0, 9.0]})
    assert environment.is_busy({"load_average": [1e3, 0.0, 0.0]})
    assert not environment.is_busy({"load_average": None})
    json.dumps(environment.load(), allow_nan=False)
