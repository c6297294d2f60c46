"""The hidden correction: on paper, on disk, in a calibration and in a decoder."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel

import ladon
from families import build
from ladon.calibrate.findings import calibrate
from ladon.calibrate.lattice_trace import record
from ladon.calibrate.simulate import simulate
from ladon.calibrate.summary import summary
from ladon.calibrate.timing import StepTimes
from ladon.config import HIDDEN, HIDDEN_ROWS
from ladon.drafting.head_chaining import Chaining, hidden_rows, joint_of, make_chaining
from ladon.errors import HeadsError, TreeError
from ladon.heads import Heads
from ladon.heads.calibration import Calibration, read_calibration
from ladon.heads.correction import HiddenCorrection
from ladon.train.data.batches import Collator
from ladon.train.data.rows import Document
from ladon.train.evaluate import evaluate
from ladon.trees.fixed_tree import FixedTree
from ladon.trees.grow import grow_dynamic
from ladon.trees.lattice import Lattice, from_logits

ROWS = 3


@pytest.fixture
def model() -> PreTrainedModel:
    return build("llama").double()


@torch.no_grad()
def corrected_heads(model: PreTrainedModel, num_heads: int = 3, seed: int = 0, family: str = "shared") -> Heads:
    """Heads with a correction, all of random numbers."""
    options = {"projection": "shared"} if family == "medusa" else {}
    heads = ladon.new_heads(model, num_heads, family, hidden_correction=5, **options)
    generator = torch.Generator().manual_seed(seed)
    for parameter in heads.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.25)
    return heads


def drawn(heads: Heads, batch_size: int = 2) -> tuple[Tensor, Tensor]:
    """Hidden rows and roots."""
    generator = torch.Generator().manual_seed(1)
    dtype = next(heads.parameters()).dtype
    roots = torch.randint(heads.vocab_size, (batch_size,), generator=generator)
    return torch.randn(batch_size, heads.hidden_size, generator=generator).to(dtype), roots


@torch.no_grad()
def after(heads: Heads, hidden: Tensor, depth: int, before: int) -> Tensor:
    """Log-probabilities [V] of one depth, from 0, after one token, by the way that training takes."""
    following = torch.full((1, heads.num_heads), before)
    return heads.corrected(hidden[None], following)[0, depth].float().log_softmax(-1)


def rows_of(heads: Heads, hidden: Tensor, root: int) -> list[list[int]]:
    """The tokens after which each depth guesses: after the root, then the likeliest of the depth before."""
    with torch.no_grad():
        alone = heads(hidden[None])[0]
    likely = [after(heads, hidden, 0, root), *alone[1:]]
    return [[root], *(scores.topk(ROWS).indices.tolist() for scores in likely[: heads.num_heads - 1])]


@pytest.mark.parametrize("family", ["shared", "medusa"])
def test_an_untrained_correction_changes_nothing(model: PreTrainedModel, family: str) -> None:
    options = {"projection": "shared"} if family == "medusa" else {}
    heads = ladon.new_heads(model, 3, family, hidden_correction=6, **options)
    heads.states(torch.zeros(1, heads.hidden_size, dtype=torch.float64))
    hidden, roots = drawn(heads)
    following = torch.randint(heads.vocab_size, (2, 3))
    assert torch.equal(heads.corrected(hidden, following), heads(hidden))
    found, plain = hidden_rows(heads, heads.correction, 4)(hidden, roots), from_logits(heads(hidden), 4)
    assert torch.equal(found.tokens[:, :, 1], plain.tokens[:, :, 0])
    torch.testing.assert_close(found.log_probs[:, :, 1], plain.log_probs[:, :, 0])


@pytest.mark.parametrize("family", ["shared", "medusa"])
def test_states_are_what_is_projected(model: PreTrainedModel, family: str) -> None:
    heads = corrected_heads(model, family=family)
    hidden = torch.randn(2, 5, heads.hidden_size, dtype=torch.float64)
    assert heads.states(hidden).shape == (2, 5, 3, heads.hidden_size)
    torch.testing.assert_close(heads.project(heads.states(hidden)), heads(hidden))
    torch.testing.assert_close(heads(hidden)[1, 3], heads(hidden[1, 3]))


def test_the_network_is_the_one_that_is_described() -> None:
    correction = HiddenCorrection(num_heads=2, hidden_size=4, width=3).double()
    for parameter in correction.parameters():
        torch.nn.init.normal_(parameter)
    states, embedded = torch.randn(2, 4).double(), 7 * torch.randn(2, 4).double()
    for k in range(2):
        token = embedded[k] / embedded[k].square().mean().sqrt()
        inner = correction.token_weight @ token + correction.state_weight @ states[k] + correction.depth_bias[k]
        gate, value = inner[:3], inner[3:]
        expected = states[k] + correction.down_weight @ (gate * gate.sigmoid() * value)
        torch.testing.assert_close(correction(states, embedded)[k], expected)
        torch.testing.assert_close(correction(states[k : k + 1], embedded[k], slice(k, k + 1))[0], expected)


@pytest.mark.parametrize("num_heads", [1, 2, 4])
@pytest.mark.parametrize("family", ["shared", "medusa"])
def test_each_row_is_what_follows_its_token(model: PreTrainedModel, num_heads: int, family: str) -> None:
    heads = corrected_heads(model, num_heads, family=family)
    hidden, roots = drawn(heads)
    temperatures = torch.linspace(0.6, 1.7, num_heads)
    for warmth in (None, temperatures):
        with torch.no_grad():
            found = hidden_rows(heads, heads.correction, 6, warmth, num_rows=ROWS)(hidden, roots)
        assert found.tokens.shape == found.log_probs.shape == found.next_row.shape == (2, num_heads, ROWS, 6)
        for b in range(2):
            rows = rows_of(heads, hidden[b], int(roots[b]))
            for depth, tokens in enumerate(rows):
                for row, before in enumerate(tokens):
                    cold = after(heads, hidden[b], depth, before)
                    scores = cold if warmth is None else (cold / warmth[depth]).log_softmax(-1)
                    top = scores.topk(6)
                    assert found.tokens[b, depth, row].tolist() == top.indices.tolist()
                    torch.testing.assert_close(found.log_probs[b, depth, row], top.values, rtol=1e-4, atol=1e-4)
                    later = rows[depth + 1] if depth + 1 < num_heads else []
                    expected = [later.index(token) if token in later else -1 for token in top.indices.tolist()]
                    assert found.next_row[b, depth, row].tolist() == expected


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**30), num_candidates=st.integers(1, 5), num_nodes=st.integers(2, 20))
def test_trees_are_the_best_paths(seed: int, num_candidates: int, num_nodes: int) -> None:
    heads = corrected_heads(build("llama").double(), seed=seed)
    hidden, roots = drawn(heads, 1)
    with torch.no_grad():
        found = hidden_rows(heads, heads.correction, num_candidates, num_rows=ROWS)(hidden, roots)
    rows = rows_of(heads, hidden[0], int(roots))
    paths: dict[tuple[int, ...], float] = {}

    def extend(path: tuple[int, ...], value: float) -> None:
        depth = len(path)
        before = path[-1] if path else int(roots)
        if depth == heads.num_heads or before not in rows[depth]:
            return
        top = after(heads, hidden[0], depth, before).topk(num_candidates)
        for token, score in zip(top.indices.tolist(), top.values.tolist(), strict=True):
            paths[(*path, token)] = value + score
            extend((*path, token), value + score)

    extend((), 0.0)
    tree = grow_dynamic(found, roots, num_nodes)
    best = sorted(paths.values(), reverse=True)[: num_nodes - 1]
    is_real = tree.log_probs[0, 1:] > -torch.inf
    assert int(is_real.sum()) == len(best)
    torch.testing.assert_close(tree.log_probs[0, 1:][is_real], torch.tensor(best), rtol=1e-4, atol=1e-4)
    parents, tokens = tree.parents[0].tolist(), tree.tokens[0].tolist()
    for node in range(1, 1 + len(best)):
        path, at = [], node
        while at:
            path.append(tokens[at])
            at = parents[at]
        assert paths[tuple(reversed(path))] == pytest.approx(float(tree.log_probs[0, node]), abs=1e-4)


def test_the_mass_of_leaves() -> None:
    """Half of depth 1 has no row; of the rest, a fifth of one row and nothing of the other at depth 2."""
    next_row = torch.tensor([[[[0, 1, -1], [0, 0, 0]], [[0, -1, 1], [1, 0, 1]], [[-1, -1, -1], [-1, -1, -1]]]])
    probabilities = torch.tensor([[[[0.3, 0.2, 0.5], [1, 0, 0]], [[0.5, 0.2, 0.1], [0.4, 0.3, 0.3]]]])
    probabilities = torch.cat([probabilities, torch.full((1, 1, 2, 3), 0.3)], dim=1)
    found = Lattice(tokens=torch.zeros_like(next_row), log_probs=probabilities.log(), next_row=next_row)
    torch.testing.assert_close(found.leaf_mass(), torch.tensor([[0.5, 0.3 * 0.2]]))
    alone = from_logits(torch.randn(2, 3, 7), 4)
    assert torch.equal(alone.leaf_mass(), torch.zeros(2, 2))


def test_the_more_rows_the_less_is_lost(model: PreTrainedModel) -> None:
    heads = corrected_heads(model)
    hidden, roots = drawn(heads)
    with torch.no_grad():
        few, some, all_ = (
            hidden_rows(heads, heads.correction, 97, num_rows=rows)(hidden, roots).leaf_mass() for rows in (2, 10, 97)
        )
    assert (few.sum(1) > some.sum(1)).all() and (few[:, 0] > some[:, 0]).all() and (some > 0.001).all()
    torch.testing.assert_close(all_, torch.zeros_like(all_), rtol=0, atol=1e-5)


def test_broken_heads_draft_nothing(model: PreTrainedModel) -> None:
    heads = corrected_heads(model)
    hidden, roots = drawn(heads)
    with torch.no_grad():
        found = hidden_rows(heads, heads.correction, 4)(hidden * torch.nan, roots)
    assert (found.log_probs == -torch.inf).all()


@pytest.mark.parametrize("budget", [1, 8, 64])
@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
def test_decoding_is_exact(model: PreTrainedModel, budget: int, sampled: bool) -> None:
    """Rows of a padded batch, each as it is alone; against transformers if greedy, else against plain decoding."""
    heads = corrected_heads(model)
    prompts = [torch.arange(5, 14), torch.tensor([7, 7]), torch.tensor([50, 3, 21, 9])]
    longest = max(map(len, prompts))
    ids = torch.stack([torch.nn.functional.pad(p, (longest - len(p), 0)) for p in prompts])
    mask = torch.stack([torch.nn.functional.pad(torch.ones_like(p), (longest - len(p), 0)) for p in prompts])
    options = {"max_new_tokens": 20, "do_sample": sampled} | ({"temperature": 0.9} if sampled else {})
    trees = ("dynamic", "chain", FixedTree(((0,), (1,), (0, 0), (0, 1), (0, 0, 0))))
    for tree in trees if budget > 1 else trees[:1]:
        seeds = {"seed": [3, 4, 5]} if sampled else {}
        decoder = ladon.Decoder(model, heads, budget=budget, tree=tree, joint=HIDDEN)
        found = decoder.generate(ids, attention_mask=mask, **options, **seeds)
        for row, prompt in enumerate(prompts):
            if sampled:
                plain = ladon.Decoder(model, tree="off").generate(prompt[None], **options, seed=[3 + row])
            else:
                plain = model.generate(prompt[None], attention_mask=torch.ones_like(prompt)[None], **options)
            answer = plain[0, len(prompt) :].tolist()
            padding = [0] * (found.shape[1] - longest - len(answer))
            assert found[row, longest:].tolist() == answer + padding


def test_it_is_saved_with_the_heads(model: PreTrainedModel, tmp_path: Path) -> None:
    heads = corrected_heads(model)
    heads.save(tmp_path)
    loaded = ladon.load_heads(tmp_path, model)
    assert isinstance(loaded.correction, HiddenCorrection) and loaded.weights_hash == heads.weights_hash
    assert torch.equal(loaded.correction.down_weight, heads.correction.down_weight)
    assert json.loads((tmp_path / "config.json").read_text())["options"]["hidden_correction"] == 5
    assert joint_of(loaded, "auto") == HIDDEN and joint_of(loaded, "product") == "product"


@pytest.mark.parametrize("option", ["markov_rank", "hidden_correction"])
def test_heads_of_any_family_keep_their_correction(model: PreTrainedModel, option: str, tmp_path: Path) -> None:
    heads = ladon.new_heads(model, 2, "medusa", projection="shared", **{option: 4})
    heads.save(tmp_path)
    assert ladon.load_heads(tmp_path, model).options == heads.options
    assert heads.options[option] == 4


def test_files_that_do_not_fit(model: PreTrainedModel, tmp_path: Path) -> None:
    corrected_heads(model).save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for changes, problem in (
        ({"hidden_correction": 6}, r"correction.down_weight is \[32, 5\], expected \[32, 6\]"),
        ({"hidden_correction": 0}, "hidden_correction is 0; give its inner width, 1 or more"),
        ({"markov_rank": 4}, "these shared heads take no hidden correction: they have one. Leave it out"),
    ):
        changed = config | {"options": config["options"] | changes}
        (tmp_path / "config.json").write_text(json.dumps(changed))
        with pytest.raises(HeadsError, match=problem) as raised:
            ladon.load_heads(tmp_path, model)
        assert "\n" not in str(raised.value)
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 90}))
    with pytest.raises(HeadsError, match="vocabulary 90 do not fit a model with hidden size 32 and vocabulary 97"):
        ladon.load_heads(tmp_path, model)


def test_an_embedding_of_another_width_is_refused(model: PreTrainedModel) -> None:
    heads = corrected_heads(model)
    heads._embedding = (torch.nn.Embedding(heads.vocab_size, 7),)
    with pytest.raises(HeadsError, match="this model's input embedding has width 7"):
        heads.corrected(*(part[:, None].expand(-1, 3) if part.ndim == 1 else part for part in drawn(heads)))


def test_training_sees_the_token_before(model: PreTrainedModel) -> None:
    heads = corrected_heads(model)
    hidden, following = drawn(heads, 5)[0], torch.randint(heads.vocab_size, (5, 3))
    expected = heads.corrected(hidden, following)
    other = following.clone()
    other[:, 1] = (other[:, 1] + 1) % heads.vocab_size
    changed = heads.corrected(hidden, other) != expected
    assert changed[:, 1].any() and not changed[:, [0, 2]].any()


def test_reports_on_held_out_rows_are_of_this_joint(model: PreTrainedModel) -> None:
    heads = corrected_heads(model, 2)
    tokens = torch.randint(3, 97, (24,), generator=torch.Generator().manual_seed(5)).tolist()
    document = Document(id="", tokens=np.array(tokens, np.int32), learned=np.ones(len(tokens), np.bool_))
    batch = Collator(2, 97, None)([[document]])
    report = evaluate(model, heads, [batch], budget=6)
    with torch.no_grad():
        hidden = model.base_model(input_ids=torch.tensor([tokens])).last_hidden_state[0]
    lengths = []
    for place in range(len(tokens) - 3):
        root = torch.tensor([tokens[place + 1]])
        with torch.no_grad():
            found = hidden_rows(heads, heads.correction, 32)(hidden[place : place + 1], root)
        tree = grow_dynamic(found, root, 6)
        paths: list[tuple[int, ...]] = [()]
        for token, parent in zip(tree.tokens[0, 1:].tolist(), tree.parents[0, 1:].tolist(), strict=True):
            paths.append((*paths[parent], token))
        truth = tuple(tokens[place + 2 : place + 4])
        lengths.append(1 + sum(truth[:k] in paths for k in (1, 2)))
    assert report.steps == len(lengths)
    assert report.tree_length == pytest.approx(sum(lengths) / len(lengths), abs=1e-6)


def test_a_trace_holds_what_is_guessed_after_the_truth(model: PreTrainedModel, tmp_path: Path) -> None:
    heads = corrected_heads(model)
    prompts = [torch.tensor([3, 4, 5]), torch.tensor([9, 8]), torch.tensor([40])]
    trace = record(model, heads, prompts, max_new_tokens=12, batch_size=2, num_candidates=6)
    assert trace.joint == HIDDEN
    position = 0
    for prompt in prompts:
        with torch.no_grad():
            text = model.generate(prompt[None], max_new_tokens=12, do_sample=False)
            hidden = model.base_model(input_ids=text).last_hidden_state[0]
        answer = text[0, len(prompt) :].tolist()
        for place in range(len(answer) - 1):
            known = answer[place : place + 3]
            for depth, before in enumerate(known):
                top = after(heads, hidden[len(prompt) + place - 1], depth, before).topk(6)
                assert trace.tokens[position, depth].tolist() == top.indices.tolist()
                found = trace.log_probs(depth + 1)[position]
                torch.testing.assert_close(found, top.values, rtol=1e-4, atol=1e-4)
            position += 1
    assert position == trace.num_positions
    trace.save(tmp_path / "trace")
    assert type(trace).load(tmp_path / "trace").joint == HIDDEN
    with pytest.raises(TreeError, match=r"tree is .dynamic.; a trace has what heads guess after the true tokens"):
        simulate(trace, "dynamic", 8)


def test_a_calibration_is_of_this_joint_and_simulates_nothing(model: PreTrainedModel, tmp_path: Path) -> None:
    heads = corrected_heads(model)
    prompts = [torch.tensor([token, token + 1]) for token in range(3, 9)]
    trace = record(model, heads, prompts, max_new_tokens=12, num_candidates=6)
    times = StepTimes(batch=1, context=8, nodes=(1, 4), ms=(1.0, 1.5), drafting_ms=1.2, rounds=3)
    found = calibrate(trace, step_times=[times])
    assert found.joint == HIDDEN and found.simulated == [] and "projected" not in found.step_times
    right = (trace.tokens[:, 0, 0] == trace.truth[:, 0]).float().mean()
    assert found.hit_rates[0][0] == pytest.approx(float(right), abs=1e-5)
    found.save(tmp_path)
    read = read_calibration(tmp_path)
    assert read is not None and (read.joint, read.simulated, read.temperatures) == (HIDDEN, [], found.temperatures)
    console = Console(record=True, width=200, file=io.StringIO())
    for part in summary(found):
        console.print(part)
    shown = console.export_text()
    assert "no trees are simulated" in shown and "1.50x" in shown and "projected speed-up" not in shown


def test_temperatures_belong_to_their_joint(model: PreTrainedModel) -> None:
    heads = corrected_heads(model)
    hidden, roots = drawn(heads)
    calibration = Calibration(heads="", temperatures=[0.5, 0.7, 2.0], hit_rates=[[]] * 3, joint=HIDDEN)

    @torch.no_grad()
    def tables(joint: Chaining) -> Tensor:
        return joint(hidden, roots).log_probs

    plain = tables(hidden_rows(heads, heads.correction, 7))
    warm = tables(hidden_rows(heads, heads.correction, 7, torch.tensor(calibration.temperatures)))
    assert not torch.equal(plain, warm) and plain.shape[2] == HIDDEN_ROWS
    heads.calibration = calibration
    assert torch.equal(tables(make_chaining(heads, HIDDEN, 7, 32, "dynamic", 8)), warm)
    heads.calibration = replace(calibration, joint="product")
    assert torch.equal(tables(make_chaining(heads, HIDDEN, 7, 32, "dynamic", 8)), plain)


@pytest.mark.parametrize("width", [0, -1, True, 2.0])
def test_widths_that_cannot_be(width: int) -> None:
    with pytest.raises(HeadsError, match=r"hidden_correction is .*; give its inner width, 1 or more"):
        HiddenCorrection(num_heads=2, hidden_size=4, width=width)


def test_where_it_cannot_be_used(model: PreTrainedModel) -> None:
    with pytest.raises(HeadsError, match="have no hidden correction; train one"):
        ladon.Decoder(model, ladon.new_heads(model, markov_rank=2), joint="hidden")
    with pytest.raises(HeadsError, match="have no Markov correction; train one"):
        ladon.Decoder(model, corrected_heads(model), joint="markov")
    for family, options in (("medusa", {}), ("lowrank", {"rank": 4})):
        with pytest.raises(HeadsError, match="take no hidden correction: they have output projections of their own"):
            ladon.new_heads(model, family=family, hidden_correction=2, **options)
        with pytest.raises(HeadsError, match="no states to project alike"):
            ladon.new_heads(model, family=family, **options).states(torch.zeros(1, 32, dtype=torch.float64))
    with pytest.raises(HeadsError, match="read the tokens before their guesses themselves"):
        ladon.new_heads(model, family="hydra", hidden_correction=2)
    with pytest.raises(HeadsError, match="have a vocabulary of their own"):
        ladon.new_heads(model, family="medusa", projection="shared", draft_vocab_size=8, hidden_correction=2)
    with pytest.raises(HeadsError, match="they have one"):
        ladon.new_heads(model, markov_rank=2).add_hidden_correction(2)
