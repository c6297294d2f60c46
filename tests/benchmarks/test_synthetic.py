from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from synthetic import SyntheticDecoder, SyntheticDrafts, SyntheticProposer
from torch import Tensor
from transformers import PreTrainedModel

from ladon import Decoder, new_heads
from ladon.errors import InputError
from ladon.sampling.acceptance import Accepted
from ladon.trees.check import check_tree
from ladon.trees.fixed_tree import FixedTree
from ladon.trees.grow import grow_dynamic

RATES = [[0.5, 0.2, 0.1, 0.0], [0.3, 0.25, 0.05, 0.05], [0.1, 0.1, 0.1, 0.1]]
VOCAB = 97
NEW_TOKENS = 60
PROMPTS = [torch.tensor([5, 6, 7]), torch.tensor([9, 8]), torch.tensor([3, 3, 3, 3]), torch.tensor([40])]


def key(prompt: Tensor) -> tuple[int, ...]:
    return tuple(prompt.tolist())


def batch(prompts: Sequence[Tensor]) -> dict[str, Tensor]:
    longest = max(map(len, prompts))
    padded = [torch.nn.functional.pad(prompt, (longest - len(prompt), 0)) for prompt in prompts]
    masks = [torch.nn.functional.pad(torch.ones_like(prompt), (longest - len(prompt), 0)) for prompt in prompts]
    return {"input_ids": torch.stack(padded), "attention_mask": torch.stack(masks)}


def answers_of(model: PreTrainedModel) -> dict[tuple[int, ...], list[int]]:
    plain = Decoder(model)
    sequences = [plain.generate(prompt[None], max_new_tokens=NEW_TOKENS)[0, len(prompt) :] for prompt in PROMPTS]
    return {key(prompt): row.tolist() for prompt, row in zip(PROMPTS, sequences, strict=True)}


def close(share: float, rate: float, count: int) -> bool:
    """Within 4.5 standard deviations of a binomial share."""
    return abs(share - rate) <= 4.5 * math.sqrt(rate * (1 - rate) / count) + 1e-12


def test_the_truth_stands_at_each_rank_as_often_as_asked() -> None:
    answer = torch.randint(0, VOCAB, (6000,)).tolist()
    drafts = SyntheticDrafts({(1,): answer}, RATES, vocab_size=VOCAB)
    places = torch.arange(len(answer) - 3)
    lattice = drafts.at(torch.zeros_like(places), places)
    assert lattice.tokens.shape == (len(places), 3, 1, 4) and lattice.num_rows == 1
    for depth, rates in enumerate(RATES):
        truth = torch.tensor(answer[depth + 1 :])[: len(places)]
        hits = (lattice.tokens[:, depth, 0] == truth[:, None]).float()
        assert hits.sum(1).max() == 1
        assert all(close(float(hits[:, rank].mean()), rate, len(places)) for rank, rate in enumerate(rates))
        # and the lattice says so itself
        assert torch.allclose(lattice.log_probs[0, depth, 0].exp(), torch.tensor(rates), atol=1e-6)


@given(
    rates=st.lists(st.lists(st.floats(0, 0.2), min_size=4, max_size=4), min_size=1, max_size=4),
    answer=st.lists(st.integers(0, 10), min_size=1, max_size=12),
    seed=st.integers(0, 1000),
)
def test_drafts_are_lattices_and_grow_into_trees(rates: list[list[float]], answer: list[int], seed: int) -> None:
    """Distinct tokens, sorted log-probabilities; any place up to what a last step may reach, and beyond."""
    drafts = SyntheticDrafts({(1,): answer}, rates, vocab_size=11, seed=seed)
    places = torch.arange(len(answer) + len(rates) + 3)
    lattice = drafts.at(torch.zeros_like(places), places)
    assert all(len(set(row)) == 4 for row in lattice.tokens.flatten(0, 2).tolist())
    scores = lattice.log_probs
    assert (scores[..., :-1] >= scores[..., 1:]).all() and (scores <= 0).all()
    check_tree(grow_dynamic(lattice, torch.zeros_like(places), 9))


def test_draws_depend_on_seed_and_prompt_alone() -> None:
    one, other = {(1, 2): [3, 4, 5, 6]}, {(7,): [8] * 40}
    zero = torch.zeros(4, dtype=torch.long)
    alone = SyntheticDrafts(one, RATES, vocab_size=VOCAB).at(zero, torch.arange(4)).tokens
    beside = SyntheticDrafts(other | one, RATES, vocab_size=VOCAB).at(zero + 1, torch.arange(4)).tokens
    assert torch.equal(alone, beside)
    seeded = SyntheticDrafts(one, RATES, vocab_size=VOCAB, seed=1).at(zero, torch.arange(4)).tokens
    assert not torch.equal(alone, seeded)


@pytest.mark.parametrize("tree", ["chain", "dynamic", FixedTree(((0,), (1,), (0, 0), (0, 1), (0, 0, 1)))])
def test_output_is_plain_decodings(model: PreTrainedModel, tree: str | FixedTree) -> None:
    """In a batch, where rows end apart, every row says what plain decoding says alone."""
    answers = answers_of(model)
    drafts = SyntheticDrafts(answers, RATES, vocab_size=VOCAB)
    decoder = SyntheticDecoder(model, new_heads(model, num_heads=3), drafts, tree=tree, budget=8)
    stop = answers[key(PROMPTS[1])][20]
    inputs = batch(PROMPTS)
    outputs = decoder.generate(**inputs, max_new_tokens=NEW_TOKENS, eos_token_id=stop, pad_token_id=0)
    expected = Decoder(model).generate(**inputs, max_new_tokens=NEW_TOKENS, eos_token_id=stop, pad_token_id=0)
    assert torch.equal(outputs, expected)  # type: ignore[arg-type]
    assert decoder.stats.acceptance_length > 1.3


def test_a_chain_is_accepted_as_often_as_the_rates_say(model: PreTrainedModel) -> None:
    """Of each depth, the share of steps that accept it: the product of the first ranks' rates."""
    drafts = SyntheticDrafts(answers_of(model), RATES, vocab_size=VOCAB, seed=3)
    decoder = SyntheticDecoder(model, new_heads(model, num_heads=3), drafts, tree="chain", budget=4)
    accepted = [0, 0, 0]
    steps = 0
    for prompt in PROMPTS:
        trace = decoder.trace(prompt, max_new_tokens=NEW_TOKENS)
        for step in list(trace)[:-3]:  # the last may be cut by the limit
            steps += 1
            for depth in range(len(step.path) - 1):
                accepted[depth] += 1
    expected = [0.5, 0.5 * 0.3, 0.5 * 0.3 * 0.1]
    assert steps > 100 and all(close(n / steps, rate, steps) for n, rate in zip(accepted, expected, strict=True))


def moved(counts: list[int]) -> Accepted:
    """An outcome of which only the counts matter."""
    none = torch.zeros(len(counts), dtype=torch.long)
    counted = torch.tensor(counts)
    return Accepted(root=none, path=none[:, None], count=counted, tokens=none[:, None], last=none, bonus=none)


def test_rows_come_and_go() -> None:
    """Rows that join come behind; after others have left, each goes on where it stands."""
    answers = {key(prompt): [10 * number + place for place in range(9)] for number, prompt in enumerate(PROMPTS)}
    drafts = SyntheticDrafts(answers, [[1.0, 0.0]], vocab_size=VOCAB)
    proposer = SyntheticProposer(drafts, grow_dynamic)

    def drafted(rows: int) -> list[int]:
        return proposer.propose(torch.zeros(rows, 4), torch.zeros(rows, dtype=torch.long), 2).tokens[:, 1].tolist()

    proposer.join(PROMPTS[:2], torch.zeros(2, 4))
    assert drafted(2) == [1, 11]
    proposer.observe(moved([1, 2]), torch.zeros(2, 2, 4))
    proposer.join(PROMPTS[2:], torch.zeros(2, 4))
    assert drafted(4) == [2, 13, 21, 31]
    proposer.observe(moved([2, 1, 1, 1]), torch.zeros(4, 2, 4))
    proposer.keep([3, 1])
    assert drafted(2) == [32, 14]
    proposer.keep([])
    proposer.join(PROMPTS[:1], torch.zeros(1, 4))
    assert drafted(1) == [1]
    assert proposer.propose(torch.zeros(1, 4), torch.zeros(1, dtype=torch.long), 1).num_nodes == 1


@pytest.mark.parametrize(
    ("answers", "rates", "vocab_size", "problem"),
    [
        ({(1,): [2]}, [[0.5, 0.6]], 9, "no probabilities"),
        ({(1,): [2]}, [[0.5, -0.1]], 9, "no probabilities"),
        ({(1,): [2]}, [[math.nan]], 9, "no probabilities"),
        ({(1,): [2]}, [[0.5], [0.2, 0.1]], 9, "as many ranks for each"),
        ({(1,): [2]}, [], 9, "as many ranks for each"),
        ({(1,): [2]}, [[0.5, 0.1]], 2, "cannot fill 2 ranks"),
        ({}, [[0.5]], 9, "no recorded answer"),
        ({(1,): []}, [[0.5]], 9, "no recorded answer"),
    ],
)
def test_what_cannot_be_drafted_is_refused(
    answers: dict[tuple[int, ...], list[int]], rates: list[list[float]], vocab_size: int, problem: str
) -> None:
    with pytest.raises(InputError, match=problem):
        SyntheticDrafts(answers, rates, vocab_size=vocab_size)


def test_unknown_prompts_are_refused() -> None:
    drafts = SyntheticDrafts({(1,): [2]}, [[0.5]], vocab_size=9)
    with pytest.raises(InputError, match="without a recorded answer"):
        drafts.number_of(torch.tensor([2]))
