"""What is measured of steps, and when."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from ladon.engine.observer import EngineObserver
from ladon.engine.recorder import Recorder
from ladon.engine.stats import DecodeStats
from ladon.engine.step import Step
from ladon.tree_size.tree_sizes import TreeSizes
from ladon.trees.token_tree import root_tree
from threads import together

CPU = torch.device("cpu")


def recorder(module: torch.nn.Module | None = None, *, profile: bool = True) -> Recorder:
    module = torch.nn.Linear(2, 2) if module is None else module
    return Recorder(DecodeStats(), TreeSizes(1, CPU), module, CPU, profile=profile)


def decoded(found: Recorder) -> dict[str, float]:
    """The stages of a run, after a decode step of one sequence has ended."""
    found._sizes.reach([3])
    found._sizes.choose([3], depth=0)
    found.stepped(Step(tree=root_tree(torch.tensor([1])), counts=[1]))
    return found.stats.stage_seconds


def test_stages_are_timed_only_when_profiled() -> None:
    for profile in (False, True):
        found = recorder(profile=profile)
        for _ in range(2):
            with found.stage("heads"):
                pass
        assert bool(decoded(found)) == profile
    assert found.stats.stage_seconds["heads"] > 0


def test_a_step_that_only_reads_adds_to_no_stage() -> None:
    found = recorder()
    with found.stage("heads"):
        pass
    found.stepped(Step())
    assert found.stats.stage_seconds == {} and found.stats.decode_seconds == 0.0
    with found.stage("heads"):
        pass
    assert decoded(found)["heads"] > 0


def test_forwards_are_timed_only_while_trees_are_verified() -> None:
    module = torch.nn.Linear(2, 2)
    found = recorder(module)
    with found.stage("verify"):
        module(torch.ones(1, 2))
    timed = decoded(found)["forward"]
    module(torch.ones(1, 2))
    assert timed > 0 and decoded(found)["forward"] == timed and not module._forward_hooks


def test_forwards_of_other_threads_are_not_timed(tiny_llama: PreTrainedModel) -> None:
    found = recorder(tiny_llama)
    with found.stage("verify"):
        together([lambda: tiny_llama(torch.tensor([[3, 4]]))])
        assert found._stages == {}
        tiny_llama(torch.tensor([[3, 4]]))
    assert decoded(found)["forward"] > 0


def test_an_observer_does_nothing_unless_it_is_told_to() -> None:
    with EngineObserver().stage("verify"):
        EngineObserver().verifies([], 4)
    EngineObserver().stepped(Step())
