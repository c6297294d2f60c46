"""The ways in which other systems write trees down, and what they mean here.

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
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ladon.errors import TreeError
from ladon.fixed_tree import FixedTree

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
