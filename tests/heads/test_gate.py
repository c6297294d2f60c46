"""The gate of the Markov correction: its strength depends on the hidden row."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

import ladon
from corrections import brute_force, corrected_heads, made
from families import build
from ladon.config import MARKOV
from ladon.drafting.head_chaining import make_chaining
from ladon.errors import HeadsError
from ladon.heads import Heads
from ladon.train import evaluate as evaluation
from ladon.trees import lattice
from ladon.trees.grow import grow_dynamic

WEIGHTS = "heads.safetensors"


@pytest.fixture
def model() -> PreTrainedModel:
    return build("llama")


def heads_of(model: PreTrainedModel, *, gate: float | None, successors: int = 0) -> Heads:
    """Heads whose correction corrects, with a gate of numbers about this large; the rest is the same whatever it is."""
    heads = corrected_heads(model, markov_successors=successors, markov_gate=int(gate is not None))
    if gate:
        torch.nn.init.normal_(heads.correction.gate, std=gate)
    heads.correction.find_successors()
    return heads


def hidden_rows(heads: Heads, model: PreTrainedModel, count: int = 2) -> Tensor:
    drawn = torch.randn(count, heads.hidden_size, generator=torch.Generator().manual_seed(2))
    return drawn.to(model.dtype)


@torch.no_grad()
@pytest.mark.parametrize("successors", [0, 3])
def test_a_zero_gate_changes_nothing(model: PreTrainedModel, successors: int) -> None:
    zero, none = (heads_of(model, gate=gate, successors=successors) for gate in (0, None))
    assert not zero.correction.gate.any() and none.correction.gate is None
    hidden, root, following = hidden_rows(zero, model), torch.tensor([4, 5]), torch.tensor([[1, 2, 3], [6, 5, 4]])
    assert torch.equal(zero.corrected(hidden, following), none.corrected(hidden, following))
    tables = [make_chaining(heads, MARKOV, 6, 6, "dynamic", 8)(hidden, root) for heads in (zero, none)]
    for name in ("tokens", "log_probs", "next_row"):
        assert torch.equal(*(getattr(table, name) for table in tables))


@torch.no_grad()
def test_all_logits_by_hand(model: PreTrainedModel) -> None:
    heads = heads_of(model.double(), gate=0.5)
    correction, hidden, following = heads.correction, hidden_rows(heads, model), torch.tensor([[1, 2, 3], [6, 5, 4]])
    expected = heads(hidden)
    for row in range(2):
        for k in range(3):
            factor = 2 / (1 + torch.exp(-(correction.gate[k] @ hidden[row])))
            products = correction.after @ correction.before[following[row, k]]
            expected[row, k] += correction.strength[k] * factor * products
    torch.testing.assert_close(heads.corrected(hidden, following), expected)
    assert (correction.gates(hidden) - 1).abs().min() > 1e-3  # each of them says something


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**30), num_candidates=st.integers(1, 4), num_nodes=st.integers(2, 14))
def test_trees_are_the_best_paths_one_token_after_the_other(seed: int, num_candidates: int, num_nodes: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits, gates = 2 * torch.randn(3, 11, generator=generator), 2 * torch.rand(3, generator=generator)
    temperatures, correction = torch.rand(3, generator=generator) + 0.5, made(seed=seed)
    candidates, root = lattice.from_logits(logits[None], num_candidates), torch.tensor([4])
    found = lattice.conditioned(candidates, root, correction.among, temperatures=temperatures, gates=gates[None])
    tree = grow_dynamic(found, root, num_nodes)
    named = brute_force(logits, 4, partial(correction, gates=gates), num_candidates, temperatures)
    expected = sorted(named.values(), reverse=True)
    values = tree.log_probs[0, 1:]
    assert len(values) == min(num_nodes - 1, len(expected))
    torch.testing.assert_close(values, torch.tensor(expected[: len(values)]), rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_successors_are_gated_too(model: PreTrainedModel, dtype: torch.dtype) -> None:
    heads = heads_of(model.to(dtype), gate=0.5, successors=5)
    hidden, root, following = hidden_rows(heads, model, 1), torch.tensor([3]), torch.tensor([[3, 0, 0]])
    found = make_chaining(heads, MARKOV, 2, 2, "dynamic", 8)(hidden, root)
    real = found.log_probs[0, 0, 0] > -torch.inf
    tokens = found.tokens[0, 0, 0][real]
    assert found.log_probs.dtype == torch.float32 and (found.next_row[0, 0, 0][real] < 0).any()
    base = heads(hidden)[0, 0].log_softmax(-1)
    scores = base[tokens] + (heads.corrected(hidden, following) - heads(hidden))[0, 0, tokens]
    total = (scores.exp().sum() + 1 - base[tokens].exp().sum()).log()
    torch.testing.assert_close(found.log_probs[0, 0, 0][real], (scores - total).float(), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_held_out_reports_draft_what_decoding_drafts(model: PreTrainedModel) -> None:
    heads = heads_of(model, gate=0.5)
    hidden, root = hidden_rows(heads, model), torch.tensor([3, 7])
    reported = evaluation._drafted(heads, hidden, root, heads(hidden))
    decoded = make_chaining(heads, MARKOV, 32, 32, "dynamic", 8)(hidden, root)
    assert torch.equal(reported.tokens, decoded.tokens) and torch.equal(reported.log_probs, decoded.log_probs)


@pytest.mark.parametrize("tree", ["dynamic", "chain"])
def test_decoding_is_exact(model: PreTrainedModel, tree: str) -> None:
    model = model.double()
    ids = torch.tensor([[5, 6, 7, 8]])
    plain = model.generate(ids, max_new_tokens=24, do_sample=False)
    decoder = ladon.Decoder(model, heads_of(model, gate=0.5), budget=12, tree=tree)
    assert torch.equal(decoder.generate(ids, max_new_tokens=24, do_sample=False), plain)


def test_it_is_saved_with_the_heads(model: PreTrainedModel, tmp_path: Path) -> None:
    heads = heads_of(model, gate=0.5)
    heads.save(tmp_path)
    loaded = ladon.load_heads(tmp_path, model)
    assert torch.equal(loaded.correction.gate, heads.correction.gate) and loaded.weights_hash == heads.weights_hash
    assert loaded.options["markov_gate"] == 1
    # Files of corrections that were saved before there were gates stay readable.
    without = heads_of(model, gate=None)
    assert not any("gate" in name for name in (*without.correction.state_dict(), *without.correction.options))


@pytest.mark.parametrize("broken", ["of other sizes", "missing", "unexpected"])
def test_files_that_do_not_fit_name_it(model: PreTrainedModel, tmp_path: Path, broken: str) -> None:
    heads_of(model, gate=None if broken == "unexpected" else 0.5).save(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    if broken == "missing":
        del tensors["correction.gate"]
    else:
        tensors["correction.gate"] = torch.zeros(3, 5)
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(HeadsError, match=r"correction\.gate") as caught:
        ladon.load_heads(tmp_path, model)
    assert "\n" not in str(caught.value)


def test_gradients_reach_it(model: PreTrainedModel) -> None:
    """They are those of a factor per depth; heads need none."""
    heads = heads_of(model.double(), gate=0.5)
    hidden, following = hidden_rows(heads, model, 5), torch.randint(heads.vocab_size, (5, 3))
    weights = torch.randn(5, 3, heads.vocab_size, dtype=torch.float64)
    (heads.corrected(hidden, following) * weights).sum().backward()
    with torch.no_grad():
        half = (heads.correction.gate @ hidden.mT).sigmoid().mT  # [5, K]
        spoken = (heads.correction(following) * weights).sum(-1)
        expected = (2 * half * (1 - half) * spoken).mT @ hidden
    torch.testing.assert_close(heads.correction.gate.grad, expected)


@pytest.mark.parametrize("gate", [2, -1, 1.0, "1"])
def test_what_is_no_gate(model: PreTrainedModel, gate: object) -> None:
    with pytest.raises(HeadsError, match=r"markov_gate is .*; give 1 for a gate, or 0 for none"):
        ladon.new_heads(model, markov_rank=2, markov_gate=gate)
    with pytest.raises(HeadsError, match="give markov_rank too"):
        ladon.new_heads(model, markov_gate=gate)
