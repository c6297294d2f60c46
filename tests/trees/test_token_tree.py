"""What follows from the parent array, against walks up the tree."""

from __future__ import annotations

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
