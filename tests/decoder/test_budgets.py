"""Sizes and the engine: output does not depend on them, and the decoder's options mean what they say."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedModel

from drafts import PROPOSERS, TREES, RandomSizing, decode, make_proposer
from ladon import Decoder, FixedTree, Heads, TreeError, new_heads
from ladon.decoder.options import largest_budget
from ladon.drafting.proposer import RootProposer
from ladon.engine.sequence import Row
from ladon.target.target import Target
from ladon.tree_size.adaptive import AutoSizing
from ladon.tree_size.frozen import FrozenSizing
from ladon.tree_size.latency_model import StepTime
from ladon.tree_size.policy import EDGES, FixedSizing
from ladon.tree_size.profile_store import place_of, write_profile
from ladon.tree_size.tree_sizes import path_mass
from random_trees import draw

PROMPTS = [torch.arange(3, 12), torch.arange(5, 30), torch.tensor([7])]
NEW_TOKENS = 30


@pytest.fixture
def heads(tiny_llama: PreTrainedModel) -> Heads:
    made = new_heads(tiny_llama, num_heads=3)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made.bind(tiny_llama)


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("kind", PROPOSERS)
def test_output_is_the_same_under_any_schedule(tiny_llama: PreTrainedModel, heads: Heads, kind: str, tree: str) -> None:
    target = Target(tiny_llama)
    plain, _ = decode(target, RootProposer(), PROMPTS, NEW_TOKENS)
    for seed in range(4):
        proposer = make_proposer(kind, TREES[tree], plain, 97, heads)
        found, stats = decode(target, proposer, PROMPTS, NEW_TOKENS, budget=RandomSizing(seed))
        assert found == plain
        assert sum(stats.sizes.values()) == stats.forwards


def test_what_a_sizing_is_told(tiny_llama: PreTrainedModel, heads: Heads) -> None:
    """Sums rise with the edge and never above one per row; accepted nodes are those of the statistics."""
    target = Target(tiny_llama)
    plain, _ = decode(target, RootProposer(), PROMPTS, NEW_TOKENS)
    sizing = RandomSizing(1)
    proposer = make_proposer("oracle", "dynamic", plain, 97, heads)
    _, stats = decode(target, proposer, PROMPTS, NEW_TOKENS, budget=sizing)
    assert len(sizing.records) == stats.forwards
    whole = [record for record in sizing.records if record.expected]
    assert whole and all(len(record.accepted) == len(record.expected) for record in whole)
    assert sum(sum(record.accepted) for record in whole) <= stats.accepted_nodes
    assert any(sum(record.accepted) for record in whole)
    for record in sizing.records:
        assert 1 <= record.batch <= 3 and record.context > 0 and record.seconds > 0
        assert record.nodes > 1 or not any(record.accepted)
    for sums in sizing.sums:
        for masses in sums or []:
            assert masses[0] == 0.0 and list(masses) == sorted(masses) and masses[-1] <= 3.0
    assert stats.predicted_steps == stats.forwards and stats.prediction_error > 0
    assert 0 < stats.sizing_seconds < stats.decode_seconds + stats.prefill_seconds


@pytest.mark.parametrize("seed", range(5))
def test_path_mass(seed: int) -> None:
    """Against the definition, node by node."""
    drawn = draw(random.Random(seed), [None, None, 2], 20, 97)
    tree = drawn.tree
    buckets = torch.tensor([0, 1, 2, 2, *[3] * 16, *[4] * 20])
    found = path_mass(tree, buckets, 5).view(-1, 5).double() / 2**32
    assert found.shape == (tree.max_depth + 1, 5)
    for depth in range(tree.max_depth + 1):
        for bucket in range(5):
            nodes = [(r, n) for r in range(3) for n in range(20) if drawn.depth(r, n) == depth and buckets[n] == bucket]
            expected = sum(tree.log_probs[row, node].exp().item() for row, node in nodes)
            assert found[depth, bucket].item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_a_probability_that_is_no_number_shows_in_every_sum(wrong: float) -> None:
    """Also where several of them meet."""
    tree = draw(random.Random(1), [None, None], 12, 97).tree
    log_probs = tree.log_probs.clone()
    log_probs[:, 5] = wrong
    buckets = torch.tensor([0, *[1] * 11])
    found = path_mass(replace(tree, log_probs=log_probs), buckets, 2)
    assert int(found.min()) < 0


def test_heads_that_overflow_decode_plainly_and_say_so(tiny_llama: PreTrainedModel) -> None:
    heads = new_heads(tiny_llama, num_heads=2)
    for parameter in heads.parameters():
        torch.nn.init.constant_(parameter, torch.nan)
    prompt = torch.arange(3, 12)[None]
    expected = tiny_llama.generate(prompt, max_new_tokens=24, do_sample=False)
    decoder = Decoder(tiny_llama, heads, ngrams="off")
    with pytest.warns(UserWarning, match="not finite") as caught:
        for _ in range(2):
            assert torch.equal(decoder.generate(prompt, max_new_tokens=24, do_sample=False), expected)
    assert len([warning for warning in caught if "not finite" in str(warning.message)]) == 1
    assert set(decoder.stats.sizes) == {1}


def test_auto_is_the_default_and_decodes_as_plain_does(tiny_llama: PreTrainedModel, heads: Heads) -> None:
    prompts = torch.stack([torch.arange(3, 12), torch.arange(5, 14)])
    plain = Decoder(tiny_llama).generate(prompts, max_new_tokens=60, do_sample=False)
    decoder = Decoder(tiny_llama, heads)
    assert isinstance(decoder.sizing, AutoSizing)
    for _ in range(3):  # what it has learnt stays, and changes nothing but sizes
        assert torch.equal(decoder.generate(prompts, max_new_tokens=60, do_sample=False), plain)
        assert set(decoder.stats.sizes) <= set(EDGES)


def test_a_chain_has_small_edges(tiny_llama: PreTrainedModel, heads: Heads) -> None:
    assert Decoder(tiny_llama, heads, tree="chain").sizing.edges == (1, 2, 4)
    assert Decoder(tiny_llama, heads, num_candidates=1, ngrams="off").sizing.edges == (1, 2, 4)
    assert Decoder(tiny_llama, heads).sizing.edges == EDGES
    assert Decoder(tiny_llama).sizing.edges == (1, 2, 4, 8, 16, 24, 32, 48)  # n-grams alone


def test_sizes_that_nobody_need_choose(tiny_llama: PreTrainedModel, heads: Heads) -> None:
    tree = FixedTree(((0,), (1,), (0, 0)))
    for decoder, nodes in (
        (Decoder(tiny_llama, ngrams="off"), 1),
        (Decoder(tiny_llama, tree="off"), 1),
        (Decoder(tiny_llama, heads, tree="off"), 1),
        (Decoder(tiny_llama, heads, tree=tree), 4),
        (Decoder(tiny_llama, heads, budget=7), 7),
    ):
        assert isinstance(decoder.sizing, FixedSizing) and decoder.sizing.reach(1, 9.0) == nodes


@pytest.mark.parametrize("budget", [0, -3, 2.5, True, "many"])
def test_a_budget_that_is_none(tiny_llama: PreTrainedModel, heads: Heads, budget: object) -> None:
    with pytest.raises(TreeError, match="budget is"):
        Decoder(tiny_llama, heads, budget=budget)  # type: ignore[arg-type]


@pytest.mark.parametrize("by", ["argument", "environment"])
def test_deterministic(
    tiny_llama: PreTrainedModel, heads: Heads, by: str, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sixteen nodes without a profile; with one, sizes that depend on the trees alone."""
    monkeypatch.setenv("LADON_CACHE", str(tmp_path))
    monkeypatch.setenv("LADON_DETERMINISTIC", "1" if by == "environment" else "0")
    options = {"deterministic": True} if by == "argument" else {}
    without = Decoder(tiny_llama, heads, **options)
    assert isinstance(without.sizing, FixedSizing) and without.sizing.reach(1, 9.0) == 16
    assert Decoder(tiny_llama, heads, tree="chain", **options).sizing.reach(1, 9.0) == 4
    times = [
        StepTime(batch=1, nodes=n, context=16.0, drafts=drafts, seconds=0.01 + 1e-4 * n)
        for n, drafts in [(1, False), *((n, True) for n in EDGES)]
    ]
    write_profile(place_of(tiny_llama, heads), times)
    decoder = Decoder(tiny_llama, heads, **options)
    assert isinstance(decoder.sizing, FrozenSizing)
    schedules = []
    for _ in range(2):
        row = Row(prompt=torch.arange(3, 12), max_new_tokens=40, is_stop=lambda _: False)
        schedules.append([step.tree.num_nodes for step in decoder.decode([row]) if step.tree is not None])
        assert decoder.stats.probes == 0
    assert schedules[0] == schedules[1]


def test_the_largest_tree(tiny_llama: PreTrainedModel) -> None:
    heads = new_heads(tiny_llama, num_heads=2)
    assert largest_budget("dynamic", heads, 4) == 1 + 4 + 16
    assert largest_budget("dynamic", heads, 32) == 128
    assert largest_budget("chain", heads, 32) == 3
    assert largest_budget("dynamic", None, 32) == largest_budget("off", heads, 32) == 1
