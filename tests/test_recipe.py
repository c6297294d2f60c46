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
from transformers import AutoModelForCausalLM, PreTrainedModel

from ladon.fixed_tree import FixedTree
from ladon.heads import load_heads, new_heads

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "tiny"
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
    return recipe("heads").HeadsTraining(
        num_heads=3, batch_tokens=256, length=32, chunk_rows=96, warmup_steps=2, **options
    )


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


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_learns(arch: str, tmp_path: Path) -> None:
    base = recipe("base")
    config = tiny_base(arch, steps=40, save_every=20)
    model, record = base.train_base(config, counting(4000), counting(2000), 0, tmp_path)
    first, last = (entry["held_out_loss"] for entry in record["history"])
    assert model.config.model_type == arch and last < first < np.log(64)


def test_head_k_learns_the_token_k_plus_one_places_on(tmp_path: Path) -> None:
    """On counting text, token t is followed by t + 1: the base says t + 1 and head k must say t + k + 1."""
    base, heads_module = recipe("base"), recipe("heads")
    text = counting(4000)
    model, _ = base.train_base(tiny_base(steps=60, save_every=60), text, text, 0, tmp_path)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    heads = heads_module.train_heads(tiny_heads(steps=60, save_every=60), model, text, text, tmp_path)
    with torch.no_grad():
        hidden = model.base_model(input_ids=torch.arange(10, 30)[None]).last_hidden_state[0]
        said, guessed = model.lm_head(hidden[-1]).argmax(-1), heads(hidden[-1]).argmax(-1)
    assert said == 30 and guessed.tolist() == [31, 32, 33]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    result = heads.training_record["history"][-1]
    assert all(rates[0] > 0.9 and rates == sorted(rates) for rates in result["accuracy"])


def test_chunks_do_not_change_the_gradient() -> None:
    heads_module, base = recipe("heads"), recipe("base")
    model = base.new_model(tiny_base(), 0).requires_grad_(False)
    batch = torch.randint(64, (2, 36))
    hidden, targets = heads_module.hidden_and_targets(model, batch, 3)
    assert hidden.shape == (64, 32) and targets.shape == (64, 3)
    for k in (1, 2, 3):
        assert torch.equal(targets[:, k - 1].view(2, 32), batch[:, k + 1 : k + 33])
    gradients = []
    for rows in (64, 16):
        heads = new_heads(model, 3)
        for part, goal in zip(hidden.split(rows), targets.split(rows), strict=True):
            (heads_module.heads_losses(heads, part, goal) * (len(part) / 64)).sum().backward()
        gradients.append(heads.down_weight.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=2e-2, atol=1e-4)  # bfloat16 products


def _stop_at(module: ModuleType, name: str, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    original = getattr(module, name)

    def stopping(tokens: np.ndarray, at: int, config: Any) -> torch.Tensor:
        if at == step:
            raise KeyboardInterrupt
        return original(tokens, at, config)

    monkeypatch.setattr(module, name, stopping)


def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, heads_module = recipe("base"), recipe("heads")
    text = counting(3000)
    config, training = tiny_base(steps=8, save_every=3), tiny_heads(steps=8, save_every=3)

    def build(folder: Path) -> tuple[PreTrainedModel, torch.nn.Module]:
        folder.mkdir(exist_ok=True)
        model, _ = base.train_base(config, text, text, 0, folder)
        return model, heads_module.train_heads(training, model, text, text, folder)

    whole = build(tmp_path / "whole")
    for module, name in ((base, "sample_batch"), (heads_module, "sample_windows")):
        with monkeypatch.context() as patch:
            _stop_at(module, name, 5, patch)
            with pytest.raises(KeyboardInterrupt):
                build(tmp_path / "parts")
    parts = build(tmp_path / "parts")
    for left, right in zip(whole, parts, strict=True):
        for name, value in left.state_dict().items():
            assert torch.equal(value, right.state_dict()[name]), name
    assert whole[1].training_record == parts[1].training_record


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
    assert f"build.py --arch {arch} --steps 60 --heads-steps 40 --tiny" in card and "{" not in card

    weights = (out / "heads" / "heads.safetensors").read_bytes()
    again = build_command(arch, run, tmp_path / "again")  # every stage is kept: nothing is trained a second time
    assert again.returncode == 0 and "step 10/" not in again.stdout
    assert (tmp_path / "again" / "heads" / "heads.safetensors").read_bytes() == weights

    refused = build_command(arch, run, out, "--steps", "7")
    assert refused.returncode != 0 and "other settings" in refused.stderr
