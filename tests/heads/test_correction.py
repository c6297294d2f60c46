"""The Markov correction: on paper, on disk, in training and in a decoder."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

import ladon
from corrections import brute_force, corrected_heads, made
from families import build
from ladon.calibrate.lattice_trace import correction_of, record
from ladon.calibrate.simulate import simulate_budgets
from ladon.config import MARKOV, MARKOV_ROWS, PRODUCT
from ladon.drafting.head_chaining import joint_of, make_chaining
from ladon.errors import HeadsError, InputError
from ladon.heads.calibration import Calibration
from ladon.heads.correction import MarkovCorrection
from ladon.trees import lattice
from ladon.trees.grow import grow_chain, grow_dynamic
from ladon.util.observer import SILENT


@pytest.fixture
def model() -> PreTrainedModel:
    return build("llama")


def test_an_untrained_correction_changes_nothing() -> None:
    correction = MarkovCorrection(num_heads=2, vocab_size=7, rank=3)
    correction.initialise(5)
    assert torch.equal(correction(torch.tensor([[1, 6]])), torch.zeros(1, 2, 7))


def test_few_guesses_are_corrected_as_all_are() -> None:
    correction = made()
    before, guesses = torch.randint(11, (2, 3, 5)), torch.randint(11, (2, 3, 4))
    found = correction.among(before, guesses)
    for row, depth, place in itertools.product(range(2), range(3), range(5)):
        all_of = correction(before[row, :, place])[depth]
        torch.testing.assert_close(found[row, depth, place], all_of[guesses[row, depth]])


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**30), num_candidates=st.integers(1, 4), num_nodes=st.integers(2, 14))
def test_trees_are_the_best_paths_one_token_after_the_other(seed: int, num_candidates: int, num_nodes: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(3, 11, generator=generator)
    correction = made(seed=seed)
    temperatures = torch.rand(3, generator=generator) + 0.5
    candidates = lattice.from_logits(logits[None], num_candidates)
    root = torch.tensor([4])
    found = lattice.conditioned(candidates, root, correction.among, temperatures=temperatures)
    tree = grow_dynamic(found, root, num_nodes)
    expected = sorted(brute_force(logits, 4, correction, num_candidates, temperatures).values(), reverse=True)
    values = tree.log_probs[0, 1:]
    torch.testing.assert_close(values, torch.tensor(expected[: len(values)]), rtol=1e-4, atol=1e-4)
    assert len(values) == min(num_nodes - 1, len(expected))
    named = brute_force(logits, 4, correction, num_candidates, temperatures)
    parents, tokens = tree.parents[0].tolist(), tree.tokens[0].tolist()
    for node in range(1, tree.num_nodes):
        path, at = [], node
        while at:
            path.append(tokens[at])
            at = parents[at]
        assert named[tuple(reversed(path))] == pytest.approx(float(tree.log_probs[0, node]), abs=1e-4)


def test_children_never_sum_to_more_than_one() -> None:
    candidates = lattice.from_logits(8 * torch.randn(5, 3, 11), 11)
    found = lattice.conditioned(candidates, torch.arange(5), made().among, temperatures=torch.tensor([0.3, 1.0, 3.0]))
    assert (found.log_probs.exp().sum(-1) <= 1 + 1e-5).all() and (found.log_probs <= 0).all()
    assert (found.log_probs.diff(dim=-1) <= 0).all()


def test_rows_are_for_the_best_candidates_and_the_others_stay_leaves() -> None:
    candidates = lattice.from_logits(torch.randn(2, 3, 11), 6)
    whole, few = (
        lattice.conditioned(candidates, torch.tensor([1, 2]), made().among, num_rows=rows) for rows in (None, 2)
    )
    assert few.num_rows == 2 and torch.equal(few.tokens, whole.tokens[:, :, :2])
    assert torch.equal(few.next_row, whole.next_row[:, :, :2].masked_fill(whole.next_row[:, :, :2] >= 2, -1))


@torch.no_grad()
def test_successors_are_guessed_beside_the_heads_own_candidates(model: PreTrainedModel) -> None:
    heads = ladon.new_heads(model, num_heads=3, markov_rank=4, markov_successors=5)
    correction = heads.correction
    assert correction is not None and heads.options == heads.options | {"markov_rank": 4, "markov_successors": 5}
    drawn = made(3, heads.vocab_size, 4)
    correction.load_state_dict(drawn.state_dict() | {"successors": correction.successors})
    correction.find_successors()
    products = correction.before @ correction.after.T
    for token in (0, 7):
        assert set(correction.successors[token].tolist()) == set(products[token].topk(5).indices.tolist())
    hidden, root = torch.randn(1, heads.hidden_size, dtype=model.dtype), torch.tensor([3])
    found = make_chaining(heads, MARKOV, 2, 2, "dynamic", 8)(hidden, root)
    base = heads.draft(hidden, root).float().log_softmax(-1)[0]
    first = base[0].topk(2).indices.tolist()
    expected = {*first, *(v for v in correction.successors[3].tolist() if base[0, v] < base[0].topk(2).values[-1])}
    real = found.log_probs[0, 0, 0] > -torch.inf
    tokens = found.tokens[0, 0, 0][real].tolist()
    assert set(tokens) == expected and len(tokens) == len(expected)
    added = correction(torch.tensor([[3, 3, 3]]))[0, 0]
    scores = torch.tensor([float(base[0, v] + added[v]) for v in tokens])
    rest = 1 - sum(math.exp(float(base[0, v])) for v in tokens)
    total = math.log(float(scores.exp().sum()) + rest)
    torch.testing.assert_close(found.log_probs[0, 0, 0][real], scores - total, rtol=1e-4, atol=1e-4)
    leaves = found.next_row[0, 0, 0][real] < 0
    assert [token not in first for token in tokens] == leaves.tolist()


def test_decoding_with_successors_is_exact_and_they_are_saved(model: PreTrainedModel, tmp_path: Path) -> None:
    model = model.double()
    heads = ladon.new_heads(model, num_heads=3, markov_rank=4, markov_successors=3)
    assert heads.correction is not None
    heads.correction.find_successors()
    heads.save(tmp_path)
    loaded = ladon.load_heads(tmp_path, model)
    assert loaded.correction is not None and torch.equal(loaded.correction.successors, heads.correction.successors)
    ids = torch.tensor([[5, 6, 7, 8]])
    plain = model.generate(ids, max_new_tokens=24, do_sample=False)
    decoder = ladon.Decoder(model, loaded, budget=12)
    assert torch.equal(decoder.generate(ids, max_new_tokens=24, do_sample=False), plain)


def test_broken_heads_draft_nothing() -> None:
    candidates = lattice.from_logits(torch.full((1, 3, 11), torch.nan), 4)
    found = lattice.conditioned(candidates, torch.tensor([1]), made().among)
    assert (found.log_probs == -torch.inf).all()


def test_the_chain_follows_the_best_token_after_each_token() -> None:
    correction, logits = made(), torch.randn(1, 3, 11)
    found = lattice.conditioned(lattice.from_logits(logits, 11), torch.tensor([7]), correction.among)
    chain = grow_chain(found, torch.tensor([7]), 4).tokens[0].tolist()
    for depth in range(3):
        after = correction(torch.full((3,), chain[depth]))[depth]
        assert chain[depth + 1] == int((logits[0, depth].log_softmax(-1) + after).argmax())


def test_decoding_is_exact_and_uses_it(model: PreTrainedModel) -> None:
    model = model.double()
    heads = corrected_heads(model)
    ids = torch.tensor([[5, 6, 7, 8]])
    plain = model.generate(ids, max_new_tokens=24, do_sample=False)
    for joint in ("auto", PRODUCT, MARKOV):
        for tree in ("dynamic", "chain"):
            decoder = ladon.Decoder(model, heads, budget=12, tree=tree, joint=joint)
            assert torch.equal(decoder.generate(ids, max_new_tokens=24, do_sample=False), plain)
    assert joint_of(heads, "auto") == MARKOV and joint_of(ladon.new_heads(model), "auto") == "product"


def test_it_is_saved_with_the_heads(model: PreTrainedModel, tmp_path: Path) -> None:
    heads = corrected_heads(model)
    heads.save(tmp_path)
    loaded = ladon.load_heads(tmp_path, model)
    assert loaded.correction is not None and loaded.weights_hash == heads.weights_hash
    assert torch.equal(loaded.correction.after, heads.correction.after)
    assert loaded.options["markov_rank"] == 4
    # Files of corrections that were saved before there were successors stay readable.
    assert not any("successors" in name for name in heads.state_dict())


def test_training_sees_the_token_before(model: PreTrainedModel) -> None:
    heads = corrected_heads(model)
    hidden, following = torch.randn(5, heads.hidden_size, dtype=model.dtype), torch.randint(heads.vocab_size, (5, 3))
    expected = heads(hidden) + heads.correction(following)
    torch.testing.assert_close(heads.corrected(hidden, following), expected)
    other = following.clone()
    other[:, 0] = (other[:, 0] + 1) % heads.vocab_size
    changed = heads.corrected(hidden, other) != expected
    assert changed[:, 0].any() and not changed[:, 1:].any()


@torch.no_grad()
@pytest.mark.parametrize("gate", [0, 1])
def test_a_trace_given_the_truth_is_what_decoding_drafts_after_it(model: PreTrainedModel, gate: int) -> None:
    heads = corrected_heads(model, markov_gate=gate)
    if gate:
        heads.correction.gate.normal_(std=0.5)
    trace = record(model, heads, [torch.tensor([3, 4, 5]), torch.tensor([9, 8])], max_new_tokens=12, num_candidates=6)
    correction = correction_of(heads)
    assert correction is not None
    given = trace.given_the_truth()
    for place in range(trace.num_positions):
        truth = trace.truth[place]
        base = torch.stack([trace.log_probs(k)[place] for k in (1, 2, 3)])
        candidates = lattice.Lattice(tokens=trace.tokens[place, None, :, None].long(), log_probs=base[None, :, None])
        gates = trace.gates[place, None] if gate else None
        table = lattice.conditioned(candidates, trace.roots[place, None].long(), correction, gates=gates)
        row = 0
        for depth in range(3):
            expected = table.log_probs[0, depth, row]
            torch.testing.assert_close(given.log_probs(depth + 1)[place], expected, rtol=1e-3, atol=1e-3)
            right = (table.tokens[0, depth, row] == truth[depth]).nonzero()
            if truth[depth] < 0 or not len(right):
                break
            row = int(table.next_row[0, depth, row, right[0, 0]])
    runs = simulate_budgets(trace, "dynamic", [2, 6])
    assert runs[0].acceptance_length <= runs[1].acceptance_length


def test_temperatures_belong_to_their_joint(model: PreTrainedModel) -> None:
    heads = corrected_heads(model)
    heads.calibration = Calibration(heads="", temperatures=[0.5] * 3, hit_rates=[[]] * 3, joint=MARKOV)
    hidden, root = torch.randn(1, heads.hidden_size, dtype=model.dtype), torch.tensor([3])
    cold, warm = (
        ladon.Decoder(model, heads, joint=joint, budget=8)._proposer(SILENT).propose(hidden, root, 8)
        for joint in (MARKOV, "product")
    )
    expected = grow_dynamic(lattice.from_logits(heads.draft(hidden, root), 7), root, 8)
    torch.testing.assert_close(warm.log_probs, expected.log_probs)
    candidates = lattice.from_logits(heads.draft(hidden, root), 32)
    given_so = {"temperatures": torch.tensor([0.5] * 3), "num_rows": MARKOV_ROWS}
    by_hand = lattice.conditioned(candidates, root, heads.correction.among, **given_so)
    torch.testing.assert_close(cold.log_probs, grow_dynamic(by_hand, root, 8).log_probs)


@pytest.mark.parametrize("rank", [0, -1, 12, True, 2.0])
def test_ranks_that_cannot_be(rank: int) -> None:
    with pytest.raises(HeadsError, match=r"markov_rank is .*; give 1 to 11"):
        MarkovCorrection(num_heads=2, vocab_size=11, rank=rank)


def test_where_it_cannot_be_used(model: PreTrainedModel) -> None:
    with pytest.raises(InputError, match="joint is 'both'; give 'auto', 'product', 'markov'"):
        ladon.Decoder(model, ladon.new_heads(model), joint="both")
    with pytest.raises(HeadsError, match="have no Markov correction; train one"):
        ladon.Decoder(model, ladon.new_heads(model), joint="markov")
    with pytest.raises(HeadsError, match="read the tokens before their guesses themselves"):
        ladon.new_heads(model, family="hydra", markov_rank=2)
    with pytest.raises(HeadsError, match="have a vocabulary of their own"):
        ladon.new_heads(model, family="medusa", draft_vocab_size=8, markov_rank=2)
    with pytest.raises(HeadsError, match="give markov_rank too"):
        ladon.new_heads(model, markov_successors=2)
    with pytest.raises(HeadsError, match="markov_successors is -1; give 0 to"):
        ladon.new_heads(model, markov_rank=2, markov_successors=-1)
    with pytest.raises(HeadsError, match="they have one"):
        corrected_heads(model).add_correction(2)
