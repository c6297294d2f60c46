"""`ladon bench`: every mode on the same prompts, in turns."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typer import Exit

from ladon.cli import options
from ladon.cli.options import DRAFT, MEASURE, OUTPUT, WHAT, option, setting
from ladon.cli.output import check_writable, print_json, progress_bar, say, show, write_whole
from ladon.config import MTP, BenchOptions
from ladon.errors import InputError
from ladon.util.files import explained

if TYPE_CHECKING:
    from ladon.bench.findings import Findings, Progress, Subject
    from ladon.bench.runner import TimeLimit
    from ladon.bench.workloads import Workload
    from ladon.cli.loading import Loaded
    from ladon.trees.fixed_tree import FixedTree

_DEFAULTS = BenchOptions()
_DEMO_PROMPTS = 16
_NOT_IDENTICAL = 1  # exit code


@options.command(threads=options.ONE_THREAD)
def bench(
    target: options.Target,
    prompts: Path | None = option(
        WHAT, None, "FILE", "JSONL with `prompt`, or MT-Bench `turns`; held-out code for the bundled model."
    ),
    limit: int | None = options.LIMIT,
    modes: str = setting(DRAFT, BenchOptions, "modes", "NAME,..."),
    budget: str = setting(DRAFT, BenchOptions, "budgets", "N,..."),
    batch: str = setting(MEASURE, BenchOptions, "batches", "N,..."),
    max_new_tokens: int = options.new_tokens(_DEFAULTS.max_new_tokens),
    repeats: int = setting(MEASURE, BenchOptions, "repeats", "N", min=1),
    fixed_tree: Path | None = option(
        DRAFT, None, "FILE", "JSON file of rank paths for mode fixed, instead of calibrating one."
    ),
    calibration: Path | None = option(
        DRAFT,
        None,
        "FILE",
        "JSONL of prompts, all of which the model answers (first turns, --max-new-tokens each) to find the best "
        "fixed tree of each size for its heads. If left out: known for the bundled heads, else the measured "
        "prompts, which flatters the fixed tree.",
    ),
    prune: str = setting(DRAFT, BenchOptions, "prune", "NAME"),
    diagnose: bool = setting(MEASURE, BenchOptions, "diagnose"),
    answers: Path | None = option(
        OUTPUT,
        None,
        "FILE",
        "Write answers as FastChat's MT-Bench rows: to FILE itself if there is one mode at one budget, else each "
        "system's to a file beside it, such as OUT-dynamic-16.jsonl for OUT.jsonl.",
    ),
    output: Path | None = option(OUTPUT, None, "FILE", "Write the JSON document to this file too."),
    plots: Path | None = option(
        OUTPUT,
        None,
        "DIR",
        "Write pictures (PNG) to this folder: speed-up against batch, expected and real tokens per step by size, "
        "step times with their fit.",
    ),
    as_json: bool = options.JSON,
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
        budgets=options.parse_budgets(budget),
        batches=options.parse_counts("--batch", batch),
        max_new_tokens=max_new_tokens,
        repeats=repeats,
        prune=prune,
        diagnose=diagnose,
    )
    check_writable(answers)
    check_writable(output)
    if plots is not None:
        _check_pictures(plots)
    from ladon.bench.table import parts
    from ladon.cli.loading import load

    loaded = load(target)
    if plan.modes == _DEFAULTS.modes:
        plan = replace(plan, modes=_modes(loaded, target.heads, has_tree=fixed_tree is not None))
    workload = workload_of(loaded, prompts, limit)
    with progress_bar() as progress:
        is_bundled = loaded.is_demo and target.heads in (None, "demo")
        trees = tree_source(loaded, workload, fixed_tree, calibration, is_bundled, plan.max_new_tokens, progress)
        subject = make_subject(loaded, trees)
        document, findings = measure(subject, workload, plan, progress)
    show(parts(document, findings))
    if answers is not None:
        _write_answers(answers, subject, findings, plan)
    if output is not None:
        write_whole(output, (json.dumps(document, indent=2, allow_nan=False) + "\n").encode())
    if plots is not None:
        _write_pictures(plots, document)
    if as_json:
        print_json(document)
    fail_unless_identical(document)


def _modes(loaded: Loaded, heads: str | None, *, has_tree: bool) -> tuple[str, ...]:
    """The modes that are measured unless some are named: those that these heads can have."""
    if loaded.heads is None:
        return ("plain", "ngrams")
    if heads == MTP and not has_tree:
        # a fixed tree is found by hit rates, which MTP modules do not have by themselves
        return tuple(mode for mode in _DEFAULTS.modes if mode != "fixed")
    return _DEFAULTS.modes


def tree_source(
    loaded: Loaded,
    workload: Workload,
    fixed_tree: Path | None,
    calibration: Path | None,
    bundled_heads: bool,
    max_new_tokens: int,
    progress: Progress,
) -> Callable[[int], FixedTree]:
    """Where mode fixed gets its tree of a size from: a file, or the best of the size by the heads' hit rates.

    Hit rates are measured on the model's answers to the prompts of `calibration`. Without such a file, those of the
    bundled heads are known; for others they are measured on the prompts of the benchmark itself, and that is said.
    """
    from ladon.bench.runner import calibrate
    from ladon.bench.workloads import read_workload
    from ladon.demo.bundled import demo_fixed_tree
    from ladon.trees.fixed_tree import FixedTree, best_fixed_tree

    if fixed_tree is not None:
        given = FixedTree.load(fixed_tree)
        return lambda size: given
    if calibration is None and bundled_heads:
        return demo_fixed_tree
    other = None if calibration is None else read_workload(calibration)

    @cache
    def rates() -> list[list[float]]:
        assert loaded.heads is not None  # modes that need a tree need heads, which is checked first
        if other is None:
            say("ladon: warning: the fixed tree is calibrated on the measured prompts; --calibration takes others")
        questions = (other or workload).questions
        return calibrate(loaded.model, loaded.heads, loaded.tokenizer, questions, max_new_tokens, progress)

    return lambda size: best_fixed_tree(rates(), size)


def workload_of(loaded: Loaded, prompts: Path | None, limit: int | None) -> Workload:
    """The questions of a file, or held-out code for the bundled model."""
    from ladon.bench.workloads import demo_workload, read_workload

    if prompts is not None:
        return read_workload(prompts, limit)
    if not loaded.is_demo:
        raise InputError("no prompts; give --prompts FILE with a JSON object with `prompt` or `turns` on each line")
    return demo_workload(limit or _DEMO_PROMPTS)


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
    with explained(f"cannot make the folder {folder}", InputError, "give another place"):
        folder.mkdir(parents=True, exist_ok=True)
    check_writable(folder / "speedup.png")


def _write_pictures(folder: Path, document: dict[str, Any]) -> None:
    from ladon.bench.plots import pictures

    files = pictures(document)
    for name, data in files.items():
        write_whole(folder / name, data)
    say(f"ladon: pictures are in {folder}: {', '.join(files)}")


def make_subject(loaded: Loaded, fixed_tree: Callable[[int], FixedTree]) -> Subject:
    """What the runner measures."""
    from ladon.bench.findings import Subject

    known = {name: getattr(loaded, name) for name in ("name", "model", "tokenizer", "heads")}
    return Subject(fixed_tree=fixed_tree, **known)


def measure(
    subject: Subject, workload: Workload, plan: BenchOptions, progress: Progress, limit: TimeLimit | None = None
) -> tuple[dict[str, Any], Findings]:
    """Run a benchmark: its JSON document, and what was found."""
    from ladon.bench.report import document
    from ladon.bench.runner import run_bench
    from ladon.util.machine import environment, is_busy, load

    before = load()
    if is_busy(before):
        say(f"ladon: warning: the machine is busy (load average {before['load_average'][0]}); timings will suffer")
    findings = run_bench(subject, workload, plan, progress, limit)
    place = environment(subject.model.device) | {"load_before": before, "load_after": load()}
    return document(findings, subject, workload, plan, place), findings


def fail_unless_identical(document: dict[str, Any]) -> None:
    """End with exit code 1 if a mode wrote something else than transformers in float32."""
    if any(result["identical"] is False for result in document["results"]):
        raise Exit(_NOT_IDENTICAL)
