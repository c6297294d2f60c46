"""Fixed trees: notations, validation, and the search for the best one."""

from __future__ import annotations

import json
import math
from itertools import combinations, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ladon
from ladon.errors import TreeError
from ladon.trees.fixed_tree import FixedTree, best_fixed_tree


def test_parents_come_first_whatever_the_order_given():
    tree = FixedTree(((0, 0, 1), (0, 0), (1,), (0,)))
    assert tree.paths == ((0,), (0, 0), (0, 0, 1), (1,))
    assert (tree.num_nodes, tree.max_depth, tree.max_rank) == (5, 3, 1)


def test_dense_form_is_the_product():
    tree = FixedTree.from_dense([1, 7, 6])
    assert tree.num_nodes == 1 + 7 + 42
    assert set(tree.paths) == {(i,) for i in range(7)} | set(product(range(7), range(6)))
    assert FixedTree.from_dense([1]).num_nodes == 1


def test_chain():
    assert FixedTree.chain(3).paths == ((0,), (0, 0), (0, 0, 0))
    assert FixedTree.chain(0).num_nodes == 1


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (((0,), (0, 1, 0)), "lacks its parent"),
        (((0,), (0,)), "given twice"),
        (((-1,),), "each 0 or more"),
        (((),), "non-empty"),
        ((("a",),), "list of ranks"),
        ((([0],),), "list of ranks"),
        (((True,),), "list of ranks"),
        ((0, 1), "list of ranks"),
    ],
)
def test_broken_paths_are_named(paths, message):
    with pytest.raises(TreeError, match=message):
        FixedTree(paths)


@pytest.mark.parametrize("widths", [[], [2, 3], [1, 0], [1, 2.5], [True, 3], [1, True]])
def test_broken_dense_forms(widths):
    with pytest.raises(TreeError, match="first entry is the root"):
        FixedTree.from_dense(widths)


def test_a_tree_must_fit_the_heads():
    tree = FixedTree(((0,), (0, 10)))
    tree.check_fits(num_heads=2, num_candidates=11)
    with pytest.raises(TreeError, match="2 deep but there are 1 heads"):
        tree.check_fits(num_heads=1, num_candidates=11)
    with pytest.raises(TreeError, match="rank 10 but only 10 candidates"):  # a reference takes another head's tokens
        tree.check_fits(num_heads=2, num_candidates=10)


def test_a_tree_must_fit_the_vocabulary(tiny_llama):
    """A head has no more candidates than there are tokens."""
    heads = ladon.new_heads(tiny_llama, num_heads=1)
    ladon.Decoder(tiny_llama, heads, tree=FixedTree(((96,),)), num_candidates=97)
    with pytest.raises(TreeError, match="rank 97 but only 97 candidates"):
        ladon.Decoder(tiny_llama, heads, tree=FixedTree(((97,),)), num_candidates=97)
    with pytest.raises(TreeError, match="num_candidates is 98; give 1 to 97, the size of the vocabulary"):
        ladon.Decoder(tiny_llama, heads, num_candidates=98)


@pytest.mark.parametrize("count", [0, -3, 2.5, True, "many"])
def test_there_must_be_candidates(tiny_llama, count):
    with pytest.raises(TreeError, match="1 or more"):
        ladon.Decoder(tiny_llama, num_candidates=count)


def test_files(tmp_path):
    path = tmp_path / "tree.json"
    tree = FixedTree(((0,), (0, 1)))
    tree.save(path)
    assert json.loads(path.read_text()) == [[0], [0, 1]]
    assert FixedTree.load(path) == tree
    path.write_text("[1, 7, 6]")
    assert FixedTree.load(path).num_nodes == 50
    for text in ("{}", '["a"]', "[[0], 3]", "[[[0]]]", "[true, 3]", "[[0], [0]]", "not json"):
        path.write_text(text)
        with pytest.raises(TreeError, match=r"tree\.json"):
            FixedTree.load(path)
    with pytest.raises(TreeError, match=r"missing\.json"):
        FixedTree.load(tmp_path / "missing.json")


RATES = st.sampled_from([0.0, 0.1, 0.25, 0.5, 1.0])


def expected_length(paths, rates) -> float:
    return sum(math.prod(rates[depth][rank] for depth, rank in enumerate(path)) for path in paths)


@settings(max_examples=60, deadline=None)
@given(
    rates=st.lists(st.lists(RATES, min_size=2, max_size=2), min_size=2, max_size=2),
    num_nodes=st.integers(1, 7),
)
def test_the_search_finds_the_best_of_all_trees(rates, num_nodes):
    every = [path for depth in (1, 2) for path in product(range(2), repeat=depth)]
    best = max(
        expected_length(chosen, rates)
        for chosen in combinations(every, min(num_nodes - 1, len(every)))
        if all(len(path) == 1 or path[:-1] in chosen for path in chosen)
    )
    tree = best_fixed_tree(rates, num_nodes)
    assert expected_length(tree.paths, rates) == pytest.approx(best)
    assert tree.num_nodes == min(num_nodes, len(every) + 1)


def test_the_search_refuses_nonsense():
    with pytest.raises(TreeError, match="is no share"):
        best_fixed_tree([[1.5]], 4)
    with pytest.raises(TreeError, match="at least its root"):
        best_fixed_tree([[0.5]], 0)
