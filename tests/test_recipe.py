"""The recipe of the bundled model: what is held out, the base, the texts and prompts, the one command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from ladon.heads import load_heads

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "tiny"
pytestmark = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="the recipe needs torch 2.9 or later")
ARCHITECTURES = ["llama", "gpt_neox", "qwen3"]


@pytest.fixture(autouse=True)
def _recipe_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(RECIPE))


def recipe(name: str) -> ModuleType:
    return __import__(name)


def tiny_base(arch: str = "llama", vocab_size: int = 64, **options: Any) -> Any:
    return recipe("base").BaseConfig(
        arch=arch,
        vocab_size=vocab_size,
        hidden_size=32,
        num_layers=2,
        num_heads=2,
        intermediate_size=64,
        max_positions=64,
        batch_tokens=256,
        short_length=32,
        warmup_steps=2,
        **options,
    )


def text_of(tokens: np.ndarray) -> Any:
    return recipe("training").Text(kinds=[tokens], shares=[1.0], held_out=tokens)


def counting(count: int, vocab_size: int = 64) -> np.ndarray:
    """0, 1, 2, ... modulo the vocabulary: text whose every next token is certain."""
    return (np.arange(count) % vocab_size).astype(np.uint16)


def test_held_out_modules_are_not_trained_on() -> None:
    corpus = recipe("corpus")
    assert not set(corpus.CALIBRATION_MODULES) & set(corpus.PROMPT_MODULES)
    for name in (*corpus.CALIBRATION_MODULES, *corpus.PROMPT_MODULES):
        for path in (f"{name}.py", f"test/test_{name}.py", f"test/{name}_tests.py", f"test/test_{name}/util.py"):
            assert corpus._is_held_out(Path(path)), path
    for path in ("json/decoder.py", "test/test_json/test_scanstring.py", "asyncio/queues.py", "test/test_dict.py"):
        assert not corpus._is_held_out(Path(path)), path
    paths = [source.path for source in corpus.training_files()]
    stems = {Path(path).stem.removeprefix("test_") for path in paths}
    assert len(paths) > 200 and not stems & corpus.HELD_OUT
    assert paths == [source.path for source in corpus.training_files()]


def test_provenance_names_every_file() -> None:
    corpus = recipe("corpus")
    sources = list(corpus.training_files())[:5]
    record = corpus.provenance(sources)
    assert record["files"] == 5 and list(record["file_sha256"]) == [source.path for source in sources]
    assert corpus.provenance(sources[:4])["sha256"] != record["sha256"]


def test_wheels_give_each_text_once_and_nothing_held_out() -> None:
    corpus = recipe("corpus")
    sources = corpus.wheel_files()
    if not sources:
        pytest.skip("this Python carries no wheels in ensurepip")
    assert len({source.sha256 for source in sources}) == len(sources)
    assert all(".whl/" in source.path for source in sources)
    assert not {Path(source.path).stem for source in sources} & corpus.HELD_OUT


def test_what_is_measured_on_is_nowhere_in_the_training_text() -> None:
    """By text, not by file name: fewer than one in 40 runs of four lines occurs in anything trained on."""
    corpus = recipe("corpus")

    def runs(text: str) -> set[tuple[str, ...]]:
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return {tuple(lines[i : i + 4]) for i in range(len(lines) - 3)}

    held_out = {
        name: runs(corpus.held_out_files([name])[0].text)
        for name in (*corpus.CALIBRATION_MODULES, *corpus.PROMPT_MODULES)
    }
    wanted = set().union(*held_out.values())
    trained = set().union(*(runs(s.text) & wanted for s in [*corpus.training_files(), *corpus.wheel_files()]))
    for name, lines in held_out.items():
        assert len(lines & trained) < len(lines) / 40, name


def test_windows_come_from_every_kind_by_its_share() -> None:
    kinds = [np.full(1000, kind, dtype=np.uint16) for kind in range(3)]
    text = recipe("training").Text(kinds=kinds, shares=[0.5, 0.3, 0.2], held_out=kinds[0])
    windows = text.windows(2000, 5, np.random.default_rng(0))
    assert windows.shape == (2000, 5) and (windows == windows[:, :1]).all()
    for kind, share in enumerate(text.shares):
        assert abs((windows[:, 0] == kind).float().mean() - share) < 0.05


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_learns(arch: str, tmp_path: Path) -> None:
    base = recipe("base")
    config = tiny_base(arch, steps=40, save_every=20)
    model, record = base.train_base(config, text_of(counting(4000)), 0, tmp_path / "base.pt")
    first, last = (entry["held_out_loss"] for entry in record["history"])
    assert model.config.model_type == arch and last < first < np.log(64)


def test_a_killed_base_training_goes_on_as_if_nothing_had_happened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, training = recipe("base"), recipe("training")
    text, config = text_of(counting(3000)), tiny_base(steps=8, save_every=3)
    (tmp_path / "parts").mkdir()
    (tmp_path / "whole").mkdir()
    whole, whole_record = base.train_base(config, text, 0, tmp_path / "whole" / "base.pt")
    scale = training.Schedule.rate_scale

    def stopping(schedule: Any, step: int) -> float:
        if step == 5:
            raise KeyboardInterrupt
        return scale(schedule, step)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training.Schedule, "rate_scale", stopping)
        base.train_base(config, text, 0, tmp_path / "parts" / "base.pt")
    parts, parts_record = base.train_base(config, text, 0, tmp_path / "parts" / "base.pt")
    assert whole_record == parts_record
    for name, value in whole.state_dict().items():
        assert torch.equal(value, parts.state_dict()[name]), name


def sources(count: int) -> list[Any]:
    lines = "".join(f"value_{number} = {number}\n" for number in range(120))
    return [recipe("corpus").SourceFile(path=f"{i}.py", text=lines, sha256=str(i)) for i in range(count)]


def rows_of(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_prompts_are_whole_lines_by_share_and_seed() -> None:
    prompts = recipe("prompts")
    files = sources(2)
    rows = prompts.draw_prompts(files, [0.9, 0.1], 200, seed=1)
    assert (
        rows == prompts.draw_prompts(files, [0.9, 0.1], 200, seed=1)
        and len({row["id"] for row in rows}) == len(rows) == 200
    )
    assert 150 < sum(":0.py:" in row["id"] for row in rows) < 200
    text = f"\n{files[0].text}"
    for row in rows:
        assert f"\n{row['prompt']}\n" in text and len(row["prompt"]) < 2 * prompts.CHARS[1]


def test_lines_that_no_model_can_go_on_with_are_left_out() -> None:
    long = recipe("corpus").SourceFile(path="long.py", text="x" * 9000, sha256="")
    assert recipe("prompts").draw_prompts([long], [1.0], 3, seed=0) == []


def test_texts_hold_every_line_once(tmp_path: Path) -> None:
    files = [*sources(2), recipe("corpus").SourceFile(path="blank.py", text="\n \n", sha256="")]
    recipe("prompts").write_texts(tmp_path / "t.jsonl", files)
    rows = rows_of(tmp_path / "t.jsonl")
    for i in range(2):
        assert "\n".join(row["text"] for row in rows if row["id"].startswith(f"{i}:{i}.py:")) + "\n" == files[i].text
    assert not [row for row in rows if "blank" in row["id"]]


def test_prompts_come_from_what_the_model_never_saw() -> None:
    corpus = recipe("corpus")
    packages = corpus.package_files()
    trained = {source.sha256 for source in [*corpus.training_files(), *corpus.wheel_files()]}
    assert len(packages) > 10  # torch and transformers bring the others
    seen = sum(source.sha256 in trained for files in packages for source in files)
    assert seen < sum(map(len, packages)) / 50  # (pip carries copies of a few)


def build_command(arch: str, run: Path, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(RECIPE / "build.py"), "--tiny", "--arch", arch, "--threads", "1"]
    return subprocess.run(
        [*command, "--run", str(run), "--out", str(out), *more],
        capture_output=True,
        text=True,
        timeout=900,
        env=os.environ | {"PYTHONPATH": str(RECIPE.parents[1] / "src")},
    )


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["gpt_neox", "qwen3"])
def test_the_one_command(arch: str, tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    done = build_command(arch, run, out)
    assert done.returncode == 0, done.stderr
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.model_type == arch and model.dtype == torch.bfloat16
    heads = load_heads(out / "heads", model)
    assert heads.calibration is not None and len(heads.calibration.temperatures) == heads.num_heads
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "ladon distill prompts.jsonl --model joint/model" in card and "{" not in card
    assert str(tmp_path) not in card

    weights = (out / "heads" / "heads.safetensors").read_bytes()
    again = build_command(arch, run, tmp_path / "again")  # every stage is kept: nothing is trained a second time
    assert again.returncode == 0 and "step 10/" not in again.stdout
    assert (tmp_path / "again" / "heads" / "heads.safetensors").read_bytes() == weights

    kept = build_command(arch, tmp_path / "kept", tmp_path / "new", "--model", str(out))
    assert kept.returncode == 0, kept.stderr
    assert (tmp_path / "new" / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()

    refused = build_command(arch, run, out, "--base-steps", "7")
    assert refused.returncode != 0 and "other settings" in refused.stderr
