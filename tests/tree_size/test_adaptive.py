"""Sizes chosen on simulated machines: never much slower than plain decoding, about as fast as the best fixed size."""

from __future__ import annotations

import math
import random
import warnings
from statistics import mean

import pytest

from ladon.tree_size.adaptive import AutoSizing
from ladon.tree_size.frozen import FrozenSizing
from ladon.tree_size.latency_model import LatencyModel, StepTime
from ladon.tree_size.policy import EDGES, PLAIN, FixedSizing, PrunedSteps, StepRecord, edges_up_to
from sizing_machines import (
    BAD,
    BOASTING,
    DEPTHS,
    FAIR,
    GOOD,
    MACHINES,
    MOST,
    CostFunction,
    Heads,
    Run,
    SimulatedPruning,
    Simulation,
    flat,
    float32_cpu,
    gpu,
    linear,
)

CELLS = [
    (machine, batch, heads) for machine in MACHINES for batch in (1, 4, 16) for heads in (GOOD, FAIR, BAD, BOASTING)
]
SEEDS = range(4)


def cell_name(value: object) -> str:
    return getattr(value, "__name__", str(value))


def plain_rate(machine: CostFunction, heads: Heads, batch: int, tokens: int, context: float = 64.0) -> float:
    simulation = Simulation(FixedSizing(1), machine, heads, batch=batch)
    simulation.context = context
    return simulation.run(tokens).rate


def best_fixed_rate(machine: CostFunction, heads: Heads, batch: int, tokens: int) -> float:
    """Of all sizes, found by trying each one on the same text."""
    rates = []
    for nodes in EDGES:
        sizing = FixedSizing(nodes)
        sizing.edges = EDGES  # the simulation's trees need them
        rates.append(mean(Simulation(sizing, machine, heads, batch=batch, seed=s).run(tokens).rate for s in SEEDS))
    return max(rates)


@pytest.mark.parametrize(("machine", "batch", "heads"), CELLS, ids=cell_name)
def test_never_slower_than_plain_decoding(machine: CostFunction, batch: int, heads: Heads) -> None:
    """A cold start of 256 tokens, and another 256 afterwards."""
    cold, warm = over_plain(machine, heads, batch)
    assert mean(cold) >= 0.95 and mean(warm) >= 0.98
    assert min(cold) >= 0.93 and min(warm) >= 0.95  # single runs: acceptance is a matter of luck as well


def over_plain(machine: CostFunction, heads: Heads, batch: int) -> tuple[list[float], list[float]]:
    """Speed over plain decoding's, of cold starts and of what follows, by seed."""
    plain = plain_rate(machine, heads, batch, 256)
    cold, warm = [], []
    for seed in SEEDS:
        simulation = Simulation(AutoSizing(MOST), machine, heads, batch=batch, seed=seed)
        cold.append(simulation.run(256).rate / plain)
        simulation.context = 64.0
        warm.append(simulation.run(256).rate / plain)
    return cold, warm


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_heads_that_boast_where_nodes_are_free(batch: int) -> None:
    """The hardest case: every larger size might pay, and drafting takes a fifth of a step."""
    cold, warm = over_plain(flat, BOASTING, batch)
    assert mean(cold) >= 0.95 and mean(warm) >= 0.97


@pytest.mark.parametrize("context", [1024.0, 8000.0])
def test_never_slower_at_long_contexts(context: float) -> None:
    plain = plain_rate(linear, BOASTING, 8, 256, context)
    simulation = Simulation(AutoSizing(MOST), linear, BOASTING, batch=8)
    simulation.context = context
    assert simulation.run(256).rate >= 0.95 * plain


@pytest.mark.slow
@pytest.mark.parametrize(
    ("machine", "batch", "heads"), [cell for cell in CELLS if cell[2] is not BOASTING], ids=cell_name
)
def test_about_as_fast_as_the_best_fixed_size(machine: CostFunction, batch: int, heads: Heads) -> None:
    check_against_the_best_fixed_size(machine, batch, heads)


def test_about_as_fast_as_the_best_fixed_size_in_one_cell() -> None:
    check_against_the_best_fixed_size(float32_cpu, 1, GOOD)


def check_against_the_best_fixed_size(machine: CostFunction, batch: int, heads: Heads) -> None:
    rates = []
    for seed in SEEDS:
        simulation = Simulation(AutoSizing(MOST), machine, heads, batch=batch, seed=seed)
        simulation.run(256)
        simulation.context = 64.0
        rates.append(simulation.run(800).rate)
    assert mean(rates) >= 0.97 * best_fixed_rate(machine, heads, batch, 800)


STEPS = PrunedSteps(keep=8, share=0.25)


def pruned_share(pruning: SimulatedPruning, seed: int = 0) -> tuple[float, float]:
    """Of a warm run with good heads on a CPU: tokens per second, and the share of its steps that prune."""
    sizing = AutoSizing(MOST, pruned=pruning.steps)
    simulation = Simulation(sizing, float32_cpu, GOOD, seed=seed, pruning=pruning)
    simulation.run(400)
    simulation.num_pruned, simulation.context = 0, 64.0
    run = simulation.run(800)
    return run.rate, simulation.num_pruned / len(run.sizes)


def test_pruning_is_taken_where_it_pays() -> None:
    """It costs little and keeps nearly all: faster than the best size that is verified whole."""
    rates, shares = zip(*(pruned_share(SimulatedPruning(STEPS, 0.995, 0.05), seed) for seed in SEEDS), strict=True)
    assert min(shares) > 0.6
    assert mean(rates) > 1.05 * best_fixed_rate(float32_cpu, GOOD, 1, 800)


@pytest.mark.parametrize(("keeps", "score"), [(0.6, 0.05), (0.995, 12.0)])
def test_pruning_is_left_where_it_does_not_pay(keeps: float, score: float) -> None:
    """It drops too much, or takes longer than what it saves."""
    rates, shares = zip(*(pruned_share(SimulatedPruning(STEPS, keeps, score), seed) for seed in SEEDS), strict=True)
    assert max(shares) < 0.1
    assert mean(rates) >= 0.96 * best_fixed_rate(float32_cpu, GOOD, 1, 800)


@pytest.mark.parametrize("machine", [gpu, float32_cpu])
def test_the_ramp_is_fast_with_good_heads(machine: CostFunction) -> None:
    """Also past two nodes, which cost more than four on one of these machines."""
    simulation = Simulation(AutoSizing(MOST), machine, GOOD)
    sizes = simulation.run(150).sizes
    assert max(sizes[:12]) >= 16
    late = sizes[20:40]
    assert min(late) >= (32 if machine is gpu else 4)


def test_off_is_plain_decoding() -> None:
    """With heads that never pay, nearly every step drafts nothing and verifies the root alone."""
    sizing = AutoSizing(MOST)
    simulation = Simulation(sizing, linear, BOASTING, batch=4)
    simulation.run(256)
    sizes = simulation.run(512).sizes
    assert sum(size > 1 for size in sizes) <= 0.02 * len(sizes)
    assert 0 < sizing.probes < 0.05 * 768


def test_off_is_not_for_ever() -> None:
    """The text turns into one that the heads know."""
    simulation = Simulation(AutoSizing(MOST), float32_cpu, BAD)
    simulation.run(400)
    simulation.heads = GOOD
    simulation.run(400)
    assert mean(size > 1 for size in simulation.run(100).sizes) > 0.9


def test_on_is_not_for_ever() -> None:
    """The text turns into one on which the heads are sure and wrong."""
    shortly, later = [], []
    for seed in SEEDS:
        simulation = Simulation(AutoSizing(MOST), float32_cpu, GOOD, seed=seed)
        simulation.run(400)
        simulation.heads = BOASTING
        shortly.append(simulation.run(400).rate)
        later.append(simulation.run(400).rate)
    assert mean(shortly) >= 0.92 * plain_rate(float32_cpu, BOASTING, 1, 400, 464.0)
    assert mean(later) >= 0.97 * plain_rate(float32_cpu, BOASTING, 1, 400, 864.0)


def test_plain_decoding_is_looked_at_again() -> None:
    """Drafting was right when the machine was idle; now verifying costs far more."""
    sizing = AutoSizing(MOST)
    simulation = Simulation(sizing, gpu, GOOD)
    simulation.run(300)

    def crowded(batch: int, nodes: float, context: float, grown: int) -> float:
        return 10.0 * nodes**1.2

    simulation.machine = crowded
    simulation.run(1000)
    assert mean(simulation.run(300).sizes) < 8


def test_rows_join_and_leave() -> None:
    """What was learnt at one batch serves another: no new cold start."""
    simulation = Simulation(AutoSizing(MOST), linear, GOOD)
    for batch in (1, 2, 4, 8, 16, 12, 6, 3, 2):
        simulation.batch, simulation.context = batch, 64.0
        simulation._trees = simulation._trees[:batch] if len(simulation._trees) >= batch else []
        simulation._size = simulation._size if simulation._trees else PLAIN
        simulation.run(60)
    simulation.batch, simulation._size, simulation.context = 1, PLAIN, 64.0
    simulation._trees = []
    assert simulation.run(300).rate >= 1.05 * plain_rate(linear, GOOD, 1, 300)


@pytest.mark.parametrize("batches", [(1, 1), (1, 16)])
def test_runs_at_once_share_what_is_learnt_and_not_their_trees(batches: tuple[int, int]) -> None:
    """Two runs of one decoder, in turns: each about as fast as if it were alone."""
    shares: list[list[float]] = [[], []]
    for seed in SEEDS:
        sizing = AutoSizing(MOST)
        runs = [Simulation(sizing.for_run(), float32_cpu, GOOD, batch=batch, seed=seed) for batch in batches]
        in_turns(runs, 200)
        for place, rate in enumerate(in_turns(runs, 400)):
            alone = Simulation(AutoSizing(MOST), float32_cpu, GOOD, batch=batches[place], seed=seed)
            alone.run(200)
            shares[place].append(rate / alone.run(400).rate)
        assert sizing.expectation.rows_verified > 200
    assert min(map(mean, shares)) >= 0.95


def in_turns(runs: list[Simulation], tokens: int) -> list[float]:
    """Step by step in turns until each row has emitted so many tokens; the rate of each."""
    done, emitted = [Run() for _ in runs], [0.0 for _ in runs]
    while min(emitted) < tokens:
        for place, run in enumerate(runs):
            emitted[place] += run.step(done[place]) / run.batch
    return [count / run.seconds for count, run in zip(emitted, done, strict=True)]


def test_a_new_run_knows_what_others_have_learnt() -> None:
    sizing = AutoSizing(MOST)
    Simulation(sizing.for_run(), float32_cpu, GOOD).run(300)
    sizes = Simulation(sizing.for_run(), float32_cpu, GOOD, seed=1).run(60).sizes
    assert max(sizes[1:4]) > 1 and mean(sizes[1:]) > 4


def test_pruning_to_a_threshold_does_not_hide_that_heads_are_wrong() -> None:
    """What a threshold keeps is not told apart from what heads achieve."""
    pruning = SimulatedPruning(PrunedSteps(keep=4, share=0.5), 0.97, 0.05)
    simulation = Simulation(AutoSizing(MOST), float32_cpu, GOOD, pruning=pruning)
    simulation.run(400)
    simulation.heads = BOASTING
    simulation.run(400)
    simulation.num_pruned = 0
    sizes = simulation.run(200).sizes
    assert mean(size > 1 for size in sizes) < 0.2


@pytest.mark.parametrize("limit", [1, 2])
def test_rows_near_their_end_do_not_stop_learning(limit: int) -> None:
    """Trees are cut to the depth that a row may still emit, in every second step: what is above is learnt from."""
    rates = []
    for cuts in (False, True):
        simulation = Simulation(AutoSizing(MOST), float32_cpu, GOOD)
        simulation.cut_at = limit if cuts else None
        simulation.run(300)
        simulation.cut_at = None
        rates.append(simulation.run(400).rate)
    assert rates[1] >= 0.9 * rates[0]


@pytest.mark.parametrize("wrong", [0.0, -1.0, math.nan, math.inf, 7200.0])
def test_a_clock_that_jumps(wrong: float) -> None:
    simulation = Simulation(AutoSizing(MOST), float32_cpu, GOOD)
    clock = iter(range(10**9))

    def jumping(batch: int, nodes: float, context: float, grown: int) -> float:
        return wrong if next(clock) % 37 == 5 else float32_cpu(batch, nodes, context, grown)

    simulation.machine = jumping
    simulation.run(300)
    sizes = simulation.run(300).sizes
    assert mean(4 <= size <= 32 for size in sizes) > 0.9


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf, 0.0])
def test_probabilities_that_are_not_finite(wrong: float) -> None:
    sizing = AutoSizing(MOST)
    for _ in range(3):
        sizing.observe(StepRecord(batch=1, context=9.0, nodes=1, kept=1, grown=1, tokens=1, seconds=0.01))
    with pytest.warns(UserWarning, match="not finite"):
        assert sizing.reach(1, 9.0) > 1
        assert sizing.choose([[wrong] * len(EDGES)], 1, 9.0).nodes == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it warns once
        sizing.reach(1, 9.0)
        assert sizing.choose([[wrong] * len(EDGES)], 1, 9.0).nodes == 1
    assert all(map(math.isfinite, sizing.expectation.typical_tokens(1)))


def test_nothing_grown_is_plain() -> None:
    for sizing in (AutoSizing(MOST), FrozenSizing(profile(linear), MOST, DEPTHS)):
        assert sizing.choose(None, 3, 9.0).nodes == 1


def profile(machine: CostFunction) -> LatencyModel:
    return LatencyModel(profile_times(machine))


def profile_times(machine: CostFunction) -> list[StepTime]:
    sizes = [(1, False), (1, True), *((nodes, True) for nodes in EDGES[1:])]
    return [
        StepTime(
            batch=batch, nodes=nodes, context=64.0, drafts=drafts,
            seconds=1e-3 * machine(batch, nodes, 64.0, 32 if drafts else 1),
        )
        for batch in (1, 4, 16)
        for nodes, drafts in sizes
    ]  # fmt: skip


def test_a_profile_spares_the_cold_start() -> None:
    simulation = Simulation(AutoSizing(MOST, profile_times(float32_cpu)), float32_cpu, GOOD)
    sizes = simulation.run(100).sizes
    assert sizes[0] == 1  # the simulation begins with a root alone
    assert mean(sizes[1:20]) > 4 and max(sizes) <= 32


@pytest.mark.parametrize("machine", MACHINES, ids=cell_name)
def test_frozen_sizes_depend_on_the_trees_alone(machine: CostFunction) -> None:
    """Whatever the clock says: two machines with one profile choose the same sizes."""
    runs = []
    for slower in (1.0, 7.0):
        simulation = Simulation(FrozenSizing(profile(machine), MOST, DEPTHS), machine, GOOD, batch=2, seed=3)
        simulation.slower = slower
        runs.append(simulation.run(200).sizes)
    assert runs[0] == runs[1]


def test_frozen_sizes_pay() -> None:
    simulation = Simulation(FrozenSizing(profile(float32_cpu), MOST, DEPTHS), float32_cpu, GOOD)
    assert simulation.run(500).rate >= 0.97 * best_fixed_rate(float32_cpu, GOOD, 1, 500)


def test_frozen_is_off_where_no_tree_could_pay() -> None:
    def hopeless(batch: int, nodes: float, context: float, grown: int) -> float:
        return 2.0 * nodes + (1.0 if grown > 1 else 0.0)

    sizing = FrozenSizing(profile(hopeless), MOST, DEPTHS)
    assert sizing.reach(1, 64.0) == 1
    assert FrozenSizing(profile(gpu), MOST, DEPTHS).reach(1, 64.0) == MOST


def test_a_fixed_size_never_changes() -> None:
    sizing = FixedSizing(12)
    assert sizing.reach(3, 9.0) == sizing.choose(None, 1, 9.0).nodes == 12
    assert math.isnan(
        sizing.observe(StepRecord(batch=1, context=9.0, nodes=12, kept=12, grown=12, tokens=2, seconds=0.01))
    )


def test_edges_of_small_trees() -> None:
    assert edges_up_to(5) == (1, 2, 4, 5)
    assert edges_up_to(128) == EDGES
    assert edges_up_to(1) == (1,)


def ngram_steps(sizing: AutoSizing, *, promise: float, truth: float, steps: int) -> tuple[float, list[int]]:
    """Steps without heads whose chains of n-grams promise so many tokens and give others; seconds, and the sizes."""
    run, dice = sizing.for_run(), random.Random(1)
    seconds, sizes = 0.0, []
    sums = [[0.0, *[promise ** (depth + 1)] * (len(run.edges) - 1)] for depth in range(3)]
    for _ in range(steps):
        assert run.reach(1, 64.0) == 1
        size = run.choose(sums, 1, 64.0)
        tokens = 1
        while size.nodes > 1 and tokens < 4 and dice.random() < truth:
            tokens += 1
        took = float32_cpu(1, size.nodes, 64.0, 1)
        run.observe(
            StepRecord(
                batch=1, context=64.0, nodes=size.nodes, kept=size.nodes, grown=1, seconds=took, tokens=tokens,
                by_heads=False, expected=[masses[-1] for masses in sums] if size.nodes > 1 else [],
                accepted=[int(tokens > depth) for depth in (1, 2, 3)] if size.nodes > 1 else [],
            )
        )  # fmt: skip
        seconds += took
        sizes.append(size.nodes)
    return seconds, sizes


def test_ngrams_alone_are_verified_where_they_promise_enough() -> None:
    sizing = AutoSizing(48, has_heads=False)
    _, sizes = ngram_steps(sizing, promise=0.9, truth=0.9, steps=60)
    assert sizes[:4] == [1, 1, 1, 1] and mean(size > 1 for size in sizes[4:]) > 0.9
    _, sizes = ngram_steps(AutoSizing(48, has_heads=False), promise=0.02, truth=0.02, steps=60)
    assert mean(size > 1 for size in sizes) < 0.1
    assert sizing.expectation.rows_verified == 0  # n-grams say nothing of heads
    assert AutoSizing(48, has_heads=False).choose(None, 1, 64.0).nodes == 1


def test_ngrams_that_promise_too_much_lose_little() -> None:
    """Never right, always sure: what such steps lose is bounded like any trial."""
    seconds, sizes = ngram_steps(AutoSizing(48, has_heads=False), promise=0.9, truth=0.0, steps=1000)
    plain = 1000 * float32_cpu(1, 1, 64.0, 1)
    assert max(sizes) > 1
    assert seconds <= 1.02 * plain
