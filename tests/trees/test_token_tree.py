"""What follows from the parent array, against walks up the tree."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given

from ladon.errors import TreeError
from ladon.trees.check import check_tree
from ladon.trees.token_tree import TokenTree, ancestor_mask, node_depths, position_ids, root_tree
from random_trees import parent_arrays


def walk(parents: list[int], node: int) -> list[int]:
    path = [node]
    while parents[path[-1]] >= 0:
        path.append(parents[path[-1]])
    return path


@given(parent_arrays())
def test_mask_and_depths_equal_a_walk_to_the_root(parents):
    deepest = max(len(walk(parents, node)) - 1 for node in range(len(parents)))
    mask = ancestor_mask(torch.tensor([parents]), deepest)
    for node in range(len(parents)):
        seen = mask[0, node].nonzero().flatten().tolist()
        assert seen == sorted(walk(parents, node)), "a node sees itself and its ancestors, nothing else"
    assert node_depths(mask)[0].tolist() == [len(walk(parents, node)) - 1 for node in range(len(parents))]
    assert torch.equal(mask, ancestor_mask(torch.tensor([parents]), deepest + 3)), "a looser bound changes nothing"


def test_the_worked_example():
    mask = ancestor_mask(torch.tensor([[-1, 0, 0, 1]]), 2)
    assert mask.int().tolist() == [[[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1]]]
    assert position_ids(node_depths(mask), torch.tensor([10])).tolist() == [[10, 11, 11, 12]]


def test_first_level_nodes_see_themselves_whatever_their_rank():
    """A reference implementation sets the mask column from the rank, so a node may see a sibling instead of itself."""
    mask = ancestor_mask(torch.tensor([[-1, 0, 0, 0, 2]]), 2)
    assert mask[0].diagonal().all()
    assert mask[0, 4].int().tolist() == [1, 0, 1, 0, 1]


def make_tree(parents: list[int], log_probs: list[float]) -> TokenTree:
    tokens = torch.arange(len(parents))[None]
    return TokenTree(
        tokens=tokens, parents=torch.tensor([parents]), log_probs=torch.tensor([log_probs]), max_depth=len(parents)
    )


def test_prefix_rows_and_root():
    tree = make_tree([-1, 0, 1], [0.0, -1.0, -2.0])
    assert tree.prefix(2).tokens.tolist() == [[0, 1]] and tree.prefix(2).max_depth == 1
    assert tree.prefix(9) is tree
    assert tree.rows([0, 0]).batch_size == 2 and tree.rows([]).batch_size == 0
    root = root_tree(torch.tensor([7, 8]))
    assert (root.batch_size, root.num_nodes, root.max_depth) == (2, 1, 0)
    check_tree(root)


def test_capping_makes_deep_nodes_padding():
    tree = make_tree([-1, 0, 1, 2], [0.0, -1.0, -2.0, -3.0]).rows([0, 0])
    capped = tree.capped(node_depths(ancestor_mask(tree.parents, 3)), torch.tensor([1, 3]))
    assert capped.log_probs.tolist() == [[0.0, -1.0, -torch.inf, -torch.inf], [0.0, -1.0, -2.0, -3.0]]
    check_tree(capped)


@pytest.mark.parametrize(
    ("parents", "log_probs", "message"),
    [
        ([0, 0], [0.0, -1.0], "root's parent must be -1"),
        ([-1, 2, 0], [0.0, -1.0, -1.0], "node 1 has parent 2"),
        ([-1, 0, 1], [0.0, -1.0, -0.5], "above its parent's"),
    ],
)
def test_broken_trees_are_named(parents, log_probs, message):
    with pytest.raises(TreeError, match=message):
        check_tree(make_tree(parents, log_probs))


def test_paths_become_a_tree() -> None:
    """What they share is one node; the likeliest come first, and those are kept."""
    root = torch.tensor([3, 4])
    paths = [[[(5, 0.8), (7, 0.5)], [(6, 0.1)], [(5, 0.2), (9, 0.9), (7, 1.0)]], [[(8, 0.25)]]]
    tree = TokenTree.from_paths(root, paths, 12)
    check_tree(tree, root, 10)
    assert tree.tokens.tolist() == [[3, 5, 9, 7, 7, 6], [4, 8, 0, 0, 0, 0]]
    assert tree.parents.tolist() == [[-1, 0, 1, 2, 1, 0], [-1, 0, 0, 0, 0, 0]]
    expected = torch.tensor([[1.0, 0.8, 0.72, 0.72, 0.4, 0.1], [1.0, 0.25, 0.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(tree.log_probs.exp(), expected)
    assert tree.log_probs.dtype == torch.float32 and tree.max_depth == 3
    cut = TokenTree.from_paths(root, paths, 3)
    assert cut.tokens.tolist() == [[3, 5, 9], [4, 8, 0]] and cut.max_depth == 2
    check_tree(cut, root, 10)


def test_paths_of_nothing_are_the_root() -> None:
    root = torch.tensor([3, 4])
    for tree in (
        TokenTree.from_paths(root, [[], [[]]], 12),
        TokenTree.from_paths(root, [[[(5, 0.5)]]] * 2, 1),
        TokenTree.chain(root, torch.zeros(2, 0, dtype=torch.long)),
    ):
        check_tree(tree, root, 10)
        assert tree.tokens.tolist() == [[3], [4]] and tree.max_depth == 0
    assert TokenTree.from_paths(root[:0], [], 4).batch_size == 0


def test_any_paths_give_a_tree() -> None:
    dice = random.Random(1)
    for _ in range(50):
        root = torch.tensor([dice.randrange(9) for _ in range(3)])
        paths = [
            [[(dice.randrange(9), dice.choice([1.0, dice.random() + 1e-9])) for _ in range(dice.randrange(5))]
             for _ in range(dice.randrange(6))]
            for _ in root
        ]  # fmt: skip
        whole = TokenTree.from_paths(root, paths, 99)
        check_tree(whole, root, 9)
        starts = [{tuple(token for token, _ in path[:n]) for path in own for n in range(1, 9)} for own in paths]
        assert (whole.log_probs > -torch.inf).sum(1).tolist() == [1 + len(found - {()}) for found in starts]
        for size in range(1, whole.num_nodes):
            tree = TokenTree.from_paths(root, paths, size)
            assert torch.equal(tree.tokens, whole.tokens[:, :size]) and torch.equal(
                tree.parents, whole.parents[:, :size]
            )
            check_tree(tree, root, 9)


@pytest.mark.parametrize("probability", [0.0, -0.5, 1.5, float("nan")])
def test_probabilities_that_are_none(probability) -> None:
    with pytest.raises(TreeError, match="sequence 1: token 7 has probability"):
        TokenTree.from_paths(torch.tensor([3, 4]), [[], [[(5, 0.5), (7, probability)]]], 4)
    with pytest.raises(TreeError, match="paths for 1 sequences and 2 roots"):
        TokenTree.from_paths(torch.tensor([3, 4]), [[]], 4)


def test_chains() -> None:
    root, tokens = torch.tensor([3, 4]), torch.tensor([[5, 6, 7], [5, 0, 0]])
    log_probs = torch.tensor([[0.5, 0.5, 1.0], [0.5, 0.0, 1.0]]).log()
    tree = TokenTree.chain(root, tokens, log_probs)
    check_tree(tree, root, 8, is_chain=True)
    assert tree.tokens.tolist() == [[3, 5, 6, 7], [4, 5, 0, 0]] and tree.parents.tolist() == [[-1, 0, 1, 2]] * 2
    torch.testing.assert_close(tree.log_probs.exp(), torch.tensor([[1.0, 0.5, 0.25, 0.25], [1.0, 0.5, 0.0, 0.0]]))
    tree = TokenTree.chain(root, tokens)
    torch.testing.assert_close(tree.log_probs.exp(), torch.tensor([[1.0, 0.5, 0.25, 0.125]] * 2))
    for wrong in ((tokens[:1], None), (tokens[0], None), (tokens, log_probs[:, :2])):
        with pytest.raises(TreeError, match=r"there are 2 roots; give \[B, D\]"):
            TokenTree.chain(root, *wrong)
