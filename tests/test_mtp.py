"""MTP modules: what they read and guess is what transformers' own loop reads and guesses; what is said stays the same.

All modules are random, so a guess is right by chance only: where acceptance matters the trees are wide.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import families
import ladon
from drafts import FIXED, RandomSizing
from ladon.engine import Engine
from ladon.heads.mtp import MtpHeads
from ladon.mtp import MtpProposer
from ladon.rows import Row
from ladon.sampling import GREEDY
from ladon.stats import DecodeStats, StageClock
from ladon.target import Target
from ladon.tree import check_tree

modeling_layers = pytest.importorskip("transformers.modeling_layers")
if not hasattr(modeling_layers, "MtpModel"):
    pytest.skip("the installed transformers has no MTP modules", allow_module_level=True)

MODULES = {  # family, modules
    "deepseek_v3": ("deepseek_v3", 1),
    "glm4_moe": ("glm4_moe", 1),
    "glm4_moe with 3": ("glm4_moe", 3),
    "deepseek_v3 with 2": ("deepseek_v3", 2),
    "mellum": ("mellum", 1),  # its module sees a window
    "glm4_moe with eager": ("glm4_moe", 2),
}
CLOCK = StageClock({}, enabled=False, device=torch.device("cpu"))
LENGTHS = (3, 17, 9, 1, 26)


def build(name):
    """A tiny model with random MTP modules, of which three tokens are guessed."""
    model, heads = families.random_mtp(*MODULES[name])
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    if name.endswith("eager"):
        model.set_attn_implementation("eager")
    return model, heads.bind(model)


def prompts_of(lengths=LENGTHS, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, families.VOCAB_SIZE, (length,), generator=generator) for length in lengths]


@torch.no_grad()
def states_of(model, tokens):
    """The hidden states that transformers gives to the modules."""
    return model(tokens[None], use_cache=False, output_hidden_states=True).hidden_states[-1][0]


def proposer_of(heads, model, tree="dynamic", **options):
    return MtpProposer(heads, model, tree, options.get("num_candidates", 4), options.get("budget", 12), CLOCK)


@torch.no_grad()
def drafts(proposer, model, texts, max_nodes=12):
    """What a proposer drafts for texts that it has not seen, whose last token is the root: tree [B, N]."""
    states = [states_of(model, text[:-1]) for text in texts]
    proposer.join([text[:-1] for text in texts], torch.stack([state[-1] for state in states]), states)
    return proposer.propose(
        torch.stack([state[-1] for state in states]), torch.stack([t[-1] for t in texts]), max_nodes
    )


@torch.no_grad()
def transformers_drafts(model, mtp, text, monkeypatch):
    """The chain that transformers' own candidate generator drafts after `text`."""
    from transformers.generation.candidate_generator import MTPCandidateGenerator

    monkeypatch.setattr(modeling_layers.MtpModel, "from_pretrained", lambda *_, **__: mtp)
    config = model.generation_config
    config.do_sample = False
    generator = MTPCandidateGenerator(model, config, {})
    outputs = model(text[None, :-1], use_cache=False, output_hidden_states=True)
    positions = torch.arange(len(text))[None]
    found, _ = generator.get_candidates(
        text[None], {"position_ids": positions}, outputs, is_first_iteration=False, n_last_matches=0
    )
    return found[0, len(text) :].tolist()


@pytest.mark.parametrize("name", MODULES)
def test_a_chain_is_what_transformers_drafts(name, monkeypatch):
    model, heads = build(name)
    texts = prompts_of((2, 3, 4, 9, 17, 26))
    truth = [transformers_drafts(model, heads.mtp, text, monkeypatch) for text in texts]
    heads = MtpHeads(model, heads.mtp, num_heads=len(heads.mtp.layers))
    tree = drafts(proposer_of(heads, model, "chain"), model, texts)
    assert tree.tokens[:, 1:].tolist() == truth
    assert len({tuple(chain) for chain in truth}) > 1


@torch.no_grad()
@pytest.mark.parametrize("name", ["deepseek_v3", "glm4_moe", "mellum"])
def test_one_module_is_applied_again_to_its_own_output(name):
    """Written out with transformers' own cache: its output at the token before stands for the target's hidden state."""
    from transformers.cache_utils import MtpCache

    model, heads = build(name)
    heads, mtp = MtpHeads(model, heads.mtp, num_heads=4), heads.mtp
    (text,) = prompts_of((19,))
    chain = drafts(proposer_of(heads, model, "chain"), model, [text]).tokens[0, 1:].tolist()
    del mtp.create_masks_for_mtp_layer  # transformers' own masks again
    cache, hidden, tokens = MtpCache(config=model.config.get_mtp_config()), states_of(model, text[:-1])[None], text[1:]
    for position, drafted in enumerate(chain, start=len(text)):
        positions = torch.arange(position - len(tokens), position)[None]
        hidden = mtp.forward_layer(0, hidden, positions, cache, input_ids=tokens[None])[:, -1:]
        assert model.lm_head(hidden)[0, -1].argmax().item() == drafted
        tokens = torch.tensor([drafted])


@torch.no_grad()
@pytest.mark.parametrize("num_paths", [1, 3])
@pytest.mark.parametrize("name", MODULES)
def test_every_path_is_scored_given_all_its_tokens(name, num_paths):
    """A node's probability is its parent's times what a chain forced along its path says."""
    model, heads = build(name)
    heads = MtpHeads(model, heads.mtp, num_heads=3, num_paths=num_paths)
    texts = prompts_of((2, 17, 5))
    tree = drafts(proposer_of(heads, model, budget=29), model, texts, max_nodes=29)
    check_tree(tree)
    assert tree.max_depth == 3 and (tree.depths == 3).any()
    for row, text in enumerate(texts):
        real = [node for node, value in enumerate(tree.log_probs[row].tolist()) if node and value > -torch.inf]
        assert len(real) == 4 + 2 * num_paths * 4
        for node in real:
            path, above = [], node
            while above:
                path.insert(0, tree.tokens[row, above].item())
                above = tree.parents[row, above].item()
            expected = sum(forced(heads, model, text, path))
            assert tree.log_probs[row, node].item() == pytest.approx(expected, abs=1e-5)


@torch.no_grad()
def forced(heads, model, text, path):
    """Log-probabilities of a path's tokens by the modules, everything computed anew without Ladon's cache and masks."""
    from transformers.cache_utils import DynamicCache

    mtp = heads.mtp
    vars(mtp).pop("create_masks_for_mtp_layer", None)
    known = torch.cat([text, torch.tensor(path, dtype=torch.long)])
    states, found = states_of(model, text[:-1]), []
    last, outputs = heads.num_layers - 1, states
    inputs = [states]  # of each module, at the tokens text[1:], text[2:], ...; then of the last one again
    for depth, token in enumerate(path):
        layer = min(depth, last)
        tokens = known[1 + layer : len(text) + depth]
        if depth > last:
            inputs[-1] = torch.cat([inputs[-1], outputs[-1:]])
        positions = torch.arange(1 + layer, len(text) + depth)[None]
        cache = DynamicCache(config=model.config.get_mtp_config())
        outputs = mtp.forward_layer(layer, inputs[-1][None, : len(tokens)], positions, cache, input_ids=tokens[None])[0]
        found.append(model.lm_head(outputs[-1]).log_softmax(-1)[token].item())
        if depth < last:
            inputs.append(outputs)
    return found


def reference(model, prompt, new_tokens):
    output = model.generate(prompt[None], attention_mask=torch.ones_like(prompt[None]), max_new_tokens=new_tokens)
    return output[0, len(prompt) :].tolist()


TREES = {"dynamic": {"budget": 48}, "chain": {"tree": "chain"}, "auto": {}, "fixed": {"tree": FIXED}}


@pytest.mark.parametrize("options", TREES.values(), ids=TREES)
@pytest.mark.parametrize("name", MODULES)
def test_greedy_equals_generate(name, options):
    """A padded batch of rows of many lengths, in float64 without exception."""
    model, heads = build(name)
    prompts = prompts_of()
    decoder = ladon.Decoder(model, heads, ngrams="off", **options)
    rows = decoder.rows(prompts, max_new_tokens=20)
    for _ in decoder.decode(rows):
        pass
    assert [row.tokens for row in rows] == [reference(model, prompt, 20) for prompt in prompts]
    if options.get("budget"):
        assert decoder.stats.accepted_nodes > 5
    width = max(map(len, prompts))
    ids = torch.stack([nn.functional.pad(prompt, (width - len(prompt), 0)) for prompt in prompts])
    mask = torch.stack([torch.arange(width) >= width - len(prompt) for prompt in prompts]).long()
    out = decoder.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False)
    assert out[:, width:].tolist() == [row.tokens for row in rows]


@pytest.mark.parametrize("name", ["deepseek_v3", "glm4_moe with 3", "mellum"])
def test_sampled_equals_plain_decoding_with_the_same_seed(name):
    model, heads = build(name)
    ids = torch.stack(prompts_of((9, 9, 9)))
    found = []
    for drafting, options in ((None, {"tree": "off"}), (heads, {"budget": 48})):
        decoder = ladon.Decoder(model, drafting, **options)
        found.append(decoder.generate(ids, do_sample=True, temperature=0.9, seed=11, max_new_tokens=24))
    assert decoder.stats.accepted_nodes > 3
    assert found[0].tolist() == found[1].tolist()


def run_changing(model, proposer, *, sizing, chunk=5, picker=GREEDY):
    """Rows that join and leave at any step, two cancelled; yields each step's rows and the trees drafted after it."""
    target = Target(model, prefill_chunk=chunk)
    engine = Engine(target, proposer, budget=sizing, stats=DecodeStats(), clock=CLOCK, max_rows=3)
    rows = [
        Row(prompt=prompt, max_new_tokens=limit, is_stop=lambda _: False, picker=picker)
        for prompt, limit in zip(prompts_of((6, 1, 23, 2, 11)), (30, 3, 19, 12, 14), strict=True)
    ]
    with torch.no_grad():
        for number in range(200):
            if number % 3 == 0 and number < 15:
                engine.submit(rows[number // 3])
            if number == 8:
                engine.cancel(rows[2])
            if engine.step() is None:
                break
            yield engine._batch.decoding, engine._tree
    assert all(row.finished for row in rows) and sum(row.cancelled for row in rows) == 1
    for row in rows:
        truth = reference(model, row.prompt, row.max_new_tokens)
        assert row.tokens == truth[: len(row.tokens)] and (row.cancelled or row.tokens == truth)


@pytest.mark.parametrize("name", MODULES)
def test_drafts_are_those_of_a_row_that_has_just_joined(name):
    """Whatever trees and steps came before, plain ones among them: the same tokens and probabilities, at every step."""
    (model, heads), compared = build(name), 0
    proposer = proposer_of(heads, model, budget=48, num_candidates=16)
    for rows, tree in run_changing(model, proposer, sizing=RandomSizing(3)):
        if tree is None or tree.num_nodes == 1:
            continue
        texts = [torch.cat([row.prompt, torch.tensor(row.tokens)]) for row in rows if not row.finished]
        places = [place for place, row in enumerate(rows) if not row.finished]
        if not texts:
            continue
        fresh = drafts(proposer_of(heads, model, budget=48, num_candidates=16), model, texts, tree.num_nodes)
        assert torch.equal(fresh.tokens, tree.rows(places).tokens)
        torch.testing.assert_close(fresh.log_probs, tree.rows(places).log_probs, rtol=0, atol=1e-5)
        compared += len(texts)
    assert compared > 20


def test_much_that_waits_is_read_though_nothing_is_drafted():
    """Plain steps leave tokens to be read later, but not without a bound."""
    (model, heads), widths = build("glm4_moe with 3"), []
    proposer = proposer_of(heads, model)
    row = Row(prompt=prompts_of((4,))[0], max_new_tokens=150, is_stop=lambda _: False)
    engine = Engine(Target(model), proposer, budget=1, stats=DecodeStats(), clock=CLOCK)
    for _ in engine.run([row]):
        widths.append(proposer._waiting.tokens.shape[1])
    assert row.tokens == reference(model, row.prompt, 150)
    assert max(widths) == 63 and widths.count(0) == 2
