"""From findings to files: the numbers of each mode in the JSON document, and answers for FastChat's MT-Bench tools.

Terms are as docs/reference/metrics.md defines them.
"""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from ladon.bench.findings import Findings, Key, Measured, Subject
from ladon.bench.quality.repetition import Repetition
from ladon.bench.systems import Run, by_size, merged
from ladon.bench.workloads import Workload, make_workload
from ladon.config import BenchOptions
from ladon.engine.stats import DecodeStats
from ladon.util.files import finite

_BASES = ("plain", "transformers")


def document(
    findings: Findings, subject: Subject, workload: Workload, plan: BenchOptions, environment: dict[str, Any]
) -> dict[str, Any]:
    """Everything that was measured, and of what and where, as JSON values."""
    heads, asked = subject.heads, dict.fromkeys(request.question for request in findings.requests)
    return {
        "environment": environment,
        "model": subject.name,
        "dtype": str(subject.model.dtype).removeprefix("torch."),
        "heads": None if heads is None else {"family": heads.family, "num": heads.num_heads},
        "workload": make_workload(workload.name, list(asked)).summary(),
        "max_new_tokens": plan.max_new_tokens,
        "repeats": len(findings.measured[0].timed),
        "transformers": baselines(findings),
        "identity_unchecked": findings.unchecked,
        "results": results(findings),
    }


def results(findings: Findings) -> list[dict[str, Any]]:
    """One result per mode, budget and batch size, as JSON values; None stands for what could not be measured.

    Times and speeds are of the timed runs, stages of the profiled runs, which wait for each stage; each is the median
    over repeats. A result holds:

    - mode: plain, chain, fixed, dynamic, auto or pruned.
    - batch: rows decoded together.
    - budget: nodes verified per step and row, root included; "auto" where each step has its own size.
    - rows_per_step: rows of a decode step, their mean: below `batch` where a group has fewer prompts or answers end
      apart.
    - nodes_per_step: node slots verified per row-step, their mean.
    - prompts: answers given (turns of all questions).
    - acceptance_length: tokens per row-step, bonus included.
    - acceptance_length_non_repeated: the same over steps that repeat nothing (`ladon.bench.quality.repetition`);
      batch 1.
    - repeated_share: repeated 8-grams over all 8-grams of the outputs; batch 1.
    - tokens_per_second: decode tokens per second of decode time, all rows.
    - tokens_per_second_range: least and greatest over repeats.
    - step_ms: mean milliseconds of a decode step.
    - profiled_step_ms: the same in the profiled runs.
    - forward_ms: mean milliseconds of the target's forward in a decode step; profiled.
    - overhead: share of decode time outside the target's forward; profiled.
    - growth_share: share of decode time spent growing trees; profiled.
    - stages: share of decode time by stage ("forward" is part of "verify"); profiled.
    - tree_efficiency: accepted draft nodes per verified draft node.
    - pruned_share: share of the node slots given to the target that later layers did not see.
    - prediction_error: mean relative error of the predicted step times; None if none are predicted.
    - sizing_share: share of decode time spent deciding on sizes.
    - sizes: the histogram of sizes: of each, `nodes`, `steps` of all timed runs, and their mean `tokens`,
      `expected_tokens`, `step_ms` and `predicted_ms`, as `ladon.bench.systems.by_size` gives them.
    - fitted_step_ms: of every size that could be chosen, `nodes` and the `ms` predicted for a step, in the end.
    - first_token_ms: milliseconds from the call to the first tokens, one of each row; median over calls.
    - speedup_vs_plain: tokens_per_second over plain decoding's.
    - speedup_vs_transformers: tokens_per_second over that of transformers' `generate`.
    - identical: whether in float32 every output equals transformers' `generate`, near-ties aside; None if that could
      not be checked.
    - float32_near_ties: float32 outputs that left the reference at a near-tie; None likewise.
    - near_ties: outputs in the timed dtype that left plain decoding of that dtype at a near-tie.
    - different: outputs in the timed dtype that left it elsewhere: wrong ones.
    - largest_margin: greatest margin (logits) at which one of either left it; None if none did, or one was cut short.
    - categories: acceptance length, tokens per second and prompts of each category.
    - diagnosis: where tokens are lost, if that was asked for (`ladon.bench.quality.diagnosis`).
    """
    speeds = {(entry.system, entry.batch): _speed(entry.timed) for entry in findings.measured if entry.system in _BASES}
    return [_result(findings, entry, speeds) for entry in findings.measured if entry.budget is not None]


def baselines(findings: Findings) -> list[dict[str, Any]]:
    """Transformers' `generate` at each batch size: tokens per second, step time, time to the first token."""
    return [
        {
            "batch": entry.batch,
            "tokens_per_second": finite(_speed(entry.timed)),
            "step_ms": _median(entry.timed, lambda stats: stats.step_ms),
            "first_token_ms": finite(_first_token_ms(entry.timed)),
        }
        for entry in findings.measured
        if entry.system == "transformers"
    ]


def _result(findings: Findings, entry: Measured, speeds: dict[tuple[str, int], float]) -> dict[str, Any]:
    assert entry.budget is not None
    key = (entry.system, entry.budget, entry.batch)
    differences = findings.differences[key]
    near_ties = sum(difference.is_near_tie for difference in differences)
    per_repeat = [stats_of(runs).tokens_per_second for runs in entry.timed]
    every_run = [run for runs in entry.timed for run in runs]
    counts, speed = stats_of(every_run), _speed(entry.timed)
    repetition, stages = _repetition(entry), _stages(entry.profiled)
    return {
        "mode": entry.system,
        "batch": entry.batch,
        "budget": entry.budget,
        "rows_per_step": finite(counts.row_steps / counts.forwards if counts.forwards else math.nan),
        "nodes_per_step": finite(counts.nodes_verified / counts.row_steps if counts.row_steps else math.nan),
        "prompts": sum(len(group) for group in entry.groups),
        "acceptance_length": finite(counts.acceptance_length),
        "acceptance_length_non_repeated": finite(repetition.acceptance_length),
        "repeated_share": finite(repetition.share),
        "tokens_per_second": finite(speed),
        "tokens_per_second_range": [finite(min(per_repeat)), finite(max(per_repeat))],
        "step_ms": _median(entry.timed, lambda stats: stats.step_ms),
        "profiled_step_ms": _median(entry.profiled, lambda stats: stats.step_ms),
        "forward_ms": _median(entry.profiled, lambda stats: stats.forward_ms),
        "overhead": _median(entry.profiled, lambda stats: stats.overhead),
        "growth_share": stages.get("growth"),
        "stages": stages,
        "tree_efficiency": finite(counts.tree_efficiency),
        "pruned_share": finite(counts.pruned_share),
        "prediction_error": finite(counts.prediction_error),
        "sizing_share": _median(entry.timed, lambda stats: stats.sizing_share),
        "sizes": by_size([step for run in every_run for step in run.steps]),
        "fitted_step_ms": entry.fitted_step_ms,
        "first_token_ms": finite(_first_token_ms(entry.timed)),
        "speedup_vs_plain": finite(speed / speeds["plain", entry.batch]),
        "speedup_vs_transformers": finite(speed / speeds["transformers", entry.batch]),
        **_identity(findings, key),
        "near_ties": near_ties,
        "different": len(differences) - near_ties,
        "largest_margin": finite(max((difference.margin for difference in differences), default=math.nan)),
        "categories": _categories(entry),
        "diagnosis": findings.diagnoses.get(key),
    }


def _identity(findings: Findings, key: Key) -> dict[str, Any]:
    """The fields about the check in float32; one wrong output settles it, even in a check that was cut short."""
    near_ties = [difference.is_near_tie for difference in findings.float32_differences[key]]
    if findings.unchecked is not None:
        return {"identical": None if all(near_ties) else False, "float32_near_ties": None}
    return {"identical": all(near_ties), "float32_near_ties": sum(near_ties)}


def _repetition(entry: Measured) -> Repetition:
    """Of the outputs of rows that were decoded alone; their steps were recorded in the profiled runs."""
    repetition = Repetition()
    if entry.batch == 1:
        for run in entry.profiled[0]:
            repetition.add(run.outputs[0], run.step_counts)
    return repetition


def _median(repeats: Sequence[Sequence[Run]], number: Callable[[DecodeStats], float]) -> float | None:
    """The median over repeats of a number of each repeat's counts and times."""
    return finite(median(number(stats_of(runs)) for runs in repeats))


def _stages(profiled: Sequence[Sequence[Run]]) -> dict[str, float | None]:
    names = dict.fromkeys(name for runs in profiled for run in runs for name in run.stats.stage_seconds)

    def share(stats: DecodeStats, name: str) -> float:
        return stats.stage_seconds.get(name, 0.0) / stats.decode_seconds if stats.decode_seconds else math.nan

    return {name: _median(profiled, partial(share, name=name)) for name in names}


def stats_of(runs: Sequence[Run]) -> DecodeStats:
    """The sums of the counts and times of some runs."""
    return merged([run.stats for run in runs])


def _speed(timed: Sequence[Sequence[Run]]) -> float:
    return median(stats_of(runs).tokens_per_second for runs in timed)


def _first_token_ms(timed: Sequence[Sequence[Run]]) -> float:
    return 1e3 * median(run.first_token_seconds for runs in timed for run in runs)


def _categories(entry: Measured) -> dict[str, dict[str, float | int | None]]:
    names = dict.fromkeys(group[0].question.category for group in entry.groups)
    found: dict[str, dict[str, float | int | None]] = {}
    for name in names if list(names) != [""] else []:
        chosen = [place for place, group in enumerate(entry.groups) if group[0].question.category == name]
        timed = [[runs[place] for place in chosen] for runs in entry.timed]
        found[name] = {
            "prompts": sum(len(entry.groups[place]) for place in chosen),
            "acceptance_length": finite(stats_of(timed[0]).acceptance_length),
            "tokens_per_second": finite(_speed(timed)),
        }
    return found


def answer_files(path: Path, subject: Subject, measured: Sequence[Measured], stamp: float) -> dict[Path, str]:
    """The text of each answer file: `path` for one system, a file beside it for each of several.

    FastChat takes a model's name from its file's name, and of each question the last row.

    Args:
        path: what the user named, OUT.jsonl; several systems go to OUT-dynamic-16.jsonl and so on.
        subject: what was measured.
        measured: the systems, all at one batch size.
        stamp: seconds since 1970, for all rows.
    """
    names = [path] if len(measured) == 1 else [path.with_stem(f"{path.stem}-{entry.label}") for entry in measured]
    return {name: "".join(_rows(subject, entry, stamp)) for name, entry in zip(names, measured, strict=True)}


def _rows(subject: Subject, entry: Measured, stamp: float) -> Iterator[str]:
    """JSON lines; `model_id` is the model's name and the mode.

    Of each turn: its text, `idxs` (decode steps), `new_tokens` (all new tokens) and `wall_time` (seconds of the call,
    prefill included; rows decoded together share it), from the first timed repeat.
    """
    turns: dict[int | str, list[tuple[str, int, int, float]]] = {}
    for request, output, run in entry.answers(entry.timed[0]):
        text = str(subject.tokenizer.decode(output, skip_special_tokens=True))
        row = (text, run.stats.forwards, len(output), run.seconds)
        turns.setdefault(request.question.question_id, []).append(row)
    for question_id, rows in turns.items():
        texts, steps, tokens, seconds = (list(column) for column in zip(*rows, strict=True))
        choice = {"index": 0, "turns": texts, "idxs": steps, "new_tokens": tokens, "wall_time": seconds}
        row_of_file = {
            "question_id": question_id,
            "answer_id": uuid.uuid4().hex[:22],
            "model_id": f"{subject.name}-{entry.label}",
            "choices": [choice],
            "tstamp": stamp,
        }
        yield json.dumps(row_of_file, ensure_ascii=False) + "\n"
