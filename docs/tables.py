"""The tables made from result files: between `<!-- KIND FILE -->` and `<!-- end -->` stands what FILE, below
benchmarks/results, says. KIND is timing, acceptance, blocks, structured or ladder. What to show of it may follow FILE:
for ladder a cell, such as code/greedy; for timing the modes, such as plain,dynamic:16 (a short table of these rows).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
MARKED = re.compile(
    r"<!-- (timing|acceptance|blocks|structured|ladder) (\S+)(?: (\S+))? -->\n.*?<!-- end -->", re.DOTALL
)
NAMES = {
    "plain": "plain",
    "chain": "chain",
    "fixed": "fixed tree",
    "dynamic": "dynamic tree",
    "auto": "dynamic tree, automatic size",
    "auto+ngrams": "dynamic tree, automatic size, n-grams (default)",
    "pruned": "dynamic tree, automatic size, early pruning",
}
RUNGS = {
    "chain": "chain",
    "fixed": "fixed tree (MEDUSA)",
    "candidates": "dynamic tree (MEDUSA+)",
    "softmax": "+ full softmax",
    "calibrated": "+ calibration",
    "markov": "+ Markov",
    "ngrams": "+ n-grams",
    "hydra": "Hydra",
}


def with_tables(page: str) -> str:
    """The page with every marked table made anew."""

    def table(match: re.Match[str]) -> str:
        document = json.loads((RESULTS / match[2]).read_text(encoding="utf-8"))
        if match[1] == "timing" and match[3]:
            rows = short_timing_rows(document, match[3].split(","))
        elif match[1] == "ladder":
            rows = ladder_rows(document, match[3])
        else:
            kinds = {"timing": timing_rows, "acceptance": acceptance_rows}
            kinds |= {"blocks": block_rows, "structured": structured_rows}
            rows = kinds[match[1]](document)
        lines = ["| " + " | ".join(row) + " |" for row in rows]
        lines.insert(1, "|" + "---|" * len(rows[0]))
        return "\n".join([match[0].split("\n", 1)[0], *lines, "<!-- end -->"])

    return MARKED.sub(table, page)


def timing_rows(document: dict[str, Any]) -> list[list[str]]:
    """Head and rows of a `ladon bench` document, batch 1."""
    results = [result for result in document["results"] if result["batch"] == 1]
    reference = next(entry for entry in document["transformers"] if entry["batch"] == 1)["tokens_per_second"]
    plain = next(result for result in results if result["mode"] == "plain")["tokens_per_second"]
    rows = [["mode", "nodes", "tokens per step", "tokens per second", "vs plain", "vs `transformers`", "overhead"]]
    rows.append(["`transformers` generate", "1", "1.00", f"{reference:.0f}", f"{reference / plain:.2f}x", "1.00x", ""])
    for result in results:
        speed = result["tokens_per_second"]
        rows.append(
            [
                NAMES[result["mode"]],
                str(result["budget"]) if result["budget"] != "auto" else f"{result['nodes_per_step']:.1f}",
                f"{result['acceptance_length']:.2f}",
                f"{speed:.0f}",
                f"{speed / plain:.2f}x",
                f"{speed / reference:.2f}x",
                f"{result['overhead']:.0%}".replace("%", " %"),
            ]
        )
    return rows


def short_timing_rows(document: dict[str, Any], chosen: list[str]) -> list[list[str]]:
    """The head and the row of `transformers` of `timing_rows`, then the chosen modes; without the overhead.

    `dynamic:16` is the mode at 16 nodes; a name alone is the only row of its mode.
    """
    results = [result for result in document["results"] if result["batch"] == 1]
    head, reference, *rows = (row[:-1] for row in timing_rows(document))
    by_name = {name: row for result, row in zip(results, rows, strict=True) for name in _names(result)}
    return [head, reference, *(by_name[name] for name in chosen)]


def _names(result: dict[str, Any]) -> tuple[str, str]:
    return result["mode"], f"{result['mode']}:{result['budget']}"


def acceptance_rows(document: dict[str, Any]) -> list[list[str]]:
    """Head and rows of a `benchmarks/acceptance.py` document: fixed beside dynamic at every size."""
    by_key = {(result["mode"], result["budget"]): result for result in document["results"]}
    rows = [["nodes", "fixed tree", "dynamic tree", "gain", "fixed, not repeated", "dynamic, not repeated"]]
    for mode, size in by_key:
        if mode == "dynamic":
            fixed, dynamic = by_key["fixed", size], by_key["dynamic", size]
            kept, gain = "acceptance_length", dynamic["acceptance_length"] / fixed["acceptance_length"] - 1
            rows.append(
                [str(size), f"{fixed[kept]:.2f}", f"{dynamic[kept]:.2f}", f"{gain:+.1%}".replace("%", " %")]
                + [f"{result[f'{kept}_non_repeated']:.2f}" for result in (fixed, dynamic)]
            )
    return rows


def block_rows(document: dict[str, Any]) -> list[list[str]]:
    """Head and rows of a `benchmarks/head_blocks.py` document: what a draft reads and takes, and what is accepted."""
    rows = [
        ["head block", "parameters", "read per draft", "draft, bf16", "draft, fp32", "chain", "16 nodes", "64 nodes"]
    ]
    for result in document["results"]:
        lengths = {
            (entry["tree"], entry["nodes"]): entry["acceptance_length"]
            for entry in result["simulated"]
            if not entry["temperatures"]
        }
        chain = next(length for (tree, _), length in lengths.items() if tree == "chain")
        rows.append(
            [
                result["block"],
                f"{result['parameters'] / 1e6:.2f}M",
                f"{result['bytes_read'] / 1e6:.1f} MB",
                *(f"{result['draft_ms'][dtype]:.2f} ms" for dtype in ("bfloat16", "float32")),
                *(f"{length:.2f}" for length in (chain, lengths["dynamic", 16], lengths["dynamic", 64])),
            ]
        )
    return rows


def structured_rows(document: dict[str, Any]) -> list[list[str]]:
    """Head and rows of a document of benchmarks/structured.py."""
    table = [["mode", "forwards", "tokens per forward", "drafts dropped", "tokens/s", "vs plain"]]
    for result in document["results"]:
        share = result["illegal_share"]
        table.append(
            [
                result["mode"],
                str(result["forwards"]),
                f"{result['acceptance_length']:.2f}",
                "" if share is None else f"{share:.0%}",
                f"{result['tokens_per_second']:.0f}",
                f"{result['speedup_vs_plain']:.2f}",
            ]
        )
    return table


def ladder_rows(document: dict[str, Any], cells: str) -> list[list[str]]:
    """Head and rows of a document of benchmarks/ladder.py: tokens per step (on what repeats nothing) by budget."""
    chosen = [cell for cell in document["results"] if f"{cell['task']}/{cell['law']}" == cells]
    lengths: dict[str, dict[int, str]] = {}
    for cell in chosen:
        text = f"{cell['acceptance_length']:.2f} ({cell['acceptance_length_non_repeated']:.2f})"
        lengths.setdefault(cell["rung"], {})[cell["budget"]] = text
    speeds = next((cell for cell in document["timed"] if f"{cell['task']}/{cell['law']}" == cells), None)
    nodes = sorted({cell["budget"] for cell in chosen if cell["rung"] != "chain"})
    head = ["", *(f"{size} nodes" for size in nodes)]
    table = [head if speeds is None else [*head, f"tokens/s over plain, {speeds['budget']} nodes"]]
    for rung, found in lengths.items():
        row = [RUNGS.get(rung, f"+ {rung}"), *(found.get(size, found.get(max(found), "")) for size in nodes)]
        table.append(row if speeds is None else [*row, f"{speeds['systems'][rung]['vs_plain']:.2f}"])
    return table
