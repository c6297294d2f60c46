"""How far the truth is followed, against a search through all paths of a lattice."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ladon.calibrate.simulate import mean_leaf_mass, reached, true_rows, true_slots
from ladon.trees.grow import grow_chain, grow_dynamic
from ladon.trees.lattice import Lattice
from lattices import brute_force, random_lattice, tree_paths


def some_truth(lattice: Lattice, row: int, dice: random.Random) -> list[int]:
    """A path of the lattice that goes wrong or ends at some depth, if it does."""
    paths = [path for path, value in brute_force(lattice, row).items() if value > -torch.inf]
    path = list(dice.choice(sorted(paths, key=len)[-20:])) if paths else []
    path += [dice.randrange(lattice.num_candidates + 3) for _ in range(lattice.depth - len(path))]
    if dice.random() < 0.3:
        path[dice.randrange(lattice.depth)] = dice.randrange(lattice.num_candidates + 3)
    length = dice.choice([lattice.depth, lattice.depth, dice.randrange(lattice.depth + 1)])
    return path[:length] + [-1] * (lattice.depth - length)


def longest(truth: list[int], paths: set[tuple[int, ...]]) -> int:
    return max((n for n in range(1, len(truth) + 1) if tuple(truth[:n]) in paths), default=0)


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    depth=st.integers(1, 4),
    num_rows=st.sampled_from([1, 2, 4]),
    candidates=st.integers(1, 4),
    nodes=st.integers(2, 12),
    style=st.sampled_from(["plain", "ties", "saturated", "padded"]),
)
def test_prefixes_are_the_longest_paths(
    seed: int, depth: int, num_rows: int, candidates: int, nodes: int, style: str
) -> None:
    lattice, dice = random_lattice(seed, 3, depth, num_rows, candidates, style), random.Random(seed)
    truth = torch.tensor([some_truth(lattice, row, dice) for row in range(3)])
    rows, root = true_rows(lattice, truth), torch.zeros(3, dtype=torch.long)
    tree, whole = grow_dynamic(lattice, root, nodes), grow_dynamic(lattice, root, 500)
    selected = (true_slots(tree, truth, -1) >= 0).sum(1)
    for row in range(3):
        paths = {path for path, value in brute_force(lattice, row).items() if value > -torch.inf}
        said = truth[row].tolist()
        assert rows.oracle[row] == longest(said, paths)
        nodes_of_tree = zip(tree_paths(tree, row), tree.log_probs[row, 1:].tolist(), strict=True)
        assert selected[row] == longest(said, {path for path, value in nodes_of_tree if value > -torch.inf})
    assert torch.equal((true_slots(whole, truth, -1) >= 0).sum(1), rows.oracle), "all paths are in the largest tree"
    chain = grow_chain(lattice, root, depth + 1)
    assert torch.equal((true_slots(chain, truth, -1) >= 0).sum(1), rows.top)
    assert bool((selected <= rows.oracle).all())


def test_candidates_of_the_row_that_the_truth_leads_to() -> None:
    """Token 5 leads to row 1, whose best candidate is 7; token 6 to none, and stays a leaf."""
    lattice = Lattice(
        tokens=torch.tensor([[[[5, 6], [5, 6]], [[8, 9], [7, 8]]]]),
        log_probs=torch.tensor([[[[-0.1, -3.0], [-0.1, -3.0]], [[-0.2, -2.0], [-0.5, -1.0]]]]),
        next_row=torch.tensor([[[[1, -1], [1, -1]], [[0, 0], [0, 0]]]]),
    )
    found = true_rows(lattice, torch.tensor([[5, 8]]))
    assert (found.oracle.item(), found.top.item()) == (2, 1)
    torch.testing.assert_close(found.log_probs, torch.tensor([[[-0.1, -3.0], [-0.5, -1.0]]]))
    assert found.right.tolist() == [[[True, False], [False, True]]]
    leaf = true_rows(lattice, torch.tensor([[6, 8]]))
    assert leaf.oracle.item() == 1 and leaf.log_probs[0, 1].tolist() == [-torch.inf, -torch.inf]
    assert mean_leaf_mass([lattice.leaf_mass()], 3) == [pytest.approx(torch.tensor(-3.0).exp().item(), abs=1e-4), None]
    assert true_rows(lattice, torch.tensor([[-1, -1]])).oracle.item() == 0


def test_shares_add_up_to_the_mean() -> None:
    found = reached(torch.tensor([0, 1, 3, 3]), 4)
    assert found == {"mean": 1.75, "shares": [0.75, 0.5, 0.5, 0.0]}
    assert sum(found["shares"]) == pytest.approx(found["mean"])
    assert reached(torch.tensor([], dtype=torch.long), 2) == {"mean": None, "shares": [None, None]}
