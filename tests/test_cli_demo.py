"""`ladon demo`: what it says while it works, and how long it takes, by a clock of the test's own."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ladon.cli import demo
from ladon.cli.main import run
from ladon.cli.output import progress_bar

MODES = 5
SYSTEMS = 2 * MODES + 1  # each mode timed and profiled, and transformers


@dataclass
class Machine:
    """A machine on which every run of 128 tokens takes so many seconds; its clock moves only when something runs."""

    seconds: float
    now: float = 0.0
    measured: list[tuple[int, int, int]] = field(default_factory=list)

    def measure(self, _: object, workload: Any, plan: Any, *__: object) -> tuple[dict[str, Any], Any]:
        """Stands for the benchmark: counts its runs as the runner makes them."""
        prompts, one = len(workload.questions), self.seconds * plan.max_new_tokens / 128
        self.measured.append((prompts, plan.repeats, plan.max_new_tokens))
        self.now += one * prompts * (1 + SYSTEMS * plan.repeats + MODES + 1)
        runs = [[SimpleNamespace(seconds=one, stats=SimpleNamespace(decode_seconds=one))]]
        entries = [SimpleNamespace(timed=runs, profiled=runs)] * MODES + [SimpleNamespace(timed=runs, profiled=[])]
        return {"prompts": prompts}, SimpleNamespace(measured=entries)


@pytest.fixture
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Machine:
    found = Machine(request.param)
    monkeypatch.setattr(demo, "_clock", lambda: found.now)
    monkeypatch.setattr(demo, "measure", found.measure)
    monkeypatch.setattr(demo, "busy_state", dict)
    return found


def measured(machine: Machine, repeats: int = 3) -> dict[str, Any]:
    """The document of a demo on that machine, after the seconds that loading and two live prompts take."""
    machine.now = 8.0 + 3 * machine.seconds
    plan = demo.BenchOptions(max_new_tokens=128, repeats=repeats)
    subject: Any = None
    document, _ = demo._measure(subject, 5, plan, lambda *_: None, demo._SECONDS)
    return document


@pytest.mark.parametrize("machine", [0.01, 0.1, 0.3, 0.8, 1.5, 3.0, 6.0, 12.0], indirect=True)
def test_it_ends_within_three_minutes_however_slow_the_machine(machine: Machine) -> None:
    measured(machine)
    assert machine.now <= 180, machine.measured
    assert machine.measured[0] == (1, 1, 32), "the trial"
    prompts, repeats, tokens = machine.measured[-1]
    assert (prompts, repeats) == ((5, 3) if machine.seconds <= 0.3 else (prompts, repeats))
    assert tokens == (32 if machine.seconds >= 6 else 128)


@pytest.mark.parametrize("machine", [0.05], indirect=True)
def test_a_fast_machine_measures_all_prompts(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    assert measured(machine) == {"prompts": 5}
    assert "[4/4] measuring 5 prompts of 5, 3 repeats: about" in capsys.readouterr().err


@pytest.mark.parametrize("machine", [12.0], indirect=True)
def test_a_very_slow_machine_shows_what_was_tried(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    assert measured(machine) == {"prompts": 1} and len(machine.measured) == 1
    assert "this machine is slow: what was tried is all that is measured" in capsys.readouterr().err


def test_prompts_are_left_out_before_repeats() -> None:
    assert demo.fitting(5, 3, turn=1.0, seconds=20.0) == (5, 3)
    assert demo.fitting(5, 3, turn=1.0, seconds=15.9) == (3, 3)
    assert demo.fitting(5, 3, turn=1.0, seconds=3.5) == (1, 2)
    assert demo.fitting(5, 3, turn=1.0, seconds=1.9) == (0, 0)
    assert demo.fitting(5, 3, turn=1.0, seconds=-4.0) == (0, 0)


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
    told: list[tuple[str, str]] = []  # what standard error got, and what standard output had by then
    monkeypatch.setattr(demo, "say", lambda line: (told.append((line, capsys.readouterr().out)), None)[1])
    small = ["--prompts", "1", "--live", "1", "--max-new-tokens", "8", "--repeats", "1", "--budget", "4"]
    assert run(["demo", *small, "--json"]) == 0
    captured = capsys.readouterr()
    stages = [line for line, _ in told]
    assert [line.split("]")[0] for line in stages] == [f"ladon: [{n}/4" for n in (1, 2, 3, 4)]
    assert told[0][1] == told[1][1] == "" and "tokens in" in told[2][1], "the text is complete before the third stage"
    progress = [line for line in captured.err.splitlines() if "warning" not in line]
    assert "ladon: measuring, modes in turn: 11 of 11" in progress, "no terminal here, so it is said in lines"
    assert "plain decoding runs at " in captured.out
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
