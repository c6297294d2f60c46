"""The early-exit head: where it looks, how it starts, its way to disk."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

import families
import ladon.heads.checkpoint as checkpoint
from ladon import load_heads, new_heads
from ladon.errors import HeadsError, UnsupportedModelError
from ladon.heads.early_exit import EarlyExit, load_early_exit, new_early_exit
from ladon.heads.model_parts import decoder_layers, output_projection
from ladon.target.hooks import layer_output, projection_inputs

IDS = torch.arange(3, 20)[None]


@torch.no_grad()
def both_ends(model: PreTrainedModel, layer: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states after a layer, by us and by transformers, and what the projection receives."""
    with layer_output(model, layer) as seen, projection_inputs(output_projection(model).module) as end:
        out = model(IDS, use_cache=False, output_hidden_states=True)
    assert len(seen) == 1
    return seen[0], out.hidden_states[layer], end[0]


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gemma", "bloom", "mpt", "llama4_text", "gemma4_text-shared"])
def test_an_untrained_head_is_the_rest_of_the_model_left_out(name: str) -> None:
    """On the last layer's output it must be the model's own final norm: of LayerNorm, RMSNorm and Gemma's kind."""
    model = families.build(name, torch.float32)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    head = new_early_exit(model, 1)
    last, _, end = both_ends(model, head.num_layers)
    torch.testing.assert_close(head(last), end, atol=1e-4, rtol=1e-4)
    first, theirs, _ = both_ends(model, 1)
    assert torch.equal(first, theirs)
    assert head(first).shape == first.shape


@pytest.mark.slow
def test_layers_are_found_in_every_workable_family() -> None:
    lacking = []
    for name in families.WORKABLE:
        try:
            model = families.skeleton(name)
        except pytest.skip.Exception:
            continue
        if len(decoder_layers(model)) != model.config.get_text_config(decoder=True).num_hidden_layers:
            lacking.append(name)
    assert not lacking


def test_training_brings_it_closer_to_the_model(tiny_llama: PreTrainedModel) -> None:
    torch.manual_seed(1)
    head = new_early_exit(tiny_llama, 1, width=64)
    ids = torch.randint(3, 97, (8, 32))
    with torch.no_grad(), layer_output(tiny_llama, 1) as seen:
        wanted = tiny_llama(ids, use_cache=False).logits.log_softmax(-1)

    def divergence() -> Tensor:
        said = output_projection(tiny_llama).module(head(seen[0])).log_softmax(-1)
        return functional.kl_div(said, wanted, log_target=True, reduction="sum") / ids.numel()

    before = float(divergence().detach())
    optimizer = torch.optim.Adam(head.parameters(), lr=0.01)
    for _ in range(100):
        optimizer.zero_grad()
        divergence().backward()
        optimizer.step()
    assert float(divergence().detach()) < 0.5 * before


def test_size_and_start(tiny_llama: PreTrainedModel) -> None:
    head = new_early_exit(tiny_llama, 1, seed=3)
    assert (head.layer, head.num_layers, head.hidden_size, head.width) == (1, 2, 32, 4)
    assert sum(p.numel() for p in head.parameters()) == 2 * 4 * 32 + 2 * 32
    assert head.scale.dtype == torch.float64 and not head.down_weight.any()
    assert torch.equal(head.up_weight, new_early_exit(tiny_llama, 1, seed=3).up_weight)
    assert not torch.equal(head.up_weight, new_early_exit(tiny_llama, 1, seed=4).up_weight)


def test_half_precision_is_normalised_in_float32(tiny_llama: PreTrainedModel) -> None:
    head = new_early_exit(tiny_llama.half(), 1)
    hidden = torch.full((1, 32), 300.0, dtype=torch.float16)  # its square is beyond float16
    assert head(hidden).dtype == torch.float16
    assert torch.isfinite(head(hidden)).all()


@pytest.mark.parametrize("layer", [0, 2, -1, True])
def test_a_layer_that_is_none_is_refused(layer: int, tiny_llama: PreTrainedModel) -> None:
    with pytest.raises(HeadsError, match=r"after layer \S+ of 2; give 1 to 1"):
        new_early_exit(tiny_llama, layer)


def test_other_threads_are_not_noted(tiny_llama: PreTrainedModel) -> None:
    with torch.no_grad(), layer_output(tiny_llama, 1) as seen:
        other = threading.Thread(target=lambda: tiny_llama(IDS, use_cache=False))
        other.start()
        other.join()
    assert seen == []
    tiny_llama(IDS, use_cache=False)
    assert seen == []  # the hook is gone


def test_several_states_per_token_are_refused() -> None:
    model = families.build("gemma3n_text", torch.float32)
    with pytest.raises(UnsupportedModelError, match="several per token"), torch.no_grad(), layer_output(model, 1):
        model(IDS, use_cache=False)


@pytest.fixture
def saved(tiny_llama: PreTrainedModel, tmp_path: Path) -> Path:
    """A folder with heads and a trained early exit."""
    new_heads(tiny_llama, num_heads=2).save(tmp_path)
    head = new_early_exit(tiny_llama, 1)
    torch.nn.init.normal_(head.down_weight)
    head.training_record = {"recall": 0.9}
    head.save(tmp_path)
    return tmp_path


def test_saved_and_loaded_is_the_same(saved: Path, tiny_llama: PreTrainedModel) -> None:
    head = load_early_exit(saved, tiny_llama)
    assert head is not None and head.layer == 1 and head.training_record == {"recall": 0.9}
    hidden = torch.randn(3, 32, dtype=torch.float64)
    untrained = new_early_exit(tiny_llama, 1)
    assert not torch.equal(head(hidden), untrained(hidden))
    untrained.load_state_dict(head.state_dict())
    assert torch.equal(head(hidden), untrained(hidden))
    assert load_heads(saved, tiny_llama).num_heads == 2  # one does not disturb the other
    half = load_early_exit(saved, tiny_llama.bfloat16())
    assert half is not None and half.scale.dtype == torch.bfloat16


def test_heads_without_one_have_none(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    new_heads(tiny_llama).save(tmp_path)
    assert load_early_exit(tmp_path, tiny_llama) is None


def _without_config(folder: Path) -> None:
    (folder / "early_exit.json").unlink()


def _without_weights(folder: Path) -> None:
    (folder / "early_exit.safetensors").unlink()


def _truncated(folder: Path) -> None:
    path = folder / "early_exit.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _change(**values: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "early_exit.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_without_config, "early_exit.json cannot be read"),
        (_without_weights, "early_exit.safetensors cannot be read. A heads folder holds early_exit.json"),
        (_truncated, "is no safetensors file"),
        (_change(width=5), r"up_weight is \[4, 32\], expected \[5, 32\]"),
        (_change(layer=2), "after layer 2 of 2"),
        (_change(width="4"), "width is '4'"),
        (_change(format="other"), "is no ladon-early-exit file of version 1"),
        (_change(more=1), "is damaged"),
        (_change(num_layers=3), "for a model of 3 layers of width 32, this one has 2 of width 32"),
    ],
)
def test_damaged_files_are_named(
    damage: Callable[[Path], None], message: str, saved: Path, tiny_llama: PreTrainedModel
) -> None:
    damage(saved)
    with pytest.raises(HeadsError, match=message):
        load_early_exit(saved, tiny_llama)


def test_a_failed_save_leaves_the_old_head(
    saved: Path, tiny_llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    write_text = Path.write_text

    def full(path: Path, text: str, **options: str) -> int:
        write_text(path, text[:10], **options)
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(checkpoint.Path, "write_text", full)
    for save in (new_early_exit(tiny_llama, 1, width=8).save, new_heads(tiny_llama, num_heads=3).save):
        with pytest.raises(HeadsError, match="No space left on device"):
            save(saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_sizes_are_checked() -> None:
    with pytest.raises(HeadsError, match="give a model with more layers"):
        EarlyExit(layer=1, num_layers=1, hidden_size=8, width=1)
    with pytest.raises(HeadsError, match="width is 0"):
        EarlyExit(layer=1, num_layers=2, hidden_size=8, width=0)
