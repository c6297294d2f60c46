"""From the model's answers to a calibration: answers, step times, findings, and whether pruning pays."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ladon.calibrate.lattice_trace import LatticeTrace, correction_of, hit_rates, marginal_hit_rates, record
from ladon.calibrate.pruning import find_pruning, usable_ways
from ladon.calibrate.simulate import SimulatedRun, simulate_budgets, simulate_prefixes
from ladon.calibrate.temperatures import BINS, CalibrationError, calibration_errors, fit_temperatures
from ladon.calibrate.timing import StepTimes, measure_step_times, profile_of
from ladon.config import HIDDEN, MARKOV, PRODUCT
from ladon.errors import InputError
from ladon.heads import Heads
from ladon.heads.calibration import Calibration
from ladon.heads.factory import read_heads
from ladon.tree_size.profile_store import place_of, write_profile
from ladon.trees.fixed_tree import FixedTree, best_fixed_tree
from ladon.util.files import rounded
from ladon.util.machine import environment

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SIZES = (8, 16, 32, 64)
Progress = Callable[[str, int, int], None]  # what is being done, how many of how many calls are finished
_PRUNING_PROMPTS = 32  # whose answers pruning is judged on, at most


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


class HeadsMeasurement:
    """The steps of a calibration: what can be measured of heads on their model."""

    def __init__(self, model: PreTrainedModel, heads: Heads, stored: Path | str, progress: Progress) -> None:
        """Take the heads of a model, the folder or name that they were loaded from, and what is told of progress."""
        self._model, self._heads, self._stored, self._progress = model, heads, stored, progress
        self._dtype = str(model.dtype).removeprefix("torch.")

    @property
    def _place(self) -> dict[str, Any]:
        """What measurements are true of."""
        return environment(self._model.device) | {"dtype": self._dtype}

    def check_prunable(self) -> None:
        """Raise `UnsupportedModelError` now, and not after all else was measured, if the model cannot be pruned."""
        usable_ways(self._model, self._heads)

    def record(
        self, model_name: str, prompts_name: str, prompts: Sequence[Sequence[int]], max_new_tokens: int, batch: int
    ) -> LatticeTrace:
        """Let the model answer prompts, given as token ids; the names are noted with the trace."""
        sha256 = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()
        workload = {"name": prompts_name, "sha256": sha256, "questions": len(prompts)}
        about = {"model": model_name, "dtype": self._dtype, "max_new_tokens": max_new_tokens}
        trace = record(
            self._model,
            self._heads,
            [torch.tensor(prompt, device="cpu") for prompt in prompts],
            max_new_tokens=max_new_tokens,
            batch_size=batch,
            about={**about, "workload": workload},
            progress=self._progress,
        )
        return replace(trace, heads=self._stored_hash())

    def read(self, path: Path) -> LatticeTrace:
        """A trace that was recorded before; `InputError` if it is of other heads."""
        trace = LatticeTrace.load(path)
        if trace.heads != self._stored_hash():
            raise InputError(f"{path} was recorded with other heads; record a trace with these, or name the others")
        return replace(trace, correction=correction_of(self._heads))

    def _stored_hash(self) -> str:
        """The hash of the heads as they are stored: float16 keeps less of small weights than the hash's bfloat16."""
        if self._model.dtype != torch.float16:
            return self._heads.weights_hash
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # given when they were loaded for the model
            return read_heads(self._stored, self._model).weights_hash

    def step_times(self, trace: LatticeTrace, batches: Sequence[int], contexts: Sequence[int]) -> list[StepTimes]:
        """Time steps at every batch size and context length, after the beginning of the model's own answers."""
        tokens = trace.truth[:, 0].long()
        text = tokens.repeat(-(-max(contexts) // max(len(tokens), 1)))
        return [
            measure_step_times(self._model, self._heads, text[:context], batch=batch, progress=self._progress)
            for context in contexts
            for batch in batches
        ]

    def findings(self, trace: LatticeTrace, budgets: tuple[int, ...], measured: list[StepTimes]) -> Calibration:
        """What the trace and the step times say."""
        return calibrate(trace, budgets=budgets, step_times=measured, place=self._place)

    def write(self, found: Calibration, measured: list[StepTimes], folder: Path) -> Path | None:
        """Write the calibration, and keep the step times for this machine; where, or None if there are none."""
        found.save(folder)
        return write_profile(place_of(self._model, self._heads), profile_of(measured)) if measured else None

    def pruning(self, prompts: Sequence[Sequence[int]]) -> dict[str, Any]:
        """Whether early pruning pays, and how: judged on the answers to a few of the prompts."""
        few = [torch.tensor(ids, device="cpu") for ids in prompts[:_PRUNING_PROMPTS]]
        return find_pruning(self._model, self._heads, few, place=self._place, progress=self._progress)
