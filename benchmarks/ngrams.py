"""What n-grams add: tokens per step and speed, with the bundled heads and without any.

    python benchmarks/ngrams.py --humaneval FILE --output benchmarks/results/NAME.json
    python benchmarks/ngrams.py --only acceptance --prompts 8

Three kinds of prompts: code to write again with a change (repetitive edits), held-out code, and HumanEval. First
acceptance lengths, of each prompt alone, on all steps and on those that repeat nothing; every output is compared with
plain decoding's. Then speed: systems decode the same prompts side by side, step by step (`never_slower_turns.py`); as
small models repeat themselves when they are greedy, HumanEval has sampled answers, too.
Run it alone on the machine. The last line is one JSON document; docs/reference/benchmark-files.md defines its keys.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
from never_slower import near_ties
from never_slower_cells import Cell, Materials, Prompts
from never_slower_turns import Make, Settings, take_turns

from ladon.bench.quality.repetition import Repetition
from ladon.bench.systems import Run, by_size, merged
from ladon.util.files import finite
from ladon.util.machine import environment, load

TASKS = ("edits", "code", "humaneval")
ACCEPTANCE = (("dynamic", 16), ("dynamic+ngrams", 16), ("dynamic", 64), ("dynamic+ngrams", 64), ("ngrams", 16))
SPEED = (("auto", "auto"), ("auto+ngrams", "auto"), ("ngrams", "auto"))
SAMPLED = {"do_sample": True, "temperature": 1.0, "top_k": 0, "seed": 1}
TURNS = Settings(groups=6, most_repeats=6, max_new_tokens=128, second_seconds=60.0, further_seconds=45.0)


def acceptance(materials: Materials, task: str, count: int, max_new_tokens: int) -> list[dict[str, Any]]:
    """Each mode over so many prompts of a task, one by one."""
    cell = Cell(model="demo", heads="bundled", task=task, context=None, batch=count)
    prompts, model = materials.prompts(cell), materials.model(cell)
    make = materials.systems(cell, [], max_new_tokens)
    plain = make(mode="plain", budget=1)
    expected = [plain.run([ids], max_new_tokens).outputs for ids in prompts]
    rows = []
    for mode, budget in ACCEPTANCE:
        system = make(mode=mode, budget=budget, profile=True)
        runs, repetition = [system.run([ids], max_new_tokens) for ids in prompts], Repetition()
        for run in runs:
            repetition.add(run.outputs[0], run.step_counts)
        total = merged([run.stats for run in runs])
        found = near_ties(model, [[ids] for ids in prompts], {mode: runs}, expected)
        rows.append(
            {
                "task": task,
                "mode": mode,
                "budget": budget,
                "prompts": len(prompts),
                "acceptance_length": total.acceptance_length,
                "acceptance_length_non_repeated": finite(repetition.acceptance_length),
                "repeated_share": finite(repetition.share),
                "tree_efficiency": finite(total.tree_efficiency),
                "near_ties": sum(found),
                "different": len(found) - sum(found),
            }
        )
        print(rows[-1], flush=True)
    return rows


def speed(materials: Materials, task: str, batch: int, **law: Any) -> dict[str, Any]:
    """Systems side by side, new ones each time, the ratio of each to plain decoding in each repeat."""
    cell = Cell(model="demo", heads="bundled", task=task, context=None, batch=batch)
    groups: list[Prompts] = [materials.prompts(cell, group) for group in range(TURNS.groups)]
    make = materials.systems(cell, groups, TURNS.max_new_tokens)
    plain = make(mode="plain", budget=1)
    makers: dict[str, Make] = {"plain": lambda: plain}
    makers |= {mode: _new(make, mode, budget) for mode, budget in SPEED}
    before = load()
    runs = take_turns(makers, groups, TURNS.max_new_tokens, TURNS, **law)
    speeds = {name: [run.stats.tokens_per_second for run in several] for name, several in runs.items()}
    expected = [run.outputs for run in runs["plain"]]
    different = [run.outputs != own for several in runs.values() for run, own in zip(several, expected, strict=True)]
    row = {
        "task": f"{task}, sampled" if law else task,
        "batch": batch,
        "load_before": before,
        "load_after": load(),
        "systems": {name: _system(several) for name, several in runs.items()},
        "vs_plain": {name: median(map(_ratio, own, speeds["plain"])) for name, own in speeds.items()},
        "vs_plain_by_repeat": {name: [*map(_ratio, own, speeds["plain"])] for name, own in speeds.items()},
        "runs": len(different),
        "runs_different": sum(different),
    }
    print(row["task"], batch, {name: round(ratio, 3) for name, ratio in row["vs_plain"].items()}, flush=True)
    return row


def _new(make: Any, mode: str, budget: int | str) -> Make:
    return lambda: make(mode=mode, budget=budget)


def _ratio(one: float, other: float) -> float:
    return one / other


def _system(runs: Sequence[Run]) -> dict[str, Any]:
    total = merged([run.stats for run in runs])
    return {
        "tokens_per_second": [run.stats.tokens_per_second for run in runs],
        "acceptance_length": total.acceptance_length,
        "nodes_per_step": total.nodes_verified / total.row_steps,
        "sizing_share": finite(total.sizing_share),
        "sizes": by_size([step for run in runs for step in run.steps]),
    }


def goals(lengths: Sequence[dict[str, Any]], speeds: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was to be reached, what was, and whether that is enough."""
    found = []
    by = {(row["task"], row["mode"], row["budget"]): row for row in lengths}
    for task in dict.fromkeys(row["task"] for row in lengths):
        for key in ("acceptance_length", "acceptance_length_non_repeated"):
            for budget in (16, 64):
                ratio = by[task, "dynamic+ngrams", budget][key] / by[task, "dynamic", budget][key]
                least = 1.25 if task == "edits" and key == "acceptance_length" else 0.99
                found.append(_goal(f"{task}: {key} with n-grams, {budget} nodes", ratio, least))
    for row in speeds:
        least = 1.5 if row["task"] == "edits" else 0.98
        name = f"{row['task']}, batch {row['batch']}: n-grams alone against plain decoding"
        found.append(_goal(name, row["vs_plain"]["ngrams"], least))
    return found


def _goal(name: str, ratio: float, least: float) -> dict[str, Any]:
    return {"goal": name, "ratio": ratio, "at_least": least, "met": ratio >= least}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--humaneval", type=Path, help="HumanEval's problems, JSONL; without it they are left out")
    parser.add_argument("--prompts", type=int, default=10, help="of each kind, for acceptance lengths")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--batches", default="1", help="for speed; several: 1,4")
    parser.add_argument("--only", choices=["acceptance", "speed"])
    parser.add_argument("--output", type=Path, help="also write the JSON document here")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    materials = Materials(None, arguments.humaneval)
    tasks = TASKS if arguments.humaneval else TASKS[:2]
    lengths: list[dict[str, Any]] = []
    speeds: list[dict[str, Any]] = []
    for task in tasks:
        if arguments.only != "acceptance":
            laws: list[dict[str, Any]] = [{}, *([SAMPLED] if task == "humaneval" else [])]
            speeds += [speed(materials, task, int(n), **law) for n in arguments.batches.split(",") for law in laws]
        if arguments.only != "speed":
            lengths += acceptance(materials, task, arguments.prompts, arguments.max_new_tokens)
    document = {
        "environment": environment(torch.device("cpu")),
        "model": "demo",
        "dtype": "float32",
        "max_new_tokens": arguments.max_new_tokens,
        "settings": asdict(TURNS),
        "goals": goals(lengths, speeds),
        "acceptance": lengths,
        "speed": speeds,
    }
    if arguments.output:
        arguments.output.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    for goal in document["goals"]:
        print(
            f"{'met' if goal['met'] else 'MISSED':6} {goal['ratio']:.3f} (at least {goal['at_least']}) {goal['goal']}"
        )
    print(json.dumps(document, allow_nan=False))


if __name__ == "__main__":
    main()
