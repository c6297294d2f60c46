"""Constrained decoding with trees against constrained plain decoding: forwards, speed, and drafts that were dropped.

    OMP_NUM_THREADS=1 python benchmarks/structured.py --output benchmarks/results/NAME.json

The bundled model writes JSON for several schemas after held-out code. Modes take turns, text by text, in rotating
order; times are medians over the repeats. `same` says whether every answer equals that of plain constrained decoding,
`valid` how many are complete and parse. docs/benchmarks/structured-output.md says what the numbers mean.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

import ladon
from ladon.bench.systems import merged
from ladon.demo.bundled import demo_prompts
from ladon.engine.stats import DecodeStats
from ladon.util.files import finite
from ladon.util.machine import environment, load

NAME = {"type": "string", "pattern": "^[a-z][a-z_]{2,12}$"}
SCHEMAS: dict[str, Any] = {
    "flat": {
        "name": NAME,
        "version": {"type": "string", "pattern": "^[0-9][.][0-9]{1,2}$"},
        "is_public": {"type": "boolean"},
        "size": {"type": "integer", "minimum": 0, "maximum": 99999},
    },
    "enums": {
        "level": {"enum": ["debug", "info", "warning", "error"]},
        "format": {"enum": ["text", "json", "binary"]},
        "mode": {"enum": ["read", "write", "append"]},
    },
    "array": {
        "numbers": {
            "type": "array",
            "items": {"type": "integer", "minimum": 0, "maximum": 9999},
            "minItems": 3,
            "maxItems": 6,
        }
    },
    "text": {"summary": {"type": "string", "pattern": "^[A-Za-z][A-Za-z ,]{18,58}[.]$"}},
    "nested": {
        "function": {
            "type": "object",
            "properties": {
                "name": NAME,
                "arguments": {
                    "type": "array",
                    "minItems": 1,
                    "maxItems": 2,
                    "items": {
                        "type": "object",
                        "properties": {"name": NAME, "type": {"enum": ["int", "str", "bool"]}},
                        "required": ["name", "type"],
                        "additionalProperties": False,
                    },
                },
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
    },
}
MODES: dict[str, dict[str, Any]] = {
    "plain": {"budget": 1},
    "chain": {"tree": "chain", "budget": 16},
    "dynamic 8": {"budget": 8},
    "dynamic 16": {"budget": 16},
    "dynamic 32": {"budget": 32},
    "auto": {},
}
MAX_NEW_TOKENS = 120


def whole(properties: dict[str, Any]) -> dict[str, Any]:
    """The schema of an object with exactly these properties."""
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def is_valid(decoder: ladon.Decoder, text: str) -> bool:
    try:
        return decoder.complete == [True] and isinstance(json.loads(text), dict)
    except ValueError:
        return False


def run_all(decoders: dict[str, ladon.Decoder], tokenizer: Any, prompts: Sequence[str], schema: Any) -> dict[str, Any]:
    """All modes over all prompts, once; of each mode its statistics, its answers and whether they are valid."""
    constraint, names = ladon.json_schema(whole(schema), tokenizer), list(decoders)
    found: dict[str, Any] = {name: ([], [], []) for name in names}
    for number, prompt in enumerate(prompts):
        ids = tokenizer(prompt, return_tensors="pt")
        for name in names[number % len(names) :] + names[: number % len(names)]:
            decoder = decoders[name]
            output = decoder.generate(**ids, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, constraint=constraint)
            new = output[0, ids.input_ids.shape[1] :].tolist()
            stats, answers, valid = found[name]
            stats.append(decoder.stats)
            answers.append(new)
            valid.append(is_valid(decoder, tokenizer.decode(new, skip_special_tokens=True)))
    return found


def summary(name: str, repeats: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One mode over all schemas and prompts; `repeats` hold its statistics, answers and verdicts."""
    totals: list[DecodeStats] = [merged(repeat[name][0]) for repeat in repeats]
    plain = [merged(repeat["plain"][0]) for repeat in repeats]
    first = totals[0]
    return {
        "mode": name,
        "texts": len(repeats[0][name][0]),
        "tokens": first.tokens,
        "forwards": first.forwards,
        "acceptance_length": finite(first.acceptance_length),
        "nodes_per_step": first.nodes_verified / first.row_steps,
        "drafts_checked": first.drafts_checked,
        "drafts_illegal": first.drafts_illegal,
        "illegal_share": finite(first.illegal_share),
        "tokens_per_second": median(total.tokens_per_second for total in totals),
        "speedup_vs_plain": median(
            total.tokens_per_second / other.tokens_per_second for total, other in zip(totals, plain, strict=True)
        ),
        "same": all(repeat[name][1] == repeats[0]["plain"][1] for repeat in repeats),
        "valid": sum(repeats[0][name][2]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="also write the JSON document here")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    load_before = load()
    model, tokenizer, heads = ladon.load_demo()
    decoders = {name: ladon.Decoder(model, heads, **options) for name, options in MODES.items()}
    prompts = [f"{prompt}\n\nEXAMPLE = " for prompt in demo_prompts(arguments.prompts)]
    repeats = []
    for _ in range(arguments.repeats):
        found: dict[str, Any] = {name: ([], [], []) for name in decoders}
        for schema in SCHEMAS.values():
            for name, parts in run_all(decoders, tokenizer, prompts, schema).items():
                for whole_list, part in zip(found[name], parts, strict=True):
                    whole_list += part
        repeats.append(found)
    rows = [summary(name, repeats) for name in decoders]
    document = {
        "environment": environment(model.device) | {"load_before": load_before, "load_after": load()},
        "model": "demo",
        "dtype": "float32",
        "schemas": {name: whole(schema) for name, schema in SCHEMAS.items()},
        "prompts": len(prompts),
        "max_new_tokens": MAX_NEW_TOKENS,
        "repeats": arguments.repeats,
        "results": rows,
    }
    for row in rows:
        print(row, flush=True)
    if arguments.output:
        arguments.output.write_text(json.dumps(document, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    print(json.dumps(document, allow_nan=False))


if __name__ == "__main__":
    main()
