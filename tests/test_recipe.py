"""The recipe of the bundled model: what is held out, what the heads learn, resuming, calibration, the one command."""

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

from ladon.fixed_tree import FixedTree
from ladon.heads import load_heads, new_heads

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


def tiny_heads(**options: Any) -> Any:
    return recipe("heads").HeadsTraining(batch_tokens=256, length=32, chunk_rows=96, warmup_steps=2, **options)


def tiny_joint(**options: Any) -> Any:
    return recipe("joint").JointTraining(
        batch_tokens=256,
        short_length=32,
        long_length=64,
        long_share=0.2,
        heads_positions=128,
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


@pytest.mark.parametrize("from_base", [False, True])
def test_head_k_learns_the_token_k_plus_one_places_on(from_base: bool, tmp_path: Path) -> None:
    """On counting text, token t is followed by t + 1: the base says t + 1 and head k must say t + k + 1."""
    base, heads_module = recipe("base"), recipe("heads")
    text = text_of(counting(4000))
    model, _ = base.train_base(tiny_base(steps=60, save_every=60), text, 0, tmp_path / "base.pt")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    heads = new_heads(model, 3)
    training = tiny_heads(steps=60, save_every=60, from_base=from_base)
    heads_module.train_heads(training, model, heads, text, tmp_path / "heads.pt")
    with torch.no_grad():
        hidden = model.base_model(input_ids=torch.arange(10, 30)[None]).last_hidden_state[0]
        said, guessed = model.lm_head(hidden[-1]).argmax(-1), heads(hidden[-1]).argmax(-1)
    assert said == 30 and guessed.tolist() == [31, 32, 33]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    result = heads.training_record["history"][-1]
    assert all(rates[0] > 0.9 and rates == sorted(rates) for rates in result["accuracy"])


def test_joint_training_moves_base_and_heads_towards_the_text(tmp_path: Path) -> None:
    base, joint = recipe("base"), recipe("joint")
    text = text_of(counting(4000))
    model, _ = base.train_base(tiny_base(steps=20, save_every=20), text, 0, tmp_path / "base.pt")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    record = joint.train_jointly(
        tiny_joint(steps=60, save_every=20), model, new_heads(model, 3), text, tmp_path / "j.pt"
    )
    first, last = record["history"][0], record["history"][-1]
    assert last["held_out_loss"] < first["held_out_loss"]
    assert sum(last["heads"]["loss"]) < sum(first["heads"]["loss"])
    assert any(not torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_heads_loss_reaches_the_base() -> None:
    base, joint = recipe("base"), recipe("joint")
    model = base.new_model(tiny_base(), 0)
    heads = new_heads(model, 3)
    losses = joint.joint_losses(model, heads, torch.randint(64, (2, 36)), torch.arange(0, 64, 4))
    assert losses.shape == (4,)
    losses[3].backward()
    assert all(layer.mlp.up_proj.weight.grad.abs().sum() > 0 for layer in model.base_model.layers)


def test_targets_of_both_kinds_line_up() -> None:
    """Head k's target after place t: the text's token t + k + 1, or what the base says at place t + k."""
    heads_module, base = recipe("heads"), recipe("base")
    model = base.new_model(tiny_base(), 0).requires_grad_(False)
    batch = torch.randint(64, (2, 36))
    hidden = heads_module.hidden_states(model, batch[:, :35])
    targets = heads_module.later(batch, 32, 3, first=2)
    goals = heads_module.later(hidden, 32, 3, first=1)
    assert targets.shape == (64, 3) and goals.shape == (64, 3, 32)
    for k in (1, 2, 3):
        assert torch.equal(targets[:, k - 1].view(2, 32), batch[:, k + 1 : k + 33])
        assert torch.equal(goals[:, k - 1].view(2, 32, 32), hidden[:, k : k + 32])


def test_learning_from_a_sure_base_is_learning_from_its_tokens() -> None:
    """With probabilities that are 1 for one token, both losses are the same number."""
    heads_module, base = recipe("heads"), recipe("base")
    heads = new_heads(base.new_model(tiny_base(), 0), 3)
    hidden, targets = torch.randn(16, 32), torch.randint(64, (16, 3))
    sure = torch.nn.functional.one_hot(targets, 64).float()
    torch.testing.assert_close(
        heads_module.heads_losses(heads, hidden, targets), heads_module.heads_losses(heads, hidden, sure)
    )


def test_narrowed_heads_keep_the_units_that_matter() -> None:
    heads_module, base = recipe("heads"), recipe("base")
    model = base.new_model(tiny_base(), 0)
    wide = new_heads(model, 3, expansion=4)
    with torch.no_grad():
        used = torch.stack([torch.randperm(128)[:64] for _ in range(3)])  # the other units add nothing
        for head, units in enumerate(used):
            wide.down_weight[head, units] = torch.randn(64, 32)
    narrow = heads_module.narrowed(wide, model, expansion=2)
    hidden = torch.randn(5, 32)
    assert narrow.expansion == 2
    torch.testing.assert_close(narrow(hidden), wide(hidden))


def test_chunks_do_not_change_the_gradient() -> None:
    heads_module, base = recipe("heads"), recipe("base")
    model = base.new_model(tiny_base(), 0).requires_grad_(False)
    hidden, targets = torch.randn(64, 32), torch.randint(64, (64, 3))
    gradients = []
    for rows in (64, 16):
        heads = new_heads(model, 3)
        for part, goal in zip(hidden.split(rows), targets.split(rows), strict=True):
            (heads_module.heads_losses(heads, part, goal) * (len(part) / 64)).sum().backward()
        gradients.append(heads.down_weight.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=2e-2, atol=1e-4)  # bfloat16 products


def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, heads_module, joint, training = (recipe(name) for name in ("base", "heads", "joint", "training"))
    text = text_of(counting(3000))
    options = {"steps": 8, "save_every": 3}

    def build(folder: Path) -> tuple[list[Any], dict[str, torch.Tensor]]:
        folder.mkdir(exist_ok=True)
        model, base_record = base.train_base(tiny_base(**options), text, 0, folder / "base.pt")
        heads = new_heads(model, 3)
        heads_module.train_heads(tiny_heads(**options), model, heads, text, folder / "heads.pt")
        records = [base_record, heads.training_record]
        records.append(joint.train_jointly(tiny_joint(**options), model, heads, text, folder / "joint.pt"))
        return records, {**model.state_dict(), **heads.state_dict()}

    whole_records, whole = build(tmp_path / "whole")
    scale = training.Schedule.rate_scale
    for stage in (base.BaseConfig, heads_module.HeadsTraining, joint.JointTraining):

        def stopping(schedule: Any, step: int, stage: type = stage) -> float:
            if type(schedule) is stage and step == 5:
                raise KeyboardInterrupt
            return scale(schedule, step)

        with monkeypatch.context() as patch:
            patch.setattr(training.Schedule, "rate_scale", stopping)
            with pytest.raises(KeyboardInterrupt):
                build(tmp_path / "parts")
    parts_records, parts = build(tmp_path / "parts")
    assert whole_records == parts_records
    for name, value in whole.items():
        assert torch.equal(value, parts[name]), name


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
    first, last = heads.training_record["history"]
    assert sum(last["loss"]) < sum(first["loss"])
    trees = json.loads((out / "fixed_trees.json").read_text(encoding="utf-8"))["trees"]
    for size, paths in trees.items():
        assert FixedTree(tuple(map(tuple, paths))).num_nodes == int(size)
    card = (out / "README.md").read_text(encoding="utf-8")
    steps = "--base-steps 60 --first-heads-steps 20 --joint-steps 20 --heads-steps 20"
    assert f"build.py --arch {arch} {steps} --tiny" in card and "{" not in card

    weights = (out / "heads" / "heads.safetensors").read_bytes()
    again = build_command(arch, run, tmp_path / "again")  # every stage is kept: nothing is trained a second time
    assert again.returncode == 0 and "step 10/" not in again.stdout
    assert (tmp_path / "again" / "heads" / "heads.safetensors").read_bytes() == weights

    refused = build_command(arch, run, out, "--base-steps", "7")
    assert refused.returncode != 0 and "other settings" in refused.stderr
