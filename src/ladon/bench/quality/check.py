"""Every output compared: with plain decoding in the dtype that is timed, with transformers' `generate` in float32."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from ladon.bench.findings import Findings, Measured, Progress, Request, Subject
from ladon.bench.quality.identity import Difference, compare, examine
from ladon.bench.systems import LadonSystem, TransformersSystem
from ladon.errors import LadonError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ladon.heads import Heads

SystemsOf = Callable[["PreTrainedModel", "Heads | None"], Sequence[LadonSystem]]


def leaving_plain(model: PreTrainedModel, entry: Measured) -> list[Difference]:
    """Each output of the timed runs that is not plain decoding's, once per prompt."""
    found: dict[int, Difference] = {}
    for runs in entry.timed:
        for group, run in zip(entry.groups, runs, strict=True):
            for request, output in zip(group, run.outputs, strict=True):
                if request.number not in found:
                    difference = compare(model, request.number, request.ids, output, request.reference)
                    if difference is not None:
                        found[request.number] = difference
    return list(found.values())


def check_float32(
    subject: Subject, findings: Findings, systems_of: SystemsOf, max_new_tokens: int, progress: Progress
) -> None:
    """Compare every mode with transformers' `generate`, each row of which runs alone, in float32.

    Differences go to `findings.float32_differences`. If memory runs out, or the model is refused in float32, what was
    measured before is worth keeping: the reason goes to `findings.unchecked`.

    Args:
        subject: what was measured.
        findings: with everything that was measured.
        systems_of: makes all modes for a model and its heads.
        max_new_tokens: as in the measurement.
        progress: told after each group.
    """
    for entry in findings.measured:
        if entry.budget is not None:
            findings.float32_differences[entry.system, entry.budget, entry.batch] = []
    try:
        _compare_modes(subject, findings, systems_of, max_new_tokens, progress)
    except LadonError as error:
        findings.unchecked = str(error)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        findings.unchecked = "out of memory: the check needs room for a float32 copy of the model"


def is_out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed, on the CPU or on a device; torch has an own error for some devices only."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and bool(re.search("out of memory|alloc|enough memory", str(error), re.I))


def _compare_modes(
    subject: Subject, findings: Findings, systems_of: SystemsOf, max_new_tokens: int, progress: Progress
) -> None:
    model, heads = in_float32(subject.model, subject.heads)
    reference = TransformersSystem(model)
    expected: Mapping[int, list[int]] = {
        request.number: reference.run([request.ids], max_new_tokens).outputs[0] for request in findings.requests
    }
    systems = systems_of(model, heads)
    groups: dict[int, list[list[Request]]] = {entry.batch: entry.groups for entry in findings.measured}
    work = [(batch, group) for batch, parts in groups.items() for group in parts]
    for done, (batch, group) in enumerate(work, start=1):
        for system in systems:
            outputs = system.run([request.ids for request in group], max_new_tokens).outputs
            for request, output in zip(group, outputs, strict=True):
                found = examine(model, system, request.number, request.ids, output, expected[request.number])
                if found is not None:
                    findings.float32_differences[system.name, system.budget, batch].append(found)
        progress("checking every mode in float32", done, len(work))


def in_float32(model: PreTrainedModel, heads: Heads | None) -> tuple[PreTrainedModel, Heads | None]:
    """Copies in float32 with the same weights; the very same objects if they are float32 already.

    They are copied together, so that the heads use the copied model's output projection and not a second copy of it.
    """
    if model.dtype == torch.float32:
        return model, heads
    model, heads = copy.deepcopy((model, heads))
    model = model.float()
    return model, None if heads is None else heads.bind(model)
