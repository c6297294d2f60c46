"""One forward at a time: threads on one model, and what the output projection is seen to receive."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import ladon
from families import VOCAB_SIZE, build
from ladon.heads import Heads
from ladon.target.hooks import lock_of, projection_inputs
from ladon.target.target import Target
from threads import together


@pytest.fixture
def eager_switches() -> Iterator[None]:
    """Threads take turns as often as they can."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(usual)


def random_heads(model: PreTrainedModel) -> Heads:
    """Heads that disagree with the model, on its own projection."""
    heads = ladon.new_heads(model, num_heads=3)
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return heads


@pytest.mark.usefixtures("eager_switches")
@pytest.mark.parametrize("name", ["llama", "bloom", "gpt_neo"])
def test_two_threads_on_one_model(name: str) -> None:
    """Each gets what it gets alone: hooks of one thread must not meet the other's forward, self-test or heads."""
    model = build(name)
    model.generation_config.eos_token_id = None
    prompts = [torch.randint(3, VOCAB_SIZE, (1, 70)), torch.randint(3, VOCAB_SIZE, (1, 5))]
    decoders = [ladon.Decoder(model, random_heads(model), budget=6) for _ in prompts]
    decoders[1] = ladon.Decoder(model, random_heads(model), tree="chain", profile=True)

    def job(place: int) -> Callable[[], list[Any]]:
        def run() -> list[Any]:
            texts = [decoders[place].generate(prompts[place], max_new_tokens=30)[0].tolist() for _ in range(3)]
            return [*texts, Target(model).supports_trees]

        return run

    alone = [job(place)() for place in range(2)]
    assert together([job(place) for place in range(2)]) == alone
    stages = decoders[1].stats.stage_seconds
    assert stages["forward"] <= stages["verify"], "the other thread's forwards are not in it"


def test_a_model_has_one_lock() -> None:
    first, second = build("llama"), build("llama")
    assert lock_of(first) is lock_of(first) is not lock_of(second)
    locks = together([lambda: lock_of(second)] * 4)
    assert all(lock is locks[0] for lock in locks)


def test_a_forward_waits_for_the_lock(tiny_llama: PreTrainedModel) -> None:
    target = Target(tiny_llama, self_test=False)
    cache = target.new_cache(1)
    thread = threading.Thread(target=target.prefill, args=([torch.tensor([3, 4])], cache))
    with lock_of(tiny_llama):
        thread.start()
        thread.join(timeout=0.2)
        assert thread.is_alive()
    thread.join()
    assert cache.host_lengths == [2]


def test_other_threads_may_use_the_projection(tiny_llama: PreTrainedModel) -> None:
    """As heads do: what they project is neither seen nor cut."""
    hidden = torch.randn(2, 5, 32, dtype=torch.float64)
    with projection_inputs(tiny_llama.lm_head, torch.tensor([4, 0])) as seen:
        (elsewhere,) = together([lambda: tiny_llama.lm_head(hidden).shape])
        assert (elsewhere, seen) == ((2, 5, 97), [])
        assert tiny_llama.lm_head(hidden).shape == (2, 1, 97)
    assert len(seen) == 1 and seen[0] is hidden
    assert not tiny_llama.lm_head._forward_pre_hooks
