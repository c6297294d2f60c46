"""`ladon demo`: the bundled model, live and measured, within three minutes."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ladon.cli import options
from ladon.cli.bench import busy_state, fail_unless_identical, make_subject, measure
from ladon.cli.options import DRAFT, MEASURE, WHAT, option, setting
from ladon.cli.output import OutConsole, print_json, progress_bar, say, show
from ladon.config import AUTO_BUDGET, BenchOptions, DecoderOptions

if TYPE_CHECKING:
    from rich.console import Console

    from ladon.bench.findings import Findings, Progress, Subject
    from ladon.cli.loading import Loaded

_DEFAULTS = BenchOptions()
_SHOWN_LINES = 6  # of a prompt, before its live completion
_SECONDS = 170.0  # for all of it: three minutes, and a little left for what was not foreseen
_LINE_SECONDS = 10.0  # between lines of progress where standard error is no terminal
_TRIAL_SHARE = 4  # the trial writes a quarter of the tokens


@options.command()
def demo(
    prompts: int = option(
        WHAT, 5, "N", "How many held-out prompts are measured: at most, as many as fit in the three minutes.", min=1
    ),
    live: int = option(WHAT, 2, "N", "How many of them are completed before your eyes.", min=0),
    max_new_tokens: int = options.new_tokens(_DEFAULTS.max_new_tokens),
    budget: str = setting(DRAFT, DecoderOptions, "budget", "N"),
    repeats: int = option(MEASURE, _DEFAULTS.repeats, "N", "Timed runs of each prompt and mode.", min=1),
    dtype: str = options.DTYPE,
    threads: int | None = options.ONE_THREAD,
    as_json: bool = options.JSON,
) -> None:
    """Complete code with the bundled model, live, then compare plain decoding, the chain and every kind of tree.

    The prompts come from modules of the running Python that the model was never trained on.
    Each token has the colour of its origin: drafted at some depth, or the bonus token.
    Nothing is downloaded, and all of it takes three minutes at most: a slow machine measures fewer prompts.
    The exit code is 1 if a mode wrote something else than transformers in float32.

    For example:

        ladon demo
        ladon demo --prompts 4 --budget 32 --json
    """
    started, nodes = _clock(), options.parse_budget(budget)
    plan = BenchOptions(
        budgets=(nodes if isinstance(nodes, int) else AUTO_BUDGET,), max_new_tokens=max_new_tokens, repeats=repeats
    )
    say("ladon: [1/4] loading PyTorch, transformers and the bundled model; this takes some seconds")
    from ladon.bench.table import parts, several
    from ladon.bench.workloads import demo_workload
    from ladon.cli.loading import DEMO, load
    from ladon.demo.bundled import demo_fixed_tree

    loaded = load(options.Target(model=DEMO, dtype=dtype, device="cpu", threads=threads))
    texts = [question.turns[0] for question in demo_workload(prompts).questions]
    say(f"ladon: [2/4] completing {several(len(texts[:live]), 'prompt')}, as you watch")
    console = OutConsole(highlight=False)
    for text in texts[:live]:
        _complete(console, loaded, text, plan)
    with progress_bar(_LINE_SECONDS) as progress:
        subject = make_subject(loaded, demo_fixed_tree)
        document, findings = _measure(subject, len(texts), plan, progress, started + _SECONDS)
    show(parts(document, findings))
    if as_json:
        print_json(demo_json(document))
    fail_unless_identical(document)


def demo_json(document: dict[str, Any]) -> dict[str, Any]:
    """The benchmark's document by mode: the demo has one budget and batch size."""
    results = {result["mode"]: result for result in document["results"]}
    kept = ("dtype", "environment", "identity_unchecked", "max_new_tokens", "repeats", "workload")
    rest = {name: document[name] for name in kept}
    return {"modes": results, "transformers": document["transformers"][0], **rest}


def _complete(console: Console, loaded: Loaded, prompt: str, plan: BenchOptions) -> None:
    """Write one completion as it is decoded, every token in the colour of its origin."""
    from rich.rule import Rule
    from rich.text import Text

    from ladon.cli.prompts import encode
    from ladon.decoder.decoder import Decoder
    from ladon.decoder.detokenizer import Detokenizer
    from ladon.viz.terminal import legend, live

    decoder = Decoder(loaded.model, loaded.heads, budget=plan.budgets[0], ngrams="off")
    ids = encode(loaded.tokenizer, prompt)
    trace = decoder.trace(ids, max_new_tokens=plan.max_new_tokens)
    console.print(Rule("dynamic tree, live", align="left", style="dim"))
    console.print(Text("\n".join(prompt.splitlines()[-_SHOWN_LINES:]), "dim"), end="", soft_wrap=True)
    for piece in live(trace, Detokenizer(loaded.tokenizer, ids.tolist())):
        console.print(piece, end="", soft_wrap=True)
    console.print()
    stats = decoder.stats
    if stats.forwards:
        console.print(legend(loaded.heads.num_heads if loaded.heads else 0))
        counts = f"{stats.tokens} tokens in {stats.forwards} forwards: {stats.acceptance_length:.2f} per forward"
        console.print(f"{counts}\n")


def _measure(
    subject: Subject, prompts: int, plan: BenchOptions, progress: Progress, end: float
) -> tuple[dict[str, Any], Findings]:
    """Measure every mode, on as many of the prompts as fit in the time until `end`: a short trial tells.

    Where not even one fits, the trial's own numbers are the result.
    """
    from ladon.bench.table import several
    from ladon.bench.workloads import demo_workload

    before, started = busy_state(), _clock()
    say("ladon: [3/4] trying every mode on a short answer, to see how many prompts fit in three minutes")
    trial = replace(plan, max_new_tokens=-(-plan.max_new_tokens // _TRIAL_SHARE), repeats=1)
    tried = measure(subject, demo_workload(1), trial, progress, before)
    turn, now = turn_seconds(tried[1], plan.max_new_tokens / trial.max_new_tokens), _clock()
    count, repeats = fitting(prompts, plan.repeats, turn, end - now - (now - started))
    if not count:
        say("ladon: [4/4] this machine is slow: what was tried is all that is measured")
        return tried
    what = f"{several(count, 'prompt')} of {prompts}, {several(repeats, 'repeat')}"
    say(f"ladon: [4/4] measuring {what}: about {count * (repeats + 1) * turn:.0f} seconds")
    return measure(subject, demo_workload(count), replace(plan, repeats=repeats), progress, before)


def turn_seconds(findings: Findings, longer: float) -> float:
    """Seconds in which every mode answers one prompt once, if it writes `longer` times what it wrote there."""
    runs = [run for entry in findings.measured for repeat in (*entry.timed, *entry.profiled) for run in repeat]
    return sum(run.seconds + (longer - 1) * run.stats.decode_seconds for run in runs)


def fitting(prompts: int, repeats: int, turn: float, seconds: float) -> tuple[int, int]:
    """How many prompts and repeats of each fit in the time; 0 prompts if none does.

    A prompt costs a turn per repeat, and less than another one for the comparison with transformers. Prompts are left
    out first, repeats only where one prompt is left.
    """
    for fewer in range(repeats, 0, -1):
        count = min(prompts, int(seconds / (turn * (fewer + 1))))
        if count >= 1:
            return count, fewer
    return 0, 0


def _clock() -> float:
    return time.monotonic()
