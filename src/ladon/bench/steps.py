"""Single decode steps: which size was chosen, what was expected of it, and what it took."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class StepFacts:
    """One decode step; NaN stands for what nobody predicted.

    Attributes:
        batch: rows it served.
        context: cached tokens per row before it, their mean.
        nodes: node slots verified per row, root included.
        seconds: how long it took.
        predicted_seconds: what the sizing had predicted for it.
        tokens: tokens per row: accepted drafts and the bonus token, even where a row ended before.
        expected_tokens: what the heads' probabilities, uncorrected, had let expect.
    """

    batch: int
    context: float
    nodes: int
    seconds: float
    predicted_seconds: float
    tokens: float
    expected_tokens: float


def by_size(steps: Sequence[StepFacts]) -> list[dict[str, Any]]:
    """The histogram of sizes, smallest first, with the means of the steps of each.

    Returns:
        Of each size `nodes`, `steps`, `tokens` and `expected_tokens` per row-step, `step_ms` and `predicted_ms`; means
        over the row-steps or steps that have such a number, None if none has.
    """
    groups: dict[int, list[StepFacts]] = {}
    for step in steps:
        groups.setdefault(step.nodes, []).append(step)
    return [
        {
            "nodes": nodes,
            "steps": len(group),
            "tokens": _mean([(step.tokens, step.batch) for step in group]),
            "expected_tokens": _mean([(step.expected_tokens, step.batch) for step in group]),
            "step_ms": _mean([(1e3 * step.seconds, 1) for step in group]),
            "predicted_ms": _mean([(1e3 * step.predicted_seconds, 1) for step in group]),
        }
        for nodes, group in sorted(groups.items())
    ]


def step_time_error(steps: Sequence[StepFacts]) -> float:
    """Mean absolute error of predicted step times as a share of the mean step time; NaN if nothing was predicted."""
    predicted = [step for step in steps if math.isfinite(step.predicted_seconds)]
    total = sum(step.seconds for step in predicted)
    return sum(abs(step.predicted_seconds - step.seconds) for step in predicted) / total if total else math.nan


def _mean(weighted: Sequence[tuple[float, int]]) -> float | None:
    """The weighted mean of the values that are numbers."""
    known = [(value, weight) for value, weight in weighted if math.isfinite(value)]
    total = sum(weight for _, weight in known)
    return sum(value * weight for value, weight in known) / total if total else None
