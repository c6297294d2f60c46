"""Models of which parts are elsewhere between forwards (accelerate's offloading) decode as `generate` does.

At rest such a model seems to be on the meta device, after a forward that failed on another: inputs go where its
embedding computes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

import ladon
from greedy import BATCH, MASK, plain
from ladon.errors import HeadsError
from ladon.util.devices import device_of, input_device, is_offloaded

# An older transformers takes the meta device, where offloaded weights seem to be, for the model's.
pytestmark = pytest.mark.filterwarnings("ignore:You are calling .generate:UserWarning")

CALL = {"attention_mask": MASK, "max_new_tokens": 12}
PARTS = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")


def mapped(model: PreTrainedModel, folder: Path, elsewhere: dict[str, str]) -> PreTrainedModel:
    device_map = dict.fromkeys(PARTS, "cpu") | elsewhere
    options: dict[str, Any] = {"main_device": "cpu", "offload_dir": str(folder), "force_hooks": True}
    return accelerate.dispatch_model(model, device_map, **options)


WAYS: dict[str, Callable[[PreTrainedModel, Path], PreTrainedModel]] = {
    "cpu": lambda model, _: accelerate.cpu_offload(model, execution_device="cpu"),
    "buffers too": lambda model, _: accelerate.cpu_offload(model, torch.device("cpu"), offload_buffers=True),
    "disk": lambda model, folder: accelerate.disk_offload(model, str(folder), execution_device="cpu"),
    "map": lambda model, folder: mapped(model, folder, {}),
    "map, layers on disk": lambda model, folder: mapped(model, folder, dict.fromkeys(PARTS[1:3], "disk")),
    "map, ends on disk": lambda model, folder: mapped(model, folder, {PARTS[0]: "disk", PARTS[-1]: "disk"}),
    "whole model by turns": lambda model, _: accelerate.cpu_offload_with_hook(model, execution_device="cpu")[0],
}


@pytest.mark.parametrize("way", WAYS)
def test_every_call_gives_what_generate_gives(model: PreTrainedModel, tmp_path: Path, way: str) -> None:
    """The first, the next, after a failure (which leaves weights where they were needed), and in a new decoder."""
    heads = ladon.new_heads(model, num_heads=3)
    for parameter in heads.parameters():
        nn.init.normal_(parameter, std=0.3)
    expected = plain(model, BATCH, **CALL)
    there = WAYS[way](copy.deepcopy(model), tmp_path)
    heads = heads.bound(there, force=True)
    decoder = ladon.Decoder(there, heads, budget=8)
    for _ in range(3):
        assert torch.equal(decoder.generate(BATCH, **CALL), expected)
        assert input_device(there) == torch.device("cpu")

    first = decoder.generate(BATCH[1:2], max_new_tokens=4, return_dict_in_generate=True)
    with pytest.raises(IndexError):
        decoder._target.prefill([torch.tensor([5000])], decoder._target.new_cache(1))
    for _ in range(2):
        assert torch.equal(decoder.generate(BATCH, **CALL), expected)
    again = decoder.generate(first.sequences, max_new_tokens=4, past_key_values=first.past_key_values)
    assert torch.equal(again, plain(model, first.sequences, max_new_tokens=4))
    assert decoder.stats.reused_tokens > 0
    assert torch.equal(ladon.Decoder(there, heads, budget=8).generate(BATCH, **CALL), expected)


@pytest.mark.parametrize("way", ["cpu", "disk"])
def test_pruning(model: PreTrainedModel, tmp_path: Path, way: str) -> None:
    heads = ladon.new_heads(model, num_heads=3)
    there = WAYS[way](copy.deepcopy(model), tmp_path)
    pruning = ladon.Pruning(layer=1, keep=4, criterion="top-k")
    decoder = ladon.Decoder(there, heads.bound(there, force=True), budget=8, prune=pruning)
    assert torch.equal(decoder.generate(BATCH, **CALL), plain(model, BATCH, **CALL))


def test_heads_that_start_from_numbers_that_are_elsewhere(model: PreTrainedModel) -> None:
    there = accelerate.cpu_offload(model, execution_device="cpu")
    assert is_offloaded(there) and device_of(there.lm_head) == torch.device("cpu")
    assert ladon.new_heads(there, 2).up_weight.device == torch.device("cpu")
    for family in ("medusa", "hydra"):
        with pytest.raises(HeadsError, match=r"is offloaded\. Make them on the model loaded whole"):
            ladon.new_heads(there, 2, family)


def test_where_a_module_computes() -> None:
    """The hook says so before its tensors do, in a sequence of hooks and by number too."""
    layer = nn.Linear(2, 2, device="meta")
    assert device_of(layer) is None and device_of(nn.Identity()) is None
    layer.register_buffer("scale", torch.ones(1))
    assert device_of(layer) == torch.device("cpu")
    inner = accelerate.hooks.AlignDevicesHook(execution_device="cuda:1")
    layer._hf_hook = accelerate.hooks.SequentialHook(accelerate.hooks.ModelHook(), inner)
    assert device_of(layer) == torch.device("cuda:1")
    layer._hf_hook = accelerate.hooks.AlignDevicesHook(execution_device={"": "cpu"})
    assert device_of(layer) == torch.device("cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: parts of the model in main memory")
def test_on_a_gpu(model: PreTrainedModel, tmp_path: Path) -> None:
    heads = ladon.new_heads(model, num_heads=3)
    expected = plain(model, BATCH, **CALL)
    device_map = dict.fromkeys(PARTS, 0) | {"model.layers.1": "cpu", "lm_head": "cpu"}
    there = accelerate.dispatch_model(copy.deepcopy(model), device_map, main_device=0)
    decoder = ladon.Decoder(there, heads.bound(there, force=True), budget=8)
    for _ in range(3):
        call = {"attention_mask": MASK.cuda(), "max_new_tokens": 12}
        assert torch.equal(decoder.generate(BATCH.cuda(), **call).cpu(), expected)
