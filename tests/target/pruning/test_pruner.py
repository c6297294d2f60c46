"""Early pruning against decoding without it: every family, random trees and keep sets, the layers, what is refused."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import PreTrainedModel

import ladon
from drafts import TREES, RandomSizing, decode, make_proposer
from families import FAMILIES, FAST, VOCAB_SIZE, WORKABLE, build
from greedy import PROMPTS, generate
from ladon import Pruning
from ladon.decoder.options import chosen_pruning
from ladon.errors import HeadsError, InputError, UnsupportedModelError
from ladon.heads.calibration import Calibration
from ladon.heads.early_exit import EarlyExit, new_early_exit
from ladon.target.pruning.pruner import Pruner
from ladon.target.pruning.self_test import check_pruning
from ladon.target.target import Target
from ladon.tree_size.adaptive import AutoSizing
from ladon.tree_size.policy import PrunedSteps
from ladon.tree_size.profile_store import machine_of
from ladon.util.machine import environment
from random_trees import draw, pad_paths, plain_logits
from toys import Packed, deep_llama

SEVERAL_STATES = ("gemma3n_text", "hy_v4")  # per token and layer; they cannot be pruned
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4}  # many families compute softmax or routing in float32
CRITERIA = ("evidence", "siblings", "top-k")


def slow(name: str) -> Any:
    """A parameter that only the slow suite runs."""
    return pytest.param(name, marks=pytest.mark.slow)


PRUNED = [slow(name) if name not in FAST else name for name in WORKABLE if name not in SEVERAL_STATES]


def random_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every score be a random number: what survives is any closed set."""

    def score(self: Pruner, hidden: Tensor, tree: Any, ancestors: Tensor) -> Tensor:
        from ladon.target.pruning.node_scores import node_scores, path_scores

        return path_scores(node_scores(-torch.rand(tree.tokens.shape), tree), ancestors)

    monkeypatch.setattr(Pruner, "score", score)


def run_pruned(target: Target, lengths: list[int], pruning: Pruning, *, seed: int = 1, num_nodes: int = 9) -> float:
    """Worst difference of survivors' logits to plain forwards over several steps, each committed."""
    rng, model = random.Random(seed), target.model
    tokens = [[rng.randrange(3, VOCAB_SIZE) for _ in range(length)] for length in lengths]
    cache = target.new_cache(len(tokens))
    target.prefill([torch.tensor(row) for row in tokens], cache)
    worst = 0.0
    for _ in range(3):
        drawn = draw(rng, [target.depth_cap(length) for length in cache.host_lengths], num_nodes, VOCAB_SIZE)
        out = target.verify(drawn.tree, cache, pruning)
        assert out.nodes is not None and out.num_pruned == num_nodes - out.nodes.shape[1]
        assert out.logits.shape == (len(tokens), out.tree.num_nodes, VOCAB_SIZE) == (*out.nodes.shape, VOCAB_SIZE)
        assert out.hidden.shape[:2] == out.nodes.shape
        paths = []
        for row, prefix in enumerate(tokens):
            kept = [node for node in out.nodes[row].tolist() if drawn.real[row][node]]
            places = [out.nodes[row].tolist().index(node) for node in kept]
            plain = plain_logits(model, [prefix + drawn.tokens(row, drawn.path(row, node)) for node in kept])
            worst = max(worst, (out.logits[row, places] - plain).abs().max().item())
            path = drawn.path(row, rng.choice(kept))
            paths.append([out.nodes[row].tolist().index(node) for node in path])
        path, count = pad_paths(paths)
        given_path = out.given(path)
        cache.commit(given_path, count)
        cache.mirror(count.tolist())
        for row in range(len(tokens)):
            tokens[row] += drawn.tokens(row, given_path[row, : int(count[row])].tolist())
    _check_cache(target, cache, tokens)
    return worst


def _check_cache(target: Target, cache: Any, tokens: list[list[int]]) -> None:
    """Keys and values of every layer are those of reading the same tokens at once."""
    fresh = target.new_cache(len(tokens))
    target.prefill([torch.tensor(row) for row in tokens], fresh)
    for layer, expected in zip(cache.layers, fresh.layers, strict=True):
        for name, store in layer.stores.items():
            for row, ids in enumerate(tokens):
                ours, theirs = store[:, row, :, : len(ids)], expected.stores[name][:, row, :, : len(ids)]
                torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3 if ours.dtype == torch.float32 else 1e-4)


@pytest.mark.parametrize("name", PRUNED)
def test_survivors_say_what_they_say_unpruned(name: str) -> None:
    dtype = torch.float64 if FAMILIES[name].float64 else torch.float32
    target = Target(build(name, dtype))
    num_layers = target.model.config.get_text_config(decoder=True).num_hidden_layers
    for layer in range(1, num_layers):
        for keep, criterion in ((4, "evidence"), (1, "siblings"), (7, "top-k")):
            pruning = Pruning(layer=layer, keep=keep, criterion=criterion, top_k=3)
            assert run_pruned(target, [5, 19, 2], pruning) < TOLERANCE[dtype]


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_eager_attention(name: str) -> None:
    model = build(name)
    model.set_attn_implementation("eager")
    assert run_pruned(Target(model), [5, 19, 2], Pruning(layer=1, keep=4)) < TOLERANCE[torch.float64]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), data=st.data())
def test_random_trees_and_keep_sets(seed: int, data: st.DataObject) -> None:
    num_nodes = data.draw(st.integers(2, 20))
    lengths = data.draw(st.lists(st.integers(1, 30), min_size=1, max_size=4))
    pruning = Pruning(layer=data.draw(st.integers(1, 4)), keep=data.draw(st.integers(1, num_nodes - 1)))
    with pytest.MonkeyPatch.context() as patch:
        random_scores(patch)
        assert run_pruned(Target(deep_llama()), lengths, pruning, seed=seed, num_nodes=num_nodes) < 1e-9


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("kind", ["oracle", "random"])
def test_decoding_says_the_same(model: PreTrainedModel, kind: str, tree: str, monkeypatch: pytest.MonkeyPatch) -> None:
    truth = [generate(model, prompt, 14) for prompt in PROMPTS]
    for keep, by_chance in ((3, True), (3, False), (6, True)):
        with monkeypatch.context() as patch:
            if by_chance:
                random_scores(patch)
            proposer = make_proposer(kind, TREES[tree], truth, 97, None)
            outputs, stats = decode(Target(model), proposer, PROMPTS, 14, pruning=Pruning(layer=1, keep=keep))
        assert outputs == truth
        assert (stats.nodes_pruned > 0) == (tree != "chain" or keep == 3)
        assert stats.nodes_verified > stats.nodes_pruned
    if kind == "oracle":
        assert stats.accepted_nodes > 0, "nothing was drafted, so nothing was tried"


def test_a_sizing_decides_step_by_step(model: PreTrainedModel) -> None:
    """Pruned or whole, of any size, at any step: the tokens are the same, and the sizing is told what went on."""
    truth = [generate(model, prompt, 30) for prompt in PROMPTS]
    kept = set()
    for seed in range(4):
        sizing = RandomSizing(seed)
        proposer = make_proposer("oracle", "dynamic", truth, 97, None)
        pruning = Pruning(layer=1, keep=4)
        outputs, stats = decode(Target(model), proposer, PROMPTS, 30, budget=sizing, pruning=pruning)
        assert outputs == truth
        assert sum(r.batch * (r.nodes - r.kept) for r in sizing.records) == stats.nodes_pruned
        kept |= {(record.kept, record.kept < record.nodes) for record in sizing.records}
    assert (4, True) in kept and any(count > 4 and not is_cut for count, is_cut in kept)


@pytest.mark.parametrize(("keep", "learns"), [(4, True), ("threshold", False)])
def test_automatic_sizes_know_what_pruning_does(keep: int | str, learns: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A number of kept nodes makes sizes to choose from; a threshold keeps as many as it likes, always."""
    model, asked = deep_llama(), []

    def asked_for(*given: Any, **more: Any) -> AutoSizing:
        asked.append(given)
        return AutoSizing(*given, **more)

    monkeypatch.setattr("ladon.decoder.options.AutoSizing", asked_for)
    heads = ladon.new_heads(model, num_heads=3)
    decoder = ladon.Decoder(model, heads, prune=Pruning(layer=2, keep=keep, threshold=0.1))
    assert [pruned for *_, pruned in asked] == [PrunedSteps(keep=4, share=0.4) if learns else None]
    prompt = torch.arange(3, 40)[None]
    assert decoder.generate(prompt, max_new_tokens=24).tolist() == model.generate(prompt, max_new_tokens=24).tolist()


def test_a_pruned_truth_is_the_bonus(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the root alone: the drafts are all right and all dropped, and each step emits one token."""
    truth = [generate(model, PROMPTS[1], 9)]
    proposer = make_proposer("oracle", "chain", truth, 97, None)
    outputs, stats = decode(Target(model), proposer, PROMPTS[1:2], 9, pruning=Pruning(layer=1, keep=1))
    assert outputs == truth and stats.acceptance_length == 1.0
    assert stats.pruned_share == pytest.approx(stats.nodes_pruned / (stats.nodes_pruned + stats.row_steps))


@pytest.mark.parametrize("criterion", CRITERIA)
def test_the_layers_see_what_survives(criterion: str) -> None:
    """Layers 1 and 2 run on all nodes, those after on the survivors, and so does the output projection."""
    model = deep_llama()
    seen: list[int] = []
    hooks = [*(layer.self_attn.o_proj for layer in model.model.layers), model.lm_head]
    target = Target(model, self_test=False)
    cache = target.new_cache(2)
    target.prefill([torch.arange(3, 9), torch.arange(3, 20)], cache)
    drawn = draw(random.Random(0), [None, None], 12, VOCAB_SIZE)
    for module in hooks:
        module.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[1]))
    target.verify(drawn.tree, cache, Pruning(layer=2, keep=5, criterion=criterion))
    assert seen == [12, 12, 5, 5, 5, 5]


def test_threshold_keeps_what_passes() -> None:
    """As many as pass in the row where most do; a lower bar lets more through."""
    target = Target(deep_llama(), self_test=False)
    pruner = target.pruner(Pruning(layer=2, keep="threshold"))
    hidden, drawn = torch.randn(3, 16, 32, dtype=torch.float64), draw(random.Random(0), [None] * 3, 16, VOCAB_SIZE)
    from ladon.trees.token_tree import ancestor_mask

    ancestors = ancestor_mask(drawn.tree.parents, drawn.tree.max_depth)
    paths = pruner.score(hidden, drawn.tree, ancestors)
    kept = []
    for threshold in (1e-30, 1e-3, 0.05, 0.999):
        found = Pruner(target.model, replace(pruner.options, threshold=threshold)).choose(hidden, drawn.tree, ancestors)
        assert found.shape[1] == int((paths.exp() >= threshold).sum(1).max())
        kept.append(found.shape[1])
    assert kept == sorted(kept, reverse=True) and kept[-1] == 1 < kept[0]
    top = Pruner(target.model, replace(pruner.options, criterion="top-k", top_k=VOCAB_SIZE))
    assert top.choose(hidden, drawn.tree, ancestors).shape[1] == max(sum(row) for row in drawn.real)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_threshold_decodes_the_same(model: PreTrainedModel, criterion: str) -> None:
    truth = [generate(model, prompt, 12) for prompt in PROMPTS]
    proposer = make_proposer("oracle", "dynamic", truth, 97, None)
    pruning = Pruning(layer=1, keep="threshold", criterion=criterion, threshold=0.01, top_k=40)
    outputs, _ = decode(Target(model), proposer, PROMPTS, 12, pruning=pruning)
    assert outputs == truth


def test_rows_in_several_spans_are_verified_whole() -> None:
    model = build("llama4_text")
    target = Target(model)
    target._regimes.parts = lambda lengths: _split(type(target._regimes).parts(target._regimes, lengths))  # type: ignore
    cache = target.new_cache(2)
    target.prefill([torch.arange(3, 9), torch.arange(3, 20)], cache)
    drawn = draw(random.Random(0), [None, None], 8, VOCAB_SIZE)
    out = target.verify(drawn.tree, cache, Pruning(layer=1, keep=3))
    assert out.nodes is None and out.tree is drawn.tree and out.logits.shape[1] == 8
    path = torch.tensor([[0, 1], [0, 0]])
    assert torch.equal(out.given(path), path)


def _split(parts: list[Any]) -> list[Any]:
    return [replace(part, rows=[row]) for part in parts for row in part.rows]


@pytest.mark.parametrize("name", SEVERAL_STATES)
def test_several_states_per_token_are_refused(name: str) -> None:
    model = build(name)
    with pytest.raises(
        UnsupportedModelError, match=r"cannot be pruned after layer 1: .*several per token.*prune='off'"
    ):
        ladon.Decoder(model, ladon.new_heads(model), prune=Pruning(layer=1, keep=4))


def test_a_model_that_cannot_be_pruned_is_found_out() -> None:
    """Layers that depend on the number of tokens in the call pass the test of trees and fail that of pruning."""
    model = deep_llama(3)

    def scale(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        count = args[0].shape[1]
        return (args[0] * (0.1 if count == 5 else 1.0), *args[1:]), kwargs

    model.model.layers[2].register_forward_pre_hook(scale, with_kwargs=True)
    target = Target(model)
    assert target.supports_trees
    with pytest.raises(UnsupportedModelError, match=r"after layer 1: what survives differs by .* prune='off'"):
        target.pruner(Pruning(layer=1, keep=4))


def test_each_layer_is_tested_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tested: list[int] = []
    monkeypatch.setattr("ladon.target.target.check_pruning", lambda target, layer: tested.append(layer))
    model = deep_llama(4)
    target = Target(model)
    target.check()
    for layer, keep in ((1, 4), (1, 4), (1, 8), (2, 4)):
        target.pruner(Pruning(layer=layer, keep=keep))
    assert tested == [1, 2]
    model.float()
    target.check()
    target.pruner(Pruning(layer=1, keep=4))
    assert tested == [1, 2, 1], "another dtype is another model"
    check_pruning(Target(model, self_test=False), 3)


def test_the_model_is_left_as_it_was(model: PreTrainedModel) -> None:
    heads = ladon.new_heads(model, num_heads=3)
    decoder = ladon.Decoder(model, heads, budget=8, prune=Pruning(layer=1, keep=4))
    with torch.no_grad():
        before = model(PROMPTS[1][None]).logits
    decoder.generate(PROMPTS[1][None], max_new_tokens=9)
    assert decoder.stats.nodes_pruned > 0
    with torch.no_grad():
        assert torch.equal(model(PROMPTS[1][None]).logits, before)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_an_early_exit_is_used_and_left_as_it_was() -> None:
    """It goes to the model's dtype in a copy; trained to prefer other tokens, it keeps other nodes."""
    model = deep_llama()
    early_exit = new_early_exit(model, 2).float()
    nn.init.normal_(early_exit.down_weight, std=3.0)
    target = Target(model, self_test=False)
    drawn, hidden = draw(random.Random(0), [None], 16, VOCAB_SIZE), torch.randn(1, 16, 32, dtype=torch.float64)
    ancestors = torch.eye(16, dtype=torch.bool)[None]
    ancestors[:, :, 0] = True
    tree = replace(drawn.tree, parents=torch.tensor([[-1, *[0] * 15]]), log_probs=torch.tensor([[0.0, *[-3.0] * 15]]))
    with_it, without = (
        target.pruner(Pruning(layer=2, keep=6, early_exit=given_exit)).choose(hidden, tree, ancestors)
        for given_exit in (early_exit, None)
    )
    assert not torch.equal(with_it, without)
    assert early_exit.scale.dtype == torch.float32


def test_a_packed_projection_takes_top_k_only() -> None:
    model = build("llama")
    model.lm_head = Packed(model.lm_head)
    target = Target(model, self_test=False)
    assert run_pruned(target, [5, 9], Pruning(layer=1, keep=4, criterion="top-k")) < 1e-5
    with pytest.raises(InputError, match=r"packed or offloaded.*criterion='top-k'"):
        target.pruner(Pruning(layer=1, keep=4))


def test_a_packed_projection_passes_the_test_for_top_k() -> None:
    model = build("llama")
    heads = ladon.new_heads(model, num_heads=3)
    model.lm_head = Packed(model.lm_head)
    target = Target(model)
    assert run_pruned(target, [5, 9], Pruning(layer=1, keep=4, criterion="top-k")) < 1e-5
    heads.calibration = calibration({"best": BEST})
    assert chosen_pruning("auto", heads, target) is None, "by evidence"
    heads.calibration = calibration({"best": {**BEST, "criterion": "top-k"}})
    assert chosen_pruning("auto", heads, target) == Pruning(layer=1, keep=4, criterion="top-k", weight=0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": 0}, "layer is 0; give a number of 1 or more"),
        ({"layer": True}, "layer is True"),
        ({"keep": 0}, 'keep is 0; give a number of 1 or more or "threshold"'),
        ({"keep": "some"}, "keep is 'some'"),
        ({"top_k": 0}, "top_k is 0"),
        ({"criterion": "other"}, "criterion is 'other'; give 'evidence', 'siblings', 'top-k'"),
        ({"threshold": 1.0}, "threshold is 1.0"),
        ({"weight": float("nan")}, "weight is nan"),
        (
            {"early_exit": EarlyExit(layer=2, num_layers=4, hidden_size=8, width=1)},
            "the early exit is for layer 2, not 1",
        ),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Pruning(**{"layer": 1, "keep": 4, **options})


def test_what_does_not_fit_the_model_is_refused(model: PreTrainedModel) -> None:
    heads = ladon.new_heads(model)
    with pytest.raises(HeadsError, match="after layer 2 of 2; give 1 to 1"):
        ladon.Decoder(model, heads, prune=Pruning(layer=2, keep=4))
    other = EarlyExit(layer=1, num_layers=4, hidden_size=8, width=1)
    with pytest.raises(InputError, match=r"for a model of 4 layers of width 8, this one has 2 of\s+width 32"):
        ladon.Decoder(model, heads, prune=Pruning(layer=1, keep=4, early_exit=other))
    with pytest.raises(
        InputError, match=r'prune is True; give "off", "auto", a layer and the nodes to keep \("4:16"\)'
    ):
        ladon.Decoder(model, heads, prune=True)
    for text, message in (("1:", "prune is '1:'"), ("1:0", "keep is 0"), ("1:-4", "prune is"), ("0:4", "layer is 0")):
        with pytest.raises(InputError, match=message):
            ladon.Decoder(model, heads, prune=text)


def test_named_by_layer_and_size(model: PreTrainedModel) -> None:
    assert ladon.Decoder(model, ladon.new_heads(model), prune="1:4").pruning == Pruning(layer=1, keep=4)


BEST = {"layer": 1, "keep": 4, "criterion": "evidence", "weight": 0.5, "top_k": 8, "trained": False}


def calibration(pruning: dict[str, Any]) -> Calibration:
    return Calibration(heads="", temperatures=[1.0] * 3, hit_rates=[[]] * 3, pruning=pruning)


def test_auto_does_what_the_calibration_found(model: PreTrainedModel, tmp_path: Any) -> None:
    heads = ladon.new_heads(model, num_heads=3)
    assert ladon.Decoder(model, heads).pruning is None
    assert ladon.Decoder(model, heads, prune="auto").pruning is None, "never calibrated"
    for found in ({}, {"best": None}):
        heads.calibration = calibration(found)
        assert ladon.Decoder(model, heads, prune="auto").pruning is None
    heads.calibration = calibration({"best": BEST})
    assert ladon.Decoder(model, heads, prune="auto").pruning == Pruning(layer=1, keep=4, weight=0.5)
    assert ladon.Decoder(model, heads).pruning is None
    trained = calibration({"best": {**BEST, "trained": True}})
    heads.calibration = trained
    assert ladon.Decoder(model, heads, prune="auto").pruning is None, "the early exit is gone"
    heads.calibration = None
    heads.save(tmp_path)
    new_early_exit(model, 1).save(tmp_path)
    loaded = ladon.load_heads(tmp_path, model)
    loaded.calibration = trained
    found = ladon.Decoder(model, loaded, prune="auto").pruning
    assert found is not None and found.early_exit is not None and found.early_exit.layer == 1


def test_auto_is_for_the_machine_that_was_measured(model: PreTrainedModel) -> None:
    heads, here = ladon.new_heads(model, num_heads=3), machine_of(model)
    assert here.keys() == {"dtype", "device", "cpu", "threads"} and here["dtype"] == "float64"
    assert here.items() <= (environment(model.device) | {"dtype": "float64"}).items(), "what a calibration records"
    for place in ({}, here, {**here, "python": "3.0"}):
        heads.calibration = calibration({"place": place, "best": BEST})
        assert ladon.Decoder(model, heads, prune="auto").pruning is not None
    heads.calibration = calibration({"place": {**here, "dtype": "bfloat16", "threads": 999}, "best": BEST})
    with pytest.warns(
        UserWarning, match=r"with dtype bfloat16, not float64; threads 999, not .* --pruning` again"
    ) as w:
        assert ladon.Decoder(model, heads, prune="auto").pruning is None
    assert len(w) == 1 and "\n" not in str(w[0].message) and w[0].filename == __file__
    assert ladon.Decoder(model, heads).pruning is None
    heads.calibration = calibration({"place": {**here, "cpu": "another"}, "best": None})
    assert ladon.Decoder(model, heads, prune="auto").pruning is None, "nothing to leave off, so nothing to say"


def test_a_calibration_of_another_criterion_is_named(model: PreTrainedModel) -> None:
    heads = ladon.new_heads(model, num_heads=3)
    heads.calibration = calibration({"best": {**BEST, "criterion": "other"}})
    with pytest.raises(HeadsError, match=r"criterion is 'other'.*run `ladon calibrate --pruning` again"):
        ladon.Decoder(model, heads, prune="auto")


def test_auto_leaves_off_what_a_changed_model_cannot(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tested again before the next run, not in the middle of it; one that was asked for by name is still refused."""
    heads, prompt = ladon.new_heads(model, num_heads=3), torch.arange(3, 40)[None]
    heads.calibration = calibration({"best": BEST})
    auto = ladon.Decoder(model, heads, budget=8, prune="auto")
    named = ladon.Decoder(model, heads, budget=8, prune=Pruning(layer=1, keep=4))

    def refuse(target: Target, layer: int) -> None:
        raise UnsupportedModelError("it cannot any more")

    auto.generate(prompt, max_new_tokens=9)
    assert auto.stats.nodes_pruned > 0
    monkeypatch.setattr("ladon.target.target.check_pruning", refuse)
    model.set_attn_implementation("eager")
    assert auto.generate(prompt, max_new_tokens=9).tolist() == model.generate(prompt, max_new_tokens=9).tolist()
    assert auto.pruning is None and auto.stats.nodes_pruned == 0
    with pytest.raises(UnsupportedModelError, match="it cannot any more"):
        named.generate(prompt, max_new_tokens=9)


def test_auto_leaves_a_model_alone_that_cannot_be_pruned() -> None:
    model = build("gemma3n_text")
    heads = ladon.new_heads(model, num_heads=3)
    heads.calibration = calibration({"best": BEST})
    decoder = ladon.Decoder(model, heads, prune="auto")
    assert decoder.pruning is None
