"""What steps take by size: which sizes may be taken, and in what order they are tried."""

from __future__ import annotations

import math

import pytest

from ladon.tree_size.latency_model import Curve, Curves, LatencyModel, StepTime, options_of
from ladon.tree_size.policy import PrunedSteps, Size

EDGES = (1, 2, 4, 8, 16, 24, 32)
PRUNED = PrunedSteps(keep=8, share=0.5)


def seen(cost: LatencyModel, nodes: float, seconds: float, *, pruned: bool = False, times: int = 3) -> None:
    for _ in range(times):
        cost.observe(StepTime(batch=1, nodes=nodes, context=64.0, drafts=nodes > 1, seconds=seconds, pruned=pruned))


def curve_after(*steps: tuple[float, float, bool], pruned: PrunedSteps | None = None, may_lose: bool = True) -> Curve:
    """The curve after three steps of each (work, seconds, pruned)."""
    cost = LatencyModel()
    for nodes, seconds, is_pruned in steps:
        seen(cost, nodes, seconds, pruned=is_pruned)
    return Curves(cost, options_of(EDGES, pruned)).at(1, 64.0, may_lose=may_lose)


def test_options_without_pruning_are_the_edges() -> None:
    options = options_of(EDGES, None)
    assert [option.size for option in options] == [Size(nodes, True) for nodes in EDGES]  # threshold pruning goes on
    assert [option.edge for option in options] == list(range(len(EDGES)))
    assert not any(option.is_cut for option in options)


def test_options_with_pruning() -> None:
    """What pruning would cut comes twice, in the order of the work."""
    options = options_of(EDGES, PRUNED)
    found = [(option.size.nodes, option.size.pruned, option.work) for option in options]
    assert found == [
        (1, False, 1.0), (2, False, 2.0), (4, False, 4.0), (8, False, 8.0), (16, True, 12.0), (16, False, 16.0),
        (24, True, 16.0), (32, True, 20.0), (24, False, 24.0), (32, False, 32.0),
    ]  # fmt: skip
    assert [EDGES[option.edge] for option in options] == [option.size.nodes for option in options]
    assert [option.is_cut for option in options] == [option.size.pruned for option in options]


@pytest.mark.parametrize("known", [(), ((1, 0.01, False),)])
def test_small_sizes_may_be_taken_at_once(known: tuple[tuple[float, float, bool], ...]) -> None:
    curve = curve_after(*known)
    assert sorted(curve.seconds) == [0, 1, 2] and curve.has_plain is bool(known)


def test_larger_sizes_are_tried_one_after_the_other() -> None:
    plain, four, eight = (1.0, 0.010, False), (4.0, 0.014, False), (8.0, 0.016, False)
    assert max(curve_after(plain, four).seconds) == 3  # 8 nodes
    assert max(curve_after(plain, four, eight).seconds) == 4
    assert max(curve_after(plain, four, eight, may_lose=False).seconds) == 3
    curve = curve_after(plain, four, eight)
    assert curve.known == {0, 2, 3}
    assert curve.seconds[4] <= curve.seconds[3]  # at best, time is flat up to a new size


def test_pruned_sizes_are_tried_after_the_whole_one_below() -> None:
    options = options_of(EDGES, PRUNED)
    first = next(place for place, option in enumerate(options) if option.is_cut)
    plain, four, eight = (1.0, 0.010, False), (4.0, 0.014, False), (8.0, 0.016, False)
    assert first not in curve_after(plain, four, pruned=PRUNED).seconds
    curve = curve_after(plain, four, eight, pruned=PRUNED)
    cut = [place for place in curve.seconds if options[place].is_cut]
    assert cut == [first] and curve.seconds[first] <= curve.seconds[options.index(options_of(EDGES, PRUNED)[3])]
    more = curve_after(plain, four, eight, (12.0, 0.017, True), pruned=PRUNED)
    assert first in more.known
    assert [options[place].size for place in more.seconds if options[place].is_cut] == [Size(16, True), Size(24, True)]


def test_pruned_and_whole_steps_of_the_same_work_are_apart() -> None:
    """A pruned step has an early score besides."""
    cost = LatencyModel()
    seen(cost, 1, 0.010)
    for _ in range(20):
        seen(cost, 16.0, 0.020, times=1)
        seen(cost, 16.0, 0.026, pruned=True, times=1)
    assert cost.predict(1, 16.0, 64.0, drafts=True) == pytest.approx(0.020, rel=0.05)
    assert cost.predict(1, 16.0, 64.0, drafts=True, pruned=True) == pytest.approx(0.026, rel=0.05)
    assert cost.evidence(1)[16.0, True, True] > 10


def test_a_curve_is_kept_until_something_changes() -> None:
    cost = LatencyModel()
    seen(cost, 1, 0.01)
    curves = Curves(cost, options_of(EDGES, None))
    assert curves.newest.plain == math.inf
    first = curves.at(1, 64.0, may_lose=True)
    assert curves.at(1, 65.0, may_lose=True) is first is curves.newest
    for batch, context, may_lose in ((2, 64.0, True), (1, 640.0, True), (1, 64.0, False)):
        assert curves.at(batch, context, may_lose=may_lose) is not first
    seen(cost, 4, 0.014, times=1)
    assert curves.at(1, 64.0, may_lose=True) is not first
