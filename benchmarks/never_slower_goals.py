"""What issue 4 asks of automatic sizes, and whether measured cells meet it. No measuring here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

Cell = Mapping[str, Any]

MEDUSA_GAINS = {1: 1.1, 4: 1.3, 8: 1.6, 16: 2.0}  # least speed over a fixed tree of 64 nodes, by batch
TASKS = ("code", "humaneval", "edits")


def paired(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """Median over repeats of one system's speed over another's, both of the same repeat: a slow minute meets both."""
    return median(ours / theirs for ours, theirs in zip(numerator, denominator, strict=True))


def ratios(speeds: Mapping[str, Sequence[float]], duel: Mapping[str, Sequence[float]]) -> dict[str, float | None]:
    """The ratios that goals are about.

    Args:
        speeds: tokens per second by system and repeat: "plain", "cold", "warm", and fixed budgets as "dynamic-8".
        duel: likewise "warm" against "medusa", over fewer tokens; may be empty.
    """
    plain = speeds["plain"]
    fixed = {name: paired(speeds["warm"], per_repeat) for name, per_repeat in speeds.items() if is_fixed(name)}
    return {
        "warm_over_plain": paired(speeds["warm"], plain),
        "cold_over_plain": paired(speeds["cold"], plain),
        "warm_over_best_fixed": min(fixed.values()),
        "warm_over_medusa": paired(duel["warm"], duel["medusa"]) if duel else None,
    }


def is_fixed(name: str) -> bool:
    """Whether a system has one size for all steps; plain decoding is the size 1."""
    return name == "plain" or name.startswith("dynamic-")


def goals(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Every goal with the worst cell and those that miss it; `met` is None where no cell measured it."""

    def ratio(name: str) -> Callable[[Cell], float | None]:
        return lambda cell: cell["ratios"][name]

    found = [
        _goal("warm: at least 0.98 of plain decoding", cells, ratio("warm_over_plain"), at_least=0.98),
        _goal("cold: at least 0.95 of plain decoding", cells, ratio("cold_over_plain"), at_least=0.95),
        _goal("at least 0.97 of the best fixed budget", cells, ratio("warm_over_best_fixed"), at_least=0.97),
    ]
    for batch, gain in MEDUSA_GAINS.items():
        own = [cell for cell in cells if cell["batch"] == batch]
        title = f"at least {gain} of MEDUSA's fixed tree of 64 nodes at batch {batch}"
        found.append(_goal(title, own, ratio("warm_over_medusa"), at_least=gain))
    found += [
        _goal("step times predicted within 10 % after 50 steps", cells, lambda c: c["prediction_error"], at_most=0.10),
        _goal("decisions take less than 2 % of a step", cells, lambda c: c["sizing_share"], at_most=0.02),
        _goal("no output differs from plain decoding's, near-ties aside", cells, lambda c: c["different"], at_most=0),
        _coverage(cells),
    ]
    return found


def _goal(
    title: str,
    cells: Sequence[Cell],
    value: Callable[[Cell], float | None],
    *,
    at_least: float | None = None,
    at_most: float | None = None,
) -> dict[str, Any]:
    """One goal over the cells that have the value."""
    values = {cell["cell"]: number for cell in cells if (number := value(cell)) is not None}
    worst = (min if at_least is not None else max)(values, key=values.__getitem__, default=None)
    missed = [
        name
        for name, number in values.items()
        if (at_least is not None and number < at_least) or (at_most is not None and number > at_most)
    ]
    return {
        "goal": title,
        "met": not missed if values else None,
        "cells": len(values),
        "worst": None if worst is None else values[worst],
        "worst_cell": worst,
        "missed": missed,
    }


def _coverage(cells: Sequence[Cell]) -> dict[str, Any]:
    """Whether three kinds of prompts were measured, at contexts from 64 to the model's limit."""
    tasks = {cell["task"] for cell in cells}
    missing = [f"task {task}" for task in TASKS if task not in tasks]
    if not any(cell["context"] == 64 for cell in cells):
        missing.append("context 64")
    if not any(cell["at_limit"] for cell in cells):
        missing.append("context at the model's limit")
    title = "three kinds of prompts, contexts from 64 to the model's limit"
    return {
        "goal": title,
        "met": not missing,
        "cells": len(cells),
        "worst": None,
        "worst_cell": None,
        "missed": missing,
    }


def lines(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """The goals for people, one per line."""
    words = {True: "met", False: "MISSED", None: "not measured"}
    shown = []
    for goal in found:
        worst = "" if goal["worst"] is None else f"; worst {goal['worst']:.3f} in {goal['worst_cell']}"
        missed = f"; missed: {', '.join(goal['missed'])}" if goal["missed"] else ""
        shown.append(f"{words[goal['met']]:12} {goal['goal']} ({goal['cells']} cells{worst}){missed}")
    return shown
