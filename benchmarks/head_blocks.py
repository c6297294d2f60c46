"""The head blocks side by side: what each accepts after equal training, what it weighs, and what a draft costs.

    python benchmarks/head_blocks.py answers.jsonl --work FOLDER --output benchmarks/results/NAME.json

Every block is trained by `ladon train` on the same rows in the same order, and measured by `ladon calibrate` on
held-out code. Draft times are medians over alternating rounds, on one thread: run nothing beside it. `answers.jsonl`
comes from `ladon distill`. Killed and started again, it goes on where it stopped. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ladon.demo.bundled import load_demo
from ladon.heads import Heads, load_heads
from ladon.trees import lattice
from ladon.util.machine import environment, load

SWIGLU = ("--family-option", "activation=swiglu")
BLOCKS = {
    "MEDUSA's block, own projections": ["--family", "medusa"],
    "MEDUSA's block, shared projection": ["--family", "medusa", "--family-option", "projection=shared"],
    "wide MLP (4x), shared projection": ["--family", "shared", "--family-option", "expansion=4"],
    "wide MLP (2x), shared projection": ["--family", "shared", "--family-option", "expansion=2"],
    "SwiGLU (2x), shared projection": ["--family", "shared", "--family-option", "expansion=2", *SWIGLU],
    "wide MLP (2x), own projections of rank 64": ["--family", "lowrank", "--family-option", "rank=64"],
}
ROUNDS, DRAFTS = 15, 40


def ladon(*arguments: str) -> str:
    """Standard output of a `ladon` command on one thread; its failure ends the benchmark."""
    command = [sys.executable, "-m", "ladon.cli", *arguments, "--threads", "1"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"`{' '.join(command)}` ended with {done.returncode}")
    return done.stdout


def trained(name: str, options: list[str], arguments: argparse.Namespace) -> dict[str, Any]:
    """Train one block, or take what was trained before, and let it be measured."""
    folder = arguments.work / "".join(c if c.isalnum() else "-" for c in name)
    ladon("train", str(arguments.rows), "--out", str(folder), "--steps", str(arguments.steps), *options, *SETTINGS)
    heads = ["--heads", str(folder)]
    found = ladon("calibrate", *heads, "--limit", str(arguments.prompts), "--no-step-times", "--dry-run", "--json")
    measured = json.loads(found.splitlines()[-1])
    return {"block": name, "folder": str(folder), "options": options, "simulated": measured["simulated"]}


SETTINGS = ["--optimizer", "muon", "--schedule", "linear", "--batch-size", "8", "--length", "512"]


@torch.no_grad()
def draft_times(heads: dict[str, Heads], dtype: torch.dtype) -> dict[str, float]:
    """Median milliseconds of one draft, from a hidden row to a lattice of 32 candidates, blocks in turns."""
    model, _, _ = load_demo(dtype)
    for block in heads.values():
        block.bind(model)
    hidden, root = torch.randn(1, model.config.hidden_size, dtype=dtype), torch.tensor([1])
    seconds: dict[str, list[float]] = {name: [] for name in heads}
    for _ in range(ROUNDS):
        for name, block in heads.items():
            started = time.perf_counter()
            for _ in range(DRAFTS):
                lattice.from_logits(block.draft(hidden, root), 32, token_ids=block.token_ids)
            seconds[name].append((time.perf_counter() - started) / DRAFTS)
    return {name: 1e3 * median(values) for name, values in seconds.items()}


def bytes_read(heads: Heads, projection: torch.Tensor) -> int:
    """Bytes of weights that one draft reads in bfloat16: the heads' own and, if they share it, the projection."""
    own = sum(parameter.numel() for parameter in heads.parameters())
    shares = heads.family == "shared" or heads.options.get("projection") == "shared"
    return 2 * (own + (projection.numel() if shares else 0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, help="training rows, from `ladon distill`")
    parser.add_argument("--work", type=Path, required=True, help="folder for the trained heads")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--prompts", type=int, default=60)
    parser.add_argument("--output", type=Path, help="also write the JSON document here")
    arguments = parser.parse_args()
    results = [trained(name, options, arguments) for name, options in BLOCKS.items()]
    torch.set_num_threads(1)
    before = load()
    model, _, _ = load_demo()
    heads = {result["block"]: load_heads(result["folder"], model) for result in results}
    times = {dtype: draft_times(heads, getattr(torch, dtype)) for dtype in ("bfloat16", "float32")}
    for result in results:
        name = result["block"]
        result["parameters"] = sum(parameter.numel() for parameter in heads[name].parameters())
        result["bytes_read"] = bytes_read(heads[name], model.get_output_embeddings().weight)
        result["draft_ms"] = {dtype: found[name] for dtype, found in times.items()}
        del result["folder"]
    document = {
        "environment": environment(model.device) | {"load_before": before, "load_after": load()},
        "steps": arguments.steps,
        "settings": SETTINGS,
        "prompts": arguments.prompts,
        "results": results,
    }
    if arguments.output:
        arguments.output.write_text(json.dumps(document, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    print(json.dumps(document, allow_nan=False))


if __name__ == "__main__":
    main()
