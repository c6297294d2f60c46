"""Acceptance length of every kind of tree at several budgets, with the bundled model. No timing.

    python benchmarks/acceptance.py --prompts 100 --output benchmarks/results/NAME.json
    python benchmarks/acceptance.py --prompts 100 --heads FOLDER
    python benchmarks/acceptance.py --prompts 100 --workload edits --temperature 1

Prompts are held-out code, or code to write again with a change (`--workload edits`). Every output is compared with that
of plain decoding of the same engine, sampled ones with that of the same seed. Fixed trees are the best of their size,
calibrated on other modules than the prompts come from. The last line is one JSON document; docs/reference/metrics.md
defines its keys.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tasks import TASKS, workload_of

from ladon.bench.quality.diagnosis import DiagnosedDecoder, Diagnosis
from ladon.bench.quality.repetition import Repetition
from ladon.bench.quality.verification import difference_of
from ladon.bench.systems import LadonSystem, merged
from ladon.bench.workloads import prompt_ids
from ladon.decoder.decoder import Decoder
from ladon.demo.bundled import load_demo
from ladon.drafting.head_chaining import joint_of
from ladon.engine.sequence import Row
from ladon.heads import load_heads
from ladon.target.target import Target
from ladon.trees.fixed_tree import best_fixed_tree
from ladon.util.files import finite
from ladon.util.machine import environment, load

BUDGETS = (8, 16, 32, 64)


def law_of(temperature: float, seed: int) -> dict[str, Any]:
    """`generate`'s options of how tokens are picked: greedily at 0."""
    return {"do_sample": True, "temperature": temperature, "top_k": 0, "seed": seed} if temperature else {}


def plain_rows(model: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int, temperature: float) -> list[Row]:
    """Plain decoding's answer to each prompt; sampled, prompt i has seed i."""
    decoder, found = Decoder(model, tree="off"), []
    for number, ids in enumerate(prompts):
        law = law_of(temperature, number)
        (row,) = decoder.rows([torch.tensor(ids)], max_new_tokens=max_new_tokens, **law)
        for _ in decoder.decode([row]):
            pass
        found.append(row)
    return found


def measure(decoder: DiagnosedDecoder, plain: Sequence[Row], temperature: float) -> dict[str, Any]:
    """One decoder over all prompts, row by row; `plain` are the answers of `plain_rows` at this temperature."""
    repetition, diagnosis, parts, differences = Repetition(), Diagnosis(), [], []
    target = Target(decoder.model)
    for number, expected in enumerate(plain):
        law = law_of(temperature, number)
        (row,) = decoder.rows([expected.prompt], max_new_tokens=expected.max_new_tokens, **law)
        counts = [len(step.emitted[0]) for step in diagnosis.follow(decoder, [row]) if step.tree is not None]
        repetition.add(row.tokens, counts)
        parts.append(decoder.stats)
        differences.append(difference_of(target, number, row, expected))
    total, looked_at = merged(parts), diagnosis.document()
    near_ties = [difference.is_near_tie for difference in differences if difference is not None]
    return {
        "prompts": len(plain),
        "acceptance_length": finite(total.acceptance_length),
        "acceptance_length_non_repeated": finite(repetition.acceptance_length),
        "repeated_share": finite(repetition.share),
        "tree_efficiency": finite(total.tree_efficiency),
        "near_ties": sum(near_ties),
        "different": len(near_ties) - sum(near_ties),
        "diagnosis": looked_at if looked_at["row_steps"] else None,
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--heads", type=Path, help="other heads of the bundled model, calibrated or not")
    parser.add_argument("--joint", default="auto", help="how guesses are joined to paths, as `Decoder` takes it")
    parser.add_argument("--workload", default="code", choices=TASKS, help="held-out code, or code to write again")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy; above it, answers are sampled")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--output", type=Path, help="also write the JSON document here")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    load_before = load()
    model, tokenizer, heads = load_demo(getattr(torch, arguments.dtype))
    if arguments.heads:
        heads = load_heads(arguments.heads, model)
    workload = workload_of(arguments.workload, arguments.prompts, tokenizer)
    prompts = [prompt_ids(tokenizer, question, []) for question in workload.questions]
    plain = plain_rows(model, prompts, arguments.max_new_tokens, arguments.temperature)
    make = partial(LadonSystem, model, heads, make=partial(DiagnosedDecoder, joint=arguments.joint))
    systems = [LadonSystem(model, None, mode="plain", budget=1, make=DiagnosedDecoder)]
    systems.append(make(mode="chain", budget=max(BUDGETS)))
    for size in BUDGETS:
        if heads.calibration is not None:
            tree = best_fixed_tree(heads.calibration.hit_rates, size)
            systems.append(make(mode="fixed", budget=size, fixed_tree=tree))
        systems.append(make(mode="dynamic", budget=size))
    rows = []
    for system in systems:
        found = measure(system.decoder, plain, arguments.temperature)
        rows.append({"mode": system.name, "batch": 1, "budget": system.budget, **found})
        print(rows[-1], flush=True)
    document = {
        "environment": environment(model.device) | {"load_before": load_before, "load_after": load()},
        "model": "demo",
        "dtype": arguments.dtype,
        "heads": {"family": heads.family, "num": heads.num_heads, "weights": heads.weights_hash},
        "joint": joint_of(heads, arguments.joint),
        "workload": workload.summary(),
        "temperature": arguments.temperature,
        "max_new_tokens": arguments.max_new_tokens,
        "results": rows,
    }
    if arguments.output:
        arguments.output.write_text(json.dumps(document, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    print(json.dumps(document, allow_nan=False))


if __name__ == "__main__":
    main()
