"""Fixed trees: shapes given as rank paths, as MEDUSA (arXiv 2401.10774) uses them, and the search for the best one.

A rank path names, depth by depth, which of a head's candidates to take: (0, 2) is the third candidate of head 2 after
the best candidate of head 1. A fixed tree is a list of rank paths that holds every prefix of each.

The ways in which other systems write trees down, and what they mean here.

| notation | example | meaning |
|---|---|---|
| rank paths (MEDUSA's and TensorRT-LLM's `medusa_choices`) | `[[0], [0, 0]]` | a `FixedTree` |
| the same as tuples (vLLM's `speculative_token_tree`) | `[(0,), (0, 0)]` | a `FixedTree` |
| dense (MEDUSA's older form) | `[1, 7, 6]` | a `FixedTree`: every path of 7 and then 6 candidates |
| SGLang | `{"num_steps": 3, "eagle_topk": 4, "num_draft_tokens": 16}` | a `TreeSize` |
| EAGLE | `{"total_token": 60, "depth": 5, "top_k": 10}` | a `TreeSize` |

The last two describe a tree that is grown anew at each step, by its size alone. SGLang's keys may start with
`speculative_`, as its command line has them.
"""

from __future__ import annotations

import ast
import heapq
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

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
        hit_rates: `[K][ranks]`: how often the candidate of that rank at that depth is right, given that the path to it
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


_SGLANG = ("num_steps", "eagle_topk", "num_draft_tokens")
_EAGLE = ("total_token", "depth", "top_k")
NOTATIONS = ("rank-paths", "vllm", "dense", "sglang", "eagle")


@dataclass(frozen=True, kw_only=True)
class TreeSize:
    """The size of a tree that is grown anew at each step, as SGLang and EAGLE give it.

    Kept: the number of nodes, and how many candidates of each node may be in the tree. Not kept: their bound on the
    nodes of one depth that have children (as many as candidates), because here the likeliest nodes have them; and the
    depth where it is less than the number of heads, because here probability alone says how deep a path goes.

    Attributes:
        budget: nodes verified per step, root included (`num_draft_tokens`, `total_token`).
        num_candidates: candidates kept per node (`eagle_topk`, `top_k`).
        depth: greatest depth (`num_steps`, and EAGLE's `depth` + 1: it counts the passes after the first).
    """

    budget: int
    num_candidates: int
    depth: int

    def __post_init__(self) -> None:
        """Raise `TreeError` for what no tree has."""
        for name in ("budget", "num_candidates", "depth"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise TreeError(f"tree size: {name} is {value!r}; give a number of 1 or more")

    def options(self, budget: int | str = "auto") -> tuple[str, int | str, int]:
        """Tree, budget and num_candidates as a `Decoder` takes them; a budget other than "auto" replaces this one.

        With one candidate per node it is a chain, whose depth the budget keeps.
        """
        if self.num_candidates == 1:
            return "chain", min(self.budget, self.depth + 1) if budget == "auto" else budget, 1
        return "dynamic", self.budget if budget == "auto" else budget, self.num_candidates


def read_tree(path: str | Path) -> FixedTree | TreeSize:
    """The tree in a file, in any notation; see `parse_tree`.

    Raises:
        TreeError: the file cannot be read, or holds no tree.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TreeError(f"tree file {path}: {error}; give a file such as [[0], [0, 0], [1]]") from error
    try:
        return parse_tree(text)
    except TreeError as error:
        raise TreeError(f"tree file {path}: {error}") from None


def parse_tree(text: str) -> FixedTree | TreeSize:
    """A tree from its text: JSON, or Python's tuples as vLLM had them.

    Raises:
        TreeError: the text is in no known notation, or not a tree.
    """
    try:
        data = json.loads(text)
    except ValueError:
        try:
            data = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
            raise TreeError(f"this is neither JSON nor a list of tuples ({error}); {_KNOWN}") from error
    return from_data(data)


def from_data(data: Any) -> FixedTree | TreeSize:
    """A tree from lists and dicts; see the table at the head of this module."""
    if isinstance(data, Mapping):
        return _from_mapping(data)
    if not isinstance(data, Sequence) or isinstance(data, str) or not all(isinstance(e, int | Sequence) for e in data):
        raise TreeError(f"no list of rank paths; {_KNOWN}")
    if data and all(isinstance(entry, int) for entry in data):
        return FixedTree.from_dense(data)
    return FixedTree(tuple(tuple(path) if isinstance(path, Sequence) else path for path in data))


def write_tree(tree: FixedTree | TreeSize, notation: str) -> str:
    """The text of a tree in a notation that can hold it.

    Args:
        tree: rank paths, or a size.
        notation: "rank-paths", "vllm", "dense" (only trees that are a product of widths), "sglang" or "eagle" (sizes,
            and of the fixed trees only the chain, which their one-candidate setting means).

    Raises:
        TreeError: an unknown notation, or one that cannot hold the tree.
    """
    if notation not in NOTATIONS:
        raise TreeError(f"notation {notation!r} is unknown; known: {', '.join(NOTATIONS)}")
    if notation in ("sglang", "eagle"):
        size = tree if isinstance(tree, TreeSize) else _chain_size(tree, notation)
        numbers = (size.depth, size.num_candidates, size.budget)
        if notation == "eagle":
            numbers = (size.budget, size.depth - 1, size.num_candidates)
        return json.dumps(dict(zip(_SGLANG if notation == "sglang" else _EAGLE, numbers, strict=True)))
    if isinstance(tree, TreeSize):
        raise TreeError(f"the notation {notation} names paths, and a size has none; give sglang or eagle")
    if notation == "dense":
        return json.dumps(_dense(tree))
    return str([tuple(path) for path in tree.paths]) if notation == "vllm" else json.dumps([*map(list, tree.paths)])


_KNOWN = (
    "give rank paths such as [[0], [0, 0], [1]], widths such as [1, 7, 6], or an object with "
    f"{', '.join(_SGLANG)} or {', '.join(_EAGLE)}"
)


def _from_mapping(data: Mapping[Any, Any]) -> FixedTree | TreeSize:
    named = {str(key).replace("-", "_").removeprefix("speculative_"): value for key, value in data.items()}
    for key in ("medusa_choices", "token_tree"):
        if key in named:
            paths = named[key]
            return parse_tree(paths) if isinstance(paths, str) else from_data(paths)
    for keys in (_SGLANG, _EAGLE):
        if set(keys) <= named.keys():
            steps, candidates, budget = (named[key] for key in keys)
            if keys == _EAGLE:
                budget, steps, candidates = steps, candidates, budget
                steps = steps + 1 if isinstance(steps, int) else steps
            return TreeSize(budget=budget, num_candidates=candidates, depth=steps)
    raise TreeError(f"an object with the keys {', '.join(map(str, data)) or 'none'}; {_KNOWN}")


def _chain_size(tree: FixedTree, notation: str) -> TreeSize:
    if not tree.paths or tree != FixedTree.chain(tree.max_depth):
        raise TreeError(
            f"the notation {notation} gives sizes, and of fixed trees it can hold the chain alone; write this one as "
            "rank-paths"
        )
    return TreeSize(budget=tree.num_nodes, num_candidates=1, depth=tree.max_depth)


def _dense(tree: FixedTree) -> list[int]:
    """The widths of a tree that is their product."""
    levels = [[path for path in tree.paths if len(path) == depth] for depth in range(1, tree.max_depth + 1)]
    widths = [1, *(max(path[-1] for path in level) + 1 for level in levels)]
    if set(FixedTree.from_dense(widths).paths) != set(tree.paths):
        raise TreeError("the dense notation holds products of widths alone; write this tree as rank-paths")
    return widths
