"""Is the text the same? Where an output leaves a reference, and what that is worth.

Logits of one prefix differ with the shape of the call. How far the worse of the two tokens, the one expected and the
one written, lies below the best logit says whether that explains a difference: below the bound of the dtype it is a
near-tie, else the output is wrong.

- float64: no bound, there are no near-ties.
- float32: 1e-4. Logits of one prefix differ by 1e-6 to 1e-4.
- bfloat16, float16, and float32 computed in them (autocast, TF32): `UNITS` rounding units of the largest logit, a unit
  being the dtype's epsilon (2^-7, 2^-10) times that logit's size. In the bundled model logits near the top differ by at
  most 0.94 units between two calls; two of them make 2, and deeper models round more often.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ladon.bench.findings import Difference, Findings, Measured, Progress, Request, Subject
from ladon.bench.systems import LadonSystem, TransformersSystem
from ladon.decoder.trace import TraceStep
from ladon.errors import LadonError
from ladon.heads import Heads
from ladon.target.target import Target
from ladon.trees.token_tree import TokenTree
from ladon.util.devices import input_device, working_dtype

FLOAT32_BOUND = 1e-4
UNITS = 4
SystemsOf = Callable[[PreTrainedModel, Heads | None], Sequence[LadonSystem]]


def near_tie_bound(dtype: torch.dtype, logits: Tensor) -> float:
    """Margin below which rounding in `dtype` explains another token; `logits` [V] are those of the place."""
    if dtype == torch.float64:
        return 0.0
    if dtype == torch.float32:
        return FLOAT32_BOUND
    return UNITS * torch.finfo(dtype).eps * float(logits.abs().max())


def first_difference(output: Sequence[int], reference: Sequence[int]) -> int | None:
    """Index of the first token that differs or is missing in either; None if the outputs are equal."""
    for place, (ours, theirs) in enumerate(zip(output, reference, strict=False)):
        if ours != theirs:
            return place
    return None if len(output) == len(reference) else min(len(output), len(reference))


def compare(
    model: PreTrainedModel,
    number: int,
    prompt: Sequence[int],
    output: Sequence[int],
    reference: Sequence[int],
    system: LadonSystem | None = None,
) -> Difference | None:
    """Where the output to prompt `number` leaves the reference; None if nowhere.

    Args:
        model: the target.
        number: of the prompt.
        prompt: its token ids.
        output: what is judged.
        reference: what it is compared with: plain decoding's output, or `generate`'s.
        system: whose output it is, to look closer: the logits are then those of `generate` itself, against those of the
            mode's own tree: the mode is replayed alone up to the step that gave the token, and that step's tree is
            verified again. None: one forward over the whole prefix, which rounds a third way: either token may win.
    """
    position = first_difference(output, reference)
    if position is None:
        return None
    deviation = None
    if system is None:
        logits = _generate_logits(model, [*prompt, *reference[:position]], 0)
    else:
        logits = _generate_logits(model, prompt, position)
        ours = replayed_logits(model, system, prompt, position, max_new_tokens=len(reference))
        deviation = math.inf if ours is None else float((ours - logits).abs().max())
    is_cut = position >= min(len(output), len(reference))
    margin = math.inf if is_cut else margin_of(logits, output[position], reference[position])
    bound = near_tie_bound(working_dtype(input_device(model), model.dtype), logits)
    return Difference(prompt=number, position=position, margin=margin, bound=bound, deviation=deviation)


def margin_of(logits: Tensor, ours: int, theirs: int) -> float:
    """How far the lower of two tokens lies below the best of the logits [V]."""
    return float(logits.max() - min(logits[ours], logits[theirs]))


@torch.no_grad()
def replayed_logits(
    model: PreTrainedModel, system: LadonSystem, prompt: Sequence[int], position: int, max_new_tokens: int
) -> Tensor | None:
    """Logits [V] from which the mode picked new token `position`; None if it ends before, decoding alone."""
    target = Target(model)
    ids = torch.tensor(list(prompt), device=input_device(model))
    if position == 0:
        logits: Tensor = target.prefill([ids], target.new_cache(1))[1][0].float()
        return logits
    trace = system.decoder.trace(ids, max_new_tokens=max_new_tokens)
    emitted = [trace.first]
    for step in trace:
        if position < len(emitted) + len(step.emitted):
            return _verified_again(target, [*prompt, *emitted[:-1]], step)[step.path[position - len(emitted)]]
        emitted += step.emitted
    return None


def _verified_again(target: Target, prefix: Sequence[int], step: TraceStep) -> Tensor:
    """Logits [N, V] of a recorded step's tree after `prefix`, everything before its root."""
    cache = target.new_cache(1)
    target.prefill([torch.tensor(prefix, device=target.device)], cache)
    tree = TokenTree(
        tokens=torch.tensor([step.tokens], device=target.device),
        parents=torch.tensor([step.parents], device=target.device),
        log_probs=torch.tensor([step.log_probs], device=target.device),
        max_depth=max(step.depths),
    )
    return target.verify(tree, cache).logits[0].float()


def _generate_logits(model: PreTrainedModel, prompt: Sequence[int], position: int) -> Tensor:
    """Logits [V] from which `generate` picked new token `position`."""
    ids = torch.tensor([list(prompt)], device=input_device(model))
    done = type(model).generate(
        model,
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=position + 1,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    logits: Tensor = done.logits[position][0].float()
    return logits


def leaving_plain(model: PreTrainedModel, entry: Measured) -> list[Difference]:
    """Each output of the timed runs that is not plain decoding's, once per prompt."""
    found: dict[int, Difference] = {}
    for runs in entry.timed:
        for request, output, _ in entry.answers(runs):
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
                found = compare(model, request.number, request.ids, output, expected[request.number], system)
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
