"""The measurement: modes take turns on the same prompts, medians over repeats, every output compared.

Order of a run: (1) plain decoding answers every turn once, alone: that fixes the prompts of later turns and is the
reference for the timed dtype; (2) each system warms up; (3) repeats, in which the systems alternate prompt by prompt in
rotating order, so that a slow minute of the machine meets all of them; every mode takes part twice, timed as users run
it, and profiled for the share of each stage and for the steps; (4) in float32, apart from any timing, every mode
against transformers' `generate`; (5) if that is asked for, once more to see where tokens are lost.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ladon.bench.findings import Findings, Measured, Progress, Request, Subject
from ladon.bench.quality.diagnosis import DiagnosedDecoder, Diagnosis
from ladon.bench.quality.identity import check_float32, leaving_plain
from ladon.bench.systems import Budget, LadonSystem, Run, System, TransformersSystem
from ladon.bench.workloads import Question, Workload, prompt_ids
from ladon.calibrate.lattice_trace import hit_rates, record
from ladon.config import BenchOptions
from ladon.decoder.options import OFF
from ladon.errors import InputError
from ladon.heads import Heads
from ladon.target.target import Target
from ladon.trees.fixed_tree import FixedTree

_WARM_UP_TOKENS = 16


@dataclass(frozen=True, slots=True)
class TimeLimit:
    """When a measurement has to be over, the comparison in float32 included: prompts are left out first, then repeats.

    Attributes:
        end: the time, in seconds of the clock.
        clock: tells the time.
    """

    end: float = math.inf
    clock: Callable[[], float] = time.monotonic

    def groups(self, done: int, wanted: int, repeats: int, seconds: float) -> int:
        """How many groups of prompts fit, `done` of which took so many seconds in the first repeat; at least these.

        Each costs as much again in every repeat, and no more than that in the comparison. After the first group all
        repeats have to fit, later only the first: the machine may have become slower.
        """
        each, turns = seconds / done, repeats if done == 1 else 1
        needed = each * wanted * (turns + 1) - seconds
        left = self.end - self.clock()
        return wanted if needed <= left else max(done, int((left + seconds) / (each * (turns + 1))))

    def has_time_for(self, seconds: float) -> bool:
        """Whether so many seconds are left."""
        return self.clock() + seconds <= self.end


def run_bench(
    subject: Subject, workload: Workload, options: BenchOptions, progress: Progress, limit: TimeLimit | None = None
) -> Findings:
    """Measure every mode, budget and batch size that `options` names on `workload`, as far as the time allows.

    Raises:
        InputError: a prompt leaves no room for the tokens asked for, or a mode needs heads or a tree that are missing.
    """
    plan = _plan(subject, options)

    def systems_of(model: PreTrainedModel, heads: Heads | None, profile: bool = False) -> list[LadonSystem]:
        return [entry.system(model, heads, profile=profile) for entry in plan]

    # Everything a mode needs is made before the first long run, so that a mistake shows at once.
    systems = systems_of(subject.model, subject.heads)
    profilers = systems_of(subject.model, subject.heads, profile=True)
    findings = Findings(requests=_hold_conversations(subject, workload, options.max_new_tokens, systems[0], progress))
    everyone: list[System] = [*systems, *profilers, TransformersSystem(subject.model)]
    for batch in options.batches:
        everybody = _groups(findings.requests, batch)
        *runs, reference = _take_turns(everyone, everybody, options, progress, limit or TimeLimit())
        groups = everybody[: len(reference[0])]
        if len(groups) < len(everybody):
            findings.requests = [request for group in groups for request in group]
        for system, timed, profiled in zip(systems, runs[: len(systems)], runs[len(systems) :], strict=True):
            entry = Measured(
                system=system.name,
                budget=system.budget,
                batch=batch,
                groups=groups,
                timed=timed,
                profiled=profiled,
                fitted_step_ms=system.fitted_step_ms([run for several in timed for run in several]),
            )
            findings.measured.append(entry)
            findings.differences[system.name, system.budget, batch] = leaving_plain(subject.model, entry)
        findings.measured.append(
            Measured(system="transformers", budget=None, batch=batch, groups=groups, timed=reference, profiled=[])
        )
    check_float32(subject, findings, systems_of, options.max_new_tokens, progress)
    if options.diagnose:
        for planned, system in zip(plan, systems, strict=True):
            if planned.has_lattice:
                diagnosed = planned.system(subject.model, subject.heads, make=DiagnosedDecoder)
                _diagnose(diagnosed, system, findings, options, progress)
    return findings


class _Entry(NamedTuple):
    """A mode at a budget, with its tree if that is fixed."""

    mode: str
    budget: Budget
    fixed_tree: FixedTree | None = None
    prune: str = OFF

    @property
    def has_lattice(self) -> bool:
        """Whether heads alone draft."""
        return self.mode != "plain" and not self.mode.endswith("ngrams")

    def system(self, model: PreTrainedModel, heads: Heads | None, **options: Any) -> LadonSystem:
        """The mode for a model."""
        return LadonSystem(model, heads, **self._asdict(), **options)


def _plan(subject: Subject, options: BenchOptions) -> list[_Entry]:
    """Plain decoding first, then each mode; those whose tree grows with the budget once per budget."""
    plan = [_Entry(mode="plain", budget=1)]
    for mode in options.modes:
        if mode not in ("plain", "ngrams") and subject.heads is None:
            raise InputError(f"mode {mode} needs heads; give --heads, or --modes plain,ngrams")
        if mode == "chain":
            plan.append(_Entry(mode=mode, budget=max(options.budgets)))
        elif mode == "fixed":
            trees = [(size, subject.fixed_tree(size)) for size in options.budgets]
            plan += [_Entry(mode=mode, budget=min(size, tree.num_nodes), fixed_tree=tree) for size, tree in trees]
        elif mode in ("dynamic", "dynamic+ngrams"):
            plan += [_Entry(mode=mode, budget=size) for size in options.budgets]
        elif mode in ("auto", "pruned", "ngrams", "auto+ngrams"):
            plan.append(_Entry(mode=mode, budget="auto", prune=options.prune if mode == "pruned" else OFF))
    return list(dict.fromkeys(plan))  # a fixed tree smaller than two of the budgets is one system


def _diagnose(
    system: LadonSystem, timed: LadonSystem, findings: Findings, options: BenchOptions, progress: Progress
) -> None:
    """Decode everything once more with `system`, in which sizes are chosen by what the `timed` one has learnt."""
    decoder = system.decoder
    assert isinstance(decoder, DiagnosedDecoder)
    decoder.sizing = timed.decoder.sizing
    for batch in options.batches:
        diagnosis, groups = Diagnosis(), _groups(findings.requests, batch)
        for done, group in enumerate(groups, start=1):
            prompts = [torch.tensor(request.ids, device="cpu") for request in group]
            for _ in diagnosis.follow(decoder, decoder.rows(prompts, max_new_tokens=options.max_new_tokens)):
                pass
            progress(f"where tokens are lost, {system.name}", done, len(groups))
        findings.diagnoses[system.name, system.budget, batch] = diagnosis.document()


def _hold_conversations(
    subject: Subject, workload: Workload, max_new_tokens: int, plain: LadonSystem, progress: Progress
) -> list[Request]:
    """Plain decoding's answer to every turn; what can be refused is refused before the first is decoded."""
    limit = Target(subject.model).context_limit
    for question in workload.questions:
        _check_length(question, prompt_ids(subject.tokenizer, question, []), limit, max_new_tokens)
    total = sum(len(question.turns) for question in workload.questions)
    requests: list[Request] = []
    for question in workload.questions:
        answers: list[str] = []
        for _ in question.turns:
            ids = prompt_ids(subject.tokenizer, question, answers)
            _check_length(question, ids, limit, max_new_tokens)
            reference = plain.run([ids], max_new_tokens).outputs[0]
            requests.append(Request(number=len(requests), question=question, ids=ids, reference=reference))
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


def _take_turns(
    systems: Sequence[System],
    groups: Sequence[list[Request]],
    options: BenchOptions,
    progress: Progress,
    limit: TimeLimit,
) -> list[list[list[Run]]]:
    """Runs by system, repeat, group; of the first groups, and fewer repeats, if time is short."""
    for system in systems:
        system.run([request.ids for request in groups[0]], min(_WARM_UP_TOKENS, options.max_new_tokens))
    runs: list[list[list[Run]]] = [[] for _ in systems]
    count, done = len(groups), 0
    for repeat in range(options.repeats):
        started, place = limit.clock(), 0
        for several in runs:
            several.append([])
        while place < count:
            prompts = [request.ids for request in groups[place]]
            first = (repeat * len(groups) + place) % len(systems)
            for offset in range(len(systems)):
                index = (first + offset) % len(systems)
                runs[index][repeat].append(systems[index].run(prompts, options.max_new_tokens))
                done += 1
                progress("measuring, modes in turn", done, options.repeats * count * len(systems))
            place += 1
            if repeat == 0:
                count = limit.groups(place, count, options.repeats, limit.clock() - started)
        if not limit.has_time_for(2 * (limit.clock() - started)):  # another repeat, and the comparison
            break
    return runs


def calibrate(
    model: PreTrainedModel,
    heads: Heads,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    max_new_tokens: int,
    progress: Callable[[str, int, int], None],
) -> list[list[float]]:
    """Hit rates over the model's own greedy answers to the first turn of each question."""
    prompts = [torch.tensor(prompt_ids(tokenizer, question, []), device="cpu") for question in questions]
    given = record(model, heads, prompts, max_new_tokens=max_new_tokens, progress=progress).given_the_truth()
    return hit_rates(given.ranks(), given.num_candidates)
