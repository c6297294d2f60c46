"""Is automatic sizing ever slower than plain decoding, or than the best fixed size? Cell by cell, goal by goal.

    python benchmarks/never_slower.py --humaneval FILE --work cells.jsonl --output benchmarks/results/NAME.json
    python benchmarks/never_slower.py --quick
    python benchmarks/never_slower.py --cells 'demo/*/b4' --work cells.jsonl

A cell is model, heads, kind of prompts, context and batch (`--list` prints them). In each, systems decode the same
prompts side by side, step by step (`never_slower_turns.py`): plain decoding; a decoder with automatic sizes that is new
each time (cold) and one that has run before (warm); and the three fastest fixed sizes, which a shorter sweep finds. The
fixed tree of 64 nodes that MEDUSA would use meets the warm decoder over fewer tokens, because it is slow. Every output
is compared with plain decoding's.

It takes about 40 minutes (`--quick`: 2). Run it alone on the machine: the load is recorded before and after each cell.
Cells are appended to `--work` as they are done; killed and started again, it goes on where it stopped. The last line is
one JSON document; docs/reference/benchmark-files.md defines its keys.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path
from statistics import median
from typing import Any

import torch
from never_slower_cells import MEDUSA_NODES, Cell, Materials, Prompts, all_cells
from never_slower_goals import MEDUSA_GAINS, goals, lines, ratios
from never_slower_turns import QUICK, Make, Settings, take_turns

from ladon.bench.quality.identity import compare
from ladon.bench.systems import LadonSystem, Run, by_size, merged, prediction_error
from ladon.util.files import finite
from ladon.util.machine import commit, environment, load

SWEEP = (2, 4, 8, 16, 24, 32, 48, 64)
HOPELESS = 0.8  # of the best speed so far: after two such sizes in a row the sweep ends
FINALISTS, CLOSE = 3, 0.85  # so many fixed sizes go on, if they had this share of the best speed of the sweep
LEARNT_AFTER = 50  # steps after which step times must be predicted well


def speeds(runs: Mapping[str, Sequence[Run]]) -> dict[str, list[float]]:
    """Tokens per second by system and repeat."""
    return {name: [run.stats.tokens_per_second for run in several] for name, several in runs.items()}


def sweep(make: Callable[..., LadonSystem], groups: Sequence[Prompts], tokens: int) -> dict[str, float]:
    """Tokens per second of fixed sizes, each over all groups, from small to large until they are hopeless."""

    def speed(**options: Any) -> float:
        system = make(**options)
        return merged([system.run(prompts, tokens).stats for prompts in groups]).tokens_per_second

    found = {"plain": speed(mode="plain", budget=1)}
    hopeless = 0
    for budget in SWEEP:
        found[f"dynamic-{budget}"] = speed(mode="dynamic", budget=budget)
        hopeless = hopeless + 1 if found[f"dynamic-{budget}"] < HOPELESS * max(found.values()) else 0
        if hopeless == 2:
            break
    return found


def finalists(screened: Mapping[str, float]) -> dict[str, int]:
    """The fixed sizes that meet the others in full; none where nothing comes close to plain decoding."""
    close = [name for name, speed in screened.items() if name != "plain" and speed >= CLOSE * max(screened.values())]
    best = sorted(close, key=screened.__getitem__, reverse=True)[:FINALISTS]
    return {name: int(name.removeprefix("dynamic-")) for name in best}


def measure(cell: Cell, materials: Materials, settings: Settings) -> dict[str, Any]:
    """Everything about one cell, as a JSON object."""
    before, started = load(), time.perf_counter()
    groups, tokens = [materials.prompts(cell, group) for group in range(settings.groups)], settings.max_new_tokens
    make = materials.systems(cell, groups, tokens)
    screened = sweep(make, groups, settings.sweep_tokens)
    plain, warm = make(mode="plain", budget=1), make(mode="auto", budget="auto")
    warm.run(groups[-1], tokens)
    makers: dict[str, Make] = {
        "plain": lambda: plain,
        "cold": lambda: make(mode="auto", budget="auto"),
        "warm": lambda: warm,
        **{name: _always(make(mode="dynamic", budget=size)) for name, size in finalists(screened).items()},
    }
    runs = take_turns(makers, groups, tokens, settings)
    duel: dict[str, list[Run]] = {}
    if cell.context == 64 and cell.batch in MEDUSA_GAINS and cell.heads != "untrained":
        medusa = make(mode="fixed", budget=MEDUSA_NODES, fixed_tree=materials.medusa_tree)
        duel = take_turns({"warm": lambda: warm, "medusa": lambda: medusa}, groups, settings.sweep_tokens, settings)
    return {
        "cell": cell.name,
        **asdict(cell),
        "at_limit": cell.context == materials.longest_prompt(tokens),
        "prompt_tokens": [[len(prompt) for prompt in prompts] for prompts in groups],
        "load_before": before,
        "load_after": load(),
        "seconds": round(time.perf_counter() - started, 1),
        "repeats": len(runs["plain"]),
        "screened": screened,
        "systems": {name: _system(several) for name, several in runs.items()},
        "duel": {name: _system(several) for name, several in duel.items()},
        "ratios": ratios(speeds(runs), speeds(duel)),
        **_learning(runs),
        **_differences(materials.model(cell), groups, runs, duel, plain, settings.sweep_tokens),
    }


def _always(system: LadonSystem) -> Make:
    return lambda: system


def _system(runs: Sequence[Run]) -> dict[str, Any]:
    """What one system did in all repeats."""
    total = merged([run.stats for run in runs])
    return {
        "tokens_per_second": [run.stats.tokens_per_second for run in runs],
        "median_tokens_per_second": median(run.stats.tokens_per_second for run in runs),
        "acceptance_length": total.acceptance_length,
        "nodes_per_step": total.nodes_verified / total.row_steps,
        "sizes": by_size([step for run in runs for step in run.steps]),
    }


def _learning(runs: Mapping[str, Sequence[Run]]) -> dict[str, Any]:
    """How well new decoders predict their steps once they have seen some, and what choosing took in the warm one."""
    later = [step for run in runs["cold"] for step in run.steps[LEARNT_AFTER:]]
    share = merged([run.stats for run in runs["warm"]]).sizing_share
    return {"prediction_error": finite(prediction_error(later)), "sizing_share": finite(share)}


def _differences(
    model: Any,
    groups: Sequence[Prompts],
    runs: Mapping[str, Sequence[Run]],
    duel: Mapping[str, Sequence[Run]],
    plain: LadonSystem,
    duel_tokens: int,
) -> dict[str, int]:
    """Outputs that are not plain decoding's; the duel's are held against its first `duel_tokens` tokens."""
    expected = [run.outputs for run in runs["plain"][: len(groups)]]
    found = near_ties(model, groups, runs, expected)
    if duel:  # it has repeats with groups that there was no time for before
        expected += [plain.run(prompts, duel_tokens).outputs for prompts in groups[len(expected) :]]
        found += near_ties(model, groups, duel, [[output[:duel_tokens] for output in outputs] for outputs in expected])
    return {"near_ties": sum(found), "different": len(found) - sum(found)}


def near_ties(
    model: Any,
    groups: Sequence[Prompts],
    runs: Mapping[str, Sequence[Run]],
    expected: Sequence[Sequence[Sequence[int]]],
) -> list[bool]:
    """Of every output of every repeat that is not the one expected of its group, whether it left it at a near-tie."""
    found = [
        compare(model, number, prompt, output, reference)
        for several in runs.values()
        for repeat, run in enumerate(several)
        for number, (prompt, output, reference) in enumerate(
            zip(groups[repeat % len(groups)], run.outputs, expected[repeat % len(groups)], strict=True)
        )
    ]
    return [difference.is_near_tie for difference in found if difference is not None]


def document(cells: Sequence[Mapping[str, Any]], settings: Settings) -> dict[str, Any]:
    """All cells and what they say about the goals."""
    return {
        "environment": environment(torch.device("cpu")),
        "dtype": "float32",
        "settings": asdict(settings),
        "goals": goals(cells),
        "cells": list(cells),
    }


def kept_cells(work: Path | None, key: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Cells in the work file that were measured at this commit, with these settings; a torn last line is left out."""
    if work is None or not work.exists():
        return {}
    found = {}
    for line in work.read_text(encoding="utf-8").split("\n"):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if row["key"] == key:
            found[row["cell"]["cell"]] = row["cell"]
    return found


def keep_cell(work: Path | None, key: Mapping[str, Any], cell: Mapping[str, Any]) -> None:
    """Append a cell to the work file, if there is one."""
    if work is not None:
        with work.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, "cell": cell}, allow_nan=False) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", default="*", help="measure only cells whose name matches, such as 'demo/*/b4'")
    parser.add_argument("--list", action="store_true", help="print the cells and stop")
    parser.add_argument("--quick", action="store_true", help="a few tokens of cheap cells, one repeat: does it run?")
    parser.add_argument("--humaneval", type=Path, help="HumanEval's problems, JSONL; without it they are left out")
    parser.add_argument("--heads", type=Path, help="other heads of the bundled model, calibrated")
    parser.add_argument("--work", type=Path, help="JSONL that cells are appended to, and taken from if they are there")
    parser.add_argument("--output", type=Path, help="also write the JSON document here")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    settings = QUICK if arguments.quick else Settings()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LADON_CACHE"] = folder  # what the user's machine has learnt before would not be cold
        materials = Materials(arguments.heads, arguments.humaneval)
        every = all_cells(materials.longest_prompt(settings.max_new_tokens), arguments.humaneval is not None)
        chosen = [cell for cell in every if fnmatch(cell.name, arguments.cells)]
        if arguments.quick:
            chosen = [cell for cell in chosen if cell.batch <= 4 and (cell.context or 0) <= 64]
        if arguments.list:
            print("\n".join(cell.name for cell in chosen))
            return
        cells = _measured(chosen, materials, settings, arguments.work)
    found = document(cells, settings)
    if arguments.output:
        arguments.output.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    print("\n".join(lines(found["goals"])))
    print(json.dumps(found, allow_nan=False))


def _measured(
    chosen: Sequence[Cell], materials: Materials, settings: Settings, work: Path | None
) -> list[dict[str, Any]]:
    """The cells' results, from the work file or measured now."""
    key = {"commit": commit(), "settings": asdict(settings)}
    kept = kept_cells(work, key)
    for number, cell in enumerate(chosen, start=1):
        if cell.name not in kept:
            kept[cell.name] = measure(cell, materials, settings)
            keep_cell(work, key, kept[cell.name])
        shown = {name: None if ratio is None else round(ratio, 3) for name, ratio in kept[cell.name]["ratios"].items()}
        print(f"{number}/{len(chosen)} {cell.name}: {shown} {kept[cell.name]['seconds']} s", flush=True)
    return [kept[cell.name] for cell in chosen]


if __name__ == "__main__":
    main()
