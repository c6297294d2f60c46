"""The self-test's verdict is about the model; its own failures are not, and it needs nothing of the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from ladon.errors import LadonError, SelfTestError, UnsupportedModelError
from ladon.target import self_test
from ladon.target import target as target_module
from ladon.target.pruning import self_test as pruning_test
from ladon.target.pruning.pruner import Pruning
from ladon.target.target import Target
from toys import deep_llama


@pytest.fixture(autouse=True)
def no_verdicts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_test, "_verdicts", {})
    monkeypatch.setattr(self_test, "_read", dict)


def broken(*_: Any, **__: Any) -> Any:
    raise TypeError("Cannot convert a MPS Tensor to float64 dtype\nas the MPS framework has none")


@pytest.mark.parametrize("place", ["_tree", "_plain"])
def test_a_failure_of_the_test_is_no_verdict(
    tiny_llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.setattr(self_test, place, broken)
    with pytest.raises(SelfTestError) as error:
        Target(tiny_llama).new_cache(1)
    assert str(error.value) == (
        "the self-test of LlamaForCausalLM failed by itself, with TypeError: Cannot convert a MPS Tensor to float64 "
        "dtype. That says nothing about the model: please report it, and use plain decoding of transformers until it "
        "is mended"
    )
    assert isinstance(error.value, LadonError) and isinstance(error.value.__cause__, TypeError)
    assert not self_test._verdicts


def test_a_failure_of_what_prepares_a_forward_is_no_verdict(
    tiny_llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trees of several branches fail, chains would not: that must not make the model one for chains."""
    real = target_module.ancestor_mask

    def fails_on_trees(parents: torch.Tensor, max_depth: int) -> torch.Tensor:
        return broken() if max_depth == 2 else real(parents, max_depth)

    monkeypatch.setattr(target_module, "ancestor_mask", fails_on_trees)
    with pytest.raises(SelfTestError):
        Target(tiny_llama).new_cache(1)
    assert not self_test._verdicts


def test_a_model_that_cannot_run_at_all(tiny_llama: PreTrainedModel) -> None:
    """Plain decoding of transformers would be no help."""

    def fail_without_cache(_: nn.Module, __: Any, kwargs: dict[str, Any]) -> None:
        if kwargs.get("past_key_values") is None:
            raise ValueError("give a cache")

    fail_without_cache.only_looks = True  # or the test would compare with `generate`, which gives one
    tiny_llama.register_forward_pre_hook(fail_without_cache, with_kwargs=True)
    with pytest.raises(
        UnsupportedModelError, match="a plain forward of it fails with ValueError: give a cache"
    ) as error:
        Target(tiny_llama).new_cache(1)
    assert "token trees" not in str(error.value)


def test_a_failure_of_the_pruning_test_is_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pruning_test, "_rows_at", broken)
    with pytest.raises(SelfTestError, match="failed by itself"):
        Target(deep_llama()).pruner(Pruning(layer=2, keep=4, criterion="top-k"))


def test_a_failure_inside_a_pruned_forward_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model = deep_llama()

    def fails_on_fewer(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if args[0].shape[1] == pruning_test._KEPT:
            raise ValueError("too few")

    model.model.layers[3].register_forward_pre_hook(fails_on_fewer, with_kwargs=True)
    with pytest.raises(UnsupportedModelError, match="cannot be pruned after layer 2: ValueError: too few"):
        Target(model).pruner(Pruning(layer=2, keep=4, criterion="top-k"))


def test_kinds_of_layers_are_part_of_the_key(tiny_llama: PreTrainedModel) -> None:
    """The config of a quantised model may be that of the model it was made from."""

    class Other(nn.Linear):
        """A layer of torch: those from elsewhere are tested every time."""

        __module__ = "torch.ao.nn"

    assert Target(tiny_llama).supports_trees
    tiny_llama.model.layers[0].mlp.up_proj.__class__ = Other
    assert Target(tiny_llama).supports_trees and len(self_test._verdicts) == 2
