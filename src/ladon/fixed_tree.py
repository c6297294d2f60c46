"""Fixed trees: shapes given as rank paths, as MEDUSA (arXiv 2401.10774) uses them, and the search for the best one.

A rank path names, depth by depth, which of a head's candidates to take: (0, 2) is the third candidate of head 2 after
the best candidate of head 1. A fixed tree is a list of rank paths that holds every prefix of each.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from ladon.errors import TreeError

RankPath = tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class FixedTreePlan:
    """A fixed tree as index tensors on one device.

    Attributes:
        parents: parent of each node, [1, N] int64; -1 for the root.
        depths: depth of each node, [1, N] int64.
        levels: for each depth, (nodes, their parents, their ranks), each [n] int64.
    """

    parents: Tensor
    depths: Tensor
    levels: tuple[tuple[Tensor, Tensor, Tensor], ...]


@dataclass(frozen=True)
class FixedTree:
    """A tree of rank paths, root left out, every parent before its children.

    Raises:
        TreeError: a path is empty, negative, given twice, or lacks its parent. Paths are sorted so that parents come
            first, and otherwise keep their order.
    """

    paths: tuple[RankPath, ...]
    _index: dict[RankPath, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Check the paths and put parents first."""
        for path in self.paths:
            if not isinstance(path, Sequence) or not path or not all(_is_count(rank, 0) for rank in path):
                raise TreeError(f"fixed tree: path {path!r} must be a non-empty list of ranks, each 0 or more")
        paths = tuple(tuple(path) for path in self.paths)
        known = set(paths)
        if len(known) != len(paths):
            twice = next(path for i, path in enumerate(paths) if path in paths[:i])
            raise TreeError(f"fixed tree: path {list(twice)} is given twice; give each path once")
        for path in paths:
            if len(path) > 1 and path[:-1] not in known:
                raise TreeError(f"fixed tree: path {list(path)} lacks its parent {list(path[:-1])}; add it")
        ordered, placed = [], set()
        for path in paths:
            for length in range(1, len(path) + 1):
                if path[:length] not in placed:
                    placed.add(path[:length])
                    ordered.append(path[:length])
        object.__setattr__(self, "paths", tuple(ordered))
        object.__setattr__(self, "_index", {path: node for node, path in enumerate([(), *ordered])})

    @property
    def num_nodes(self) -> int:
        """N, root included."""
        return len(self.paths) + 1

    @property
    def max_depth(self) -> int:
        """Length of the longest path."""
        return max((len(path) for path in self.paths), default=0)

    @property
    def max_rank(self) -> int:
        """The greatest rank used; -1 for the root alone."""
        return max((rank for path in self.paths for rank in path), default=-1)

    @classmethod
    def chain(cls, depth: int) -> FixedTree:
        """The best candidate of each of `depth` depths."""
        return _chain(depth)

    @classmethod
    def from_dense(cls, widths: Sequence[int]) -> FixedTree:
        """The old dense form: `[1, 7, 6]` is the root, 7 candidates of head 1, and 6 of head 2 after each of them."""
        if len(widths) < 1 or widths[0] != 1 or not all(_is_count(width, 1) for width in widths):
            raise TreeError(
                f"dense tree {list(widths)}: the first entry is the root and must be 1, the others are widths of 1 or "
                "more, as in [1, 7, 6]"
            )
        ranges = [range(width) for width in widths[1:]]
        return cls(tuple(path for depth in range(1, len(ranges) + 1) for path in product(*ranges[:depth])))

    @classmethod
    def load(cls, path: str | Path) -> FixedTree:
        """Read a JSON file: a list of rank paths, or the dense form."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise TreeError(f"fixed tree file {path}: {error}; give a JSON list such as [[0], [0, 0], [1]]") from error
        if not isinstance(data, list) or not all(isinstance(entry, list | int) for entry in data):
            raise TreeError(f"fixed tree file {path}: holds no list of rank paths; give e.g. [[0], [0, 0], [1]]")
        try:
            dense = data and all(isinstance(entry, int) for entry in data)
            return cls.from_dense(data) if dense else cls(tuple(data))
        except TreeError as error:
            raise TreeError(f"fixed tree file {path}: {error}") from None

    def save(self, path: str | Path) -> None:
        """Write the rank paths as JSON, the form that MEDUSA and TensorRT-LLM call `medusa_choices`."""
        Path(path).write_text(json.dumps([list(p) for p in self.paths]) + "\n", encoding="utf-8")

    def check_fits(self, num_heads: int, num_candidates: int) -> None:
        """Raise `TreeError` unless heads of this number and candidates of this number can fill the tree."""
        if self.max_depth > num_heads:
            raise TreeError(
                f"the tree is {self.max_depth} deep but there are {num_heads} heads; use paths of at most {num_heads} "
                "ranks, or heads for more depths"
            )
        if self.max_rank >= num_candidates:
            raise TreeError(
                f"the tree uses rank {self.max_rank} but only {num_candidates} candidates are kept per head (ranks 0 "
                f"to {num_candidates - 1}); use smaller ranks"
            )

    def plan(self, device: torch.device) -> FixedTreePlan:
        """The tree as index tensors, made once per device."""
        return _plan(self, device)


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


@lru_cache(maxsize=64)
def _chain(depth: int) -> FixedTree:
    return FixedTree(tuple((0,) * length for length in range(1, depth + 1)))


@lru_cache(maxsize=64)
def _plan(shape: FixedTree, device: torch.device) -> FixedTreePlan:
    index = shape._index

    def tensor(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=device)

    levels = []
    for depth in range(1, shape.max_depth + 1):
        paths = [path for path in shape.paths if len(path) == depth]
        levels.append(
            (
                tensor([index[path] for path in paths]),
                tensor([index[path[:-1]] for path in paths]),
                tensor([path[-1] for path in paths]),
            )
        )
    parents = tensor([-1, *(index[path[:-1]] for path in shape.paths)])[None]
    depths = tensor([0, *(len(path) for path in shape.paths)])[None]
    return FixedTreePlan(parents=parents, depths=depths, levels=tuple(levels))


def best_fixed_tree(hit_rates: Sequence[Sequence[float]], num_nodes: int) -> FixedTree:
    """The fixed tree of a size with the greatest expected acceptance, as MEDUSA builds it.

    Args:
        hit_rates: [K][ranks]: how often the candidate of that rank at that depth is right, given that the path to it
            is right. Each in [0, 1].
        num_nodes: N, root included.

    Returns:
        The `num_nodes` - 1 paths with the greatest product of hit rates, best first; fewer if there are fewer. Ties go
        to the shorter path, then to the lower ranks.

    Raises:
        TreeError: a hit rate is outside [0, 1], or `num_nodes` < 1.

    Source: arXiv 2401.10774, section 2.3.3 (the expected length is the sum of the path values).
    """
    if num_nodes < 1:
        raise TreeError(f"num_nodes is {num_nodes}, but a tree has at least its root; give 1 or more")
    for depth, rates in enumerate(hit_rates):
        for rank, rate in enumerate(rates):
            if not 0.0 <= rate <= 1.0:
                raise TreeError(f"hit rate {rate} at depth {depth + 1}, rank {rank} is no share; give 0 to 1")

    frontier: list[tuple[float, int, RankPath]] = []

    def push_children(value: float, path: RankPath) -> None:
        if len(path) < len(hit_rates):
            for rank, rate in enumerate(hit_rates[len(path)]):
                heapq.heappush(frontier, (-value * rate, len(path) + 1, (*path, rank)))

    push_children(1.0, ())
    chosen: list[RankPath] = []
    while frontier and len(chosen) < num_nodes - 1:
        negative_value, _, path = heapq.heappop(frontier)
        chosen.append(path)
        push_children(-negative_value, path)
    return FixedTree(tuple(chosen))
