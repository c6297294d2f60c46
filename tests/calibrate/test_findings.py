"""From a trace to the calibration: what is fitted on what, and its summary."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from ladon.calibrate.findings import SIZES, Halves, calibrate
from ladon.calibrate.lattice_trace import LatticeTrace, hit_rates
from ladon.calibrate.simulate import simulate, simulate_prefixes
from ladon.calibrate.summary import summary
from ladon.calibrate.temperatures import calibration_errors, fit_temperatures
from ladon.calibrate.timing import StepTimes
from ladon.errors import InputError
from ladon.trees.fixed_tree import FixedTree, best_fixed_tree
from ladon.viz.fixed_tree import outline
from traces import trace_of

TIMES = StepTimes(batch=1, context=9, nodes=(1, 4, 16), ms=(2.0, 2.2, 40.0), drafting_ms=2.1, rounds=3)


@pytest.fixture
def trace() -> LatticeTrace:
    """Six answers of 50 tokens; the odd ones are easy to guess, the even ones hard."""
    logits = torch.randn(300, 3, 40) * 2
    truth = torch.distributions.Categorical(logits=logits).sample()
    starts = torch.arange(0, 301, 50)
    for row in (1, 3, 5):
        truth[50 * row : 50 * row + 50] = logits[50 * row : 50 * row + 50].argmax(-1)
    about = {"model": "m", "dtype": "float32"}
    return replace(trace_of(logits, 32), truth=truth.int(), row_starts=starts, heads="0123", about=about)


def test_what_is_written_is_of_all_answers_and_what_is_claimed_of_unseen_ones(trace: LatticeTrace) -> None:
    found = calibrate(trace, budgets=(4, 16), step_times=[TIMES], place={"cpu": "x"})
    known, unseen = trace.of_rows([0, 2, 4]), trace.of_rows([1, 3, 5])
    assert found.heads == "0123"
    assert found.temperatures == fit_temperatures(trace) != fit_temperatures(known)
    assert found.hit_rates == hit_rates(trace.ranks(), 32)
    assert found.fixed_trees.keys() == {str(size) for size in SIZES}
    assert FixedTree(tuple(map(tuple, found.fixed_trees["8"]))) == best_fixed_tree(found.hit_rates, 8)
    temperatures = fit_temperatures(known)
    assert found.error["temperatures"] == temperatures
    for name, given_ in (("before", None), ("after", temperatures)):
        errors = calibration_errors(unseen, given_)
        assert found.error[name]["top"] == pytest.approx([error.top for error in errors], abs=1e-4)
        assert found.error[name]["all"] == pytest.approx([error.all for error in errors], abs=1e-4)
    lengths = {(run["tree"], run["nodes"], run["temperatures"]): run["acceptance_length"] for run in found.simulated}
    fixed = best_fixed_tree(hit_rates(known.ranks(), 32), 16)
    expected = {
        ("chain", 4, False): simulate(unseen, "chain", 4),
        ("fixed", 4, False): simulate(unseen, best_fixed_tree(hit_rates(known.ranks(), 32), 4), 4),
        ("fixed", 16, False): simulate(unseen, fixed, 16),
        ("dynamic", 4, False): simulate(unseen, "dynamic", 4),
        ("dynamic", 4, True): simulate(unseen, "dynamic", 4, temperatures=temperatures),
        ("dynamic", 16, False): simulate(unseen, "dynamic", 16),
        ("dynamic", 16, True): simulate(unseen, "dynamic", 16, temperatures=temperatures),
    }
    assert lengths == pytest.approx({key: run.acceptance_length for key, run in expected.items()}, abs=1e-4)
    sizes = [str(size) for size in SIZES]
    assert found.prefixes["positions"] == 150 and list(found.prefixes["selected"]) == sizes
    assert found.prefixes["top"] == found.prefixes["known"], "the unseen answers are easy to guess"
    assert found.prefixes["leaf_mass"] == [0.0] * (len(found.temperatures) - 1)
    assert found.measured_on == {"model": "m", "dtype": "float32", "answers": 6, "positions": 300}


def test_prefixes_of_what_is_hard_to_guess(trace: LatticeTrace) -> None:
    """The deepest candidates are right as often as ranks say; a tree of all paths selects all of the lattice."""
    hard = replace(trace.of_rows([0, 2, 4]), tokens=trace.of_rows([0, 2, 4]).tokens[:, :, :4])
    hard = replace(hard, logits=hard.logits[:, :, :4])
    found = simulate_prefixes(hard, [4, 16, 85])
    ranks = hard.ranks()
    held = ((ranks >= 0) & (ranks < 4)).cumprod(1).double().mean(0).tolist()
    assert found["oracle"]["shares"] == pytest.approx(held, abs=1e-4) and 0.1 < held[-1] < 0.9
    assert found["top"]["shares"] == pytest.approx((ranks == 0).cumprod(1).double().mean(0).tolist(), abs=1e-4)
    assert found["known"]["mean"] == 3.0
    small, large, whole = (found["selected"][size]["mean"] for size in ("4", "16", "85"))
    assert small < large < whole == found["oracle"]["mean"]
    flat = simulate_prefixes(hard, [16], temperatures=[4.0, 1.0, 0.25])
    assert flat["oracle"] == found["oracle"] and flat["selected"]["16"]["mean"] < large, "they change the ranking alone"


def test_the_projected_budget_weighs_tokens_against_time(trace: LatticeTrace) -> None:
    found = calibrate(trace, step_times=[TIMES], place={"cpu": "x"}).step_times
    lengths = found["projected"]["acceptance_length"]
    assert lengths[0] == 1.0 and lengths[1] < lengths[2]
    assert found["projected"]["speedup"] == pytest.approx([1.0, lengths[1] / 1.1, lengths[2] / 20], abs=1e-3)
    assert found["projected"]["best_budget"] == 4
    measured = found["measured"][0]
    assert (measured["nodes"], measured["relative"]) == ((1, 4, 16), [1.0, 1.1, 20.0])


def test_halves_are_every_second_answer(trace: LatticeTrace) -> None:
    halves = Halves.of(trace)
    assert torch.equal(halves.known.truth, trace.of_rows([0, 2, 4]).truth)
    assert torch.equal(halves.unseen.truth, trace.of_rows([1, 3, 5]).truth)


def test_one_answer_is_too_few(trace: LatticeTrace) -> None:
    with pytest.raises(InputError, match=r"answers to 1 prompts have 50 tokens to guess, too few"):
        calibrate(trace.of_rows([0]))


def test_a_depth_that_is_never_reached_has_no_error(trace: LatticeTrace) -> None:
    """JSON has no NaN."""
    truth = trace.truth.clone()
    truth[:, 1:] = -1
    found = calibrate(replace(trace, truth=truth), budgets=())
    assert found.error["after"]["all"][1:] == [None, None] and found.temperatures[1:] == [1.0, 1.0]
    json.dumps(found.document(), allow_nan=False)
    assert [run["tree"] for run in found.simulated] == ["chain"]
    assert "→" in shown(found)


def test_summary(trace: LatticeTrace) -> None:
    text = shown(calibrate(trace, budgets=(4, 16), step_times=[TIMES], place={"cpu": "A CPU", "threads": 1}))
    for part in (
        "best fixed tree of 64 nodes",
        "dynamic, with temperatures",
        "projected speed-up",
        "cpu A CPU",
        "selected, 16 nodes",
    ):
        assert part in text


def test_heads_that_read_the_path_so_far_have_no_simulated_dynamic_trees(trace: LatticeTrace) -> None:
    read = calibrate(replace(trace, joint="paths"), budgets=(4, 16), step_times=[TIMES], place={"cpu": "x"})
    alone = calibrate(trace, budgets=(4, 16), step_times=[TIMES], place={"cpu": "x"})
    assert (read.joint, alone.joint) == ("paths", "product")
    assert (read.temperatures, read.hit_rates, read.error) == (alone.temperatures, alone.hit_rates, alone.error)
    assert read.simulated == [run for run in alone.simulated if run["tree"] != "dynamic"]
    assert len(read.simulated) == 3
    assert read.step_times == {name: found for name, found in alone.step_times.items() if name != "projected"}
    text = shown(read)
    assert "no dynamic trees are simulated: a trace has what heads guess after the true tokens" in text
    assert "projected" not in text and "40.00" in text


def shown(calibration: object) -> str:
    console = Console(width=160)
    with console.capture() as capture:
        for part in summary(calibration):
            console.print(part)
    return capture.get()


def test_outline_by_hand() -> None:
    tree = FixedTree(((0,), (1,), (2,), (3,), (4,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (6,)))
    assert outline(tree) == "0(0(0) 1) 1(0) 2-4 6"
    assert outline(FixedTree(())) == ""


@given(st.lists(st.lists(st.integers(0, 11), min_size=1, max_size=4).map(tuple), max_size=20))
def test_an_outline_holds_every_node(paths: list[tuple[int, ...]]) -> None:
    nodes = {path[:length] for path in paths for length in range(1, len(path) + 1)}
    tree = FixedTree(tuple(sorted(nodes, key=lambda path: (len(path), path))))
    assert parsed(outline(tree)) == set(tree.paths)


def parsed(text: str) -> set[tuple[int, ...]]:
    """The rank paths of an outline."""
    paths: set[tuple[int, ...]] = set()
    at: tuple[int, ...] = ()
    last = at
    for token in text.replace("(", " ( ").replace(")", " ) ").split():
        if token == "(":
            at = last
        elif token == ")":
            last = at
            at = at[:-1]
        else:
            first, _, end = token.partition("-")
            for rank in range(int(first), int(end or first) + 1):
                last = (*at, rank)
                paths.add(last)
    return paths
