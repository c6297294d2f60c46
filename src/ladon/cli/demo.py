"""`ladon demo`: the bundled model, live and measured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from ladon.cli import options
from ladon.cli.bench import fail_unless_identical, make_subject, measure, show
from ladon.cli.output import OutConsole, print_json, progress_bar
from ladon.config import AUTO_BUDGET, BenchOptions, DecoderOptions

if TYPE_CHECKING:
    from rich.console import Console

    from ladon.cli.loading import Loaded

_DEFAULTS = BenchOptions()
_BUDGET = str(DecoderOptions().budget)
_SHOWN_LINES = 6  # of a prompt, before its live completion


def demo(
    prompts: Annotated[
        int, Option("--prompts", metavar="N", min=1, help="How many held-out prompts are measured.")
    ] = 5,
    live: Annotated[
        int, Option("--live", metavar="N", min=0, help="How many of them are completed before your eyes.")
    ] = 2,
    max_new_tokens: options.NewTokensOption = _DEFAULTS.max_new_tokens,
    budget: options.BudgetOption = _BUDGET,
    repeats: Annotated[
        int, Option("--repeats", metavar="N", min=1, help="Timed runs of each prompt and mode.")
    ] = _DEFAULTS.repeats,
    dtype: options.DtypeOption = "auto",
    threads: options.OneThreadOption = 1,
    as_json: options.JsonOption = False,
) -> None:
    """Complete code with the bundled model, live, then compare plain decoding, the chain and every kind of tree.

    The prompts come from modules of the running Python that the model was never trained on.
    Each token has the colour of its origin: drafted at some depth, or the bonus token.
    Nothing is downloaded. The exit code is 1 if a mode wrote something else than transformers in float32.

    For example:

        ladon demo
        ladon demo --prompts 4 --budget 32 --json
    """
    nodes = options.parse_budget(budget)
    plan = BenchOptions(
        budgets=(nodes if isinstance(nodes, int) else AUTO_BUDGET,), max_new_tokens=max_new_tokens, repeats=repeats
    )
    from ladon.bench.workloads import demo_workload
    from ladon.cli.loading import DEMO, load
    from ladon.demo.bundled import demo_fixed_tree

    loaded = load(DEMO, None, dtype=dtype, device="cpu", threads=threads)
    workload = demo_workload(prompts)
    console = OutConsole(highlight=False)
    for question in workload.questions[:live]:
        _complete(console, loaded, question.turns[0], plan)
    with progress_bar() as progress:
        document, findings, title = measure(make_subject(loaded, demo_fixed_tree), workload, plan, progress)
    show(document, findings, title)
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
    from ladon.viz.record import origins
    from ladon.viz.terminal import legend, token_text

    decoder = Decoder(loaded.model, loaded.heads, budget=plan.budgets[0], ngrams="off")
    ids = encode(loaded.tokenizer, prompt)
    pieces = Detokenizer(loaded.tokenizer, ids.tolist())
    console.print(Rule("dynamic tree, live", align="left", style="dim"))
    console.print(Text("\n".join(prompt.splitlines()[-_SHOWN_LINES:]), "dim"), end="", soft_wrap=True)
    steps = 0
    trace = decoder.trace(ids, max_new_tokens=plan.max_new_tokens)
    console.print(Text(pieces.push(trace.first)), end="", soft_wrap=True)
    for step in trace:
        for token, origin in origins(step):
            console.print(token_text(pieces.push(token), origin), end="", soft_wrap=True)
        steps += 1
    console.print()
    if steps:
        console.print(legend(loaded.heads.num_heads if loaded.heads else 0))
        console.print(
            f"{decoder.stats.tokens} tokens in {steps} forwards: {decoder.stats.acceptance_length:.2f} per forward\n"
        )
