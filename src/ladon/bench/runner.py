"""The measurement: modes take turns on the same prompts, medians over repeats, every output compared.

Order of a run: (1) plain decoding answers every turn once, alone: that fixes the prompts of later turns and is the
reference for half precision; (2) each system warms up; (3) timed repeats, in which the systems alternate prompt by
prompt in rotating order, so that a slow minute of the machine meets all of them; (4) one profiled pass for the share
of each stage and for the steps; (5) in float32, apart from any timing, every mode against transformers' `generate`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from ladon.bench.identity import Difference, examine, first_difference, margin
from ladon.bench.systems import LadonSystem, Run, System, TransformersSystem
from ladon.bench.workloads import Question, Workload, prompt_ids
from ladon.errors import InputError
from ladon.fixed_tree import FixedTree

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ladon.config import BenchOptions
    from ladon.heads import Heads

Progress = Callable[[str, int, int], None]  # what is being done, how many of how many calls are finished
_WARM_UP_TOKENS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """What is measured.

    Attributes:
        name: the model's name in results.
        model: the target, in the dtype that is timed.
        tokenizer: its tokenizer.
        heads: its heads; None measures plain decoding only.
        fixed_tree: gives the fixed tree of a size (nodes, root included) for mode "fixed".
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    heads: Heads | None
    fixed_tree: Callable[[int], FixedTree]


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One answer to give: a turn of a question, with its reference answer.

    Attributes:
        question: the question.
        turn: which of its turns, from 0.
        ids: the prompt, earlier turns and answers included.
        reference: plain decoding's answer in the timed dtype, alone.
    """

    question: Question
    turn: int
    ids: list[int]
    reference: list[int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """One system's runs at one batch size.

    Attributes:
        system: its name: a mode, or "transformers".
        budget: nodes per step and row; None for transformers.
        batch: rows decoded together.
        groups: the requests of each group.
        timed: runs by repeat, then by group.
        profiled: runs by group with stage times and, at batch 1, step counts; empty for transformers.
    """

    system: str
    budget: int | None
    batch: int
    groups: list[list[Request]]
    timed: list[list[Run]]
    profiled: list[Run]


@dataclass(kw_only=True)
class Findings:
    """Everything a report is made from.

    Attributes:
        requests: all requests.
        measured: one entry per batch size and system, plain decoding among them.
        differences: by (mode, budget, batch): outputs that left plain decoding of the timed dtype.
        float32_differences: likewise, float32 outputs that left transformers' `generate`.
    """

    requests: list[Request] = field(default_factory=list)
    measured: list[Measured] = field(default_factory=list)
    differences: dict[tuple[str, int, int], list[Difference]] = field(default_factory=dict)
    float32_differences: dict[tuple[str, int, int], list[Difference]] = field(default_factory=dict)


def run_bench(subject: Subject, workload: Workload, options: BenchOptions, progress: Progress) -> Findings:
    """Measure every mode, budget and batch size that `options` names on `workload`.

    Raises:
        InputError: a prompt leaves no room for the tokens asked for, or a mode needs heads or a tree that are missing.
    """
    findings = Findings()
    plan = _plan(subject, options)
    # Everything a mode needs is made before the first long run, so that a mistake shows at once.
    systems = [_make(subject.model, subject.heads, entry) for entry in plan]
    profilers = [_make(subject.model, subject.heads, entry, profile=True) for entry in plan]
    findings.requests = _hold_conversations(subject, workload, options, systems[0], progress)
    for batch in options.batches:
        groups = _groups(findings.requests, batch)
        everyone: list[System] = [*systems, TransformersSystem(subject.model)]
        timed = _time(everyone, groups, options, progress)
        profiled = _profile(profilers, groups, options.max_new_tokens, progress)
        budgets: list[int | None] = [*(system.budget for system in systems), None]
        for system, budget, runs, profile in zip(everyone, budgets, timed, [*profiled, []], strict=True):
            entry = Measured(
                system=system.name, budget=budget, batch=batch, groups=groups, timed=runs, profiled=profile
            )
            findings.measured.append(entry)
            if budget is not None:
                findings.differences[system.name, budget, batch] = _leaving_plain(subject.model, entry)
    _check_float32(subject, findings, plan, options, progress)
    return findings


@dataclass(frozen=True, kw_only=True, slots=True)
class _Entry:
    """A mode at a budget, with its tree if that is fixed."""

    mode: str
    budget: int
    fixed_tree: FixedTree | None


def _plan(subject: Subject, options: BenchOptions) -> list[_Entry]:
    """Plain decoding first, then each mode; those whose tree grows with the budget once per budget."""
    largest = max(options.budgets)
    plan = [_Entry(mode="plain", budget=1, fixed_tree=None)]
    for mode in options.modes:
        if mode != "plain" and subject.heads is None:
            raise InputError(f"mode {mode} needs heads; give --heads, or --modes plain")
        if mode == "chain":
            plan.append(_Entry(mode=mode, budget=largest, fixed_tree=None))
        elif mode == "fixed":
            plan += [_Entry(mode=mode, budget=n, fixed_tree=subject.fixed_tree(n)) for n in options.budgets]
        elif mode == "dynamic":
            plan += [_Entry(mode=mode, budget=n, fixed_tree=None) for n in options.budgets]
    return plan


def _make(model: PreTrainedModel, heads: Heads | None, entry: _Entry, profile: bool = False) -> LadonSystem:
    return LadonSystem(model, heads, mode=entry.mode, budget=entry.budget, fixed_tree=entry.fixed_tree, profile=profile)


def _hold_conversations(
    subject: Subject, workload: Workload, options: BenchOptions, plain: LadonSystem, progress: Progress
) -> list[Request]:
    limit = getattr(subject.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    total = sum(len(question.turns) for question in workload.questions)
    requests: list[Request] = []
    for question in workload.questions:
        answers: list[str] = []
        for turn in range(len(question.turns)):
            ids = prompt_ids(subject.tokenizer, question, answers)
            _check_length(question, ids, limit, options.max_new_tokens)
            reference = plain.run([ids], options.max_new_tokens).outputs[0]
            requests.append(Request(question=question, turn=turn, ids=ids, reference=reference))
            answers.append(str(subject.tokenizer.decode(reference, skip_special_tokens=True)))
            progress("plain decoding fixes the conversations", len(requests), total)
    return requests


def _check_length(question: Question, ids: Sequence[int], limit: int | None, max_new_tokens: int) -> None:
    if not ids:
        raise InputError(f"question {question.question_id} has an empty prompt; give at least one token")
    if limit is not None and len(ids) + max_new_tokens > limit:
        raise InputError(
            f"question {question.question_id} has {len(ids)} prompt tokens; with {max_new_tokens} new ones it passes "
            f"the model's context limit of {limit}; leave it out or lower --max-new-tokens"
        )


def _groups(requests: Sequence[Request], batch: int) -> list[list[Request]]:
    """Requests in groups of `batch` that share a category."""
    by_category: dict[str, list[Request]] = {}
    for request in requests:
        by_category.setdefault(request.question.category, []).append(request)
    return [part[at : at + batch] for part in by_category.values() for at in range(0, len(part), batch)]


def _time(
    systems: Sequence[System], groups: Sequence[list[Request]], options: BenchOptions, progress: Progress
) -> list[list[list[Run]]]:
    """Runs by system, repeat, group."""
    for system in systems:
        system.run([request.ids for request in groups[0]], min(_WARM_UP_TOKENS, options.max_new_tokens))
    runs: list[list[list[Run]]] = [[[] for _ in range(options.repeats)] for _ in systems]
    total, done = options.repeats * len(groups) * len(systems), 0
    for repeat in range(options.repeats):
        for place, group in enumerate(groups):
            first = (repeat * len(groups) + place) % len(systems)
            for offset in range(len(systems)):
                index = (first + offset) % len(systems)
                prompts = [request.ids for request in group]
                runs[index][repeat].append(systems[index].run(prompts, options.max_new_tokens))
                done += 1
                progress("timing, modes in turn", done, total)
    return runs


def _profile(
    systems: Sequence[LadonSystem], groups: Sequence[list[Request]], max_new_tokens: int, progress: Progress
) -> list[list[Run]]:
    """Profiled runs by system and group."""
    runs: list[list[Run]] = [[] for _ in systems]
    for done, group in enumerate(groups, start=1):
        for index, system in enumerate(systems):
            runs[index].append(system.run([request.ids for request in group], max_new_tokens))
        progress("profiling the stages", done, len(groups))
    return runs


def _leaving_plain(model: PreTrainedModel, entry: Measured) -> list[Difference]:
    """Each output of the timed runs that is not plain decoding's, once per prompt, with plain decoding's margin."""
    found: dict[int, Difference] = {}
    for runs in entry.timed:
        pairs = [
            (r, out)
            for group, run in zip(entry.groups, runs, strict=True)
            for r, out in zip(group, run.outputs, strict=True)
        ]
        for number, (request, output) in enumerate(pairs):
            position = first_difference(output, request.reference)
            if position is not None and number not in found:
                value = margin(model, request.ids, request.reference, position)
                found[number] = Difference(mode=entry.system, prompt=number, position=position, margin=value)
    return list(found.values())


def _check_float32(
    subject: Subject, findings: Findings, plan: Sequence[_Entry], options: BenchOptions, progress: Progress
) -> None:
    """Compare every mode with transformers' `generate`, each row of which runs alone, in float32."""
    model, heads = in_float32(subject.model, subject.heads)
    reference = TransformersSystem(model)
    expected: Mapping[int, list[int]] = {
        id(request): reference.run([request.ids], options.max_new_tokens).outputs[0] for request in findings.requests
    }
    systems = [_make(model, heads, entry) for entry in plan]
    work = [(batch, group) for batch in options.batches for group in _groups(findings.requests, batch)]
    for system in systems:
        for batch in options.batches:
            findings.float32_differences[system.name, system.budget, batch] = []
    for done, (batch, group) in enumerate(work, start=1):
        for system in systems:
            outputs = system.run([request.ids for request in group], options.max_new_tokens).outputs
            for request, output in zip(group, outputs, strict=True):
                position = first_difference(output, expected[id(request)])
                if position is not None:
                    number = findings.requests.index(request)
                    found = examine(model, system, request.ids, position, number, options.max_new_tokens)
                    findings.float32_differences[system.name, system.budget, batch].append(found)
        progress("checking every mode in float32", done, len(work))


def in_float32(model: PreTrainedModel, heads: Heads | None) -> tuple[PreTrainedModel, Heads | None]:
    """Copies in float32 with the same weights; the very same objects if they are float32 already."""
    if model.dtype == torch.float32:
        return model, heads
    model = copy.deepcopy(model).float()
    return model, None if heads is None else copy.deepcopy(heads).float().bind(model, force=True)
