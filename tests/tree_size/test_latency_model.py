"""What steps cost: predictions on simulated machines, and clocks that cannot be trusted."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from statistics import mean

import pytest

from ladon.tree_size.latency_model import LatencyModel, StepTime
from sizing_machines import MACHINES, CostFunction


def step(
    machine: CostFunction, dice: random.Random, batch: int, nodes: int, context: float, drafts: bool = True
) -> StepTime:
    seconds = 1e-3 * machine(batch, nodes, context, 32 if drafts else 1) * (1 + 0.05 * dice.gauss(0.0, 1.0))
    return StepTime(batch=batch, nodes=nodes, context=context, drafts=drafts, seconds=seconds)


def visits(dice: random.Random, count: int) -> Iterator[tuple[int, int, float, bool]]:
    """Batch, nodes, context, drafts of steps: sizes change often, rows join and leave, texts get longer."""
    batch, nodes = 4, 1
    for number in range(count):
        if dice.random() < 0.05:
            batch = dice.choice((1, 2, 3, 4, 6, 8, 12, 16))
        nodes = dice.choice((1, 2, 4, 8, 16, 24, 32, 48, 64)) if dice.random() < 0.3 else nodes
        yield batch, nodes, 64.0 + 3 * number, nodes > 1 or dice.random() < 0.5


@pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: machine.__name__)
def test_predictions_after_50_steps(machine: CostFunction) -> None:
    """Within 10 % mean absolute error, noise of 5 % included, also where batch and size change all the time."""
    errors = []
    for seed in range(4):
        dice = random.Random(seed)
        cost = LatencyModel()
        for number, (batch, nodes, context, drafts) in enumerate(visits(dice, 300)):
            time = step(machine, dice, batch, nodes, context, drafts)
            if number >= 50:
                predicted = cost.predict(batch, nodes, context, drafts=drafts)
                errors.append(abs(predicted - time.seconds) / time.seconds)
            cost.observe(time)
    assert mean(errors) < 0.10


def test_nothing_is_known_at_first() -> None:
    cost = LatencyModel()
    assert math.isnan(cost.predict(1, 1, 10.0, drafts=False))
    assert cost.evidence(1) == {}


def test_evidence_of_a_batch_counts_for_batches_like_it() -> None:
    cost = LatencyModel()
    for _ in range(3):
        cost.observe(StepTime(batch=4, nodes=8, context=10.0, drafts=True, seconds=0.01))
    for batch in (2, 4, 8):
        assert cost.evidence(batch) == {(8, True, False): 3}
    assert cost.evidence(9) == cost.evidence(1) == {}


def known(seconds: float = 0.01, steps: int = 60) -> LatencyModel:
    cost = LatencyModel()
    for _ in range(steps):
        for nodes in (1, 8):
            cost.observe(StepTime(batch=1, nodes=nodes, context=100.0, drafts=nodes > 1, seconds=seconds * nodes**0.5))
    return cost


@pytest.mark.parametrize("wrong", [0.0, -3.0, math.nan, math.inf, 3600.0, 1e300, 1e-9])
def test_a_clock_that_jumps(wrong: float) -> None:
    """One impossible or absurd time leaves predictions where they were."""
    cost = known()
    before = [cost.predict(1, nodes, 100.0, drafts=nodes > 1) for nodes in (1, 8)]
    cost.observe(StepTime(batch=1, nodes=8, context=100.0, drafts=True, seconds=wrong))
    after = [cost.predict(1, nodes, 100.0, drafts=nodes > 1) for nodes in (1, 8)]
    assert after == pytest.approx(before, rel=0.04)


def test_an_absurd_first_time_is_forgotten() -> None:
    """The first step of a size compiles and allocates; or the machine slept just then."""
    cost = known()
    cost.observe(StepTime(batch=1, nodes=16, context=100.0, drafts=True, seconds=900.0))
    cost.observe(StepTime(batch=1, nodes=16, context=100.0, drafts=True, seconds=0.04))
    assert cost.predict(1, 16, 100.0, drafts=True) == pytest.approx(0.04, rel=0.2)
    assert cost.predict(1, 8, 100.0, drafts=True) == pytest.approx(0.01 * 8**0.5, rel=0.05)


def test_a_machine_that_slows_down_slows_all_sizes() -> None:
    """Only one size is run after the change; the others are compared with it as before."""
    cost = known()
    ratio = cost.predict(1, 8, 100.0, drafts=True) / cost.predict(1, 1, 100.0, drafts=False)
    for _ in range(60):
        cost.observe(StepTime(batch=1, nodes=8, context=100.0, drafts=True, seconds=0.013 * 8**0.5))
    assert cost.predict(1, 8, 100.0, drafts=True) == pytest.approx(0.013 * 8**0.5, rel=0.03)
    assert cost.predict(1, 8, 100.0, drafts=True) / cost.predict(1, 1, 100.0, drafts=False) == pytest.approx(
        ratio, rel=0.15
    )


def test_a_machine_that_slows_down_much_is_followed() -> None:
    cost = known()
    for _ in range(100):
        cost.observe(StepTime(batch=1, nodes=8, context=100.0, drafts=True, seconds=0.05 * 8**0.5))
    assert cost.predict(1, 8, 100.0, drafts=True) == pytest.approx(0.05 * 8**0.5, rel=0.1)


def test_a_profile_is_kept_whole() -> None:
    """However many times it has; as a step of another kind comes, one of them goes, not all above a bound."""
    batches, contexts, sizes = (1, 2, 4, 8, 16), (64.0, 256.0, 1024.0), range(1, 13)
    times = [
        StepTime(batch=batch, nodes=nodes, context=context, drafts=nodes > 1, seconds=1e-3 * batch**0.5 * nodes)
        for context in contexts
        for batch in batches
        for nodes in sizes
    ]
    cost = LatencyModel(times)
    assert len(cost) == len(times) == 180
    assert cost.predict(1, 1, 64.0, drafts=False) == pytest.approx(1e-3, rel=0.3)
    cost.observe(StepTime(batch=3, nodes=1, context=64.0, drafts=False, seconds=2e-3))
    assert len(cost) == 180


def test_contexts_of_one_octave_count_alike() -> None:
    """Two times of a profile that share a cell are their mean, whichever comes first."""

    def at(context: float, seconds: float) -> StepTime:
        return StepTime(batch=1, nodes=1, context=context, drafts=False, seconds=seconds)

    times = [at(1100.0, 0.01), at(1500.0, 0.02), at(1900.0, 0.04)]
    found = [LatencyModel(given).predict(1, 1, 1500.0, drafts=False) for given in (times, times[::-1])]
    assert found == pytest.approx([0.02, 0.02], rel=0.05)
    assert len(LatencyModel(times)) == 1 and LatencyModel(times).evidence(1) == {(1, False, False): 24.0}


def test_memory_is_bounded() -> None:
    cost = LatencyModel()
    for batch in range(1, 400):
        cost.observe(StepTime(batch=batch, nodes=1, context=9.0 * batch, drafts=False, seconds=1e-3 * batch))
    assert len(cost) <= 129
    assert cost.predict(399, 1, 3000.0, drafts=False) == pytest.approx(0.4, rel=0.2)
