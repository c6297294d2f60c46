"""`ladon distill`: answers written by the model itself, to train heads on."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Exit, Option

from ladon.cli import options
from ladon.cli.output import check_writable, print_json, progress_bar, say
from ladon.config import DecoderOptions, DistillOptions, help_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ladon.train.distill import Answer, Report

_DEFAULTS, _DRAFTING = DistillOptions(), DecoderOptions()
_SOME_FAILED = 1
_LOG_SECONDS = 30.0  # between lines of progress where standard error is no terminal


def _help(name: str) -> str:
    return f"{help_of(DistillOptions, name).capitalize()}."


_PromptsArgument = Annotated[
    str, Argument(metavar="PROMPTS", help="A JSONL or Parquet file of prompts or chats, or a data set's hub id.")
]
_OutOption = Annotated[Path, Option("--out", metavar="FILE", help="JSONL file that the answers are appended to.")]
_BatchOption = Annotated[int, Option("--batch", metavar="N", min=1, help=_help("batch"))]
_NewTokensOption = Annotated[int, Option("--max-new-tokens", metavar="N", min=1, help=_help("max_new_tokens"))]
_SystemOption = Annotated[str | None, Option("--system", metavar="TEXT", help="System message of every chat.")]
_FieldOption = Annotated[
    str | None, Option("--field", metavar="NAME", help="Field of the prompts, if it is not one of the usual ones.")
]
_LimitOption = Annotated[int | None, Option("--limit", metavar="N", min=1, help="Take the first N rows only.")]
_SplitOption = Annotated[str, Option("--split", metavar="NAME", help="Split of a data set from the hub.")]


def distill(
    prompts: _PromptsArgument,
    out: _OutOption,
    model: options.ModelOption = "demo",
    heads: options.HeadsOption = None,
    batch: _BatchOption = _DEFAULTS.batch,
    max_new_tokens: _NewTokensOption = _DEFAULTS.max_new_tokens,
    system: _SystemOption = None,
    field: _FieldOption = None,
    limit: _LimitOption = None,
    split: _SplitOption = "train",
    tree: options.TreeOption = _DRAFTING.tree,
    budget: options.BudgetOption = str(_DRAFTING.budget),
    dtype: options.DtypeOption = "auto",
    device: options.DeviceOption = "auto",
    threads: options.ThreadsOption = None,
    trust_remote_code: options.TrustOption = False,
    as_json: options.JsonOption = False,
) -> None:
    """Let the model answer prompts, one row of training data each.

    The file only grows. After a kill, the same command goes on where it stopped.

    For example:

        ladon distill prompts.jsonl --out answers.jsonl --batch 32
    """
    nodes, shape = options.parse_budget(budget), options.parse_tree(tree)
    check_writable(out)
    from ladon.capability import context_limit
    from ladon.cli.loading import dtype_name, load
    from ladon.generation import Decoder
    from ladon.train.distill import Settings
    from ladon.train.distill import distill as run
    from ladon.train.local import LocalModel
    from ladon.train.prompts import read_prompts

    loaded = load(model, heads, dtype=dtype, device=device, threads=threads, trust_remote_code=trust_remote_code)
    asked = read_prompts(prompts, loaded.tokenizer, field=field, system=system, limit=limit, split=split)
    decoder = Decoder(loaded.model, loaded.heads, tree=shape, budget=nodes)
    answerer = LocalModel(decoder, loaded.tokenizer, batch, context_limit(loaded.model.config.get_text_config()))
    settings = Settings(model=loaded.name, dtype=dtype_name(loaded.model), max_new_tokens=max_new_tokens)
    with _progress() as progress:
        report = run(
            asked,
            out,
            answerer,
            settings,
            first=lambda answer: _show_sample(answer, loaded.tokenizer),
            progress=progress,
            notice=lambda line: say(f"ladon: {line}"),
        )
    acceptance = None if loaded.heads is None or not answerer.row_steps else answerer.tokens / answerer.row_steps
    document = _document(report, acceptance)
    for line in _lines(document):
        say(line)
    if as_json:
        print_json(document)
    if report.failures:
        raise Exit(_SOME_FAILED)


def _show_sample(answer: Answer, tokenizer: PreTrainedTokenizerBase) -> None:
    """What is learned of one row and what is not, special tokens included."""
    say("--- prompt: read, not learned ---")
    say(tokenizer.decode(answer.prompt.token_ids))
    say(f"--- answer: learned ({len(answer.token_ids)} tokens, finish: {answer.finish}) ---")
    say(tokenizer.decode(answer.token_ids))
    say("---")


@contextmanager
def _progress() -> Iterator[Callable[[Report], None]]:
    """A bar on a terminal; elsewhere a line now and then."""
    last = time.monotonic()
    with progress_bar() as bar:

        def show(report: Report) -> None:
            nonlocal last
            done = report.resumed + report.rows + report.failures.total()
            if sys.stderr.isatty():
                bar("answers", done, report.total)
            elif time.monotonic() - last >= _LOG_SECONDS:
                last = time.monotonic()
                left = (report.total - done) * report.seconds / max(1, done - report.resumed)
                say(f"{done} of {report.total} rows, {report.tokens_per_second:.0f} tokens/s, {left / 60:.0f} min left")

        yield show


def _document(report: Report, acceptance_length: float | None) -> dict[str, Any]:
    from ladon.bench.report import finite

    return {
        "rows": report.rows,
        "resumed_rows": report.resumed,
        "total": report.total,
        "tokens": report.tokens,
        "seconds": report.seconds,
        "tokens_per_second": report.tokens_per_second,
        "acceptance_length": acceptance_length,
        "repeated_8grams": finite(report.repetition.share),
        "failures": dict(report.failures),
    }


def _lines(document: dict[str, Any]) -> list[str]:
    """The same for people."""
    about = (
        f"{document['rows']} rows written, {document['tokens']} tokens, {document['tokens_per_second']:.0f} tokens/s"
    )
    if document["resumed_rows"]:
        about += f" ({document['resumed_rows']} rows were there before)"
    if document["acceptance_length"] is not None:
        about += f"; acceptance length {document['acceptance_length']:.2f}"
    if document["repeated_8grams"] is not None:
        about += f"; repeated 8-grams {document['repeated_8grams']:.1%}"
    return [about, *(f"failed: {count} x {reason}" for reason, count in document["failures"].items())]
