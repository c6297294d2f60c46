"""`ladon calibrate`: what it writes, where, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from ladon.calibrate.lattice_trace import LatticeTrace, hit_rates
from ladon.cli.main import run
from ladon.demo.bundled import demo_path
from ladon.drafting.head_chaining import calibrated_temperatures, joint_of
from ladon.heads import load_heads, new_heads
from ladon.heads.calibration import CALIBRATION_FILE, read_calibration
from user_side import Tiny, write_jsonl

PROMPTS: list[dict[str, object]] = [{"prompt": text} for text in ("def read", "for line in", "return", "self.")]
QUICK = ["--max-new-tokens", "20", "--no-step-times"]


@pytest.fixture(autouse=True)
def _own_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)


@pytest.fixture(autouse=True)
def profiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where step times are kept: not where other tests would find them."""
    monkeypatch.setenv("LADON_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def arguments(tiny: Tiny, tmp_path: Path) -> list[str]:
    """The command with the tiny model, a copy of its heads in `heads`, and prompts."""
    shutil.copytree(tiny.folder / "heads", tmp_path / "heads")
    prompts = write_jsonl(tmp_path / "p.jsonl", PROMPTS)
    model = ["--model", str(tiny.folder / "model"), "--heads", str(tmp_path / "heads")]
    return ["calibrate", str(prompts), *model]


def test_it_writes_beside_the_heads_what_decoding_then_uses(
    tiny: Tiny,
    arguments: list[str],
    tmp_path: Path,
    profiles: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ladon.calibrate.timing._SECONDS", 0.0)
    assert run([*arguments, "--max-new-tokens", "20", "--simulate", "chain,4,9", "--json"]) == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out.splitlines()[-1])
    assert document == json.loads((tmp_path / "heads" / CALIBRATION_FILE).read_text(encoding="utf-8"))
    assert f"written to {tmp_path / 'heads'}" in captured.err
    (profile,) = profiles.glob("step-times-*.json")
    times = json.loads(profile.read_text(encoding="utf-8"))["times"]
    assert {time["batch"] for time in times} == {1, 4} and {time["drafts"] for time in times} == {True, False}
    heads = load_heads(tmp_path / "heads", tiny.model)
    assert heads.calibration is not None and heads.calibration.temperatures == document["temperatures"]
    assert document["heads"] == heads.weights_hash
    assert document["measured_on"]["workload"]["questions"] == document["measured_on"]["answers"] == 4
    assert {entry["nodes"] for entry in document["simulated"] if entry["tree"] == "dynamic"} == {4, 9}
    times = document["step_times"]
    assert times["measured"][0]["nodes"][0] == 1 and times["place"]["dtype"] == "float32" and times["place"]["cpu"]
    assert "best fixed tree of 8 nodes" in captured.out
    assert run(["generate", *arguments[2:], "--prompt", "def", "--max-new-tokens", "4"]) == 0


def test_a_dry_run_writes_nothing(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(path.name for path in tmp_path.rglob("*"))
    assert run([*arguments, *QUICK, "--dry-run", "--limit", "2"]) == 0
    assert sorted(path.name for path in tmp_path.rglob("*")) == before
    assert "2 prompts" in capsys.readouterr().out


def test_out_and_the_recorded_trace(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    file = tmp_path / "t.safetensors"
    assert run([*arguments, *QUICK, "--out", str(tmp_path / "out"), "--trace", str(file)]) == 0
    found = read_calibration(tmp_path / "out")
    assert found is not None and not (tmp_path / "heads" / CALIBRATION_FILE).exists()
    trace = LatticeTrace.load(file)
    assert found.hit_rates == hit_rates(trace.ranks(), trace.num_candidates)
    capsys.readouterr()
    again = [arguments[0], *arguments[2:], "--from-trace", str(file), "--no-step-times", "--dry-run", "--json"]
    assert run(again) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == found.document()


def test_a_trace_of_other_heads(
    tiny: Tiny, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "t.safetensors"
    assert run([*arguments, *QUICK, "--dry-run", "--trace", str(file)]) == 0
    heads = load_heads(tmp_path / "heads", tiny.model)
    with torch.no_grad():
        next(heads.parameters()).mul_(2.0)
    heads.save(tmp_path / "heads")
    capsys.readouterr()
    assert run([arguments[0], *arguments[2:], "--from-trace", str(file), "--dry-run"]) == 2
    assert "was recorded with other heads" in capsys.readouterr().err


def test_float16_names_the_heads_as_they_are_stored(tiny: Tiny, arguments: list[str], tmp_path: Path) -> None:
    """Small weights lose bits in float16 that the hash sees."""
    heads = load_heads(tmp_path / "heads", tiny.model)
    with torch.no_grad():
        next(heads.parameters()).flatten()[:100] *= 1e-5
    heads.save(tmp_path / "heads")
    assert heads.half().weights_hash != load_heads(tmp_path / "heads").weights_hash
    assert run([*arguments, *QUICK, "--dtype", "float16"]) == 0
    assert load_heads(tmp_path / "heads").calibration is not None


def test_the_bundled_heads_stay_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(path.name for path in (demo_path() / "heads").iterdir())
    assert run(["calibrate", "--no-step-times"]) == 2
    assert "give --out DIR for the calibration, or --dry-run" in capsys.readouterr().err
    options = ["--out", str(tmp_path), "--limit", "2", "--max-new-tokens", "8", "--dtype", "float32"]
    assert run(["calibrate", "--no-step-times", *options]) == 0
    found = read_calibration(tmp_path)
    assert found is not None and found.measured_on["workload"]["questions"] == 2
    assert sorted(path.name for path in (demo_path() / "heads").iterdir()) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--out", "missing"], "there is no folder"),
        (["--trace", "missing/t"], "there is no folder"),
        (["--simulate", "8,x"], "--simulate is '8,x'"),
        (["--simulate", "0"], "--simulate is '0'"),
        (["--from-trace", "t"], "leave out the prompts"),
        (["--heads", "missing/heads/x"], "is no folder here"),
        (["--limit", "1", *QUICK], "too few"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], change: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*arguments, *change]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_prompts_and_heads_are_needed(tiny: Tiny, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["calibrate", *arguments[2:]]) == 2
    assert "no prompts; give a JSONL file" in capsys.readouterr().err
    assert run(["calibrate", arguments[1], "--model", arguments[3]]) == 2
    assert "no heads; give --heads FOLDER" in capsys.readouterr().err
    assert run(["calibrate", arguments[1], "--model", arguments[3], "--dry-run"]) == 2
    assert "no heads" in capsys.readouterr().err


def test_a_damaged_calibration_is_named(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "heads" / CALIBRATION_FILE).write_text("{", encoding="utf-8")
    assert run([*arguments, *QUICK]) == 2
    error = capsys.readouterr().err
    assert "Remove the file" in error and error.count("\n") == 1


def test_heads_that_read_the_path_so_far(
    tiny: Tiny,
    arguments: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Their calibration is of the joint that decoding then takes, and promises nothing of dynamic trees."""
    monkeypatch.setattr("ladon.calibrate.timing._SECONDS", 0.0)
    shutil.rmtree(tmp_path / "heads")
    new_heads(tiny.model, 3, "hydra").save(tmp_path / "heads")
    assert run([*arguments, "--max-new-tokens", "20", "--simulate", "8"]) == 0
    assert "no dynamic trees are simulated" in capsys.readouterr().out.replace("\n", " ")
    found = read_calibration(tmp_path / "heads")
    assert found is not None and found.joint == "paths"
    assert [run["tree"] for run in found.simulated] == ["chain", "fixed"]
    assert found.step_times.keys() == {"place", "measured"}
    heads = load_heads(tmp_path / "heads", tiny.model)
    torch.testing.assert_close(
        calibrated_temperatures(heads, joint_of(heads, "auto")), torch.tensor(found.temperatures)
    )
    assert run(["inspect", str(tmp_path / "heads"), "--model", str(tiny.folder / "model")]) == 0
