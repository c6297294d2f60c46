"""The longest match, against a walk down the tree."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ladon.sampling.acceptance import longest_match
from ladon.trees.token_tree import TokenTree
from random_trees import parent_arrays


def walk_down(tokens: list[int], parents: list[int], is_padding: list[bool], picks: list[int]) -> list[int]:
    """Nodes from the root on, each the child that holds its parent's pick."""
    path = [0]
    while True:
        node = path[-1]
        child = next(
            (
                i
                for i, parent in enumerate(parents)
                if i and parent == node and tokens[i] == picks[node] and not is_padding[i]
            ),
            None,
        )
        if child is None:
            return path
        path.append(child)


@settings(max_examples=300, deadline=None)
@given(data=st.data(), rows=st.integers(1, 3))
def test_equals_a_walk_down_the_tree(data, rows):
    parents = data.draw(parent_arrays(12))
    size = len(parents)
    every = []
    for _ in range(rows):
        tokens = [data.draw(st.integers(0, 9))]
        padding = [False]
        for node in range(1, size):
            taken = [tokens[i] for i in range(1, node) if parents[i] == parents[node]]
            tokens.append(data.draw(st.sampled_from([t for t in range(20) if t not in taken])))
            padding.append(padding[parents[node]] or data.draw(st.sampled_from([False, False, False, True])))
        picks = []
        for node in range(size):
            children = [tokens[i] for i in range(1, size) if parents[i] == node]
            picks.append(data.draw(st.sampled_from([*children, 0, 19])))
        every.append((tokens, padding, picks))
    tree = TokenTree(
        tokens=torch.tensor([row[0] for row in every]),
        parents=torch.tensor([parents] * rows),
        log_probs=torch.tensor([[-torch.inf if p else -0.1 for p in row[1]] for row in every]),
        max_depth=size - 1,
    )
    picks_table = torch.tensor([row[2] for row in every])
    accepted = longest_match(tree, picks_table)
    for row, (tokens, padding, picks) in enumerate(every):
        path = walk_down(tokens, parents, padding, picks)
        count = len(path)
        assert accepted.count[row] == count
        assert accepted.path[row, :count].tolist() == path
        assert (accepted.path[row, count:] == path[-1]).all(), "slots past the path repeat its last node"
        assert accepted.tokens[row, :count].tolist() == [picks[node] for node in path]
        assert accepted.last[row] == path[-1] and accepted.bonus[row] == picks[path[-1]]


def test_token_id_zero_is_an_ordinary_token():
    """Padding holds token 0; a pick of 0 must not accept it (it does in a reference implementation)."""
    tree = TokenTree(
        tokens=torch.tensor([[5, 3, 0]]),
        parents=torch.tensor([[-1, 0, 1]]),
        log_probs=torch.tensor([[0.0, -0.5, -torch.inf]]),
        max_depth=2,
    )
    accepted = longest_match(tree, torch.tensor([[3, 0, 7]]))
    assert accepted.count.tolist() == [2] and accepted.bonus.tolist() == [0]
    real = TokenTree(tokens=tree.tokens, parents=tree.parents, log_probs=torch.tensor([[0.0, -0.5, -0.9]]), max_depth=2)
    accepted = longest_match(real, torch.tensor([[3, 0, 7]]))
    assert accepted.count.tolist() == [3] and accepted.bonus.tolist() == [7]


def test_the_root_alone():
    tree = TokenTree(tokens=torch.tensor([[5]]), parents=torch.tensor([[-1]]), log_probs=torch.zeros(1, 1), max_depth=0)
    accepted = longest_match(tree, torch.tensor([[9]]))
    assert accepted.path.tolist() == [[0]] and accepted.tokens.tolist() == [[9]] and accepted.count.tolist() == [1]
