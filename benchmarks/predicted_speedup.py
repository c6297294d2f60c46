"""What speed-up a table of step times allows, for heads of published accuracy: a prediction, not a measurement.

MEDUSA's training log gives how often the truth is a head's best candidate, and how often it is among its best five.
Rates of the other ranks are taken to fall as a power of the rank through these two numbers, and the depths to be
independent, as in the dynamic tree of arXiv 2502.05947; then `ladon.tree_size.policy` chooses among the measured step
times as a decoder without a clock would (`deterministic=True`).

Shapes: K depths, E bucket edges.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from ladon.tree_size.frozen import FrozenSizing
from ladon.tree_size.latency_model import LatencyModel, StepTime
from ladon.tree_size.policy import EDGES
from ladon.trees.fixed_tree import RankPath, best_fixed_tree

# (best candidate, among the best five) of heads 1 to 4, from MEDUSA's training logs: docs/benchmarks/training.md
VICUNA = {
    "Vicuna-7B": ((0.560, 0.780), (0.316, 0.563), (0.201, 0.417), (0.147, 0.340)),
    "Vicuna-13B": ((0.594, 0.816), (0.340, 0.580), (0.216, 0.436), (0.150, 0.354)),
    "Vicuna-33B": ((0.605, 0.822), (0.356, 0.596), (0.225, 0.446), (0.160, 0.349)),
}
RANKS = 10  # candidates per head, as many as MEDUSA keeps
MEDUSA_NODES = 64
_AMONG = 5


def rank_rates(best: float, among_five: float) -> list[float]:
    """How often each rank is right, [RANKS]: `best` times the rank to a power, such that five of them sum up."""
    low, high = 0.0, 16.0
    for _ in range(60):
        power = (low + high) / 2
        total = sum(best * rank**-power for rank in range(1, _AMONG + 1))
        low, high = (power, high) if total > among_five else (low, power)
    return [best * rank**-low for rank in range(1, RANKS + 1)]


def tree_sums(accuracies: Sequence[tuple[float, float]], edges: Sequence[int]) -> list[list[float]]:
    """Path probability of the nodes of each depth among the best n, for each edge n, [K][E]."""
    rates = [rank_rates(*accuracy) for accuracy in accuracies]
    paths = best_fixed_tree(rates, max(edges)).paths

    def value(path: RankPath) -> float:
        return prod(rates[depth][rank] for depth, rank in enumerate(path))

    return [
        [sum(value(path) for path in paths[: edge - 1] if len(path) == depth) for edge in edges]
        for depth in range(1, len(rates) + 1)
    ]


def predict(measured: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The table: for each model and measured batch and context, what the sizing would choose, and what it is worth.

    Args:
        measured: what `step_times.py` has measured: `batch`, `context`, `nodes`, `ms` and `drafting_ms` of each.

    Returns:
        Rows of `model`, `batch`, `context`, `nodes` (the choice), `tokens` (per step), `speedup` (over plain decoding)
        and `medusa_speedup` (with a tree of 64 nodes, None if that was not measured).
    """
    rows = []
    for model, accuracies in VICUNA.items():
        for found in measured:
            edges = [edge for edge in EDGES if edge in found["nodes"]]
            sums = tree_sums(accuracies, edges)
            tokens = [1.0 + sum(of_depth[place] for of_depth in sums) for place in range(len(edges))]
            ms = [found["ms"][found["nodes"].index(edge)] for edge in edges]
            nodes = _chosen(found, sums, max(edges), len(accuracies))
            speedups = {edge: t * ms[0] / time for edge, t, time in zip(edges, tokens, ms, strict=True)}
            rows.append(
                {
                    "model": model,
                    "batch": found["batch"],
                    "context": found["context"],
                    "nodes": nodes,
                    "tokens": round(tokens[edges.index(nodes)], 3),
                    "speedup": round(speedups[nodes], 3),
                    "medusa_speedup": round(speedups[MEDUSA_NODES], 3) if MEDUSA_NODES in speedups else None,
                }
            )
    return rows


def _chosen(found: Mapping[str, Any], sums: Sequence[Sequence[float]], most: int, depth: int) -> int:
    """The size that a decoder with these step times for its profile takes."""
    batch, context = found["batch"], float(found["context"])
    times = [
        StepTime(batch=batch, nodes=nodes, context=context, drafts=drafts, seconds=1e-3 * ms)
        for nodes, drafts, ms in [
            *((n, n > 1, ms) for n, ms in zip(found["nodes"], found["ms"], strict=True)),
            (1, True, found["drafting_ms"]),
        ]
    ]
    sizing = FrozenSizing(LatencyModel(times), most, depth)
    of_all_rows = [[batch * mass for mass in masses] for masses in sums]
    return 1 if sizing.reach(batch, context) == 1 else sizing.choose(of_all_rows, batch, context).nodes
