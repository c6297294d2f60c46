"""Acceptance length of every kind of tree at several budgets, on held-out code, with the bundled model. No timing.

    python benchmarks/acceptance.py --prompts 100 --output benchmarks/results/NAME.json

Every output is compared with plain decoding of the same engine. Fixed trees are the best of their size, calibrated on
other modules than the prompts come from. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from ladon.bench.environment import environment
from ladon.bench.repetition import Repetition
from ladon.bench.systems import LadonSystem, merged
from ladon.bundled import demo_fixed_tree, demo_prompts, load_demo

BUDGETS = (8, 16, 32, 64)


def measure(system: LadonSystem, prompts: list[list[int]], new_tokens: int, plain: list[list[int]]) -> dict[str, Any]:
    """One mode over all prompts: acceptance length, the same without loops, tree efficiency, differences from plain."""
    repetition, parts, different = Repetition(), [], 0
    for ids, expected in zip(prompts, plain, strict=True):
        run = system.run([ids], new_tokens)
        different += run.outputs[0] != expected
        repetition.add(run.outputs[0], run.step_counts)
        parts.append(run.stats)
    total = merged(parts)
    return {
        "mode": system.name,
        "budget": system.budget,
        "acceptance_length": round(total.acceptance_length, 4),
        "acceptance_length_not_repeated": round(repetition.acceptance_length, 4),
        "repeated_8grams": round(repetition.share, 4),
        "tree_efficiency": round(total.tree_efficiency, 4),
        "different_outputs": different,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--output", type=Path, help="also write the JSON document here")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer, heads = load_demo(getattr(torch, arguments.dtype))
    prompts = [tokenizer(text)["input_ids"] for text in demo_prompts(arguments.prompts)]
    plain_system = LadonSystem(model, heads, mode="plain", budget=1, profile=True)
    plain = [plain_system.run([ids], arguments.new_tokens).outputs[0] for ids in prompts]
    systems = [plain_system, LadonSystem(model, heads, mode="chain", budget=64, profile=True)]
    for size in BUDGETS:
        tree = demo_fixed_tree(size)
        systems.append(LadonSystem(model, heads, mode="fixed", budget=size, fixed_tree=tree, profile=True))
        systems.append(LadonSystem(model, heads, mode="dynamic", budget=size, profile=True))
    rows = []
    for system in systems:
        rows.append(measure(system, prompts, arguments.new_tokens, plain))
        print(rows[-1], flush=True)
    document = {
        "environment": environment(model.device),
        "model": "demo",
        "dtype": arguments.dtype,
        "prompts": len(prompts),
        "new_tokens": arguments.new_tokens,
        "results": rows,
    }
    if arguments.output:
        arguments.output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
