"""At which size of model, batch and budget early pruning pays: what it keeps, and what it saves by layer times.

    python benchmarks/pruning.py --heads FOLDER --output benchmarks/results/NAME.json

What survives is measured on the bundled model's answers, with the early exit in FOLDER if there is one. What verifying
costs is measured on random Llama layers of several widths, by rows in the forward; two layers stand for all of a
model's. `roofline` is no measurement: a 32-layer model on a GPU whose layers take the same time up to so many rows and
then in proportion to them. `perfect` is an early exit that never drops what would be accepted: the most that pruning
after this layer could ever give. Run nothing beside it. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ladon.calibrate.pruning import KEEPS, SIZES, Survival, Survivals, Verdict, judge, record_survival, ways_to_prune
from ladon.calibrate.timing import LayerTimes, Trials, measure_layer_times
from ladon.demo.bundled import demo_path, demo_prompts, load_demo
from ladon.heads import load_heads
from ladon.heads.early_exit import load_early_exit
from ladon.target.pruning.pruner import Pruning
from ladon.util.machine import environment, load

WIDTHS = {256: 8, 512: 12, 1024: 24}  # hidden width: layers of a model of this width
BATCHES = (1, 4, 8, 16)
LARGEST = max(SIZES)
RIDGES = (150, 300)  # rows up to which a GPU's layers take the same time (papers: about 150 on an A100, 300 on an H100)
CONTEXT = 256
ENOUGH = 0.98  # of the whole tree's tokens per step


def survival(heads_folder: Path, prompts: int, new_tokens: int) -> Survivals:
    """What pruning keeps on the bundled model."""
    model, tokenizer, _ = load_demo()
    heads = load_heads(demo_path() / "heads", model)
    ids = [torch.tensor(tokenizer(text)["input_ids"]).long() for text in demo_prompts(prompts, "calibration")]
    ways = ways_to_prune(model.config.num_hidden_layers, load_early_exit(heads_folder, model))
    return record_survival(model, heads, ids, ways, sizes=SIZES, keeps=KEEPS, max_new_tokens=new_tokens)


def of_model(survivals: Survivals, measured_layers: int, num_layers: int) -> Survivals:
    """The same survival at the same share of another model's layers."""
    pruned = []
    for found in survivals.pruned:
        layer = max(1, round(found.pruning.layer * num_layers / measured_layers))
        way = replace(found.pruning, layer=layer, early_exit=None)
        pruned.append(replace(found, pruning=way))
    best: dict[tuple[int, Pruning], Survival] = {}
    for found in pruned:  # with a trained early exit or without, whatever keeps more
        name = (found.nodes, found.pruning)
        if name not in best or found.acceptance_length > best[name].acceptance_length:
            best[name] = found
    return replace(survivals, pruned=list(best.values()))


def perfect(survivals: Survivals, num_heads: int) -> Survivals:
    """The same trees judged by one who knows: nothing that would be accepted is dropped if there is room for it."""
    pruned = [
        replace(found, acceptance_length=survivals.unpruned[found.nodes], whole=1.0)
        for found in survivals.pruned
        if isinstance(found.pruning.keep, int) and found.pruning.keep > num_heads
    ]
    return replace(survivals, pruned=pruned)


@torch.no_grad()
def measured_times(
    width: int, num_layers: int, batches: Sequence[int]
) -> Iterable[tuple[LayerTimes, dict[str, float]]]:
    """Layer times of a random Llama by batch size, and the milliseconds of each criterion."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=2,
        num_attention_heads=width // 64,
        vocab_size=16 * width,
        max_position_embeddings=1024,
    )
    model = LlamaForCausalLM(config).eval()
    context = torch.arange(3, 3 + CONTEXT)
    for batch in batches:
        trials = Trials(model, context, batch)
        times = measure_layer_times(trials, sorted({*SIZES, *KEEPS}), rounds=3)
        score_ms = {
            criterion: trials.score_ms(Pruning(layer=1, keep=16, criterion=criterion), LARGEST)
            for criterion in ("evidence", "siblings", "top-k")
        }
        yield replace(times, num_layers=num_layers), score_ms


def roofline_times(ridge: int, batches: Sequence[int]) -> Iterable[tuple[LayerTimes, dict[str, float]]]:
    """A layer takes one millisecond up to `ridge` rows; the output projection as long as .65 of one (7B, V = 32k)."""
    for batch in batches:
        layer = {size: max(1.0, batch * size / ridge) for size in {*SIZES, *KEEPS}}
        rest = {size: 0.65 * ms for size, ms in layer.items()}
        times = LayerTimes(batch=batch, context=CONTEXT, num_layers=32, layer_ms=layer, rest_ms=rest)
        yield times, {"evidence": 0.0, "siblings": 0.0, "top-k": rest[LARGEST]}


def row_of(
    shape: str, times: LayerTimes, score_ms: dict[str, float], survivals: Survivals, num_heads: int
) -> dict[str, Any]:
    """What pruning gives on one shape and batch size: against the whole largest tree, and against the best one."""
    ways = {replace(found.pruning, keep=1): score_ms[found.pruning.criterion] for found in survivals.pruned}
    verdicts = judge(survivals, times, ways, 0.0)
    most = survivals.unpruned[LARGEST]
    whole_ms = times.whole_ms(LARGEST)
    enough = [v for v in verdicts if v.survival.nodes == LARGEST and v.survival.acceptance_length >= ENOUGH * most]
    quickest = min(enough, key=lambda verdict: verdict.ms, default=None)
    knowing = judge(perfect(survivals, num_heads), times, ways, 0.0)[0]
    best_size = max(survivals.unpruned, key=lambda n: survivals.unpruned[n] / times.whole_ms(n))
    return {
        "shape": shape,
        "batch": times.batch,
        "whole_ms": round(whole_ms, 3),
        "saved": None if quickest is None else round(1 - quickest.ms / whole_ms, 4),
        "saved_by": None if quickest is None else _named(quickest),
        "best_unpruned_nodes": best_size,
        "gain": round(verdicts[0].gain, 4),
        "gain_by": _named(verdicts[0]),
        "perfect_gain": round(knowing.gain, 4),
        "layer_ms": {str(n): round(ms, 4) for n, ms in sorted(times.layer_ms.items())},
        "rest_ms": {str(n): round(ms, 4) for n, ms in sorted(times.rest_ms.items())},
        "score_ms": {name: round(ms, 4) for name, ms in score_ms.items()},
    }


def _named(verdict: Verdict) -> dict[str, Any]:
    pruning = verdict.survival.pruning
    names = {name: getattr(pruning, name) for name in ("layer", "keep", "criterion", "weight", "top_k")}
    return {"nodes": verdict.survival.nodes, **names, "tokens": round(verdict.survival.acceptance_length, 4)}


def show(rows: Sequence[dict[str, Any]], tokens: float) -> None:
    """A table for people."""
    print(f"whole tree of {LARGEST} nodes: {tokens:.3f} tokens per step; pruned within {1 - ENOUGH:.0%} of it")
    print(f"{'shape':24} {'batch':>5} {'whole, ms':>10} {'saved':>7} {'best n':>7} {'pruned/best':>12} {'perfect':>8}")
    for row in rows:
        saved = "-" if row["saved"] is None else f"{row['saved']:.0%}"
        print(
            f"{row['shape']:24} {row['batch']:5d} {row['whole_ms']:10.2f} {saved:>7} {row['best_unpruned_nodes']:7d} "
            f"{row['gain']:11.3f}x {row['perfect_gain']:7.3f}x"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=Path, default=demo_path() / "heads", help="folder with a trained early exit")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--widths", default=",".join(map(str, WIDTHS)))
    parser.add_argument("--output", type=Path, help="also write the JSON document here")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    before = load()
    kept = survival(arguments.heads, arguments.prompts, arguments.new_tokens)
    model, _, heads = load_demo()
    measured_layers, rows = model.config.num_hidden_layers, []
    for width in map(int, arguments.widths.split(",")):
        num_layers = WIDTHS[width]
        scaled = of_model(kept, measured_layers, num_layers)
        for times, score_ms in measured_times(width, num_layers, BATCHES):
            rows.append(row_of(f"{num_layers} layers of {width}", times, score_ms, scaled, heads.num_heads))
    for ridge in RIDGES:
        scaled = of_model(kept, measured_layers, 32)
        for times, score_ms in roofline_times(ridge, (*BATCHES, 32)):
            rows.append(row_of(f"roofline, {ridge} rows", times, score_ms, scaled, heads.num_heads))
    show(rows, kept.unpruned[LARGEST])
    document = {
        "environment": environment(torch.device("cpu")) | {"load_before": before, "load_after": load()},
        "model": "demo",
        "dtype": "float32",
        "trained_layer": _trained_layer(kept),
        "row_steps": kept.row_steps,
        "unpruned": {str(n): round(length, 4) for n, length in kept.unpruned.items()},
        "survival": [
            {"nodes": s.nodes, **_way(s.pruning), "tokens": round(s.acceptance_length, 4), "whole": round(s.whole, 4)}
            for s in kept.pruned
        ],
        "results": rows,
    }
    if arguments.output:
        arguments.output.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    print(json.dumps(document, allow_nan=False))


def _way(pruning: Pruning) -> dict[str, Any]:
    names = {name: getattr(pruning, name) for name in ("layer", "keep", "criterion", "weight", "top_k")}
    return {**names, "trained": pruning.early_exit is not None}


def _trained_layer(kept: Survivals) -> int | None:
    return next((s.pruning.early_exit.layer for s in kept.pruned if s.pruning.early_exit is not None), None)


if __name__ == "__main__":
    main()
