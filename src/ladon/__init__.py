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
    from ladon.drafting.proposer import Proposer
    from ladon.engine.sequence import Row
    from ladon.engine.stats import DecodeStats
    from ladon.errors import (
        ConstraintError,
        HeadsError,
        InputError,
        LadonError,
        LogitsError,
        SelfTestError,
        TreeError,
        UnsupportedModelError,
    )
    from ladon.heads import Heads, load_heads, new_heads
    from ladon.heads.mtp import load_mtp
    from ladon.sampling.acceptance import Accepted
    from ladon.sampling.lossy import Nucleus, Typical
    from ladon.target.pruning.pruner import Pruning
    from ladon.trees.fixed_tree import FixedTree, TreeSize, best_fixed_tree, read_tree
    from ladon.trees.token_tree import TokenTree

_NAMES = {  # where the public names live
    "constraints.llguidance_backend": "grammar json_schema regex",
    "decoder.attach": "attach detach",
    "decoder.decoder": "Decoder",
    "decoder.trace": "TraceStep",
    "demo.bundled": "load_demo",
    "drafting.proposer": "Proposer",
    "engine.sequence": "Row",
    "engine.stats": "DecodeStats",
    "errors": "ConstraintError HeadsError InputError LadonError LogitsError SelfTestError TreeError "
    "UnsupportedModelError",
    "heads": "Heads load_heads new_heads",
    "heads.mtp": "load_mtp",
    "sampling.acceptance": "Accepted",
    "sampling.lossy": "Nucleus Typical",
    "target.pruning.pruner": "Pruning",
    "trees.fixed_tree": "FixedTree TreeSize best_fixed_tree read_tree",
    "trees.token_tree": "TokenTree",
}
_HOME = {name: f"ladon.{module}" for module, names in _NAMES.items() for name in names.split()}

__version__ = "0.1.0"
__all__ = [
    "Accepted",
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
    "Proposer",
    "Pruning",
    "Row",
    "SelfTestError",
    "TokenTree",
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
