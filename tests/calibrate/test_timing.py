"""Step times: which steps are timed, not how long they take."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from ladon.calibrate.timing import StepTimes, measure_step_times, profile_of
from ladon.errors import InputError
from ladon.heads import new_heads
from ladon.target.target import Target
from ladon.trees.token_tree import TokenTree


@pytest.fixture
def verified(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(nodes, tokens in the cache) of each verified tree; and no round starts after the least number of them."""
    seen: list[tuple[int, int]] = []
    verify = Target.verify

    def noted(self: Target, tree: TokenTree, cache: object) -> object:
        seen.append((tree.num_nodes, cache.host_lengths[0]))
        return verify(self, tree, cache)

    monkeypatch.setattr(Target, "verify", noted)
    monkeypatch.setattr("ladon.calibrate.timing._SECONDS", 0.0)
    return seen


def test_sizes_take_turns_at_one_context(tiny_llama: PreTrainedModel, verified: list[tuple[int, int]]) -> None:
    Target(tiny_llama).check()  # the self-test verifies trees of its own
    verified.clear()
    rounds: list[int] = []
    times = measure_step_times(
        tiny_llama,
        new_heads(tiny_llama, 3),
        torch.arange(3, 40),
        nodes=(4, 16, 2),
        progress=lambda what, done, total: rounds.append(done),
    )
    assert times.nodes == (1, 2, 4, 16) and len(times.ms) == 4 and min(times.ms) > 0
    assert (times.batch, times.context, times.rounds) == (1, 37, 3) and rounds == [1, 2, 3]
    up = [1, 2, 4, 16, 1]  # the last one drafts
    assert [nodes for nodes, _ in verified] == [*up, *up, *reversed(up), *up]
    assert {length for _, length in verified} == {37}


def test_sizes_that_the_heads_cannot_fill_are_left_out(
    tiny_llama: PreTrainedModel, verified: list[tuple[int, int]]
) -> None:
    times = measure_step_times(tiny_llama, new_heads(tiny_llama, 1), torch.tensor([5]), nodes=(2, 33, 34, 64))
    assert times.nodes == (1, 2, 33)


def test_a_context_at_the_models_limit(tiny_llama: PreTrainedModel, verified: list[tuple[int, int]]) -> None:
    times = measure_step_times(tiny_llama, new_heads(tiny_llama, 3), torch.full((300,), 5), nodes=(8,))
    assert times.context == 256 - 4
    with pytest.raises(InputError, match="no context"):
        measure_step_times(tiny_llama, new_heads(tiny_llama, 3), torch.tensor([], dtype=torch.long))


def test_times_relative_to_plain_decoding() -> None:
    times = StepTimes(batch=1, context=4, nodes=(1, 8), ms=(2.0, 3.0), drafting_ms=2.5, rounds=5)
    assert times.relative == (1.0, 1.5)


def test_rows_are_timed_together(tiny_llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ladon.calibrate.timing._SECONDS", 0.0)
    times = measure_step_times(tiny_llama, new_heads(tiny_llama, 3), torch.arange(3, 40), batch=3, nodes=(4,))
    assert times.batch == 3 and times.nodes == (1, 4) and times.drafting_ms > 0


def test_a_profile_has_every_kind_of_step() -> None:
    times = StepTimes(batch=2, context=4, nodes=(1, 8), ms=(2.0, 3.0), drafting_ms=2.5, rounds=5)
    found = {(time.batch, time.nodes, time.drafts, round(1e3 * time.seconds, 3)) for time in profile_of([times])}
    assert found == {(2, 1, False, 2.0), (2, 8, True, 3.0), (2, 1, True, 2.5)}
