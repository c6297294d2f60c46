"""Right at every length: rotary switches, blocks of query scales and sparse attention, against transformers' generate.

Each reference is the row alone in a new model of the same weights: `generate` with forced tokens, so that whatever it
does on the way (phi3 computes its cache again at the switch) is part of the reference.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel

from families import VOCAB_SIZE, build
from ladon.target.rope_regimes import RopeRegime, RopeRegimes
from ladon.target.target import Target
from random_trees import draw, pad_paths
from rope_cases import CASES, SWITCH, case

LENGTHS = [4, 14, 20, 16]


class Forced(LogitsProcessor):  # type: ignore[misc]  # transformers is not typed strictly
    """Makes generate say given tokens, and notes what it would have said."""

    def __init__(self, prompt: list[int], tokens: list[int]) -> None:
        self.start, self.tokens, self.seen = len(prompt), tokens, torch.empty(0)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        said = input_ids.shape[1] - self.start
        self.seen = scores[0].clone()
        token = self.tokens[said] if said < len(self.tokens) else 5
        return torch.full_like(scores, -1e9).index_fill_(1, torch.tensor([token]), 0.0)


def generated(make: Callable[[], PreTrainedModel], prompt: list[int], tokens: list[int]) -> Tensor:
    """Logits after `prompt` and `tokens`, as a new model's generate sees them, [V]."""
    forced = Forced(prompt, tokens)
    make().generate(
        torch.tensor([prompt]),
        max_new_tokens=len(tokens) + 1,
        do_sample=False,
        logits_processor=[forced],
        eos_token_id=None,
        pad_token_id=0,
    )
    return forced.seen.double()


@pytest.mark.parametrize("chunk", [5, pytest.param(512, marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", [case(name) for name in CASES])
def test_rows_on_both_sides_equal_generate(make: Callable[[], PreTrainedModel], chunk: int) -> None:
    rng = random.Random(0)
    target = Target(make(), prefill_chunk=chunk)
    prompts = [[rng.randrange(3, VOCAB_SIZE) for _ in range(length)] for length in LENGTHS]
    said: list[list[int]] = [[] for _ in prompts]
    cache = target.new_cache(len(prompts))
    _, logits = target.prefill([torch.tensor(prompt) for prompt in prompts], cache)
    for row, prompt in enumerate(prompts):
        torch.testing.assert_close(logits[row].double(), generated(make, prompt, []), rtol=0, atol=1e-5)
    for _ in range(2):
        drawn = draw(rng, [target.depth_cap(length) for length in cache.host_lengths], 5, VOCAB_SIZE)
        out = target.verify(drawn.tree, cache)
        paths = []
        for row, prompt in enumerate(prompts):
            real = [node for node in range(5) if drawn.real[row][node]]
            for node in real:
                tokens = said[row] + drawn.tokens(row, drawn.path(row, node))
                plain = generated(make, prompt, tokens)
                torch.testing.assert_close(out.logits[row, node].double(), plain, rtol=0, atol=1e-5)
            paths.append(max((drawn.path(row, node) for node in real), key=len))
            said[row] += drawn.tokens(row, paths[-1])
        path, count = pad_paths(paths)
        cache.commit(path, count)
        cache.mirror(count.tolist())
    assert any(length < SWITCH < length + len(more) for length, more in zip(LENGTHS, said, strict=True))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("case", ["longrope in a window"])
def test_an_anchor_far_beyond_the_window_spoils_nothing(make: Callable[[], PreTrainedModel], attention: str) -> None:
    """A chunk's anchor stands after a gap wider than the window: it must still see something, or it is NaN."""
    model = make()
    model.set_attn_implementation(attention)
    target, prompt = Target(model, prefill_chunk=3), torch.randint(3, VOCAB_SIZE, (SWITCH + 6,))
    _, logits = target.prefill([prompt], target.new_cache(1))
    with torch.no_grad():
        torch.testing.assert_close(logits, model(prompt[None]).logits[:, -1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", ["longrope", "blocks"])
def test_without_the_bound_it_would_differ(make: Callable[[], PreTrainedModel]) -> None:
    """The control: a tree that crosses the switch is not what plain decoding says."""
    rng = random.Random(0)
    target = Target(make())
    target._regimes = RopeRegimes(build("llama"))  # of a model without bounds
    prompt = [rng.randrange(3, VOCAB_SIZE) for _ in range(SWITCH - 3)]
    cache = target.new_cache(1)
    target.prefill([torch.tensor(prompt)], cache)
    drawn = draw(rng, [None], 9, VOCAB_SIZE)
    out = target.verify(drawn.tree, cache)
    differences = [
        (out.logits[0, node].double() - generated(make, prompt, drawn.tokens(0, drawn.path(0, node)))).abs().max()
        for node in range(9)
        if drawn.real[0][node]
    ]
    assert max(differences) > 1e-3


@pytest.mark.parametrize(
    ("case", "caps"),
    [
        ("longrope", {0: 15, 14: 1, 15: 0, 16: None, 40: None}),
        ("dynamic", {0: 15, 15: 0, 16: 0, 17: 0}),
        ("blocks", {0: 14, 14: 0, 15: 15, 30: 0, 31: 15}),
        ("indexer", {0: 15, 15: 0, 16: 0, 40: 0}),
    ],
)
def test_depth_caps(make: Callable[[], PreTrainedModel], caps: dict[int, int | None]) -> None:
    target = Target(make(), self_test=False)
    assert {length: target.depth_cap(length) for length in caps} == caps


def test_rows_that_must_not_share_a_call() -> None:
    regimes = RopeRegimes(build("llama"))
    assert [part.rows for part in regimes.parts([3, 50, 7])] == [[0, 1, 2]]
    assert regimes.at(10_000) == RopeRegime()
