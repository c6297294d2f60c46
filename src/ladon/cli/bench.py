"""`ladon bench`: every mode on the same prompts, in turns."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Exit, Option

from ladon.cli import options
from ladon.cli.output import OutConsole, check_writable, print_json, progress_bar, say, write_whole
from ladon.config import MTP, BenchOptions, help_of
from ladon.errors import InputError

if TYPE_CHECKING:
    from ladon.bench.findings import Findings, Progress, Subject
    from ladon.bench.workloads import Workload
    from ladon.cli.loading import Loaded
    from ladon.trees.fixed_tree import FixedTree

_DEFAULTS = BenchOptions()
_MODES, _BUDGETS, _BATCHES = map(options.joined, (_DEFAULTS.modes, _DEFAULTS.budgets, _DEFAULTS.batches))
_NOT_IDENTICAL = 1  # exit code

_PromptsOption = Annotated[
    Path | None,
    Option(
        "--prompts",
        metavar="FILE",
        help="JSONL with `prompt`, or MT-Bench `turns`; held-out code for the bundled model.",
    ),
]
_LimitOption = Annotated[int | None, Option("--limit", metavar="N", min=1, help="Use only the first so many prompts.")]
_ModesOption = Annotated[
    str, Option("--modes", metavar="NAME,...", help=f"{help_of(BenchOptions, 'modes').capitalize()}.")
]
_BudgetsOption = Annotated[
    str, Option("--budget", metavar="N,...", help=f"{help_of(BenchOptions, 'budgets').capitalize()}.")
]
_BatchesOption = Annotated[
    str, Option("--batch", metavar="N,...", help=f"{help_of(BenchOptions, 'batches').capitalize()}.")
]
_RepeatsOption = Annotated[
    int, Option("--repeats", metavar="N", min=1, help=f"{help_of(BenchOptions, 'repeats').capitalize()}.")
]
_FixedTreeOption = Annotated[
    Path | None,
    Option("--fixed-tree", metavar="FILE", help="JSON file of rank paths for mode fixed, instead of calibrating one."),
]
_CalibrationOption = Annotated[
    Path | None,
    Option(
        "--calibration",
        metavar="FILE",
        help="JSONL of prompts, all of which the model answers (first turns, --max-new-tokens each) to find the "
        "best fixed tree of each size for its heads. If left out: known for the bundled heads, else the measured "
        "prompts, which flatters the fixed tree.",
    ),
]
_PruneOption = Annotated[str, Option("--prune", metavar="NAME", help=f"{help_of(BenchOptions, 'prune').capitalize()}.")]
_DiagnoseOption = Annotated[
    bool, Option("--diagnose/--no-diagnose", help=f"{help_of(BenchOptions, 'diagnose').capitalize()}.")
]
_AnswersOption = Annotated[
    Path | None,
    Option(
        "--answers",
        metavar="FILE",
        help="Write answers as FastChat's MT-Bench rows: to FILE itself if there is one mode at one budget, else "
        "each system's to a file beside it, such as OUT-dynamic-16.jsonl for OUT.jsonl.",
    ),
]
_PlotsOption = Annotated[
    Path | None,
    Option(
        "--plots",
        metavar="DIR",
        help="Write pictures (PNG) to this folder: speed-up against batch, expected and real tokens per step by size, "
        "step times with their fit.",
    ),
]
_OutputOption = Annotated[
    Path | None, Option("--output", metavar="FILE", help="Write the JSON document to this file too.")
]


def bench(
    model: options.ModelOption = "demo",
    heads: options.HeadsOption = None,
    prompts: _PromptsOption = None,
    limit: _LimitOption = None,
    modes: _ModesOption = _MODES,
    budget: _BudgetsOption = _BUDGETS,
    batch: _BatchesOption = _BATCHES,
    max_new_tokens: options.NewTokensOption = _DEFAULTS.max_new_tokens,
    repeats: _RepeatsOption = _DEFAULTS.repeats,
    fixed_tree: _FixedTreeOption = None,
    calibration: _CalibrationOption = None,
    prune: _PruneOption = _DEFAULTS.prune,
    diagnose: _DiagnoseOption = _DEFAULTS.diagnose,
    answers: _AnswersOption = None,
    output: _OutputOption = None,
    plots: _PlotsOption = None,
    dtype: options.DtypeOption = "auto",
    device: options.DeviceOption = "auto",
    threads: options.OneThreadOption = 1,
    trust_remote_code: options.TrustOption = False,
    ignore_generation_config: options.IgnoreConfigOption = False,
    as_json: options.JsonOption = False,
) -> None:
    """Measure plain, chain, fixed-tree and dynamic-tree decoding against each other and against transformers.

    Modes take turns, prompt by prompt; medians are reported, and prefill is not counted.
    Every output is compared with plain decoding and, in float32, with transformers' generate.
    The exit code is 1 if one differs there.

    For example:

        ladon bench --budget 8,16,32
        ladon bench --model path/to/model --heads path/to/heads --prompts prompts.jsonl --json
    """
    plan = BenchOptions(
        modes=options.parse_modes(modes),
        budgets=tuple(dict.fromkeys(options.parse_budgets(budget))),
        batches=tuple(dict.fromkeys(options.parse_counts("--batch", batch))),
        max_new_tokens=max_new_tokens,
        repeats=repeats,
        prune=prune,
        diagnose=diagnose,
    )
    check_writable(answers)
    check_writable(output)
    if plots is not None:
        _check_pictures(plots)
    from ladon.cli.bench_inputs import tree_source, workload_of
    from ladon.cli.loading import DEMO, load

    loaded = load(
        model,
        heads,
        dtype=dtype,
        device=device,
        threads=threads,
        trust_remote_code=trust_remote_code,
        ignore_generation_config=ignore_generation_config,
    )
    if loaded.heads is None and modes == _MODES:
        plan = replace(plan, modes=("plain", "ngrams"))  # all that there is without heads
    elif heads == MTP and modes == _MODES and fixed_tree is None:
        # a fixed tree is found by hit rates, which MTP modules do not have by themselves
        plan = replace(plan, modes=tuple(mode for mode in plan.modes if mode != "fixed"))
    workload = workload_of(loaded, prompts, limit)
    bundled_heads = loaded.is_demo and heads in (None, DEMO)
    with progress_bar() as progress:
        trees = tree_source(loaded, workload, fixed_tree, calibration, bundled_heads, plan.max_new_tokens, progress)
        subject = make_subject(loaded, trees)
        document, findings, title = measure(subject, workload, plan, progress)
    show(document, findings, title)
    if answers is not None:
        _write_answers(answers, subject, findings, plan)
    if output is not None:
        import json

        write_whole(output, (json.dumps(document, indent=2, allow_nan=False) + "\n").encode())
    if plots is not None:
        _write_pictures(plots, document)
    if as_json:
        print_json(document)
    fail_unless_identical(document)


def _write_answers(path: Path, subject: Subject, findings: Findings, plan: BenchOptions) -> None:
    """One mode's answers to `path`, or those of all systems to files beside it; of the first batch size."""
    from ladon.bench.report import answer_files

    everyone = [entry for entry in findings.measured if entry.batch == plan.batches[0]]
    asked = [entry for entry in everyone if entry.system in plan.modes]
    files = answer_files(path, subject, asked if len(asked) == 1 else everyone, time.time())
    for file, text in files.items():
        write_whole(file, text.encode())
    say(f"ladon: answers are in {', '.join(map(str, files))}")


def _check_pictures(folder: Path) -> None:
    """Raise `InputError` if pictures cannot be made, or not be written to the folder, which is made."""
    from ladon.viz.png import check_available

    check_available()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {folder}: {error.strerror}; give another place") from error
    check_writable(folder / "speedup.png")


def _write_pictures(folder: Path, document: dict[str, Any]) -> None:
    from ladon.bench.plots import pictures

    files = pictures(document)
    for name, data in files.items():
        write_whole(folder / name, data)
    say(f"ladon: pictures are in {folder}: {', '.join(files)}")


def fail_unless_identical(document: dict[str, Any]) -> None:
    """End with exit code 1 if a mode wrote something else than transformers in float32."""
    if any(result["identical"] is False for result in document["results"]):
        raise Exit(_NOT_IDENTICAL)


def make_subject(loaded: Loaded, fixed_tree: Callable[[int], FixedTree]) -> Subject:
    """What the runner measures."""
    from ladon.bench.findings import Subject

    return Subject(
        name=loaded.name, model=loaded.model, tokenizer=loaded.tokenizer, heads=loaded.heads, fixed_tree=fixed_tree
    )


def measure(
    subject: Subject, workload: Workload, plan: BenchOptions, progress: Progress
) -> tuple[dict[str, Any], Findings, str]:
    """Run a benchmark; the JSON document, the findings, and a line that says what was measured where."""
    from dataclasses import asdict

    from ladon.bench.report import baselines, results
    from ladon.bench.runner import run_bench
    from ladon.cli.loading import dtype_name
    from ladon.util.machine import environment, is_busy, load

    before = load()
    if is_busy(before):
        say(f"ladon: warning: the machine is busy (load average {before['load_average'][0]}); timings will suffer")
    findings = run_bench(subject, workload, plan, progress)
    place = environment(subject.model.device)
    dtype = dtype_name(subject.model)
    document = {
        "environment": place | {"load_before": before, "load_after": load()},
        "model": subject.name,
        "dtype": dtype,
        "heads": None if subject.heads is None else {"family": subject.heads.family, "num": subject.heads.num_heads},
        "workload": workload.summary(),
        "max_new_tokens": plan.max_new_tokens,
        "repeats": plan.repeats,
        "transformers": baselines(findings),
        "identity_unchecked": findings.unchecked,
        "results": [asdict(result) for result in results(findings)],
    }
    prompts, repeats = _several(len(findings.requests), "prompt"), _several(plan.repeats, "repeat")
    title = (
        f"{subject.name} · {dtype} · {prompts} of {workload.name} · up to {plan.max_new_tokens} tokens · {repeats} · "
        f"{_several(place['threads'], 'thread')} · {place['cpu']}"
    )
    return document, findings, title


def _several(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def show(document: dict[str, Any], findings: Findings, title: str) -> None:
    """The table and what has to be said about it, on standard output."""
    from ladon.bench import table as lines
    from ladon.bench.report import results

    found = results(findings)
    console = OutConsole(highlight=False)
    console.print(title, style="bold")
    for batch in dict.fromkeys(result.batch for result in found):
        console.print(lines.table(found, document["transformers"], batch))
    if findings.diagnoses:
        console.print(lines.diagnosis_table(found))
    console.print(lines.identity_line(found, findings.unchecked), style="bold", markup=False)
    notes = [*lines.diagnosis_lines(found), lines.repetition_line(found), lines.profile_line(found)]
    notes += lines.size_lines(found)
    notes += [*lines.filling_lines(found), *lines.difference_lines(findings, document["dtype"])]
    for note in notes:
        console.print(note, style="dim", markup=False)
