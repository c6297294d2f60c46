"""`ladon demo`: the bundled model, live and measured, within three minutes."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ladon.cli import options
from ladon.cli.bench import fail_unless_identical, make_subject, measure
from ladon.cli.options import DRAFT, MEASURE, WHAT, option, setting
from ladon.cli.output import OutConsole, print_json, progress_bar, say, show
from ladon.config import AUTO_BUDGET, BenchOptions, DecoderOptions

if TYPE_CHECKING:
    from ladon.cli.loading import Loaded

_DEFAULTS = BenchOptions()
_SHOWN_LINES = 6  # of a prompt, before its live completion
_SECONDS = 165.0  # for all of it: three minutes, and a little left for what was not foreseen
_LINE_SECONDS = 10.0  # between lines of progress where standard error is no terminal
_SLOWER = 1.5  # how many times a live completion a run may take: plain decoding takes more steps
_LEAST_TOKENS = 8


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
    from ladon.bench.runner import TimeLimit
    from ladon.bench.table import parts, several
    from ladon.bench.workloads import demo_workload
    from ladon.cli.loading import DEMO, load
    from ladon.demo.bundled import demo_fixed_tree

    loaded = load(options.Target(model=DEMO, dtype=dtype, device="cpu", threads=threads))
    workload = demo_workload(prompts)
    texts = [question.turns[0] for question in workload.questions]
    say(f"ladon: [2/4] completing {several(len(texts[:live]), 'prompt')}, as you watch")
    begun = _clock()
    for text in texts[:live]:
        _complete(loaded, text, plan)
    limit = TimeLimit(started + _SECONDS, _clock)
    if live:
        each = (_clock() - begun) / len(texts[:live])
        tokens = affordable_tokens(max_new_tokens, len(texts), each, limit.end - _clock())
        plan = replace(plan, max_new_tokens=tokens)
    say(f"ladon: [3/4] measuring every mode on {several(len(texts), 'prompt')}, or as many as fit in three minutes")
    with progress_bar(_LINE_SECONDS) as progress:
        subject = make_subject(loaded, demo_fixed_tree)
        document, findings = measure(subject, workload, plan, progress, limit)
    done = f"{len(findings.requests)} of {several(len(texts), 'prompt')}, {document['repeats']} of {repeats} repeats"
    say(f"ladon: [4/4] done after {_clock() - started:.0f} seconds: {done}, up to {plan.max_new_tokens} tokens each")
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


def _complete(loaded: Loaded, prompt: str, plan: BenchOptions) -> None:
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
    console = OutConsole(highlight=False)
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


def affordable_tokens(wanted: int, prompts: int, completion: float, seconds: float) -> int:
    """How long answers may be, so that one prompt can be measured once within the time.

    Every prompt is answered once to begin with; then each mode answers one, timed and profiled, and once more in
    float32.

    Args:
        wanted: tokens of an answer.
        prompts: how many there are.
        completion: seconds that one of the live completions took.
        seconds: what is left.
    """
    needed = completion * _SLOWER * (prompts + 3 * len(_DEFAULTS.modes) + 3)
    return wanted if needed <= seconds else max(_LEAST_TOKENS, int(wanted * seconds / needed))


def _clock() -> float:
    return time.monotonic()
