"""Dynamic growth against brute force, fixed shapes against their definition."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ladon.trees.check import check_tree
from ladon.trees.fixed_tree import FixedTree
from ladon.trees.grow import grow_chain, grow_dynamic, grow_fixed
from ladon.trees.lattice import Lattice, from_logits
from ladon.trees.token_tree import ancestor_mask, node_depths
from lattices import brute_force, random_lattice, tree_paths


@settings(max_examples=400, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 3),
    depth=st.integers(1, 4),
    num_rows=st.sampled_from([1, 1, 2, 3]),
    candidates=st.integers(1, 5),
    num_nodes=st.integers(1, 40),
    style=st.sampled_from(["plain", "ties", "saturated", "padded"]),
)
def test_dynamic_growth_equals_brute_force(seed, rows, depth, num_rows, candidates, num_nodes, style):
    lattice = random_lattice(seed, rows, depth, num_rows, candidates, style)
    tree = grow_dynamic(lattice, torch.arange(rows), num_nodes)
    check_tree(tree)
    for row in range(rows):
        every = brute_force(lattice, row)
        best = sorted((v.item() for v in every.values()), reverse=True)
        values = tree.log_probs[row].tolist()[1:]
        finite = [v for v in values if v != -torch.inf]
        assert values == sorted(values, reverse=True)
        assert finite == [v for v in best[: num_nodes - 1] if v != -torch.inf]
        paths = tree_paths(tree, row)[: len(finite)]
        assert len(set(paths)) == len(paths), "siblings are distinct"
        assert [every[path].item() for path in paths] == finite


def test_thousands_of_random_cases_of_the_usual_shape():
    """2,000 rows at once: 4 heads, 6 candidates, budgets to 64, against enumeration done in one product."""
    lattice = random_lattice(7, 2000, 4, 1, 6, "plain")
    sums = [lattice.log_probs[:, 0, 0]]
    for level in range(1, 4):
        sums.append((sums[-1][:, :, None] + lattice.log_probs[:, level, 0][:, None]).flatten(1))
    best = torch.cat(sums, 1).sort(1, descending=True).values
    for num_nodes in (2, 8, 16, 33, 64):
        tree = grow_dynamic(lattice, torch.zeros(2000, dtype=torch.long), num_nodes)
        assert torch.equal(tree.log_probs[:, 1:], best[:, : num_nodes - 1])
        assert (tree.parents[:, 1:] < torch.arange(1, num_nodes)).all()


def test_saturated_heads_keep_the_parent():
    """A child that ties with its parent at probability 1 (a KeyError in a reference implementation)."""
    logits = torch.zeros(1, 4, 50)
    logits[..., 3] = 1000.0
    tree = grow_dynamic(from_logits(logits, 10), torch.tensor([9]), 5)
    check_tree(tree)
    assert tree.tokens.tolist() == [[9, 3, 3, 3, 3]]
    assert tree.parents.tolist() == [[-1, 0, 1, 2, 3]]


def test_every_prefix_is_the_best_tree_of_its_size():
    lattice = random_lattice(3, 4, 4, 1, 8, "plain")
    tree = grow_dynamic(lattice, torch.zeros(4, dtype=torch.long), 64)
    for size in (1, 2, 7, 16, 40):
        smaller = grow_dynamic(lattice, torch.zeros(4, dtype=torch.long), size)
        assert torch.equal(tree.prefix(size).log_probs, smaller.log_probs)
        check_tree(tree.prefix(size))


def test_full_softmax_and_not_the_top_candidates():
    """A flat head must look flat: its candidates' probabilities do not sum to one."""
    lattice = from_logits(torch.zeros(1, 1, 1000), 10)
    assert torch.allclose(lattice.log_probs.exp(), torch.tensor(1e-3))


def test_a_broken_head_drafts_nothing():
    logits = torch.zeros(1, 2, 10)
    logits[0, 1, 4] = torch.nan
    tree = grow_dynamic(from_logits(logits, 3), torch.tensor([0]), 8)
    assert torch.isfinite(tree.log_probs[0, :4]).all()
    assert (tree.log_probs[0, 4:] == -torch.inf).all()


def test_fewer_paths_than_asked():
    tree = grow_dynamic(random_lattice(0, 2, 3, 1, 1, "plain"), torch.tensor([1, 2]), 64)
    assert tree.num_nodes == 4
    assert tree.parents.tolist() == [[-1, 0, 1, 2]] * 2


def test_chain_takes_the_best_of_each_depth():
    lattice = random_lattice(5, 2, 3, 1, 4, "plain")
    tree = grow_chain(lattice, torch.tensor([1, 2]), 16)
    assert torch.equal(tree.tokens[:, 1:], lattice.tokens[:, :, 0, 0])
    assert torch.allclose(tree.log_probs[:, 3], lattice.log_probs[:, :, 0, 0].sum(1))
    assert grow_chain(lattice, torch.tensor([1, 2]), 2).num_nodes == 2
    assert grow_chain(lattice, torch.tensor([1, 2]), 1).num_nodes == 1


@pytest.mark.parametrize("num_rows", [1, 3])
def test_fixed_tree_holds_the_named_ranks(num_rows):
    lattice = random_lattice(11, 2, 3, num_rows, 4, "plain")
    shape = FixedTree(((0,), (0, 1), (2,), (2, 0), (2, 0, 3)))
    tree = grow_fixed(lattice, torch.tensor([7, 8]), shape)
    check_tree(tree)
    depths = node_depths(ancestor_mask(tree.parents, tree.max_depth))
    assert depths.tolist() == [[0, *(len(path) for path in shape.paths)]] * 2
    for row in range(2):
        for node, path in enumerate(shape.paths, start=1):
            table_row, total, token = 0, 0.0, None
            for level, rank in enumerate(path):
                if table_row < 0:
                    total = -torch.inf
                    break
                total += lattice.log_probs[row, level, table_row, rank].item()
                token = lattice.tokens[row, level, table_row, rank].item()
                table_row = 0 if lattice.next_row is None else int(lattice.next_row[row, level, table_row, rank])
            assert tree.log_probs[row, node].item() == pytest.approx(total, abs=1e-5)
            if total != -torch.inf:
                assert tree.tokens[row, node].item() == token


def test_dynamic_growth_contains_the_product_tree_of_equal_heads():
    """With one candidate pair per depth and equal heads, the best tree is known by hand."""
    log_probs = torch.tensor([0.6, 0.4]).log().expand(1, 2, 1, 2).contiguous()
    lattice = Lattice(tokens=torch.tensor([10, 11]).expand(1, 2, 1, 2).contiguous(), log_probs=log_probs)
    tree = grow_dynamic(lattice, torch.tensor([1]), 5)
    # .6, .4, .36 and then the tie of .24 (twice): the first of the beam wins
    assert torch.allclose(tree.log_probs.exp(), torch.tensor([[1.0, 0.6, 0.4, 0.36, 0.24]]))
    assert tree_paths(tree, 0)[:3] == [(10,), (11,), (10, 10)]
    assert set(product([10, 11], repeat=2)) > set(tree_paths(tree, 0)[2:])
