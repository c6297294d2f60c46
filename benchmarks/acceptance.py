"""Acceptance length of every kind of tree at several budgets, on held-out code, with the bundled model. No timing.

    python benchmarks/acceptance.py --prompts 100 --output benchmarks/results/NAME.json
    python benchmarks/acceptance.py --prompts 100 --heads FOLDER

Every output is compared with plain decoding of the same engine. Fixed trees are the best of their size, calibrated on
other modules than the prompts come from. The last line is one JSON document; docs/metrics.md defines its keys.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ladon.bench.identity import compare
from ladon.bench.repetition import Repetition
from ladon.bench.report import finite
from ladon.bench.systems import LadonSystem, merged
from ladon.bench.workloads import demo_workload, prompt_ids
from ladon.bundled import load_demo
from ladon.environment import environment, load
from ladon.fixed_tree import best_fixed_tree
from ladon.generation import Decoder
from ladon.heads import load_heads
from ladon.joints import joint_of

BUDGETS = (8, 16, 32, 64)


def measure(
    system: LadonSystem, prompts: Sequence[list[int]], max_new_tokens: int, plain: Sequence[list[int]]
) -> dict[str, Any]:
    """One mode over all prompts, row by row; `plain` are the answers of plain decoding."""
    repetition, parts, differences = Repetition(), [], []
    for number, (ids, expected) in enumerate(zip(prompts, plain, strict=True)):
        run = system.run([ids], max_new_tokens)
        repetition.add(run.outputs[0], run.step_counts)
        parts.append(run.stats)
        differences.append(compare(system.decoder.model, number, ids, run.outputs[0], expected))
    total = merged(parts)
    near_ties = [difference.is_near_tie for difference in differences if difference is not None]
    return {
        "mode": system.name,
        "batch": 1,
        "budget": system.budget,
        "prompts": len(prompts),
        "acceptance_length": finite(total.acceptance_length),
        "acceptance_length_non_repeated": finite(repetition.acceptance_length),
        "repeated_share": finite(repetition.share),
        "tree_efficiency": finite(total.tree_efficiency),
        "near_ties": sum(near_ties),
        "different": len(near_ties) - sum(near_ties),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--heads", type=Path, help="other heads of the bundled model, calibrated or not")
    parser.add_argument("--joint", default="auto", help="how guesses are joined to paths, as `Decoder` takes it")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--output", type=Path, help="also write the JSON document here")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    load_before = load()
    model, tokenizer, heads = load_demo(getattr(torch, arguments.dtype))
    if arguments.heads:
        heads = load_heads(arguments.heads, model)
    workload = demo_workload(arguments.prompts)
    prompts = [prompt_ids(tokenizer, question, []) for question in workload.questions]
    plain_system = LadonSystem(model, heads, mode="plain", budget=1, profile=True)
    plain = [plain_system.run([ids], arguments.max_new_tokens).outputs[0] for ids in prompts]
    make = partial(LadonSystem, model, heads, profile=True, make=partial(Decoder, joint=arguments.joint))
    systems = [plain_system, make(mode="chain", budget=max(BUDGETS))]
    for size in BUDGETS:
        if heads.calibration is not None:
            tree = best_fixed_tree(heads.calibration.hit_rates, size)
            systems.append(make(mode="fixed", budget=size, fixed_tree=tree))
        systems.append(make(mode="dynamic", budget=size))
    rows = []
    for system in systems:
        rows.append(measure(system, prompts, arguments.max_new_tokens, plain))
        print(rows[-1], flush=True)
    document = {
        "environment": environment(model.device) | {"load_before": load_before, "load_after": load()},
        "model": "demo",
        "dtype": arguments.dtype,
        "heads": {"family": heads.family, "num": heads.num_heads, "weights": heads.weights_hash},
        "joint": joint_of(heads, arguments.joint),
        "workload": workload.summary(),
        "max_new_tokens": arguments.max_new_tokens,
        "results": rows,
    }
    if arguments.output:
        arguments.output.write_text(json.dumps(document, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    print(json.dumps(document, allow_nan=False))


if __name__ == "__main__":
    main()
