"""Ladon: several tokens per forward pass of a causal language model, with the output unchanged.

Public names are loaded on first use, so that `import ladon` is quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ladon.attaching import attach, detach
    from ladon.bundled import load_demo
    from ladon.errors import (
        ConstraintError,
        HeadsError,
        InputError,
        LadonError,
        LogitsError,
        TreeError,
        UnsupportedModelError,
    )
    from ladon.fixed_tree import FixedTree, best_fixed_tree
    from ladon.generation import Decoder
    from ladon.heads import Heads, load_heads, new_heads
    from ladon.heads.mtp import load_mtp
    from ladon.lossy import Nucleus, Typical
    from ladon.pruning import Pruning
    from ladon.rows import Row
    from ladon.stats import DecodeStats
    from ladon.structured import grammar, json_schema, regex
    from ladon.trace import TraceStep
    from ladon.tree_notations import TreeSize, read_tree

_HOME = {
    "Decoder": "ladon.generation",
    "TraceStep": "ladon.trace",
    "attach": "ladon.attaching",
    "detach": "ladon.attaching",
    "Nucleus": "ladon.lossy",
    "Pruning": "ladon.pruning",
    "Row": "ladon.rows",
    "Typical": "ladon.lossy",
    "json_schema": "ladon.structured",
    "regex": "ladon.structured",
    "grammar": "ladon.structured",
    "DecodeStats": "ladon.stats",
    "FixedTree": "ladon.fixed_tree",
    "best_fixed_tree": "ladon.fixed_tree",
    "Heads": "ladon.heads",
    "load_heads": "ladon.heads",
    "new_heads": "ladon.heads",
    "load_mtp": "ladon.heads.mtp",
    "load_demo": "ladon.bundled",
    "TreeSize": "ladon.tree_notations",
    "read_tree": "ladon.tree_notations",
    "LadonError": "ladon.errors",
    "InputError": "ladon.errors",
    "LogitsError": "ladon.errors",
    "TreeError": "ladon.errors",
    "ConstraintError": "ladon.errors",
    "HeadsError": "ladon.errors",
    "UnsupportedModelError": "ladon.errors",
}

__version__ = "0.1.0"
__all__ = [
    "ConstraintError",
    "DecodeStats",
    "Decoder",
    "FixedTree",
    "Heads",
    "HeadsError",
    "InputError",
    "LadonError",
    "LogitsError",
    "Nucleus",
    "Pruning",
    "Row",
    "TraceStep",
    "TreeError",
    "TreeSize",
    "Typical",
    "UnsupportedModelError",
    "attach",
    "best_fixed_tree",
    "detach",
    "grammar",
    "json_schema",
    "load_demo",
    "load_heads",
    "load_mtp",
    "new_heads",
    "read_tree",
    "regex",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ladon' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
