"""Metrics follow from the counts as they are defined."""

from __future__ import annotations

import math

import pytest
import torch

from ladon.engine.stats import DecodeStats, StageClock


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


def test_clock_adds_up_only_when_enabled():
    seconds: dict[str, float] = {}
    with StageClock(seconds, enabled=False, device=torch.device("cpu")).stage("a"):
        pass
    assert seconds == {}
    clock = StageClock(seconds, enabled=True, device=torch.device("cpu"))
    for _ in range(2):
        with clock.stage("a"):
            pass
    assert seconds["a"] > 0


def test_a_paused_clock_adds_nothing():
    seconds: dict[str, float] = {}
    clock = StageClock(seconds, enabled=True, device=torch.device("cpu"))
    with clock.paused(), clock.stage("a"):
        pass
    assert seconds == {}
    with clock.stage("a"):
        pass
    assert seconds["a"] > 0


def test_forwards_are_timed_only_while_asked():
    seconds: dict[str, float] = {}
    module = torch.nn.Linear(2, 2)
    clock = StageClock(seconds, enabled=True, device=torch.device("cpu"))
    with clock.forward_of(module, "forward"):
        module(torch.ones(1, 2))
    timed = seconds["forward"]
    module(torch.ones(1, 2))
    assert timed > 0 and seconds["forward"] == timed and not module._forward_hooks
