"""`ladon bench`: every mode on the same prompts, in turns."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from ladon.cli import options
from ladon.cli.output import OutConsole, check_writable, print_json, progress_bar, say, write_whole
from ladon.config import BenchOptions, help_of
from ladon.errors import InputError

if TYPE_CHECKING:
    from ladon.bench.runner import Findings, Progress, Subject
    from ladon.bench.workloads import Workload
    from ladon.cli.loading import Loaded
    from ladon.fixed_tree import FixedTree

_DEFAULTS = BenchOptions()
_DEMO_PROMPTS = 16
_CALIBRATION_PROMPTS = 24


def bench(
    model: options.ModelOption = "demo",
    heads: options.HeadsOption = None,
    prompts: Annotated[
        Path | None,
        Option(
            "--prompts",
            metavar="FILE",
            help="JSONL with `prompt`, or MT-Bench `turns`; held-out code for the bundled model.",
        ),
    ] = None,
    limit: Annotated[
        int | None, Option("--limit", metavar="N", min=1, help="Use only the first so many prompts.")
    ] = None,
    modes: Annotated[
        str, Option("--modes", metavar="NAME,...", help=f"{help_of(BenchOptions, 'modes').capitalize()}.")
    ] = options.joined(_DEFAULTS.modes),
    budget: Annotated[
        str, Option("--budget", metavar="N,...", help=f"{help_of(BenchOptions, 'budgets').capitalize()}.")
    ] = options.joined(_DEFAULTS.budgets),
    batch: Annotated[
        str, Option("--batch", metavar="N,...", help=f"{help_of(BenchOptions, 'batches').capitalize()}.")
    ] = options.joined(_DEFAULTS.batches),
    max_new_tokens: options.NewTokensOption = _DEFAULTS.max_new_tokens,
    repeats: Annotated[
        int, Option("--repeats", metavar="N", min=1, help=f"{help_of(BenchOptions, 'repeats').capitalize()}.")
    ] = _DEFAULTS.repeats,
    fixed_tree: Annotated[
        Path | None,
        Option(
            "--fixed-tree", metavar="FILE", help="JSON file of rank paths for mode fixed, instead of calibrating one."
        ),
    ] = None,
    calibration: Annotated[
        Path | None,
        Option("--calibration", metavar="FILE", help="JSONL of other prompts, on which the fixed tree is calibrated."),
    ] = None,
    answers: Annotated[
        Path | None, Option("--answers", metavar="FILE", help="Write answers as FastChat's MT-Bench rows.")
    ] = None,
    output: Annotated[
        Path | None, Option("--output", metavar="FILE", help="Write the JSON document to this file too.")
    ] = None,
    dtype: options.DtypeOption = "auto",
    device: options.DeviceOption = "auto",
    threads: options.OneThreadOption = 1,
    trust_remote_code: options.TrustOption = False,
    as_json: options.JsonOption = False,
) -> None:
    """Measure plain, chain, fixed-tree and dynamic-tree decoding against each other and against transformers.

    Modes take turns, prompt by prompt; medians are reported, and prefill is not counted.
    Every output is compared with plain decoding and, in float32, with transformers' generate.

    For example:

        ladon bench --budget 8,16,32
        ladon bench --model path/to/model --heads path/to/heads --prompts prompts.jsonl --json
    """
    plan = BenchOptions(
        modes=options.parse_modes(modes),
        budgets=options.parse_budgets(budget),
        batches=options.parse_counts("--batch", batch),
        max_new_tokens=max_new_tokens,
        repeats=repeats,
    )
    check_writable(answers)
    check_writable(output)
    from ladon.cli.loading import load

    loaded = load(model, heads, dtype=dtype, device=device, threads=threads, trust_remote_code=trust_remote_code)
    workload = _workload(loaded, prompts, limit)
    with progress_bar() as progress:
        trees = tree_source(loaded, workload, fixed_tree, calibration, plan.max_new_tokens, progress)
        subject = make_subject(loaded, trees)
        document, findings, title = measure(subject, workload, plan, progress)
    show(document, findings, title)
    if answers is not None:
        from ladon.bench.answers import answer_rows

        first = [entry for entry in findings.measured if entry.batch == plan.batches[0]]
        write_whole(answers, "".join(f"{row}\n" for row in answer_rows(subject, first, time.time())).encode())
    if output is not None:
        import json

        write_whole(output, (json.dumps(document, indent=2, allow_nan=False) + "\n").encode())
    if as_json:
        print_json(document)


def make_subject(loaded: Loaded, fixed_tree: Callable[[int], FixedTree]) -> Subject:
    """What the runner measures."""
    from ladon.bench.runner import Subject

    return Subject(
        name=loaded.name, model=loaded.model, tokenizer=loaded.tokenizer, heads=loaded.heads, fixed_tree=fixed_tree
    )


def measure(
    subject: Subject, workload: Workload, plan: BenchOptions, progress: Progress
) -> tuple[dict[str, Any], Findings, str]:
    """Run a benchmark; the JSON document, the findings, and a line that says what was measured where."""
    from ladon.bench.environment import environment, is_busy, load
    from ladon.bench.report import baselines, result_json, results
    from ladon.bench.runner import run_bench
    from ladon.cli.loading import dtype_name

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
        "workload": {"name": workload.name, "sha256": workload.sha256, "questions": len(workload.questions)},
        "max_new_tokens": plan.max_new_tokens,
        "repeats": plan.repeats,
        "transformers": baselines(findings),
        "results": [result_json(result) for result in results(findings)],
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
    from ladon.bench.report import float32_lines, identity_line, near_tie_lines, repetition_line, results, table

    found = results(findings)
    console = OutConsole(highlight=False)
    console.print(title, style="bold")
    for batch in dict.fromkeys(result.batch for result in found):
        console.print(table(found, document["transformers"], batch))
    console.print(identity_line(found), style="bold", markup=False)
    for line in [repetition_line(found), *near_tie_lines(found, document["dtype"]), *float32_lines(findings)]:
        console.print(line, style="dim", markup=False)


def tree_source(
    loaded: Loaded,
    workload: Workload,
    fixed_tree: Path | None,
    calibration: Path | None,
    max_new_tokens: int,
    progress: Progress,
) -> Callable[[int], FixedTree]:
    """Where mode fixed gets its tree of a size from: a file, the bundled model's own trees, or calibration.

    Calibration measures hit rates on the model's answers to the prompts of `calibration`. Without such a file those
    are the bundled model's calibration split or, for other models, the measured prompts themselves; that flatters the
    fixed tree, and is said.
    """
    from ladon.bench.calibration import calibrate
    from ladon.bench.workloads import Question, make_workload, read_workload
    from ladon.bundled import demo_fixed_tree, demo_prompts
    from ladon.fixed_tree import FixedTree, best_fixed_tree

    given = None if fixed_tree is None else FixedTree.load(fixed_tree)
    other = None if calibration is None else read_workload(calibration, _CALIBRATION_PROMPTS)

    @cache
    def rates() -> list[list[float]]:
        assert loaded.heads is not None  # modes that need a tree need heads, which is checked first
        chosen = other
        if chosen is None and loaded.is_demo:
            texts = demo_prompts(_CALIBRATION_PROMPTS, "calibration")
            chosen = make_workload("calibration split", [Question.to_continue(text, n) for n, text in enumerate(texts)])
        if chosen is None:
            say("ladon: warning: the fixed tree is calibrated on the measured prompts; --calibration takes others")
            chosen = workload
        questions = chosen.questions[:_CALIBRATION_PROMPTS]
        return calibrate(loaded.model, loaded.heads, loaded.tokenizer, questions, max_new_tokens, progress)

    def tree_of(size: int) -> FixedTree:
        if given is not None:
            return given
        if loaded.is_demo and other is None:
            with suppress(InputError):  # a size that does not come with the model
                return demo_fixed_tree(size)
        return best_fixed_tree(rates(), size)

    return tree_of


def _workload(loaded: Loaded, prompts: Path | None, limit: int | None) -> Workload:
    from ladon.bench.workloads import read_workload

    if prompts is not None:
        return read_workload(prompts, limit)
    if not loaded.is_demo:
        raise InputError("no prompts; give --prompts FILE with a JSON object with `prompt` or `turns` on each line")
    return demo_workload(limit or _DEMO_PROMPTS)


def demo_workload(count: int) -> Workload:
    """Held-out code to complete, for the bundled model."""
    from ladon.bench.workloads import Question, make_workload
    from ladon.bundled import demo_prompts

    questions = [Question.to_continue(text, number) for number, text in enumerate(demo_prompts(count), start=1)]
    return make_workload("held-out standard library modules", questions)
