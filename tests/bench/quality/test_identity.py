"""Where an output leaves its reference, and what that is worth."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from ladon.bench.findings import Difference
from ladon.bench.quality.identity import compare, first_difference, near_tie_bound, replayed_logits
from ladon.bench.systems import LadonSystem
from user_side import Tiny


def test_first_difference() -> None:
    assert first_difference([1, 2, 3], [1, 2, 3]) is None
    assert first_difference([1, 9, 3], [1, 2, 3]) == 1
    assert first_difference([1, 2], [1, 2, 3]) == 2  # an output cut short is not equal
    assert first_difference([1, 2, 3], [1, 2]) == 2


@pytest.mark.parametrize(
    ("margin", "deviation", "near"),
    [
        (5e-5, 5e-5, True),
        (5e-5, 5e-4, False),
        (5e-4, 5e-5, False),
        (5e-5, None, True),
        (5e-4, None, False),
        (0.0, 0.0, True),
        (5e-5, math.inf, False),
        (math.inf, None, False),
    ],
)
def test_near_tie_needs_a_small_margin_and_equal_logits(margin: float, deviation: float | None, near: bool) -> None:
    found = Difference(prompt=0, position=1, margin=margin, bound=1e-4, deviation=deviation)
    assert found.is_near_tie is near


def test_bounds_follow_the_dtype() -> None:
    logits = torch.tensor([-20.0, 3.0, 15.0])
    assert near_tie_bound(torch.float64, logits) == 0.0
    assert near_tie_bound(torch.float32, logits) == 1e-4
    assert near_tie_bound(torch.bfloat16, logits) == 4 * 2**-7 * 20
    assert near_tie_bound(torch.float16, logits) == 4 * 2**-10 * 20
    assert not Difference(prompt=0, position=1, margin=0.0, bound=0.0).is_near_tie  # in float64 nothing is


def test_what_is_a_near_tie_in_half_precision(tiny: Tiny) -> None:
    """The token that was written counts, not how close the best two are."""
    model = copy.deepcopy(tiny.model).to(torch.bfloat16)
    prompt = tiny.tokenizer("def read")["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[0, -1].float()
    order = logits.argsort(descending=True).tolist()
    bound = near_tie_bound(torch.bfloat16, logits)
    assert compare(model, 0, prompt, [order[0]], [order[0]]) is None
    for rank in (1, len(order) // 2, len(order) - 1):
        found = compare(model, 7, prompt, [order[rank]], [order[0]])
        assert found is not None and (found.prompt, found.position) == (7, 0)
        assert found.margin == pytest.approx(float(logits[order[0]] - logits[order[rank]]), abs=bound / 4)
        assert found.bound == pytest.approx(bound, rel=0.02)
        assert found.is_near_tie == (found.margin < found.bound)
    assert not found.is_near_tie
    swapped = compare(model, 7, prompt, [order[0]], [order[-1]])  # the margin is that of the worse of the two
    assert swapped is not None and swapped.margin == found.margin


@pytest.mark.parametrize("mode", ["plain", "chain", "dynamic"])
def test_examine_compares_the_logits_of_the_very_step(tiny: Tiny, mode: str) -> None:
    """At every position of an equal output, the replayed tree's logits are those of `generate` up to rounding."""
    system = LadonSystem(tiny.model, tiny.heads, mode=mode, budget=6)
    prompt = tiny.tokenizer("def read")["input_ids"]
    output = system.run([prompt], 16).outputs[0]
    assert compare(tiny.model, 0, prompt, output, output, system) is None
    for position in range(16):
        wrong = [*output[:position], (output[position] + 1) % 200, *output[position + 1 :]]
        found = compare(tiny.model, 3, prompt, wrong, output, system)
        assert found is not None and (found.prompt, found.position) == (3, position)
        assert found.deviation is not None and found.deviation < 1e-4
        simple = compare(tiny.model, 3, prompt, wrong, output)
        assert simple is not None and found.margin == pytest.approx(simple.margin, abs=2e-4)
        assert found.margin > 1e-4 and not found.is_near_tie
    assert replayed_logits(tiny.model, system, prompt, 16, max_new_tokens=16) is None
