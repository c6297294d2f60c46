"""The early exit's judgement of a tree's nodes against slow references."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor, nn

from ladon.heads.model_parts import OutputProjection
from ladon.target.pruning.node_scores import CRITERIA, EarlyView, evidence, siblings, top_k
from ladon.trees.token_tree import TokenTree

H, V, N = 8, 23, 9
PARENTS = [[-1, 0, 0, 1, 1, 2, 3, 0, 0], [-1, 0, 1, 2, 2, 0, 5, 0, 0]]
REAL = [[True] * 9, [True] * 7 + [False] * 2]


def make(bias: bool) -> tuple[EarlyView, Tensor]:
    """A view of two trees whose siblings are distinct, the second with padding; and all its logits [2, N, V]."""
    torch.manual_seed(2)
    rng = random.Random(5)
    log_probs, tokens = torch.zeros(2, N), torch.zeros(2, N, dtype=torch.long)
    for row, parents in enumerate(PARENTS):
        tokens[row] = torch.tensor(rng.sample(range(V), N))
        shares = {parent: 0.2 + 0.7 * rng.random() for parent in set(parents)}
        for node, parent in enumerate(parents[1:], start=1):
            own = math.log(shares[parent] / (parents.count(parent) + rng.random()))
            log_probs[row, node] = log_probs[row, parent] + own if REAL[row][node] else -torch.inf
    tree = TokenTree(tokens=tokens, parents=torch.tensor(PARENTS), log_probs=log_probs, max_depth=4)
    module, hidden = nn.Linear(H, V, bias=bias), torch.randn(2, N, H)
    view = EarlyView(tree=tree, hidden=hidden, projection=OutputProjection(module, module.weight, H, V))
    return view, module(hidden).detach()


def prior_of(view: EarlyView, row: int, node: int) -> float:
    """The proposer's probability of a node after its parent."""
    log_probs = view.tree.log_probs[row]
    return float((log_probs[node] - log_probs[PARENTS[row][node]]).exp())


def family_of(row: int, node: int) -> list[int]:
    return [n for n in range(1, N) if REAL[row][n] and PARENTS[row][n] == PARENTS[row][node]]


def real_nodes() -> list[tuple[int, int]]:
    return [(row, node) for row in range(2) for node in range(1, N) if REAL[row][node]]


@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_top_k(bias: bool) -> None:
    view, logits = make(bias)
    scores, passed = top_k(view, 1.0, 4)
    assert passed is not None
    for row, node in real_nodes():
        parent, token = PARENTS[row][node], int(view.tree.tokens[row, node])
        assert float(scores[row, node]) == pytest.approx(float(logits[row, parent].log_softmax(-1)[token]), abs=1e-5)
        assert bool(passed[row, node]) == (token in logits[row, parent].topk(4).indices.tolist())
    assert {bool(passed[row, node]) for row, node in real_nodes()} == {True, False}


@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_siblings(bias: bool) -> None:
    view, logits = make(bias)
    scores, _ = siblings(view, 1.0, 4)
    for row, node in real_nodes():
        parent, family = PARENTS[row][node], family_of(row, node)
        weights = [float(logits[row, parent, view.tree.tokens[row, n]].exp()) for n in family]
        together = sum(prior_of(view, row, n) for n in family)
        expected = weights[family.index(node)] / sum(weights) * together
        assert math.exp(float(scores[row, node])) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_evidence(bias: bool) -> None:
    view, logits = make(bias)
    scores, _ = evidence(view, 0.4, 4)
    for row, node in real_nodes():
        parent, family = PARENTS[row][node], family_of(row, node)
        said = {n: float((0.4 * logits[row, parent, view.tree.tokens[row, n]]).exp()) for n in range(N)}
        joint = {n: prior_of(view, row, n) * said[n] for n in family}
        rest = (1 - sum(prior_of(view, row, n) for n in family)) * sum(said.values()) / N
        expected = joint[node] / (sum(joint.values()) + rest)
        assert math.exp(float(scores[row, node])) == pytest.approx(expected, rel=1e-4)


@torch.no_grad()
def test_no_evidence_is_the_prior() -> None:
    view, _ = make(False)
    scores, _ = evidence(view, 1e-9, 4)
    for row, node in real_nodes():
        assert math.exp(float(scores[row, node])) == pytest.approx(prior_of(view, row, node), rel=1e-3)


@pytest.mark.parametrize("criterion", CRITERIA.values(), ids=CRITERIA)
@torch.no_grad()
def test_siblings_share_at_most_everything(criterion) -> None:
    """Where the proposer is sure (a child of probability 1) and in half precision, too."""
    view, _ = make(True)
    view.tree.log_probs[:, 1] = 0.0
    half = EarlyView(tree=view.tree, hidden=view.hidden.bfloat16(), projection=_bfloat16(view.projection))
    for seen in (view, half):
        scores, _ = criterion(seen, 0.5, 4)
        assert scores.dtype == torch.float32
        for row, node in real_nodes():
            total = sum(math.exp(float(scores[row, n])) for n in family_of(row, node))
            assert 0 < total <= 1.0 + 1e-2


def _bfloat16(projection: OutputProjection) -> OutputProjection:
    module = nn.Linear(H, V)
    module.load_state_dict(projection.module.state_dict())
    module.bfloat16()
    return OutputProjection(module, module.weight, H, V)
