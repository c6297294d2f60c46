"""A calibration step by step: answers, step times, findings, and whether pruning pays."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ladon.calibrate.findings import calibrate
from ladon.calibrate.lattice_trace import LatticeTrace
from ladon.calibrate.pruning import find_pruning, usable_ways
from ladon.calibrate.recording import correction_of, record
from ladon.calibrate.timing import StepTimes, measure_step_times, profile_of
from ladon.errors import InputError
from ladon.heads import Heads
from ladon.heads.calibration import Calibration
from ladon.heads.factory import read_heads
from ladon.tree_size.profile_store import place_of, write_profile
from ladon.util.machine import environment

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Progress = Callable[[str, int, int], None]  # what is being done, how many of how many calls are finished

_PRUNING_PROMPTS = 32  # whose answers pruning is judged on, at most


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
            [torch.tensor(prompt) for prompt in prompts],
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
        few = [torch.tensor(ids) for ids in prompts[:_PRUNING_PROMPTS]]
        return find_pruning(self._model, self._heads, few, place=self._place, progress=self._progress)
