"""A fixed tree as text: its rank paths as a tree with how often each is taken, or as one line."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.style import Style
from rich.text import Text
from rich.tree import Tree

from ladon.trees.fixed_tree import FixedTree, RankPath
from ladon.viz.record import ansi_colour


def path_values(tree: FixedTree, hit_rates: Sequence[Sequence[float]]) -> dict[RankPath, float]:
    """How often each path of a tree is right: the product of its hit rates, as `best_fixed_tree` takes them.

    A depth or rank that was not measured counts as never right. 1 + the sum is the tokens per step to expect.
    """

    def rate(depth: int, rank: int) -> float:
        return hit_rates[depth][rank] if depth < len(hit_rates) and rank < len(hit_rates[depth]) else 0.0

    return {path: math.prod(rate(depth, rank) for depth, rank in enumerate(path)) for path in tree.paths}


def fixed_view(tree: FixedTree, hit_rates: Sequence[Sequence[float]] = ()) -> Tree:
    """The tree, one line per node; siblings that follow each other and have no children share one.

    Args:
        tree: what to draw.
        hit_rates: [K][ranks]; with them each line says in how many steps it is right.
    """
    children = _children(tree)
    values = path_values(tree, hit_rates) if hit_rates else {}

    def grow(branch: Tree, path: RankPath) -> None:
        for run in _runs(path, children):
            below = branch.add(_line(path, run, values), guide_style="dim")
            grow(below, (*path, run[0]))

    drawn = Tree(Text("root", "bold"), guide_style="dim")
    grow(drawn, ())
    return drawn


def _runs(path: RankPath, children: dict[RankPath, list[int]]) -> list[list[int]]:
    """The ranks below a path in order: each alone, leaves in a row together."""
    runs: list[list[int]] = []
    leaves: list[int] = []  # the last run, if more may join it
    for rank in sorted(children.get(path, [])):
        is_leaf = (*path, rank) not in children
        if is_leaf and leaves and rank == leaves[-1] + 1:
            leaves.append(rank)
            continue
        runs.append([rank])
        leaves = runs[-1] if is_leaf else []
    return runs


def _line(path: RankPath, run: list[int], values: dict[RankPath, float]) -> Text:
    text = Text(_range(run), Style(color=ansi_colour(len(path) + 1)), no_wrap=True)
    if values:
        paths = [(*path, rank) for rank in run]
        text.append(f"  {sum(values[each] for each in paths):.1%}", "dim")
    return text


def outline(tree: FixedTree) -> str:
    """The ranks below the root, each with its children in brackets; leaves that follow each other are a range.

    `0(0(0) 1) 1(0) 2-4` is: the best candidate of head 1, after it the best two of head 2, after the first of those
    the best of head 3; the second of head 1 with the best of head 2; and the third to fifth of head 1.
    """
    children = _children(tree)

    def below(path: RankPath) -> str:
        inner = [(run, below((*path, run[0]))) for run in _runs(path, children)]
        return " ".join(f"{run[0]}({found})" if found else _range(run) for run, found in inner)

    return below(())


def _children(tree: FixedTree) -> dict[RankPath, list[int]]:
    """The ranks below each path that has any."""
    children: dict[RankPath, list[int]] = {}
    for path in tree.paths:
        children.setdefault(path[:-1], []).append(path[-1])
    return children


def _range(run: list[int]) -> str:
    return str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}"
