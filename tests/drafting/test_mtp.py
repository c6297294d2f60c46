"""MTP modules: what they read and guess is what transformers' own loop reads and guesses; what is said stays the same.

All modules are random, so a guess is right by chance only: where acceptance matters the trees are wide.
"""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import families
import ladon
from drafts import FIXED, RandomSizing, make_engine
from ladon.cli.main import run
from ladon.drafting.mtp import MtpProposer
from ladon.drafting.ngram_lookup import NgramLookup
from ladon.engine.sequence import Row
from ladon.engine.stats import DecodeStats
from ladon.errors import HeadsError, InputError
from ladon.heads.mtp import MtpHeads
from ladon.sampling.acceptance import Accepted
from ladon.sampling.lossy import Typical
from ladon.sampling.sampling_params import GREEDY, TemperatureSampling
from ladon.target.pruning.pruner import Pruning
from ladon.target.target import Target
from ladon.trees.check import check_tree
from user_side import make_tokenizer

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
    options = {"num_candidates": 4, "budget": 12} | options
    return MtpProposer(heads, model, tree, **options)


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
    heads = MtpHeads(model, heads.mtp, num_heads=4)
    texts = prompts_of((2, 17, 5))
    proposer = proposer_of(heads, model, budget=41, joint=f"paths:{num_paths}")
    tree = drafts(proposer, model, texts, max_nodes=41)
    check_tree(tree)
    assert tree.max_depth == 4 and (tree.depths == 4).any()
    for row, text in enumerate(texts):
        real = [node for node, value in enumerate(tree.log_probs[row].tolist()) if node and value > -torch.inf]
        assert len(real) == 4 + 3 * num_paths * 4
        for node in real:
            path, above = [], node
            while above:
                path.insert(0, tree.tokens[row, above].item())
                above = tree.parents[row, above].item()
            expected = sum(forced(heads, model, text, path))
            assert tree.log_probs[row, node].item() == pytest.approx(expected, abs=1e-5)


def test_a_fixed_tree_is_filled_whole():
    """Its paths are those that get candidates, however many they are and whatever their probability."""
    model, heads = build("glm4_moe")
    shape = ladon.FixedTree([path for rank in range(8) for path in ((rank,), (rank, 0), (rank, 0, 0))])
    tree = drafts(proposer_of(heads, model, shape, num_candidates=8), model, prompts_of((4, 11)), max_nodes=25)
    assert tree.num_nodes == 25 and tree.log_probs.isfinite().all()


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


class Noting(MtpProposer):
    """Notes what it drafts: the engine may have merged n-grams into it at the end of the step."""

    drafted = None

    def propose(self, hidden, root, max_nodes):
        self.drafted = super().propose(hidden, root, max_nodes)
        return self.drafted


def run_changing(model, proposer, *, sizing, chunk=5, sampling_params=GREEDY, **options):
    """Rows that join and leave at any step, one cancelled; yields each step's rows and the trees drafted after it."""
    target = Target(model, prefill_chunk=chunk)
    engine = make_engine(target, proposer, budget=sizing, max_rows=3, **options)
    rows = [
        Row(prompt=prompt.repeat(2), max_new_tokens=limit, is_stop=lambda _: False, sampling_params=sampling_params)
        for prompt, limit in zip(prompts_of((6, 1, 23, 2, 11)), (30, 3, 19, 12, 14), strict=True)
    ]
    with torch.no_grad():
        for number in range(200):
            if number % 3 == 0 and number < 15:
                engine.submit(rows[number // 3])
            if number == 8:
                engine.cancel(rows[2])
            proposer.drafted = None
            if engine.step() is None:
                break
            yield engine._scheduler.decoding, proposer.drafted
    assert all(row.finished for row in rows) and sum(row.cancelled for row in rows) == 1
    assert not any(row.states for row in rows)
    for row in rows if sampling_params is GREEDY else []:
        truth = reference(model, row.prompt, row.max_new_tokens)
        assert row.tokens == truth[: len(row.tokens)] and (row.cancelled or row.tokens == truth)


WAYS = {
    "trees": lambda: {},
    "read at once": lambda: {"chunk": 1000},
    "n-grams": lambda: {"lookup": NgramLookup(is_chain=False)},
    "pruned": lambda: {"pruning": Pruning(layer=1, keep=6)},
    "typical": lambda: {"rule": Typical(), "sampling_params": TemperatureSampling(temperature=0.9)},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODULES)
def test_drafts_are_those_of_a_row_that_has_just_joined(name, way):
    """Whatever trees and steps came before, plain ones among them: the same tokens and probabilities, at every step."""
    (model, heads), compared = build(name), 0
    proposer = Noting(heads, model, "dynamic", num_candidates=16, budget=48)
    for rows, tree in run_changing(model, proposer, sizing=RandomSizing(3), **WAYS[way]()):
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


@torch.no_grad()
@pytest.mark.parametrize("name", MODULES)
def test_rows_that_join_when_nothing_is_drafted_know_their_first_token(name):
    """It is read with what comes after it, at the first step that drafts."""
    (model, heads), texts = build(name), prompts_of((5, 14, 3))
    proposer = proposer_of(heads, model)
    assert drafts(proposer, model, [text[:-1] for text in texts], max_nodes=1).num_nodes == 1
    proposer.mirror([])
    last = torch.stack([states_of(model, text[:-1])[-1:] for text in texts])
    zeros, tokens = torch.zeros(len(texts), 1, dtype=torch.long), torch.stack([text[-1:] for text in texts])
    none, new = zeros[:, 0], tokens[:, 0]
    accepted = Accepted(root=new, path=zeros, tokens=tokens, count=none + 1, last=none, bonus=new)
    proposer.observe(accepted, last)
    tree = proposer.propose(last[:, 0], tokens[:, 0], 12)
    fresh = drafts(proposer_of(heads, model), model, texts)
    assert torch.equal(tree.tokens, fresh.tokens)
    torch.testing.assert_close(tree.log_probs, fresh.log_probs, rtol=0, atol=1e-5)


def test_much_that_waits_is_read_though_nothing_is_drafted():
    """Plain steps leave tokens to be read later, but not without a bound."""
    (model, heads), widths = build("glm4_moe with 3"), []
    proposer = proposer_of(heads, model)
    row = Row(prompt=prompts_of((4,))[0], max_new_tokens=150, is_stop=lambda _: False)
    engine = make_engine(Target(model), proposer, budget=1)
    for _ in engine.run([row]):
        widths.append(proposer._waiting.tokens.shape[1])
    assert row.tokens == reference(model, row.prompt, 150)
    assert max(widths) == 63 and widths.count(0) == 2


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """A model on disk that ships with a module, as its checkpoints name it, and the same in memory."""
    folder = tmp_path_factory.mktemp("mellum")
    tokenizer = make_tokenizer()
    ends = dict.fromkeys(("eos_token_id", "bos_token_id", "pad_token_id"), tokenizer.eos_token_id)
    model, heads = families.random_mtp("mellum", 1, torch.float32, vocab_size=len(tokenizer), **ends)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (file,) = folder.glob("*.safetensors")
    save_file({**load_file(file), **dict(as_shipped(heads.mtp))}, file, metadata={"format": "pt"})
    return folder, model, heads


def as_shipped(mtp):
    """The names and shapes in which Mellum's checkpoints hold a module: a projection for each expert, and so on."""
    outside = {"eh_proj": "fc", "enorm": "pre_fc_norm_embedding", "hnorm": "pre_fc_norm_hidden", "post_norm": "norm"}
    for name, tensor in mtp.layers[0].state_dict().items():
        part = name.split(".")[0]
        if part in outside:
            yield f"mtp.{outside[part]}.weight", tensor
        elif name.endswith("experts.gate_up_proj") or name.endswith("experts.down_proj"):
            parts = ("gate_proj", "up_proj") if "gate_up" in name else ("down_proj",)
            place = name.removeprefix("mtp_block.").rpartition(".")[0]
            for expert, weights in enumerate(tensor):
                for kind, weight in zip(parts, weights.chunk(len(parts)), strict=True):
                    yield f"mtp.layers.0.{place}.{expert}.{kind}.weight", weight.contiguous()
        else:
            yield f"mtp.layers.0.{name.removeprefix('mtp_block.')}", tensor


def test_modules_come_from_the_models_checkpoint(shipped):
    folder, model, heads = shipped
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    found = ladon.load_mtp(loaded)
    theirs = heads.mtp.layers.state_dict()
    assert {name: tensor.tolist() for name, tensor in found.mtp.layers.state_dict().items()} == {
        name: tensor.tolist() for name, tensor in theirs.items()
    }
    assert found.mtp.embed_tokens is loaded.get_input_embeddings() and found.num_heads == 3
    texts = prompts_of((4, 15))
    tokens = [
        drafts(proposer_of(known, owner), owner, texts).tokens for known, owner in ((heads, model), (found, loaded))
    ]
    assert torch.equal(*tokens)


def test_modules_follow_a_model_to_another_dtype_and_belong_to_it(shipped):
    folder, model, _ = shipped
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    loaded.set_experts_implementation("eager")
    heads = ladon.load_mtp(loaded)
    decoder = ladon.Decoder(loaded.double(), heads, budget=32)
    assert decoder.heads.mtp.layers[0].eh_proj.weight.dtype == torch.float64
    assert heads.mtp.layers[0].eh_proj.weight.dtype == torch.float32, "the decoder has a copy"
    (prompt,) = prompts_of((7,))
    assert decoder.generate(prompt[None], max_new_tokens=12)[0, 7:].tolist() == reference(loaded, prompt, 12)
    other, _ = families.random_mtp("mellum", 1, torch.float32, vocab_size=model.config.vocab_size)
    nn.init.normal_(other.get_output_embeddings().weight)
    with pytest.raises(HeadsError, match="trained on"):
        ladon.Decoder(other, heads)


@pytest.mark.parametrize("command", ["generate", "bench"])
def test_the_command_line_takes_them(command, shipped, tmp_path, capsys):
    folder, *_ = shipped
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "def read(self):"}\n')
    options = ["--max-new-tokens", "6", "--json", "--heads", "mtp", "--model", str(folder)]
    options += ["--prompt", "def read"] if command == "generate" else ["--prompts", str(prompts), "--repeats", "1"]
    assert run([command, *options]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    if command == "bench":
        assert document["heads"] == {"family": "mtp", "num": 3}
        assert {row["mode"] for row in document["results"]} >= {"plain", "chain", "dynamic", "auto"}


def test_models_without_modules_are_refused_in_one_line(tiny_llama, shipped, monkeypatch, capsys):
    _, model, _ = shipped
    with pytest.raises(HeadsError, match="no MTP modules") as error:
        ladon.load_mtp(tiny_llama)
    assert "\n" not in str(error.value)
    with pytest.raises(HeadsError, match="cannot load the MTP modules of MellumForCausalLM from nowhere"):
        ladon.load_mtp(families.random_mtp("mellum", 1, torch.float32)[0])
    assert run(["generate", "--heads", "mtp", "--prompt", "x"]) == 2
    assert "no MTP modules" in capsys.readouterr().err
    monkeypatch.delattr(modeling_layers.MtpModel, "forward_layer")
    with pytest.raises(HeadsError, match=r"cannot load MTP modules; 5\.23 can"):
        ladon.load_mtp(model)


def test_dynamic_frequencies_are_left_as_they_were():
    """The rotary embedding is the target's: what the modules make it see is nothing to those who run it next."""
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    model, heads = families.random_mtp("glm4_moe", 1, rope_parameters=rope, max_position_embeddings=24)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    (prompt,), before = prompts_of((13,)), model.model.rotary_emb.inv_freq.clone()
    found = ladon.Decoder(model, heads, budget=12).generate(prompt[None], max_new_tokens=30)
    assert torch.equal(model.model.rotary_emb.inv_freq, before)
    assert found[0, 13:].tolist() == reference(model, prompt, 30)


def test_offloaded_models_are_refused_and_the_modules_keep_their_weights(shipped):
    _, model, heads = shipped
    with torch.device("meta"):
        nowhere = type(model)(model.config)
    for attempt in (lambda: ladon.load_mtp(nowhere), lambda: heads.bind(nowhere, force=True)):
        with pytest.raises(HeadsError, match="are offloaded"):
            attempt()
    heads.bind(model)
    assert all(parameter.device.type == "cpu" for parameter in heads.mtp.layers.parameters())


@pytest.mark.parametrize("ends", ["cancelled", "an error"])
def test_hidden_states_of_prompts_are_let_go_of(ends, shipped, monkeypatch):
    """Also of those that are never read to their end."""
    _, model, heads = shipped
    engine = make_engine(Target(model, prefill_chunk=4), proposer_of(heads, model), budget=8, stats=DecodeStats())
    row = Row(prompt=prompts_of((19,))[0], max_new_tokens=4, is_stop=lambda _: False)
    engine.submit(row)
    engine.step()
    assert [len(states) for states in row.states] == [4]
    if ends == "cancelled":
        engine.cancel(row)
        engine.step()
    else:
        monkeypatch.setattr(Target, "read", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.step()
    assert row.finished and not row.states


def test_what_modules_cannot_do_is_said(shipped, tmp_path):
    _, model, heads = shipped
    for attempt in (
        lambda: heads(torch.zeros(1, 32)),
        lambda: heads.save(tmp_path),
        lambda: heads.initialise(model, 0),
        lambda: heads.add_correction(4),
        lambda: ladon.Decoder(model, heads, joint="product"),
        lambda: ladon.Decoder(model, heads, joint="markov"),
    ):
        with pytest.raises(HeadsError) as error:
            attempt()
        assert "\n" not in str(error.value)


def test_transformers_own_loop_is_refused(shipped):
    _, model, heads = shipped
    with pytest.raises(InputError, match=r"ladon\.load_mtp"):
        ladon.Decoder(model, heads).generate(torch.arange(3, 9)[None], use_mtp=True, max_new_tokens=4)


def test_a_prompt_is_read_whole_whatever_was_kept(shipped):
    """What the modules have read is not kept with the target's keys and values."""
    _, model, heads = shipped
    decoder = ladon.Decoder(model, heads)
    first = decoder.rows(prompts_of((9,)), max_new_tokens=8, return_dict_in_generate=True)
    list(decoder.decode(first))
    again = torch.tensor([*first[0].prompt_ids, *first[0].tokens, 5])
    rows = decoder.rows([again], past=[first[0].past], max_new_tokens=8)
    list(decoder.decode(rows))
    assert rows[0].stats.reused_tokens == 0 and rows[0].tokens == reference(model, again, 8)
