"""Held-out evaluation: every number counted again position by position, by the definitions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import ladon.train.evaluate as evaluation
from ladon import new_heads
from ladon.heads import Heads, HydraHeads, SharedHeads
from ladon.train.data.batches import Collator, Document
from ladon.train.evaluate import HeldOutReport, evaluate, lines, measure_cost, projected_speedup

K = 3
BUDGET = 7


def documents(sizes: Sequence[int], seed: int = 0) -> list[Document]:
    """Random texts whose first third is not learned."""
    rng = np.random.default_rng(seed)
    return [
        Document(f"d{i}", rng.integers(3, 97, size, dtype=np.int32), np.arange(size) >= size // 3)
        for i, size in enumerate(sizes)
    ]


def batches(found: Sequence[Document], heads: Heads) -> list[dict[str, Tensor]]:
    """Two batches of packed rows."""
    collate = Collator(heads.num_heads, heads.vocab_size, heads.token_ids)
    return [collate([found[:2], found[2:3]]), collate([found[3:]])]


@pytest.fixture
def heads(tiny_llama: PreTrainedModel) -> Heads:
    """Random heads, some of whose guesses are right."""
    made = new_heads(tiny_llama, num_heads=K)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made


def goals(document: Document) -> Iterator[tuple[int, list[int | None]]]:
    """Each position with what its heads learn there, None for nothing."""
    last = len(document.tokens)
    for t in range(last):
        if t + 1 < last and document.learned[t + 1]:
            places = range(t + 2, t + 2 + K)
            yield t, [int(document.tokens[p]) if p < last and document.learned[p] else None for p in places]


def tree_match(probs: Tensor, truth: Sequence[int]) -> int:
    """1 + how many true tokens the tree of the most probable paths holds; probs [K, V]."""
    candidates = [probs[k].topk(8).indices.tolist() for k in range(K)]
    paths = [path for depth in range(1, K + 1) for path in product(*candidates[:depth])]
    paths.sort(key=lambda path: -math.prod(float(probs[k, token]) for k, token in enumerate(path)))
    kept = set(paths[: BUDGET - 1])
    return 1 + sum(tuple(truth[:depth]) in kept for depth in range(1, K + 1))


@torch.no_grad()
def by_hand(model: PreTrainedModel, heads: Heads, found: Sequence[Document]) -> HeldOutReport:
    """The report, from each document alone."""
    losses: list[list[float]] = [[] for _ in range(K)]
    ranks: list[list[int]] = [[] for _ in range(K)]
    chains, trees = [], []
    for document in found:
        ids = torch.from_numpy(document.tokens.astype(np.int64))[None]
        hidden = model.model(ids).last_hidden_state[0]
        for t, goal in goals(document):
            probs = heads(hidden[t]).softmax(-1)
            for k, token in enumerate(goal):
                if token is not None:
                    losses[k].append(-math.log(probs[k, token]))
                    ranks[k].append(int((probs[k] > probs[k, token]).sum()))
            if None not in goal:
                truth = [token for token in goal if token is not None]
                right = [int(probs[k].argmax()) == token for k, token in enumerate(truth)]
                chains.append(1 + sum(all(right[: k + 1]) for k in range(K)))
                trees.append(tree_match(probs, truth))
    return HeldOutReport(
        positions=tuple(map(len, losses)),
        loss=tuple(np.mean(values) for values in losses),
        accuracy=tuple(tuple(np.mean([rank < n for rank in found]) for n in range(1, 6)) for found in ranks),
        steps=len(chains),
        chain_length=float(np.mean(chains)),
        tree_length=float(np.mean(trees)),
        budget=BUDGET,
    )


@torch.no_grad()
def speaking(model: PreTrainedModel, sizes: Sequence[int]) -> list[Document]:
    """Texts that the model itself says, so that heads are right now and then."""
    made = []
    for document in documents(sizes):
        start = torch.from_numpy(document.tokens[:4].astype(np.int64))[None]
        said = model.generate(start, max_new_tokens=len(document.tokens) - 4, do_sample=False, eos_token_id=None)
        made.append(Document(document.id, said[0].numpy().astype(np.int32), document.learned))
    return made


def same(found: HeldOutReport, expected: HeldOutReport) -> None:
    assert (found.positions, found.steps, found.budget) == (expected.positions, expected.steps, expected.budget)
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)
    for mine, yours in zip(found.accuracy, expected.accuracy, strict=True):
        assert mine == pytest.approx(yours)
    assert found.chain_length == pytest.approx(expected.chain_length)
    assert found.tree_length == pytest.approx(expected.tree_length)


def test_equals_counting_by_hand(tiny_llama: PreTrainedModel) -> None:
    heads = new_heads(tiny_llama, num_heads=K)  # as the projection: right where the model repeats itself
    found = speaking(tiny_llama, [30, 25, 40, 33, 6])
    report = evaluate(tiny_llama, heads, batches(found, heads), budget=BUDGET)
    expected = by_hand(tiny_llama, heads, found)
    same(report, expected)
    assert min(report.chain_length, report.tree_length) > 1  # the test saw right guesses
    assert max(report.chain_length, report.tree_length) < K + 1


def test_chunks_change_nothing(tiny_llama: PreTrainedModel, heads: Heads, monkeypatch: pytest.MonkeyPatch) -> None:
    found = documents([30, 25, 40, 33, 4])
    whole = evaluate(tiny_llama, heads, batches(found, heads))
    monkeypatch.setattr(evaluation, "rows_per_chunk", lambda *_: 5)
    same(evaluate(tiny_llama, heads, batches(found, heads)), whole)


def test_heads_that_know_the_text_reach_the_greatest_length(tiny_llama: PreTrainedModel) -> None:
    """On 5, 6, 7, ... each token says what follows; a head that sees it is always right, and its shift is proven."""

    class Counting(SharedHeads):
        def forward(self, hidden: Tensor, following: Tensor | None = None) -> Tensor:
            assert following is not None  # [T, K], the first being the token after the one that is read
            goal = following[:, :1] + torch.arange(1, K + 1)
            return torch.nn.functional.one_hot(goal, self.vocab_size).double() * 50

    heads = Counting(num_heads=K, hidden_size=32, vocab_size=97, expansion=1)
    heads.initialise(tiny_llama, 0)
    heads.bind(tiny_llama, force=True)
    counting = [Document("c", np.arange(5, 45, dtype=np.int32), np.ones(40, dtype=np.bool_))]
    report = evaluate(tiny_llama, heads, [Collator(K, 97)([counting])], budget=BUDGET)
    assert report.positions == (38, 37, 36) and report.steps == 36
    assert max(report.loss) < 1e-6 and min(min(row) for row in report.accuracy) == 1.0
    assert report.chain_length == report.tree_length == K + 1


def test_trees_of_conditioned_heads_follow_several_paths(tiny_llama: PreTrainedModel) -> None:
    """The token after u is u + 1, but they would rather say u + 2: their chain is wrong at once, and their tree of 7
    nodes holds two true tokens, the second (.45 x .45) after a token that is not the best of the first head.
    """

    class Rather(HydraHeads):
        def forward(self, hidden: Tensor, following: Tensor | None = None) -> Tensor:
            assert following is not None
            guesses = torch.stack([following + 1, following + 2], dim=-1)
            logits = torch.full((*following.shape, self.vocab_size), -50.0, dtype=torch.float64)
            return logits.scatter(-1, guesses, torch.tensor([0.45, 0.55]).double().log().expand(guesses.shape))

        def after(self, hidden: Tensor, paths: Tensor) -> Tensor:
            return self.forward(hidden, paths[:, :, -1])

    heads = Rather(num_heads=K, hidden_size=32, vocab_size=97)
    heads.initialise(tiny_llama, 0)
    heads.bind(tiny_llama, force=True)
    counting = [Document("c", np.arange(5, 45, dtype=np.int32), np.ones(40, dtype=np.bool_))]
    report = evaluate(tiny_llama, heads, [Collator(K, 97)([counting])], budget=BUDGET)
    assert [row[:2] for row in report.accuracy] == [(0.0, 1.0)] * K
    assert report.chain_length == 1.0 and report.tree_length == 3.0


def test_modes_and_dtypes_stay_as_they_were(tiny_llama: PreTrainedModel, heads: Heads) -> None:
    """Float32 heads beside a bfloat16 model, as in training; the clock measures a copy."""
    model = tiny_llama.bfloat16().train()
    heads.bind(model, force=True).float().train()
    report = evaluate(model, heads, batches(documents([30, 25, 40, 33, 4]), heads))
    assert all(math.isfinite(loss) for loss in report.loss)
    assert model.training and heads.training
    model.eval()
    assert measure_cost(model, heads, torch.arange(3, 20), budget=4) > 0
    assert {p.dtype for p in heads.parameters()} == {torch.float32} and model.dtype == torch.bfloat16
    assert heads.project(torch.zeros(1, 32, dtype=torch.bfloat16)).shape == (1, 97)


def test_nothing_learned_is_no_number(tiny_llama: PreTrainedModel, heads: Heads) -> None:
    report = evaluate(tiny_llama, heads, batches(documents([3, 3, 3, 3]), heads), budget=BUDGET)
    assert report.steps == 0 and report.positions[-1] == 0
    values = report.as_dict()
    assert values["tree_length"] is None and values["loss"][-1] is None and values["budget"] == BUDGET
    assert values["accuracy"][0][0] is not None


def report_of(accuracy: float, length: float) -> HeldOutReport:
    return HeldOutReport(
        positions=(9, 9),
        loss=(2.0, math.nan),
        accuracy=((accuracy,) * 5, (accuracy / 2,) * 5),
        steps=9,
        chain_length=length - 0.2,
        tree_length=length,
        budget=16,
    )


def test_table_shows_reports_side_by_side_and_what_is_normal() -> None:
    reports = {"1 %": report_of(0.3, 1.5), "10 %": report_of(0.4, 1.9), "100 %": report_of(0.5, 2.4)}
    table = lines(reports, cost=1.2)
    assert max(map(len, table)) <= 80
    text = "\n".join(table)
    assert table[0].split()[-7:] == ["1", "%", "10", "%", "100", "%", "Vicuna-7B"]
    assert "head 1: top-1" in text and "0.300    0.400    0.500       0.560" in text
    assert "head 2: loss (nats)" in text and "-        -        -" in text
    assert "tokens per step, tree of 16" in text and "2.57 *" in text
    assert projected_speedup(reports["100 %"], 1.2) == pytest.approx(2.0)
    assert next(line for line in table if line.startswith("speed-up")).split()[-5:-2] == ["1.250", "1.583", "2.000"]
    assert "Vicuna-7B: MEDUSA-1" in table[-1]
    assert lines({}) == []
