"""Greedy picks, and sampled ones: their law, and that they depend on nothing but seed, position and logits."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from ladon import Decoder, InputError, new_heads
from ladon.engine.sequence import Row
from ladon.sampling.gumbel import gumbel_noise, mix, row_seeds
from ladon.sampling.sampler import first_best, greedy
from ladon.sampling.sampling_params import TemperatureSampling, check_settings


@pytest.mark.parametrize("shape", [(4096,), (1, 1, 4096), (1, 64, 4096), (2, 32, 4096), (3, 7, 1000)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_is_the_first_of_equal_maxima(shape, dtype):
    """Few distinct values, so that every row has many equal maxima, in one block and in several."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(-3, 4, shape, generator=generator).to(dtype)
    expected = (logits == logits.amax(-1, keepdim=True)).to(torch.uint8).argmax(-1)
    assert torch.equal(greedy(logits), expected)


@pytest.mark.parametrize("vocab_size", [4096, 1000])
def test_agrees_with_argmax_on_ordinary_logits_and_on_masked_ones(vocab_size):
    logits = torch.randn(4, 64, vocab_size, generator=torch.Generator().manual_seed(1))
    assert torch.equal(greedy(logits), logits.argmax(-1))
    logits[..., vocab_size // 2 :] = -torch.inf
    assert torch.equal(greedy(logits), logits.argmax(-1))
    logits[0, 3, 77] = torch.nan
    assert torch.equal(greedy(logits), logits.argmax(-1)), "NaN counts as the greatest, as in argmax"


def draws(sampler: TemperatureSampling, seed: int, logits: torch.Tensor, num: int) -> torch.Tensor:
    """`num` picks, each at a position of its own, of the logits [V] of one row with this seed."""
    noise = gumbel_noise(torch.tensor([seed]), torch.arange(num)[None], len(logits), torch.float64)[0]
    return first_best(sampler.scores(logits.expand(num, -1)) + noise)


def chi_square(counts: torch.Tensor, law: torch.Tensor) -> float:
    """Pearson's statistic in standard deviations above its mean; the law's support must hold all counts."""
    assert counts[law == 0].sum() == 0
    expected = law[law > 0] * counts.sum()
    assert expected.min() > 5
    freedom = len(expected) - 1
    return float(((counts[law > 0] - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize("settings", [(1.0, 0, 1.0), (0.7, 0, 1.0), (1.3, 6, 1.0), (1.0, 0, 0.8), (0.8, 9, 0.9)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_law_is_that_of_generate(settings, dtype):
    """Chi-square against the softmax after transformers' own warpers, and the same tokens have probability zero."""
    temperature, top_k, top_p = settings
    logits = torch.randn(12, generator=torch.Generator().manual_seed(3)).to(dtype)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    law = warpers(torch.zeros(1, 1, dtype=torch.int64), logits.double()[None]).softmax(-1)[0]
    sampler = TemperatureSampling(temperature=temperature, top_k=top_k, top_p=top_p)
    counts = torch.bincount(draws(sampler, mix(1, 2), logits, 40_000), minlength=12)
    assert abs(chi_square(counts, law)) < 4


def test_rows_and_positions_are_independent():
    """Pairs of picks, of two rows and of two positions, follow the product of their laws."""
    logits = torch.tensor([0.5, 0.0, -0.5, -1.0])
    law = logits.softmax(-1)
    for seeds, shift in [((mix(7, 0), mix(7, 1)), 0), ((5, 5), 1), ((0, 1), 0)]:
        left, right = (draws(TemperatureSampling(temperature=1.0), seed, logits, 30_001) for seed in seeds)
        pairs = left[: 30_001 - shift] * 4 + right[shift:]
        assert abs(chi_square(torch.bincount(pairs, minlength=16), torch.outer(law, law).flatten())) < 4


def test_noise_is_standard_gumbel_and_unlike_across_keys():
    noise = gumbel_noise(torch.tensor([3, 4]), torch.tensor([[0, 1], [0, 1]]), 50_000, torch.float64)
    assert torch.isfinite(noise).all()
    assert torch.allclose(noise.mean(-1), torch.full((2, 2), 0.5772, dtype=torch.float64), atol=0.03)
    assert torch.allclose(noise.var(-1), torch.full((2, 2), math.pi**2 / 6, dtype=torch.float64), atol=0.06)
    flat = noise.reshape(4, -1)
    together = torch.corrcoef(torch.cat([flat, flat.roll(1, -1)]))  # and beside the noise of the neighbouring token
    assert (together - torch.eye(8)).abs().max() < 0.025


def test_noise_depends_on_seed_position_and_token_alone():
    seeds, positions = torch.tensor([11, 12, 13]), torch.tensor([[4, 5], [9, 10], [0, 1]])
    whole = gumbel_noise(seeds, positions, 1000, torch.float64)
    alone = gumbel_noise(seeds[1:2], positions[1:2, 1:], 500, torch.float64)
    assert torch.equal(whole[1:2, 1:, :500], alone)
    assert (gumbel_noise(seeds, positions, 1000, torch.float32) - whole).abs().max() < 1e-5


def splitmix(x: int) -> int:
    """The finalizer of splitmix64, as published."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def lowbias32(x: int) -> int:
    """As published."""
    x = (x ^ (x >> 16)) * 0x7FEB352D % 2**32
    x = (x ^ (x >> 15)) * 0x846CA68B % 2**32
    return x ^ (x >> 16)


def test_known_values():
    """Files record seeds: the same seed must give the same noise on every machine and in every release."""
    golden, seeds, positions = 0x9E3779B97F4A7C15, [0, mix(0, 1)], [0, 100_000]
    noise = gumbel_noise(torch.tensor(seeds), torch.tensor([positions] * 2), 40, torch.float64)
    for row, place, token in itertools.product(range(2), range(2), (0, 1, 39)):
        key = splitmix((splitmix((seeds[row] + golden) % 2**64) + positions[place] * golden) % 2**64)
        bits = lowbias32((lowbias32((token * 0x9E3779B1 + key) % 2**32) + (key >> 32)) % 2**32) % 2**31
        expected = -math.log(-math.log1p(-(bits + 0.5) / 2**31))
        assert float(noise[row, place, token]) == pytest.approx(expected, abs=1e-12)
    assert [mix(0, 0), mix(0, 1), mix(1, 0)] == [2537880150861722, 5876733520225071, 7771917260970010]


def test_seeds_of_rows_differ():
    seeds = [mix(seed, index) for seed, index in itertools.product(range(20), range(500))]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**53 for seed in seeds)


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(-1.0, 0, 1.0), (math.nan, 0, 1.0), (math.inf, 0, 1.0)])
def test_settings_without_a_law_are_refused(temperature, top_k, top_p):
    with pytest.raises(InputError, match="temperature"):
        check_settings(temperature, top_k, top_p)


def test_other_settings_without_a_law_are_refused():
    for top_k, top_p, name in [(-1, 1.0, "top_k"), (0, 0.0, "top_p"), (0, 1.5, "top_p"), (0, math.nan, "top_p")]:
        with pytest.raises(InputError, match=name):
            check_settings(1.0, top_k, top_p)
    with pytest.raises(InputError, match="greedy"):
        TemperatureSampling(temperature=0.0)


def sampled(decoder: Decoder, prompts, seeds, **settings) -> list[list[int]]:
    """New tokens of each prompt, decoded together."""
    rows = [
        Row(
            prompt=prompt,
            max_new_tokens=17,
            is_stop=frozenset({5}).__contains__,
            seed=seed,
            sampling_params=TemperatureSampling(**settings),
        )
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]
    for _ in decoder.decode(rows):
        pass
    return [row.tokens for row in rows]


@pytest.mark.parametrize("settings", [{"temperature": 0.6}, {"temperature": 1.0, "top_k": 20, "top_p": 0.9}])
def test_same_tokens_plain_or_tree_alone_or_together(tiny_llama, settings):
    """Float64: equal without exception. The rows have lengths of their own and end at different steps."""
    prompts = [torch.randint(1, 97, (length,)) for length in (3, 9, 1, 14, 6)]
    seeds = [mix(4, index) for index in range(5)]
    plain = Decoder(tiny_llama)
    expected = [sampled(plain, [prompt], [seed], **settings)[0] for prompt, seed in zip(prompts, seeds, strict=True)]
    assert sampled(plain, prompts, seeds, **settings) == expected
    assert len({len(tokens) for tokens in expected}) > 1 and len({tuple(tokens) for tokens in expected}) == 5
    heads = new_heads(tiny_llama, num_heads=3)
    for tree in ("dynamic", "chain"):
        decoder = Decoder(tiny_llama, heads, tree=tree, budget=12)
        assert sampled(decoder, prompts, seeds, **settings) == expected
        assert [sampled(decoder, [p], [s], **settings)[0] for p, s in zip(prompts, seeds, strict=True)] == expected
    assert sampled(plain, prompts, [seed + 1 for seed in seeds], **settings) != expected


def test_follows_the_models_law_at_every_position(tiny_llama):
    """10,000 seeds, two tokens each: the pairs follow the law of the model itself, the likeliest ones one by one."""
    tiny_llama.lm_head.weight.data *= 8
    prompt, num = torch.tensor([3, 1, 4]), 10_000
    plain = Decoder(tiny_llama)
    law = TemperatureSampling(temperature=0.8)
    never = frozenset().__contains__
    rows = [Row(prompt=prompt, max_new_tokens=2, is_stop=never, seed=seed, sampling_params=law) for seed in range(num)]
    for _ in plain.decode(rows):
        pass
    pairs = torch.tensor([row.tokens for row in rows])
    with torch.no_grad():
        first = (tiny_llama(prompt[None]).logits[0, -1] / 0.8).softmax(-1)
        after = torch.cat([prompt.expand(97, 3), torch.arange(97)[:, None]], dim=1)
        law = first[:, None] * (tiny_llama(after).logits[:, -1] / 0.8).softmax(-1)
    law = law.flatten()
    common = law * num > 8
    counts = torch.bincount(pairs[:, 0] * 97 + pairs[:, 1], minlength=97 * 97)
    joined = torch.cat([counts[common], counts[~common].sum()[None]])
    assert common.sum() > 20
    assert abs(chi_square(joined, torch.cat([law[common], law[~common].sum()[None]]))) < 4


def test_seeds_of_a_call():
    assert row_seeds(5, 3) == [mix(5, index) for index in range(3)]
    assert row_seeds([7, 7], 2) == [7, 7]
    torch.manual_seed(11)
    first = row_seeds(None, 2)
    assert row_seeds(None, 2) != first
    torch.manual_seed(11)
    assert row_seeds(None, 2) == first


@pytest.mark.parametrize("seed", [-1, 2**63, 1.5, True, [1], [1, 2, 3], ["1", "2"]])
def test_seeds_that_are_none(seed):
    with pytest.raises(InputError, match="seed"):
        row_seeds(seed, 2)
