"""Ladon: several tokens per forward pass of a causal language model, with the output unchanged.

Public names are loaded on first use, so that `import ladon` is quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ladon.constraints.llguidance_backend import grammar, json_schema, regex
    from ladon.decoder.attach import attach, detach
    from ladon.decoder.decoder import Decoder
    from ladon.decoder.trace import TraceStep
    from ladon.demo.bundled import load_demo
    from ladon.engine.sequence import Row
    from ladon.engine.stats import DecodeStats
    from ladon.errors import (
        ConstraintError,
        HeadsError,
        InputError,
        LadonError,
        LogitsError,
        TreeError,
        UnsupportedModelError,
    )
    from ladon.heads import Heads, load_heads, new_heads
    from ladon.heads.mtp import load_mtp
    from ladon.sampling.lossy import Nucleus, Typical
    from ladon.target.pruning.pruner import Pruning
    from ladon.trees.fixed_tree import FixedTree, TreeSize, best_fixed_tree, read_tree

_HOME = {
    "Decoder": "ladon.decoder.decoder",
    "TraceStep": "ladon.decoder.trace",
    "attach": "ladon.decoder.attach",
    "detach": "ladon.decoder.attach",
    "Nucleus": "ladon.sampling.lossy",
    "Pruning": "ladon.target.pruning.pruner",
    "Row": "ladon.engine.sequence",
    "Typical": "ladon.sampling.lossy",
    "json_schema": "ladon.constraints.llguidance_backend",
    "regex": "ladon.constraints.llguidance_backend",
    "grammar": "ladon.constraints.llguidance_backend",
    "DecodeStats": "ladon.engine.stats",
    "FixedTree": "ladon.trees.fixed_tree",
    "best_fixed_tree": "ladon.trees.fixed_tree",
    "Heads": "ladon.heads",
    "load_heads": "ladon.heads",
    "new_heads": "ladon.heads",
    "load_mtp": "ladon.heads.mtp",
    "load_demo": "ladon.demo.bundled",
    "TreeSize": "ladon.trees.fixed_tree",
    "read_tree": "ladon.trees.fixed_tree",
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
