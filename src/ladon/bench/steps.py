"""Single decode steps: which size was chosen, what was expected of it, and what it took."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ladon.tree_size.acceptance_model import Sums
from ladon.tree_size.adaptive import AutoSizing
from ladon.tree_size.policy import Size, Sizing, StepRecord


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
        expected_tokens: what the trees' probabilities, uncorrected, had let expect.
    """

    batch: int
    context: float
    nodes: int
    seconds: float
    predicted_seconds: float
    tokens: float
    expected_tokens: float


class NotedSizing:
    """A sizing whose steps are kept; what it decides stays the same."""

    def __init__(self, sizing: Sizing, steps: list[StepFacts] | None = None) -> None:
        """`sizing` decides; `steps` are added to, if given."""
        self._sizing = sizing
        self._steps: list[StepFacts] = [] if steps is None else steps
        self.edges: Sequence[int] = sizing.edges
        self.probes = sizing.probes

    def for_run(self) -> NotedSizing:
        """One for another run, whose steps are kept with the others."""
        return NotedSizing(self._sizing.for_run(), self._steps)

    def reach(self, batch: int, context: float) -> int:
        """As the sizing says."""
        return self._sizing.reach(batch, context)

    def choose(self, sums: Sums | None, batch: int, context: float, of_heads: Sums | None = None) -> Size:
        """As the sizing says."""
        return self._sizing.choose(sums, batch, context, of_heads)

    def observe(self, record: StepRecord) -> float:
        """Let the sizing learn, and keep what happened."""
        predicted = self._sizing.observe(record)
        self.probes = self._sizing.probes
        known = bool(record.expected)
        self._steps.append(
            StepFacts(
                batch=record.batch,
                context=record.context,
                nodes=record.nodes,
                seconds=record.seconds,
                predicted_seconds=predicted,
                tokens=record.tokens / record.batch,
                expected_tokens=1 + sum(record.expected) / record.batch if known else math.nan,
            )
        )
        return predicted

    def taken(self) -> list[StepFacts]:
        """The steps since the last call."""
        steps = list(self._steps)
        self._steps.clear()
        return steps

    def fit(self, steps: Sequence[StepFacts]) -> list[dict[str, Any]]:
        """`nodes` and predicted `ms` of each size, as known by now, at the batch and mean context of `steps`."""
        if not isinstance(self._sizing, AutoSizing) or not steps:
            return []
        batch, cost = steps[0].batch, self._sizing.cost
        own = [step.context for step in steps if step.batch == batch]
        context = sum(own) / len(own)
        seconds = {nodes: cost.predict(batch, nodes, context, drafts=nodes > 1) for nodes in self.edges}
        return [{"nodes": nodes, "ms": 1e3 * time} for nodes, time in seconds.items() if math.isfinite(time)]


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


def prediction_error(steps: Sequence[StepFacts]) -> float:
    """Mean relative error of the predicted times, as `DecodeStats.prediction_error`; NaN if nothing was predicted."""
    errors = [
        abs(step.predicted_seconds - step.seconds) / step.seconds
        for step in steps
        if math.isfinite(step.predicted_seconds) and step.seconds > 0.0
    ]
    return sum(errors) / len(errors) if errors else math.nan


def _mean(weighted: Sequence[tuple[float, int]]) -> float | None:
    """The weighted mean of the values that are numbers."""
    known = [(value, weight) for value, weight in weighted if math.isfinite(value)]
    total = sum(weight for _, weight in known)
    return sum(value * weight for value, weight in known) / total if total else None
