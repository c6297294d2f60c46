"""`ladon demo`: what it says while it works, and how long it takes, by a clock of the test's own."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ladon.bench.findings import Subject
from ladon.bench.runner import TimeLimit, _take_turns
from ladon.bench.workloads import Question, make_workload
from ladon.cli import demo
from ladon.cli.bench import measure
from ladon.cli.main import run
from ladon.cli.output import progress_bar
from ladon.config import BenchOptions
from ladon.demo.bundled import demo_fixed_tree
from user_side import Tiny

MODES = 5
SYSTEMS = 2 * MODES + 1  # each mode timed and profiled, and transformers
PROMPTS, REPEATS, TOKENS = 5, 3, 128  # what the demo measures unless told otherwise


@dataclass
class Machine:
    """A machine whose clock moves only when something runs: 128 tokens in so many seconds, later in `later` times."""

    seconds: float
    later: float = 1.0
    now: float = 0.0
    name: str = "system"

    def clock(self) -> float:
        return self.now

    def run(self, prompts: Any, max_new_tokens: int) -> Any:
        """A run of any mode."""
        self.now += self.seconds * (self.later if self.now > 60 else 1.0) * len(prompts) * max_new_tokens / 128
        return SimpleNamespace(prompts=prompts)


def measured(machine: Machine) -> tuple[int, int, int]:
    """Prompts, repeats and tokens of a demo on that machine, whose clock then tells when all of it ends."""
    machine.now = 8.0  # loading, on two slow cores
    limit = TimeLimit(demo._SECONDS, machine.clock)
    for _ in range(2):  # live
        machine.run([[0]], TOKENS)
    left = limit.end - machine.now
    tokens = demo.affordable_tokens(TOKENS, PROMPTS, machine.seconds, left)
    for _ in range(PROMPTS):  # plain decoding fixes the conversations
        machine.run([[0]], tokens)
    groups: Any = [[SimpleNamespace(ids=[number])] for number in range(PROMPTS)]
    options = BenchOptions(max_new_tokens=tokens, repeats=REPEATS)
    runs = _take_turns([machine] * SYSTEMS, groups, options, lambda *_: None, limit)
    assert len({len(repeats) for repeats in runs}) == 1 and all(len(repeat) == len(runs[0][0]) for repeat in runs[0])
    for _ in range(len(runs[0][0]) * (MODES + 1)):  # float32
        machine.run([[0]], tokens)
    return len(runs[0][0]), len(runs[0]), tokens


@pytest.mark.parametrize("seconds", [0.01, 0.1, 0.3, 0.6, 0.8, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 10.0])
@pytest.mark.parametrize("later", [1.0, 1.6])
def test_it_ends_within_three_minutes_however_slow_the_machine(seconds: float, later: float) -> None:
    machine = Machine(seconds, later)
    found = measured(machine)
    assert machine.now <= 180, found
    prompts, repeats, tokens = found
    assert prompts >= 1 and repeats >= 1 and tokens >= 8
    if later == 1.0 and seconds <= 0.6:
        assert found == (PROMPTS, REPEATS, TOKENS)
    if later == 1.0 and seconds <= 1.5:
        assert prompts >= 2 and tokens == TOKENS


def test_prompts_are_left_out_before_repeats_and_repeats_when_the_machine_slows_down() -> None:
    assert measured(Machine(0.8)) == (4, 3, 128)
    prompts, repeats, _ = measured(Machine(0.8, later=1.6))
    assert prompts == 4 and repeats < 3


def test_a_very_slow_machine_writes_shorter_answers() -> None:
    assert demo.affordable_tokens(128, 5, completion=1.0, seconds=150.0) == 128
    assert 8 <= demo.affordable_tokens(128, 5, completion=10.0, seconds=130.0) < 64
    assert demo.affordable_tokens(128, 5, completion=100.0, seconds=-40.0) == 8


def test_a_measurement_without_a_limit_is_whole() -> None:
    machine = Machine(1e6)
    groups: Any = [[SimpleNamespace(ids=[number])] for number in range(3)]
    runs = _take_turns([machine] * 2, groups, BenchOptions(repeats=2), lambda *_: None, TimeLimit(clock=machine.clock))
    assert [[len(repeat) for repeat in repeats] for repeats in runs] == [[3, 3], [3, 3]]


def test_what_was_left_out_is_not_in_the_document(tiny: Tiny) -> None:
    """A clock that jumps by a minute whenever it is asked: one prompt, one repeat."""
    now = iter(range(0, 100000, 60))
    limit = TimeLimit(100.0, lambda: float(next(now)))
    questions = [Question.to_continue(text, number) for number, text in enumerate(("def read", "return", "for"), 1)]
    subject = Subject(name="tiny", model=tiny.model, tokenizer=tiny.tokenizer, heads=None, fixed_tree=demo_fixed_tree)
    plan = BenchOptions(modes=("plain",), max_new_tokens=6, repeats=3)
    document, findings = measure(subject, make_workload("three", questions), plan, lambda *_: None, limit)
    assert document["repeats"] == 1 and document["results"][0]["prompts"] == len(findings.requests) == 1
    assert document["workload"] == make_workload("three", questions[:1]).summary()
    assert document["results"][0]["identical"] is True


FIRST = """
import sys
from ladon.cli import demo
from ladon.cli.main import run

def stop(line):
    print(line, {"torch", "transformers", "numpy"} & set(sys.modules))
    raise KeyboardInterrupt

demo.say = stop
print(run(["demo"]))
"""


def test_the_first_line_comes_before_anything_is_loaded() -> None:
    done = subprocess.run([sys.executable, "-c", FIRST], capture_output=True, text=True, timeout=120)
    line, code = done.stdout.splitlines()
    assert line.startswith("ladon: [1/4] loading PyTorch") and line.endswith("set()") and code == "130"


def test_every_stage_is_a_line_and_the_text_comes_before_the_measurement(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    stages, outs, errs = [], [], []  # a line of the demo, and what came before it

    def say(line: str) -> None:
        stages.append(line)
        out, err = capsys.readouterr()
        outs.append(out)
        errs.append(err)

    monkeypatch.setattr(demo, "say", say)
    small = ["--prompts", "1", "--live", "1", "--max-new-tokens", "8", "--repeats", "1", "--budget", "4"]
    assert run(["demo", *small, "--json"]) == 0
    captured = capsys.readouterr()
    assert [line.split("]")[0] for line in stages] == [f"ladon: [{n}/4" for n in (1, 2, 3, 4)]
    assert outs[:2] == ["", ""] and "tokens in" in outs[2], "the text is complete before the third stage"
    assert "ladon: measuring, modes in turn: 11 of 11\n" in errs[3], "no terminal here, so it is said in lines"
    assert "plain decoding runs at " in captured.out
    assert "1 of 1 prompt, 1 of 1 repeats, up to 8 tokens each" in stages[3]
    assert json.loads(captured.out.splitlines()[-1])["workload"]["questions"] == 1


def test_progress_without_a_terminal_is_silent_unless_asked_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter([0.0, 0.0, 5.0, 12.0, 13.0])
    monkeypatch.setattr("ladon.cli.output.time", SimpleNamespace(monotonic=lambda: next(now)))
    assert not sys.stderr.isatty()
    with progress_bar() as silent:
        silent("reading", 1, 5)
    assert capsys.readouterr().err == ""
    with progress_bar(10.0) as bar:
        for done in (1, 2, 3, 5):
            bar("reading", done, 5, "slowly" if done == 3 else "")
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["ladon: reading: 1 of 5", "ladon: reading: 3 of 5, slowly", "ladon: reading: 5 of 5"]
