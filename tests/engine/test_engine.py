"""The loop: limits, stops, rows that end at different times, and what reference implementations get wrong."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import ladon
from drafts import TREES, decode, make_proposer
from greedy import PROMPTS, generate
from ladon.engine.sequence import Row
from ladon.target import target as target_module
from ladon.target.self_test import Verdict
from ladon.target.target import Target
from toys import looking


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_the_limit_counts_tokens_and_not_steps(model, tree, n):
    """An accepted path that runs past the limit is cut; a reference implementation counts passes."""
    truth = [generate(model, prompt, 12) for prompt in PROMPTS]
    proposer = make_proposer("oracle", TREES[tree], truth, 97, None)
    outputs, stats = decode(Target(model), proposer, PROMPTS, n)
    assert outputs == [tokens[:n] for tokens in truth]
    assert stats.tokens == 3 * (n - 1)


@pytest.mark.parametrize("tree", TREES)
def test_nothing_follows_the_end_of_a_sequence(model, tree):
    """Any of several end ids, in the middle of an accepted path, at different times in each row."""
    truth = [generate(model, prompt, 12) for prompt in PROMPTS]
    ends = {tokens[place] for tokens, place in zip(truth, (2, 5, 9), strict=True)}
    expected = [tokens[: next(i for i, t in enumerate(tokens) if t in ends) + 1] for tokens in truth]
    proposer = make_proposer("oracle", TREES[tree], truth, 97, None)
    outputs, stats = decode(Target(model), proposer, PROMPTS, 12, frozenset(ends))
    assert outputs == expected
    assert stats.tokens == sum(len(tokens) - 1 for tokens in expected), "cut tokens do not count"


def test_acceptance_length_counts_the_bonus_token(model):
    truth = [generate(model, PROMPTS[1], 13)]
    proposer = make_proposer("oracle", "chain", truth, 97, None)
    _, stats = decode(Target(model), proposer, PROMPTS[1:2], 13)
    assert stats.forwards == stats.row_steps == 3  # 12 tokens after the prefill's, 3 drafts and a bonus each
    assert stats.acceptance_length == 4.0
    assert stats.tree_efficiency == 1.0


def test_stages_are_parts_of_the_decode_time(model):
    """The first tree is grown before the first decode step: its time is in neither."""
    decoder = ladon.Decoder(model, ladon.new_heads(model), profile=True)
    decoder.generate(PROMPTS[0][None], max_new_tokens=2)
    parts = {name: seconds for name, seconds in decoder.stats.stage_seconds.items() if name != "forward"}
    assert decoder.stats.forwards == 1 and "commit" in parts
    assert sum(parts.values()) <= decoder.stats.decode_seconds


@pytest.mark.parametrize("tree", TREES)
def test_the_context_is_used_to_the_last_token(model, tree):
    """A reference implementation fails within 64 tokens of the limit; no node may stand past the last position."""
    limit = model.config.max_position_embeddings
    prompt = torch.arange(limit - 20) % 90 + 3
    truth = [generate(model, prompt, 20)]
    seen = []
    hook = model.model.register_forward_pre_hook(
        looking(lambda module, args, kwargs: seen.append(int(kwargs["position_ids"].max()))), with_kwargs=True
    )
    decoder = ladon.Decoder(model, ladon.new_heads(model, num_heads=3), tree=TREES[tree], budget=12)
    output = decoder.generate(prompt[None], max_new_tokens=500)
    hook.remove()
    assert output[0, len(prompt) :].tolist() == truth[0]
    assert output.shape[1] == limit and max(seen) < limit


def test_a_prompt_of_any_size_needs_logits_of_one_position(model):
    """Prefill projects one row per sequence, not [T, V] (11.7 GiB in a reference implementation at 8k tokens)."""
    decoder = ladon.Decoder(model, None)
    assert decoder._target.supports_trees, "the self-test's own plain forwards come first"
    shapes = []
    note = looking(lambda module, args, output: shapes.append(tuple(output.shape)))
    hook = model.lm_head.register_forward_hook(note)
    decoder.generate(torch.randint(3, 90, (2, 150)), max_new_tokens=2)
    hook.remove()
    assert max(shape[1] for shape in shapes) == 1


def test_a_run_follows_a_change_of_the_model(model):
    """Masks made for another attention implementation give wrong tokens without an error."""
    target, truth = Target(model), [generate(model, prompt, 8) for prompt in PROMPTS]
    for implementation in ("sdpa", "eager", "sdpa"):
        model.set_attn_implementation(implementation)
        proposer = make_proposer("oracle", TREES["dynamic"], truth, 97, None)
        assert decode(target, proposer, PROMPTS, 8)[0] == truth


def test_a_model_that_has_lost_its_trees_gets_chains(model, monkeypatch):
    """Another attention implementation may verify chains only; the next call must not branch then."""
    decoder = ladon.Decoder(model, ladon.new_heads(model, num_heads=3))
    model.set_attn_implementation("eager")
    monkeypatch.setattr(target_module, "tested", lambda *_: Verdict(trees=False))
    rows = [Row(prompt=PROMPTS[0], max_new_tokens=9, is_stop=lambda _: False)]
    trees = [step.tree for step in decoder.engine().run(rows) if step.tree is not None]
    assert trees
    for tree in trees:
        drafted = tree.log_probs[0].isfinite()  # the others are padding
        assert torch.equal(tree.parents[0, drafted], torch.arange(-1, int(drafted.sum()) - 1))
    assert decoder.stats.nodes_verified > decoder.stats.row_steps


def test_the_self_test_is_no_part_of_the_prefill(model, monkeypatch):
    """Nor is it a decode step: both clocks stand while a model is tested for the first time."""

    now = [0.0]

    def slow_test(*_):
        now[0] += 100.0
        return Verdict(trees=True)

    monkeypatch.setattr(target_module, "tested", slow_test)
    monkeypatch.setattr("ladon.engine.recorder.time", SimpleNamespace(perf_counter=lambda: now[0]))
    _, stats = decode(Target(model), make_proposer("root", "off", [], 97, None), PROMPTS, 3)
    assert (now[0], stats.prefill_seconds, stats.decode_seconds) == (100.0, 0.0, 0.0)


def test_two_runs_on_one_model_do_not_disturb_each_other(model):
    """Caches and masks belong to a run: interleaved runs corrupt each other in a reference implementation."""
    heads = ladon.new_heads(model, num_heads=3)
    first, second = ladon.Decoder(model, heads), ladon.Decoder(model, heads, tree="chain")
    rows = [Row(prompt=p, max_new_tokens=10, is_stop=lambda _: False) for p in PROMPTS[:2]]
    runs = [first.engine().run(rows[:1]), second.engine().run(rows[1:])]
    while runs:
        runs = [run for run in runs if next(run, None) is not None]
    assert [row.tokens for row in rows] == [generate(model, p, 10) for p in PROMPTS[:2]]


def test_inference_mode_first_and_then_not(model):
    decoder = ladon.Decoder(model, ladon.new_heads(model, num_heads=2))
    with torch.inference_mode():
        inside = decoder.generate(PROMPTS[1][None], max_new_tokens=8)
    outside = decoder.generate(PROMPTS[1][None], max_new_tokens=8)
    assert torch.equal(inside, outside) and not outside.requires_grad


def test_the_model_is_left_as_it_was(model):
    """No mask, cache or hook stays behind (a reference model is silently wrong after a call)."""
    text = torch.randint(3, 90, (1, 80))
    with torch.no_grad():
        before = model(text).logits
    ladon.Decoder(model, ladon.new_heads(model, num_heads=3)).generate(PROMPTS[0][None], max_new_tokens=9)
    with torch.no_grad():
        assert torch.equal(before, model(text).logits)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert "generate" not in vars(model)


def test_a_run_that_is_dropped_leaves_the_model_as_it_was(model):
    """What Ctrl-C does in the middle of a run."""
    run = ladon.Decoder(model, ladon.new_heads(model, num_heads=3)).trace(PROMPTS[0], max_new_tokens=50)
    next(run)
    run.close()
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_no_gradients_are_recorded(model):
    heads = ladon.new_heads(model, num_heads=3)
    decoder = ladon.Decoder(model, heads)
    for step in decoder.engine().run([Row(prompt=PROMPTS[0], max_new_tokens=4, is_stop=lambda _: False)]):
        if step.tree is not None:
            assert not step.tree.log_probs.requires_grad
