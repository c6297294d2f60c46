"""Metrics follow from the counts as they are defined."""

from __future__ import annotations

import math

import pytest

from ladon.engine.stats import DecodeStats


def test_metrics():
    stats = DecodeStats(
        forwards=10,
        row_steps=20,
        tokens=50,
        nodes_verified=320,
        accepted_nodes=30,
        decode_seconds=2.0,
        stage_seconds={"forward": 1.8, "growth": 0.02},
    )
    assert stats.acceptance_length == 2.5
    assert stats.tokens_per_second == 25.0
    assert stats.step_ms == pytest.approx(200.0) and stats.forward_ms == pytest.approx(180.0)
    assert stats.overhead == pytest.approx(0.1) and stats.growth_share == pytest.approx(0.01)
    assert stats.tree_efficiency == pytest.approx(0.1)


def test_nothing_measured_is_nan():
    stats = DecodeStats()
    assert all(math.isnan(v) for v in (stats.acceptance_length, stats.tokens_per_second, stats.overhead))
