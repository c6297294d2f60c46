"""Lattices over partial paths: against all paths, against a beam by hand, and with fixed trees."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ladon.trees.check import check_tree
from ladon.trees.fixed_tree import FixedTree
from ladon.trees.grow import grow_chain, grow_dynamic, grow_fixed
from ladon.trees.lattice import After, along_paths, best_rows, rows_with_children
from lattices import tree_paths

ROOTS = (4, 1)
Of = Callable[[int, tuple[int, ...]], Tensor]  # a row of the batch and a path, the root first, to the logits after it


def language(seed: int, vocab_size: int, style: str = "plain") -> Of:
    """Logits after any path, each drawn anew; `style` makes ties likely, or heads that are sure."""

    def of(row: int, path: tuple[int, ...]) -> Tensor:
        generator = torch.Generator().manual_seed(hash((seed, row, path)) % 2**31)
        logits = torch.randn(vocab_size, generator=generator)
        return {"plain": 2 * logits, "ties": logits.round(), "sure": 100 * logits}[style]

    return of


def asked(of: Of, seen: list[list[tuple[int, ...]]] | None = None) -> After:
    """The same for tensors of paths; `seen` gets the paths of each call, of the first row."""

    def after(paths: Tensor, _: Tensor) -> Tensor:
        if seen is not None:
            seen.append([tuple(path) for path in paths[0].tolist()])
        return torch.stack(
            [torch.stack([of(row, tuple(path)) for path in found]) for row, found in enumerate(paths.tolist())]
        )

    return after


def every_path(of: Of, row: int, depth: int, num_candidates: int, temperatures: list[float]) -> dict:
    """Every path of candidates with its log-probability, one token after the other."""
    found: dict[tuple[int, ...], float] = {}

    def extend(path: tuple[int, ...], value: float) -> None:
        if len(path) == depth:
            return
        log_probs = (of(row, (ROOTS[row], *path)) / temperatures[len(path)]).log_softmax(-1)
        for token in log_probs.topk(num_candidates).indices.tolist():
            found[(*path, token)] = value + float(log_probs[token])
            extend((*path, token), found[(*path, token)])

    extend((), 0.0)
    return found


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**30),
    depth=st.integers(1, 4),
    num_nodes=st.integers(2, 16),
    vocab_size=st.integers(2, 5),
    style=st.sampled_from(["plain", "ties", "sure"]),
)
def test_with_enough_rows_the_tree_is_the_best_of_all_paths(
    seed: int, depth: int, num_nodes: int, vocab_size: int, style: str
) -> None:
    of, temperatures = language(seed, vocab_size, style), [0.5, 2.0, 1.0, 1.5][:depth]
    found = along_paths(
        asked(of),
        torch.tensor(ROOTS),
        best_rows(max(1, num_nodes - 2)),
        depth=depth,
        num_candidates=vocab_size,
        temperatures=torch.tensor(temperatures),
    )
    assert found.log_probs.shape == found.tokens.shape == found.next_row.shape
    assert (found.log_probs <= 0).all() and (found.log_probs.nan_to_num().diff(dim=-1) <= 0).all()
    tree = grow_dynamic(found, torch.tensor(ROOTS), num_nodes)
    check_tree(tree)
    for row in (0, 1):
        expected = every_path(of, row, depth, vocab_size, temperatures)
        best = sorted(expected.values(), reverse=True)[: num_nodes - 1]
        values = [value for value in tree.log_probs[row, 1:].tolist() if value > -math.inf]
        assert values == pytest.approx(best[: len(values)], rel=1e-4, abs=1e-4)
        assert len(values) == len(best)
        for path, value in zip(tree_paths(tree, row), values, strict=False):
            assert expected[path] == pytest.approx(value, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("num_rows", [1, 2, 5])
def test_fewer_rows_are_a_beam(num_rows: int) -> None:
    """At each depth the best extensions of the paths that were followed are followed; the others are leaves."""
    of, seen = language(7, 6), []
    found = along_paths(asked(of, seen), torch.tensor(ROOTS), best_rows(num_rows), depth=3, num_candidates=4)
    beam, expected = {(): 0.0}, {}
    for depth in range(3):
        assert seen[depth] == [(ROOTS[0], *path) for path in beam]
        longer = {}
        for path, value in beam.items():
            log_probs = of(0, (ROOTS[0], *path)).log_softmax(-1)
            longer |= {(*path, token): value + float(log_probs[token]) for token in log_probs.topk(4).indices.tolist()}
        expected |= longer
        beam = dict(sorted(longer.items(), key=lambda entry: -entry[1])[:num_rows])
    tree = grow_dynamic(found, torch.tensor(ROOTS), 64)
    kept = [place for place, value in enumerate(tree.log_probs[0].tolist()[1:]) if value > -math.inf]
    paths = tree_paths(tree, 0)
    assert {paths[place] for place in kept} == set(expected)
    for place in kept:
        assert float(tree.log_probs[0, place + 1]) == pytest.approx(expected[paths[place]], abs=1e-5)
    assert len(seen) == 3, "one call for each depth"


SHAPE = FixedTree(((0,), (1,), (2,), (2, 1), (0, 3), (2, 1, 0), (2, 1, 2), (0, 3, 1)))


def test_a_fixed_trees_rows_are_its_nodes_with_children() -> None:
    of, seen = language(3, 9), []
    rows = rows_with_children(SHAPE)
    found = along_paths(asked(of, seen), torch.tensor(ROOTS), rows, depth=3, num_candidates=4)
    tree = grow_fixed(found, torch.tensor(ROOTS), SHAPE)
    check_tree(tree)
    assert (tree.log_probs > -torch.inf).all(), "no node is padding"
    assert [len(paths) for paths in seen] == [1, 2, 2]
    for row in (0, 1):
        by_ranks: dict[tuple[int, ...], tuple[int, ...]] = {(): ()}
        for ranks, path in zip(SHAPE.paths, tree_paths(tree, row), strict=True):
            before = by_ranks[ranks[:-1]]
            best = of(row, (ROOTS[row], *before)).topk(4).indices.tolist()
            assert path == (*before, best[ranks[-1]])
            by_ranks[ranks] = path


def test_a_chain_follows_the_best_token_after_each() -> None:
    of, seen = language(5, 9), []
    rows = rows_with_children(FixedTree.chain(3))
    found = along_paths(asked(of, seen), torch.tensor(ROOTS), rows, depth=3, num_candidates=1)
    tree = grow_chain(found, torch.tensor(ROOTS), 8)
    assert [len(paths) for paths in seen] == [1, 1, 1] and found.num_rows == 1
    for row, root in enumerate(ROOTS):
        path = (root,)
        for _ in range(3):
            path = (*path, int(of(row, path).argmax()))
        assert tree.tokens[row].tolist() == list(path)


def test_heads_with_a_vocabulary_of_their_own_are_asked_after_the_models_tokens() -> None:
    of, seen, names = language(2, 5), [], torch.tensor([70, 30, 90, 10, 50])
    found = along_paths(asked(of, seen), torch.tensor(ROOTS), best_rows(3), depth=2, num_candidates=5, token_ids=names)
    best = names[of(0, (ROOTS[0],)).topk(3).indices].tolist()
    assert sorted(seen[1]) == sorted((ROOTS[0], token) for token in best)
    assert set(found.tokens.unique().tolist()) <= {0, *names.tolist()}  # 0 is padding


def test_a_broken_head_drafts_nothing() -> None:
    found = along_paths(
        lambda paths, _: torch.full((*paths.shape[:2], 5), torch.nan if paths.shape[2] == 2 else 0.0),
        torch.tensor(ROOTS),
        best_rows(3),
        depth=3,
        num_candidates=5,
    )
    tree = grow_dynamic(found, torch.tensor(ROOTS), 16)
    assert (tree.log_probs > -torch.inf).sum(1).tolist() == [6, 6], "the root and the guesses of head 1"
