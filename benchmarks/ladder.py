"""From the chain to everything together, one rung at a time: what each step of the way adds, at equal budgets.

    python benchmarks/ladder.py --work ladder.jsonl --output benchmarks/results/NAME.json
    python benchmarks/ladder.py --heads FOLDER --hydra FOLDER --timed --work ladder.jsonl
    python benchmarks/ladder.py --prompts 2 --max-new-tokens 16 --cells 'code/greedy/*/16'

A cell is a kind of prompts (held-out code, repetitive edits), a law (greedy, temperature 1), a rung and a budget
(`--list` prints them). Rungs:

    chain       each head's best token
    fixed       MEDUSA's tree: the best fixed one of that size for these heads' hit rates
    candidates  dynamic tree by the product of the heads, each normalised over its 32 candidates alone
    softmax     each normalised over the vocabulary
    calibrated  and divided by a temperature per depth
    JOINT       the heads' own joint (markov, say) with its temperatures, if they have one
    ngrams      and n-grams merged in
    hydra       `--hydra`: sequentially conditioned heads, alone

In the cells nothing is timed; every text is compared with plain decoding's of the same seed. `--timed` adds tokens per
second of all rungs at 16 nodes beside plain decoding's, side by side and step by step (`never_slower_turns.py`): run
that alone on the machine. Cells are appended to `--work` as they are done; killed and started again, it goes on where
it stopped. The last line is one JSON document; docs/reference/benchmark-files.md defines its keys.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

import torch
from acceptance import law_of, measure, plain_rows
from ladder_rungs import Rungs
from never_slower import keep_cell, kept_cells
from never_slower_turns import Make, Settings, take_turns
from tasks import TASKS, workload_of

from ladon.bench.systems import LadonSystem, Run, merged
from ladon.bench.workloads import prompt_ids
from ladon.engine.sequence import Row
from ladon.util.files import finite
from ladon.util.machine import commit, environment, load

BUDGETS = (4, 8, 16, 32, 64)
TIMED_BUDGET = 16
LAWS = {"greedy": 0.0, "sampled": 1.0}  # temperatures
TURNS = Settings(groups=6, most_repeats=6, second_seconds=60.0, further_seconds=45.0)


class Ladder:
    """Everything that is measured, each part made when it is first needed."""

    def __init__(self, rungs: Rungs, num_prompts: int, max_new_tokens: int) -> None:
        """`num_prompts` of each kind, each answered by so many tokens at most."""
        self.rungs, self._max_new_tokens = rungs, max_new_tokens
        self.workloads = {task: workload_of(task, num_prompts, rungs.tokenizer) for task in TASKS}
        self._plain: dict[tuple[str, str], list[Row]] = {}

    @cached_property
    def cells(self) -> dict[str, tuple[str, str, str, int]]:
        """Task, law, rung and nodes by the name of the cell."""
        return {
            f"{task}/{law}/{rung}/{nodes}": (task, law, rung, nodes)
            for task in TASKS
            for law in LAWS
            for rung in self.rungs.names
            for nodes in dict.fromkeys(self.rungs.nodes(rung, budget) for budget in BUDGETS)
        }

    def prompts(self, task: str) -> list[list[int]]:
        """The token ids of each prompt."""
        return [prompt_ids(self.rungs.tokenizer, question, []) for question in self.workloads[task].questions]

    def measured(self, name: str) -> dict[str, Any]:
        """One cell, as a JSON object."""
        task, law, rung, nodes = self.cells[name]
        if (task, law) not in self._plain:
            answers = plain_rows(self.rungs.model, self.prompts(task), self._max_new_tokens, LAWS[law])
            self._plain[task, law] = answers
        decoder = self.rungs.diagnosed(rung, nodes)
        found = measure(decoder, self._plain[task, law], LAWS[law])
        return {"cell": name, "task": task, "law": law, "rung": rung, "budget": nodes, **found}

    def timed(self, name: str, settings: Settings) -> dict[str, Any]:
        """Tokens per second of all rungs, named `timed/TASK/LAW`, each over plain decoding's in the same repeat."""
        _, task, law = name.split("/")
        groups = [[ids] for ids in self.prompts(task)[: settings.groups]]
        makers: dict[str, Make] = {"plain": lambda: LadonSystem(self.rungs.model, None, mode="plain", budget=1)}
        makers |= {rung: self._maker(rung) for rung in self.rungs.names}
        before = load()
        runs = take_turns(makers, groups, settings.max_new_tokens, settings, **law_of(LAWS[law], 1))
        plain = [run.stats.tokens_per_second for run in runs["plain"]]
        texts = [run.outputs for run in runs["plain"]]
        several = [run.outputs for found in runs.values() for run in found]
        return {
            "cell": name,
            "task": task,
            "law": law,
            "budget": TIMED_BUDGET,
            "load_before": before,
            "load_after": load(),
            "systems": {rung: _speeds(found, plain) for rung, found in runs.items()},
            "runs_different": sum(outputs != texts[n % len(texts)] for n, outputs in enumerate(several)),
        }

    def _maker(self, rung: str) -> Make:
        return lambda: self.rungs.system(rung, TIMED_BUDGET)


def _speeds(runs: Sequence[Run], plain: Sequence[float]) -> dict[str, Any]:
    speeds = [run.stats.tokens_per_second for run in runs]
    return {
        "tokens_per_second": median(speeds),
        "vs_plain": median(speed / other for speed, other in zip(speeds, plain, strict=True)),
        "acceptance_length": finite(merged([run.stats for run in runs]).acceptance_length),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", default="*", help="measure only cells whose name matches, such as 'code/greedy/*'")
    parser.add_argument("--list", action="store_true", help="print the cells and stop")
    parser.add_argument("--prompts", type=int, default=20, help="of each kind")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--heads", type=Path, help="other heads of the bundled model, calibrated")
    parser.add_argument("--hydra", type=Path, help="sequentially conditioned heads of it, calibrated or not")
    parser.add_argument("--timed", action="store_true", help="tokens per second, too")
    parser.add_argument("--work", type=Path, help="JSONL that cells are appended to, and taken from if they are there")
    parser.add_argument("--output", type=Path, help="also write the JSON document here")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    ladder = Ladder(Rungs(arguments.heads, arguments.hydra), arguments.prompts, arguments.max_new_tokens)
    names = list(ladder.cells) + [f"timed/{task}/{law}" for task in TASKS for law in LAWS if arguments.timed]
    chosen = [name for name in names if fnmatch(name, arguments.cells)]
    if arguments.list:
        print("\n".join(chosen))
        return
    settings = Settings(**asdict(TURNS) | {"max_new_tokens": arguments.max_new_tokens})
    asked = {"prompts": arguments.prompts, "settings": asdict(settings), "heads": ladder.rungs.about}
    key = {"commit": commit(), **asked}
    cells = kept_cells(arguments.work, key)
    for number, name in enumerate(chosen, start=1):
        if name not in cells:
            is_timed = name.startswith("timed/")
            cells[name] = ladder.timed(name, settings) if is_timed else ladder.measured(name)
            keep_cell(arguments.work, key, cells[name])
        print(f"{number}/{len(chosen)} {name}: {_shown(cells[name])}", flush=True)
    document = {
        "environment": environment(torch.device("cpu")),
        "model": "demo",
        "dtype": "float32",
        **asked,
        "workloads": {task: workload.summary() for task, workload in ladder.workloads.items()},
        "results": [cells[name] for name in chosen if "rung" in cells[name]],
        "timed": [cells[name] for name in chosen if "systems" in cells[name]],
    }
    if arguments.output:
        arguments.output.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    print(json.dumps(document, allow_nan=False))


def _shown(cell: dict[str, Any]) -> str:
    if "systems" in cell:
        return ", ".join(f"{rung} {found['vs_plain']:.2f}x" for rung, found in cell["systems"].items())
    length, wrong = cell["acceptance_length"], cell["different"]
    return f"{length:.3f} tokens per step" + (f", {wrong} texts DIFFER" if wrong else "")


if __name__ == "__main__":
    main()
