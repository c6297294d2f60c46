"""What `ladon bench` measures with: its prompts, and where its fixed trees come from."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from ladon.cli.output import say
from ladon.errors import InputError

if TYPE_CHECKING:
    from ladon.bench.findings import Progress
    from ladon.bench.workloads import Workload
    from ladon.cli.loading import Loaded
    from ladon.trees.fixed_tree import FixedTree

_DEMO_PROMPTS = 16


def tree_source(
    loaded: Loaded,
    workload: Workload,
    fixed_tree: Path | None,
    calibration: Path | None,
    bundled_heads: bool,
    max_new_tokens: int,
    progress: Progress,
) -> Callable[[int], FixedTree]:
    """Where mode fixed gets its tree of a size from: a file, or the best of the size by the heads' hit rates.

    Hit rates are measured on the model's answers to the prompts of `calibration`. Without such a file, those of the
    bundled heads are known; for others they are measured on the prompts of the benchmark itself, and that is said.
    """
    from ladon.bench.runner import calibrate
    from ladon.bench.workloads import read_workload
    from ladon.demo.bundled import demo_fixed_tree
    from ladon.trees.fixed_tree import FixedTree, best_fixed_tree

    if fixed_tree is not None:
        given = FixedTree.load(fixed_tree)
        return lambda size: given
    if calibration is None and bundled_heads:
        return demo_fixed_tree
    other = None if calibration is None else read_workload(calibration)

    @cache
    def rates() -> list[list[float]]:
        assert loaded.heads is not None  # modes that need a tree need heads, which is checked first
        if other is None:
            say("ladon: warning: the fixed tree is calibrated on the measured prompts; --calibration takes others")
        questions = (other or workload).questions
        return calibrate(loaded.model, loaded.heads, loaded.tokenizer, questions, max_new_tokens, progress)

    return lambda size: best_fixed_tree(rates(), size)


def workload_of(loaded: Loaded, prompts: Path | None, limit: int | None) -> Workload:
    """The questions of a file, or held-out code for the bundled model."""
    from ladon.bench.workloads import demo_workload, read_workload

    if prompts is not None:
        return read_workload(prompts, limit)
    if not loaded.is_demo:
        raise InputError("no prompts; give --prompts FILE with a JSON object with `prompt` or `turns` on each line")
    return demo_workload(limit or _DEMO_PROMPTS)
