"""The calibration error by hand and by enumeration, and temperatures that are known."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ladon.calibrate.lattice_trace import LatticeTrace
from ladon.calibrate.temperatures import BINS, calibration_errors, expected_calibration_error, fit_temperatures
from traces import trace_of


def by_sorting(probabilities: Tensor, outcomes: Tensor) -> float:
    """The definition, prediction by prediction; probabilities are distinct."""
    pairs = sorted(zip(probabilities.tolist(), outcomes.tolist(), strict=True))
    total, seen = sum(p for p, _ in pairs), 0.0
    sums = [0.0] * BINS
    for p, outcome in pairs:
        # A bin reaches to the prediction with which its weight is full.
        bin_ = next(b for b in range(BINS) if b == BINS - 1 or seen < total * (b + 1) / BINS - 1e-12)
        seen += p
        sums[bin_] += p * (p - outcome)
    return sum(map(abs, sums)) / total


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**31), count=st.integers(1, 300))
def test_error_is_that_of_the_definition(seed: int, count: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    probabilities = (torch.randperm(16384, generator=generator)[:count] + 0.5) / 16384
    outcomes = torch.rand(count, generator=generator) < 0.3
    found = expected_calibration_error(probabilities, outcomes)
    assert found == pytest.approx(by_sorting(probabilities, outcomes), abs=1e-9)


def test_error_by_hand() -> None:
    certain = torch.ones(40)
    assert expected_calibration_error(certain, torch.arange(40) < 40) == 0.0
    assert expected_calibration_error(certain, torch.arange(40) < 10) == pytest.approx(0.75)
    assert expected_calibration_error(torch.full((40,), 0.25), torch.arange(40) < 10) == pytest.approx(0.0)
    # half of the weight at 0.5, always right; half at 1.0, always right
    mixed = torch.cat([torch.full((40,), 0.5), torch.ones(20)])
    assert expected_calibration_error(mixed, torch.ones(60, dtype=torch.bool)) == pytest.approx(0.25)
    assert math.isnan(expected_calibration_error(torch.empty(0), torch.empty(0, dtype=torch.bool)))
    assert math.isnan(expected_calibration_error(torch.zeros(3), torch.zeros(3, dtype=torch.bool)))


def drawn(temperature: float, positions: int = 6000) -> LatticeTrace:
    """Heads whose logits are `temperature` times those that the truth is drawn from, at two depths."""
    logits = torch.randn(positions, 2, 40) * 2
    truth = torch.distributions.Categorical(logits=logits).sample()
    return replace(trace_of(logits * temperature, 40), truth=truth.int())


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_a_known_temperature_is_found(temperature: float) -> None:
    trace = drawn(temperature)
    found = fit_temperatures(trace)
    assert found == pytest.approx([temperature] * 2, rel=0.05)
    for error in calibration_errors(trace, found):
        assert error.all < 0.01 and error.top < 0.02 and error.positions == 6000
    if temperature != 1.0:
        assert all(error.top > 0.05 and error.all > 0.03 for error in calibration_errors(trace))


def test_only_positions_on_the_true_path_count() -> None:
    """Depth 1 lacks the truth at half of the positions; there depth 2 is always wrong, and that does not show."""
    trace = drawn(1.0)
    lost = torch.arange(trace.num_positions) % 2 == 0
    truth = trace.truth.clone()
    truth[lost] = torch.tensor([1000, 1000], dtype=torch.int32)  # no candidate
    first, second = calibration_errors(replace(trace, truth=truth))
    assert (first.positions, second.positions) == (6000, 3000)
    assert second.all < 0.02 < 0.05 < first.all


def test_nothing_known_leaves_the_logits_alone() -> None:
    trace = trace_of(torch.randn(0, 2, 9), 3)
    assert fit_temperatures(trace) == [1.0, 1.0]
    assert all(math.isnan(error.all) and error.positions == 0 for error in calibration_errors(trace))


def test_fits_are_the_same_every_time() -> None:
    trace = drawn(1.3, positions=500)
    assert fit_temperatures(trace) == fit_temperatures(trace)
