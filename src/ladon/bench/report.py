"""From findings to numbers: the JSON document and the table. Terms as `ladon.stats` defines them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from rich.table import Table

from ladon.bench.repetition import Repetition
from ladon.bench.runner import Findings, Measured
from ladon.bench.systems import Run, merged


@dataclass(frozen=True, kw_only=True)
class Result:
    """One mode at one budget and batch size; None stands for what could not be measured.

    Attributes:
        mode: plain, chain, fixed or dynamic.
        batch: rows decoded together.
        budget: nodes verified per step and row, root included.
        prompts: answers given (turns of all questions).
        acceptance_length: tokens per row-step, bonus included.
        acceptance_length_non_repeated: the same over steps that repeat nothing (`ladon.bench.repetition`); batch 1.
        repeated_share: repeated 8-grams over all 8-grams of the outputs.
        tokens_per_second: decode tokens per second of decode time, all rows; median over repeats.
        tokens_per_second_range: least and greatest over repeats.
        step_ms: mean milliseconds of a decode step; median over repeats.
        forward_ms: mean milliseconds of the target's forward in it; profiled pass.
        overhead: share of decode time outside the target's forward; profiled pass.
        growth_share: share of decode time spent growing trees; profiled pass.
        stage_share: share of decode time by stage; profiled pass.
        tree_efficiency: accepted draft nodes per verified draft node.
        first_token_ms: milliseconds from the call to the first token; median over calls.
        speedup_vs_plain: tokens_per_second over plain decoding's.
        speedup_vs_transformers: tokens_per_second over that of transformers' `generate`.
        identical: in float32 every output equals transformers' `generate`, near-ties aside.
        float32_near_ties: float32 outputs that left the reference at a near-tie.
        near_ties: outputs in the timed dtype that left plain decoding of that dtype.
        largest_margin: greatest top-2 margin (logits) at which one of those left it.
        categories: acceptance length, tokens per second and prompts of each category.
    """

    mode: str
    batch: int
    budget: int
    prompts: int
    acceptance_length: float | None
    acceptance_length_non_repeated: float | None
    repeated_share: float | None
    tokens_per_second: float | None
    tokens_per_second_range: list[float | None]
    step_ms: float | None
    forward_ms: float | None
    overhead: float | None
    growth_share: float | None
    stage_share: dict[str, float | None]
    tree_efficiency: float | None
    first_token_ms: float | None
    speedup_vs_plain: float | None
    speedup_vs_transformers: float | None
    identical: bool
    float32_near_ties: int
    near_ties: int
    largest_margin: float | None
    categories: dict[str, dict[str, float | int | None]]


def results(findings: Findings) -> list[Result]:
    """One result per mode, budget and batch size."""
    speeds = {(entry.system, entry.batch): _speed(entry.timed) for entry in findings.measured if entry.system in _BASES}
    return [_result(findings, entry, speeds) for entry in findings.measured if entry.budget is not None]


def baselines(findings: Findings) -> list[dict[str, Any]]:
    """Transformers' `generate` at each batch size: tokens per second and time to the first token."""
    return [
        {
            "batch": entry.batch,
            "tokens_per_second": finite(_speed(entry.timed)),
            "step_ms": finite(median(merged([run.stats for run in runs]).step_ms for runs in entry.timed)),
            "first_token_ms": finite(_first_token_ms(entry.timed)),
        }
        for entry in findings.measured
        if entry.system == "transformers"
    ]


_BASES = ("plain", "transformers")


def _result(findings: Findings, entry: Measured, speeds: dict[tuple[str, int], float]) -> Result:
    assert entry.budget is not None
    key = (entry.system, entry.budget, entry.batch)
    in_float32, differences = findings.float32_differences[key], findings.differences[key]
    counts = merged([run.stats for run in entry.timed[0]])
    profile = merged([run.stats for run in entry.profiled])
    per_repeat = [merged([run.stats for run in runs]) for runs in entry.timed]
    repetition = Repetition()
    for run in entry.profiled:
        if entry.batch == 1:
            repetition.add(run.outputs[0], run.step_counts)
    speed = _speed(entry.timed)
    return Result(
        mode=entry.system,
        batch=entry.batch,
        budget=entry.budget,
        prompts=sum(len(group) for group in entry.groups),
        acceptance_length=finite(counts.acceptance_length),
        acceptance_length_non_repeated=finite(repetition.acceptance_length),
        repeated_share=finite(repetition.share),
        tokens_per_second=finite(speed),
        tokens_per_second_range=[
            finite(choose(stats.tokens_per_second for stats in per_repeat)) for choose in (min, max)
        ],
        step_ms=finite(median(stats.step_ms for stats in per_repeat)),
        forward_ms=finite(profile.forward_ms),
        overhead=finite(profile.overhead),
        growth_share=finite(profile.growth_share),
        stage_share={
            stage: finite(seconds / profile.decode_seconds if profile.decode_seconds else math.nan)
            for stage, seconds in profile.stage_seconds.items()
        },
        tree_efficiency=finite(counts.tree_efficiency),
        first_token_ms=finite(_first_token_ms(entry.timed)),
        speedup_vs_plain=finite(speed / speeds["plain", entry.batch]),
        speedup_vs_transformers=finite(speed / speeds["transformers", entry.batch]),
        identical=all(difference.is_near_tie for difference in in_float32),
        float32_near_ties=sum(difference.is_near_tie for difference in in_float32),
        near_ties=len(differences),
        largest_margin=max((difference.margin for difference in differences), default=None),
        categories=_categories(entry),
    )


def _speed(timed: Sequence[Sequence[Run]]) -> float:
    return median(merged([run.stats for run in runs]).tokens_per_second for runs in timed)


def _first_token_ms(timed: Sequence[Sequence[Run]]) -> float:
    return 1e3 * median(run.stats.prefill_seconds for runs in timed for run in runs)


def _categories(entry: Measured) -> dict[str, dict[str, float | int | None]]:
    names = dict.fromkeys(group[0].question.category for group in entry.groups)
    found: dict[str, dict[str, float | int | None]] = {}
    for name in names if list(names) != [""] else []:
        chosen = [place for place, group in enumerate(entry.groups) if group[0].question.category == name]
        timed = [[runs[place] for place in chosen] for runs in entry.timed]
        found[name] = {
            "prompts": sum(len(entry.groups[place]) for place in chosen),
            "acceptance_length": finite(merged([run.stats for run in timed[0]]).acceptance_length),
            "tokens_per_second": finite(_speed(timed)),
        }
    return found


def finite(value: float) -> float | None:
    """The value, or None where JSON has no number for it."""
    return value if math.isfinite(value) else None


def result_json(result: Result) -> dict[str, Any]:
    """A result as JSON values."""
    return asdict(result)


_COLUMNS = (
    "nodes",
    "tokens\n/step",
    "not re-\npeated",
    "tokens\n/s",
    "vs\nplain",
    "trans-\nformers",
    "step\nms",
    "model\nms",
    "over-\nhead",
)


def table(results: Sequence[Result], baselines: Sequence[dict[str, Any]], batch: int) -> Table:
    """The comparison at one batch size, for people: 78 columns wide, transformers first, the fastest in bold."""
    view = Table(header_style="dim", pad_edge=False, box=None, padding=(0, 1, 0, 0))
    view.add_column("mode" if batch == 1 else f"mode\n(batch {batch})", no_wrap=True)
    for name in _COLUMNS:
        view.add_column(name, justify="right", no_wrap=True)
    view.add_column("iden-\ntical", no_wrap=True)
    chosen = [result for result in results if result.batch == batch]
    base = next(base for base in baselines if base["batch"] == batch)
    plain = next(result for result in chosen if result.mode == "plain")
    ratio = None if plain.speedup_vs_transformers is None else 1 / plain.speedup_vs_transformers
    cells = [
        "1",
        "1.00",
        "",
        _number(base["tokens_per_second"], 1),
        _times(ratio),
        "1.00x",
        _number(base["step_ms"], 2),
    ]
    view.add_row("transformers", *cells, style="dim")
    best = max(chosen, key=lambda result: result.tokens_per_second or 0.0)
    for result in chosen:
        view.add_row(
            result.mode,
            str(result.budget),
            _number(result.acceptance_length, 2),
            _number(result.acceptance_length_non_repeated, 2),
            _number(result.tokens_per_second, 1),
            _times(result.speedup_vs_plain),
            _times(result.speedup_vs_transformers),
            _number(result.step_ms, 2),
            _number(result.forward_ms, 2),
            "" if result.overhead is None else f"{result.overhead:.1%}",
            "yes" if result.identical else "[bold red]NO[/]",
            style="bold" if result is best else "",
        )
    return view


def identity_line(results: Sequence[Result]) -> str:
    """Whether every mode wrote what transformers writes."""
    prompts = results[0].prompts
    if all(result.identical for result in results):
        ties = sum(result.float32_near_ties for result in results)
        aside = f", {ties} near-ties aside" if ties else ""
        return f"identical: yes (each mode against transformers' generate, float32, {prompts} prompts{aside})"
    wrong = ", ".join(f"{result.mode} {result.budget}" for result in results if not result.identical)
    return f"identical: NO ({wrong} left transformers' generate in float32)"


def near_tie_lines(results: Sequence[Result], dtype: str) -> list[str]:
    """One line about outputs that left plain decoding in the timed dtype, if any did."""
    margins = [result.largest_margin for result in results if result.largest_margin is not None]
    if not margins:
        return []
    counts = ", ".join(
        f"{result.mode} {result.budget} {result.near_ties} of {result.prompts}"
        for result in results
        if result.near_ties
    )
    return [
        f"near-ties in {dtype}: {counts} outputs left plain decoding, where the two best logits lay within "
        f"{max(margins):.3f} (rounding differs with the shape of a call)"
    ]


def float32_lines(findings: Findings) -> list[str]:
    """One line per float32 output that left transformers' `generate`."""
    return [
        f"{mode} {budget}, batch {batch}: float32 output {found.prompt} leaves transformers at token {found.position}: "
        f"top-2 margin {found.margin:.1e}, logits differ by {found.deviation or 0.0:.1e} "
        f"({'near-tie' if found.is_near_tie else 'NOT a near-tie'})"
        for (mode, budget, batch), differences in findings.float32_differences.items()
        for found in differences
    ]


def repetition_line(results: Sequence[Result]) -> str:
    """What share of the text repeats itself, and what the middle column of the table is."""
    plain = next(result for result in results if result.mode == "plain")
    if plain.repeated_share is None:
        return "not repeated: needs batch 1 and outputs of 8 tokens or more"
    return (
        f"{plain.repeated_share:.0%} of the 8-grams written occurred before in the same answer; the column `not "
        "repeated` counts only steps without such"
    )


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"
