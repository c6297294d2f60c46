"""Which nodes survive pruning: closed under taking parents, best first, padding last; and the tree that they are."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ladon.target.pruning.node_scores import LOWEST, best_nodes, cut_tree, is_accepted, node_scores, path_scores
from ladon.trees.check import check_tree
from ladon.trees.token_tree import ancestor_mask
from random_trees import Drawn, draw

STRANGE = [0.0, -0.0, 0.5, -1e-30, -3.0, -1e30, float("-inf"), float("nan"), float("inf")]


def scored(seed: int, num_nodes: int) -> tuple[Drawn, Tensor, Tensor, Tensor]:
    """Random trees of three rows, their ancestor masks, node scores with many ties, and path scores."""
    rng = random.Random(seed)
    drawn = draw(rng, [None, 2, 1], num_nodes, 97)
    ancestors = ancestor_mask(drawn.tree.parents, drawn.tree.max_depth)
    values = [rng.choice([*STRANGE, *(-rng.random() for _ in range(9))]) for _ in range(3 * num_nodes)]
    scores = node_scores(torch.tensor(values).view(3, num_nodes), drawn.tree)
    return drawn, ancestors, scores, path_scores(scores, ancestors)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10**6), num_nodes=st.integers(2, 40), data=st.data())
def test_survivors_are_closed_and_best(seed: int, num_nodes: int, data: st.DataObject) -> None:
    drawn, _, scores, paths = scored(seed, num_nodes)
    keep = data.draw(st.integers(1, num_nodes))
    nodes = best_nodes(paths, keep)
    assert nodes.shape == (3, keep)
    for row, kept in enumerate(nodes.tolist()):
        assert kept == sorted(set(kept)) and kept[0] == 0
        real = [node for node in range(num_nodes) if drawn.real[row][node]]
        assert all(drawn.parents[row][node] in kept for node in kept if node in real[1:])
        expected = {n: sum(float(scores[row, a]) for a in drawn.path(row, n)) for n in real}
        for node in real:
            assert float(paths[row, node]) == pytest.approx(expected[node], rel=1e-5, abs=1e-5)
        assert set(kept) <= set(real) or set(real) <= set(kept), "padding only where there is nothing else"
        best = sorted(expected.values(), reverse=True)[: min(keep, len(real))]
        found = sorted((expected[node] for node in kept if node in expected), reverse=True)
        assert found == pytest.approx(best, rel=1e-5, abs=1e-5)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), num_nodes=st.integers(2, 24), keep=st.integers(1, 24))
def test_the_tree_of_the_survivors(seed: int, num_nodes: int, keep: int) -> None:
    drawn, ancestors, _, paths = scored(seed, num_nodes)
    nodes = best_nodes(paths, min(keep, num_nodes))
    tree, mask = cut_tree(drawn.tree, ancestors, nodes)
    check_tree(tree)
    again = ancestor_mask(tree.parents, tree.max_depth)
    for row, kept in enumerate(nodes.tolist()):
        assert tree.tokens[row].tolist() == drawn.tokens(row, kept)
        for place, node in enumerate(kept):
            if drawn.real[row][node]:
                path = [kept[above] for above in range(len(kept)) if mask[row, place, above]]
                assert path == drawn.path(row, node)
                assert torch.equal(mask[row, place], again[row, place])
                assert tree.log_probs[row, place] == 0.0
            else:
                assert tree.log_probs[row, place] == -torch.inf


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), num_nodes=st.integers(2, 24))
def test_a_rejected_node_goes_with_its_subtree(seed: int, num_nodes: int) -> None:
    """Whatever has a rejected ancestor comes after everything that has none, however likely it is otherwise."""
    drawn, ancestors, scores, _ = scored(seed, num_nodes)
    passed = torch.rand(3, num_nodes) < 0.7
    passed[:, 0] = True
    paths = path_scores(scores, ancestors, passed)
    accepted = is_accepted(paths, None)
    for row in range(3):
        for node in range(num_nodes):
            alive = drawn.real[row][node] and all(bool(passed[row, a]) for a in drawn.path(row, node))
            assert bool(accepted[row, node]) == alive
    most = int(accepted.sum(1).amax())
    for row, kept in enumerate(best_nodes(paths, most).tolist()):
        assert {n for n in range(num_nodes) if accepted[row, n]} <= set(kept)


def test_scores_that_are_none() -> None:
    """A real node is never worse than padding, whatever a broken early exit says of it."""
    drawn = draw(random.Random(3), [None], 6, 97)
    tree = drawn.tree
    scores = node_scores(torch.full((1, 6), float("nan")), tree)
    real = tree.log_probs == 0
    assert scores[0, 0] == 0 and torch.all(scores[real][1:] == LOWEST)
    assert torch.all(scores[~real] == -torch.inf) and not bool(real.all())


def test_no_path_is_better_than_its_beginning() -> None:
    """Not by a score above 0 either, as rounding may leave one: a node kept without its parent would be wrong."""
    drawn = draw(random.Random(1), [None], 30, 97)
    ancestors = ancestor_mask(drawn.tree.parents, drawn.tree.max_depth)
    paths = path_scores(torch.randn(1, 30), ancestors)
    parents = drawn.tree.parents[:, 1:]
    assert torch.all(paths[:, 1:] <= paths.gather(1, parents))
