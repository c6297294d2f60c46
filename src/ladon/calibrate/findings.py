"""From a recorded trace to a calibration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ladon.calibrate.lattice_trace import LatticeTrace, hit_rates, marginal_hit_rates
from ladon.calibrate.simulate import SimulatedRun, simulate_budgets, simulate_prefixes
from ladon.calibrate.temperatures import BINS, CalibrationError, calibration_errors, fit_temperatures
from ladon.calibrate.timing import StepTimes
from ladon.config import HIDDEN, MARKOV, PRODUCT
from ladon.errors import InputError
from ladon.heads.calibration import Calibration
from ladon.trees.fixed_tree import FixedTree, best_fixed_tree
from ladon.util.files import rounded

SIZES = (8, 16, 32, 64)


@dataclass(frozen=True, kw_only=True, slots=True)
class Halves:
    """A trace in two: what is fitted on the one is judged on the other, every second answer each.

    Attributes:
        known: the trace to fit on, its candidates given the truth before them.
        unseen: the trace to judge on.
        temperatures: fitted on `known`, [K].
    """

    known: LatticeTrace
    unseen: LatticeTrace
    temperatures: list[float]

    @classmethod
    def of(cls, trace: LatticeTrace) -> Halves:
        """Split a trace.

        Raises:
            InputError: a half has no position.
        """
        known, unseen = (trace.of_rows(range(first, trace.num_rows, 2)) for first in (0, 1))
        if known.num_positions == 0 or unseen.num_positions == 0:
            raise InputError(
                f"the model's answers to {trace.num_rows} prompts have {trace.num_positions} tokens to guess, too few "
                "to fit on one half and judge on the other; give 2 prompts or more (about 100) and more new tokens"
            )
        known = known.given_the_truth()
        return cls(known=known, unseen=unseen, temperatures=fit_temperatures(known))

    def errors(self, temperatures: Sequence[float] | None) -> list[CalibrationError]:
        """The calibration errors on the unseen half."""
        return calibration_errors(self.unseen.given_the_truth(), temperatures)

    def simulated(
        self, tree: str | FixedTree, budgets: Sequence[int], temperatures: Sequence[float] | None = None
    ) -> list[SimulatedRun]:
        """What trees of several sizes would do on the unseen half."""
        return simulate_budgets(self.unseen, tree, budgets, temperatures=temperatures)

    def prefixes(self, budgets: Sequence[int]) -> dict[str, Any]:
        """How far lattices and dynamic trees of several sizes, with temperatures, follow the truth of that half."""
        return simulate_prefixes(self.unseen, budgets, temperatures=self.temperatures)


def calibrate(
    trace: LatticeTrace,
    *,
    budgets: Sequence[int] = SIZES,
    step_times: Sequence[StepTimes] = (),
    place: dict[str, Any] | None = None,
) -> Calibration:
    """Everything that `ladon calibrate` finds out.

    Temperatures, hit rates and fixed trees are those of the whole trace. Calibration errors, simulated runs and
    prefixes are honest: they are those of half of the answers, with temperatures and fixed trees of the other half.

    Args:
        trace: the recorded answers; temperatures, hit rates and trees are those with its correction.
        budgets: sizes of the simulated trees, root included.
        step_times: measured on this machine; the projection goes by the first. May be empty.
        place: the machine, as `ladon.util.machine` describes it.

    Raises:
        InputError: too little was recorded.
    """
    halves, given = Halves.of(trace), trace.given_the_truth()
    rates = hit_rates(given.ranks(), trace.num_candidates)
    trees = {str(size): best_fixed_tree(rates, size) for size in SIZES}
    return Calibration(
        heads=trace.heads,
        temperatures=fit_temperatures(given),
        joint=trace.joint if trace.correction is None else MARKOV,
        hit_rates=rates,
        marginal_hit_rates=marginal_hit_rates(trace.ranks(), trace.num_candidates),
        error=_errors(halves),
        fixed_trees={size: [list(path) for path in tree.paths] for size, tree in trees.items()},
        simulated=_simulated(halves, budgets),
        prefixes={} if trace.joint != PRODUCT else halves.prefixes(SIZES),
        step_times=_times(halves, step_times, place or {}),
        measured_on={**trace.about, "answers": trace.num_rows, "positions": trace.num_positions},
    )


def _errors(halves: Halves) -> dict[str, Any]:
    before, after = halves.errors(None), halves.errors(halves.temperatures)
    return {
        "bins": BINS,
        "positions": [error.positions for error in before],
        "temperatures": halves.temperatures,
        **{
            name: rounded({"top": [e.top for e in errors], "all": [e.all for e in errors]})
            for name, errors in (("before", before), ("after", after))
        },
    }


def _simulated(halves: Halves, budgets: Sequence[int]) -> list[dict[str, Any]]:
    """The chain, then of each budget the fixed tree and the dynamic one, the latter without and with temperatures.

    What cannot be simulated is left out (`ladon.calibrate.simulate`).
    """
    if halves.unseen.joint == HIDDEN:
        return []
    found = [_entry("chain", False, *halves.simulated("chain", [halves.unseen.num_heads + 1]))]
    if not budgets:
        return found
    rates = hit_rates(halves.known.ranks(), halves.known.num_candidates)
    for budget in budgets:
        found.append(_entry("fixed", False, *halves.simulated(best_fixed_tree(rates, budget), [budget])))
    if halves.unseen.joint != PRODUCT:
        return found
    for temperatures in (None, halves.temperatures):
        runs = halves.simulated("dynamic", budgets, temperatures)
        found += [_entry("dynamic", temperatures is not None, run) for run in runs]
    return found


def _entry(tree: str, temperatures: bool, run: SimulatedRun) -> dict[str, Any]:
    return {
        "tree": tree,
        "nodes": run.nodes,
        "temperatures": temperatures,
        "acceptance_length": rounded(run.acceptance_length),
        "accepted": rounded(run.accepted),
    }


def _times(halves: Halves, measured: Sequence[StepTimes], place: dict[str, Any]) -> dict[str, Any]:
    """Times with their machine, and what the dynamic tree of each size would gain: tokens per step / relative time.

    Without the latter where dynamic trees are not simulated.
    """
    if not measured:
        return {}
    found = {
        "place": place,
        "measured": [{**asdict(times), "relative": [round(r, 3) for r in times.relative]} for times in measured],
    }
    if halves.unseen.joint != PRODUCT:
        return found
    times = measured[0]
    runs = halves.simulated("dynamic", times.nodes, halves.temperatures)
    gains = [run.acceptance_length / relative for run, relative in zip(runs, times.relative, strict=True)]
    best = max(range(len(gains)), key=lambda i: gains[i])
    projected = {
        "acceptance_length": rounded([run.acceptance_length for run in runs]),
        "speedup": rounded(gains),
        "best_budget": times.nodes[best],
    }
    return found | {"projected": projected}
