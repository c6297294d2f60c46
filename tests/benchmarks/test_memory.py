"""Memory is cache + mask + logits + one layer's workspace: as the script of docs/benchmarks/memory.md measures."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

MEASURE = runpy.run_path(str(Path(__file__).resolve().parents[2] / "benchmarks" / "memory.py"))["measure"]


@pytest.mark.parametrize("batch", [1, 3])
def test_only_the_cache_grows_with_the_layers(batch: int) -> None:
    few, many = (MEASURE(layers, vocab_size=4000, batch=batch, context=700, budget=16) for layers in (2, 4))
    assert many["cache"] == 2 * few["cache"]
    assert many["step"] == pytest.approx(few["step"], rel=0.01)


def test_vocabulary_costs_the_logits_of_nodes_and_heads_alone() -> None:
    """[B, N, V] of the target, [B, K, V] of the heads, and as much again while their softmax is taken (N 32, K 4)."""
    small, large = (MEASURE(2, vocab_size=size, batch=1, context=300, budget=32) for size in (8000, 32000))
    logits = large["logits"] - small["logits"]
    assert logits < large["step"] - small["step"] <= logits * (32 + 2 * 4) / 32 * 1.001


def test_prefill_never_holds_logits_of_the_whole_prompt() -> None:
    found = MEASURE(2, vocab_size=32000, batch=1, context=1200, budget=4)
    assert found["prompt logits"] > 100
    assert found["prefill"] < 0.15 * found["prompt logits"]
