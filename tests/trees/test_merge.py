"""Merged trees: against a dictionary of paths, and against the definition of a tree."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ladon.trees.check import check_tree
from ladon.trees.merge import merge
from ladon.trees.token_tree import TokenTree, ancestor_mask, node_depths, root_tree

ROOT = 7
Path = tuple[int, ...]

# A tree as a dictionary: the probability of each path's last edge. Few tokens, so that two trees share paths.
edges = st.one_of(st.floats(0.01, 0.5), st.sampled_from([0.25, 0.5]))


@st.composite
def path_trees(draw, most: int = 8):
    """Paths with the probabilities of their edges; children of a node have 1 together at most."""
    found: dict[Path, float] = {}
    for _ in range(draw(st.integers(0, most))):
        parent = draw(st.sampled_from([(), *found]))
        path = (*parent, draw(st.integers(0, 2)))
        left = 1.0 - sum(p for other, p in found.items() if other[:-1] == parent)
        if path not in found and left > 0.1:
            found[path] = 1.0 if draw(st.integers(0, 5)) == 0 and left == 1.0 else draw(edges) * left
    return found


def log_prob(tree: dict[Path, float], path: Path) -> float:
    return sum(math.log(tree[path[: depth + 1]]) for depth in range(len(path)))


def to_tree(rows: list[dict[Path, float]], *, extra: int = 0, depths: bool = False) -> TokenTree:
    """Slots in the order in which the paths were made (parents first), padding behind."""
    width = 1 + max(len(row) for row in rows) + extra
    tokens, parents, log_probs = [], [], []
    for row in rows:
        slots = {path: slot for slot, path in enumerate([(), *row])}
        missing = width - len(slots)
        tokens.append([ROOT, *(path[-1] for path in row), *[1] * missing])
        parents.append([-1, *(slots[path[:-1]] for path in row), *[0] * missing])
        log_probs.append([0.0, *(log_prob(row, path) for path in row), *[-math.inf] * missing])
    tree = TokenTree(
        tokens=torch.tensor(tokens),
        parents=torch.tensor(parents),
        log_probs=torch.tensor(log_probs),
        max_depth=max((len(path) for row in rows for path in row), default=0),
    )
    if depths:
        object.__setattr__(tree, "depths", node_depths(ancestor_mask(tree.parents, tree.max_depth)))
    return tree


def merged_paths(first: dict[Path, float], second: dict[Path, float], share: dict[Path, float]) -> dict[Path, float]:
    """The reference: log-probability of every path of the union."""
    found: dict[Path, float] = {(): 0.0}
    ends = [{path[:-1] for path in tree} for tree in (first, second)]
    for path in sorted({*first, *second}, key=len):
        above = path[:-1]
        p, q = first.get(path, 0.0), second.get(path, 0.0)
        weight = share.get(above, 0.0) if above in ends[0] else 0.0
        weight = weight if above in ends[1] else 1.0
        mixed = weight * p + (1 - weight) * q
        if above in found and mixed > 0.0:
            found[path] = found[above] + math.log(mixed)
    return found


def paths_of(tree: TokenTree, row: int) -> dict[Path, float]:
    """The paths of a tree's real nodes, in their order."""
    found: list[tuple[Path, float]] = [((), 0.0)]
    for slot in range(1, tree.num_nodes):
        parent, value = int(tree.parents[row, slot]), float(tree.log_probs[row, slot])
        found.append(((*found[parent][0], int(tree.tokens[row, slot])), value))
    return {path: value for path, value in found if value > -math.inf}


@settings(deadline=None, max_examples=300)
@given(
    rows=st.lists(st.tuples(path_trees(), path_trees()), min_size=1, max_size=3),
    shares=st.lists(st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0]), min_size=33, max_size=33),
    num_nodes=st.integers(1, 20),
    extra=st.integers(0, 2),
    depths=st.booleans(),
)
def test_as_a_dictionary_of_paths_says(rows, shares, num_nodes, extra, depths):
    first = to_tree([row[0] for row in rows], extra=extra, depths=depths)
    second = to_tree([row[1] for row in rows], extra=2 - extra)
    share = torch.tensor(shares[: len(rows) * second.num_nodes]).reshape(len(rows), -1)
    merged = merge(first, second, share, num_nodes)
    check_tree(merged)
    assert merged.num_nodes == num_nodes
    assert bool((merged.log_probs.diff(dim=1) <= 0).logical_or(merged.log_probs[:, 1:] == -math.inf).all())
    assert merged.depths is not None
    depths_again = node_depths(ancestor_mask(merged.parents, merged.max_depth))
    is_real = merged.log_probs > -math.inf
    assert torch.equal(merged.depths[is_real], depths_again[is_real])
    assert int(merged.depths.max()) <= merged.max_depth
    for row, (one, other) in enumerate(rows):
        below = {path: float(share[row, slot]) for slot, path in enumerate([(), *other])}
        expected = merged_paths(one, other, below)
        found = paths_of(merged, row)
        assert len(found) == min(num_nodes, len(expected))
        for path, value in found.items():
            assert value == pytest.approx(expected[path], abs=1e-5)
        best = sorted(expected.values(), reverse=True)[: len(found)]
        assert list(found.values()) == pytest.approx(best, abs=1e-5)


def test_where_both_speak_the_share_counts():
    """Worked by hand: both know token 0, each has one of its own; below it only the second goes on."""
    first, second = {(0,): 0.6, (1,): 0.3}, {(0,): 0.8, (2,): 0.1, (0, 5): 0.5}
    found = paths_of(merge(to_tree([first]), to_tree([second]), torch.full((1, 4), 0.25), 8), 0)
    expected = {(): 1.0, (0,): 0.75, (0, 5): 0.375, (1,): 0.075, (2,): 0.075}
    assert list(found) == list(expected)
    assert [math.exp(value) for value in found.values()] == pytest.approx(list(expected.values()))


def test_a_root_alone_changes_nothing():
    tree = to_tree([{(0,): 0.6, (0, 1): 0.5, (1,): 0.3}, {(2,): 0.9}])
    alone = root_tree(torch.tensor([ROOT, ROOT]))
    for merged in (merge(tree, alone, torch.ones(2, 1), 4), merge(alone, tree, torch.ones(2, 4), 4)):
        assert [paths_of(merged, row).keys() for row in (0, 1)] == [paths_of(tree, row).keys() for row in (0, 1)]
        assert torch.allclose(merged.log_probs, tree.log_probs.sort(dim=1, descending=True).values)


def test_a_sure_child_stays_behind_its_parent():
    """Edges of 1.0: all log-probabilities are 0, and only the order of the slots keeps the tree a tree."""
    chain = {(0,): 1.0, (0, 1): 1.0, (0, 1, 2): 1.0, (0, 1, 2, 0): 1.0}
    merged = merge(to_tree([chain]), to_tree([chain | {(0, 1, 2, 0, 1): 1.0}]), torch.full((1, 6), 0.3), 6)
    check_tree(merged)
    assert merged.parents.tolist() == [[-1, 0, 1, 2, 3, 4]]
