"""`ladon distill`: answers written by the model itself, to train heads on."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typer import Exit

from ladon.cli import options
from ladon.cli.options import MACHINE, OUTPUT, WHAT, argument, option, setting
from ladon.cli.output import check_writable, print_json, progress_bar, say
from ladon.config import DistillOptions
from ladon.errors import InputError
from ladon.util.files import finite

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ladon.train.distill.distill import Answer, Answerer, Report, Settings

_DEFAULTS = DistillOptions()
_SOME_FAILED = 1
_LINE_SECONDS = 30.0  # between lines of progress where standard error is no terminal


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """A server that answers instead of a model that is loaded here."""

    endpoint: str | None = option(
        MACHINE,
        None,
        "URL",
        "Let an OpenAI-compatible server answer, such as http://localhost:8000/v1; --model then names the "
        "tokenizer alone.",
    )
    concurrency: int = setting(MACHINE, DistillOptions, "concurrency", "N", min=1)
    api_key_env: str | None = option(MACHINE, None, "NAME", "Environment variable that holds the endpoint's key.")
    endpoint_model: str | None = option(MACHINE, None, "NAME", "The model's name there; that of --model if left out.")

    def key(self, heads: str | None) -> str | None:
        """The endpoint's key, if there is one; `InputError` for options that do not go together."""
        if self.endpoint is None:
            if self.api_key_env is None and not self.endpoint_model:
                return None
            given = "--api-key-env" if self.api_key_env is not None else "--endpoint-model"
            raise InputError(f"{given} is for --endpoint, which is not given; give both or none")
        if heads is not None:
            raise InputError("--heads does nothing with --endpoint, where the server decodes; leave it out")
        if self.api_key_env is None:
            return None
        key = os.environ.get(self.api_key_env, "").strip()
        if not key:
            raise InputError(
                f"--api-key-env names {self.api_key_env}, which is not set; put the key into that variable"
            )
        return key


@options.command(without=("ignore_generation_config", "prune", "accept", "ngrams", "joint"))
def distill(
    *,
    target: options.Target,
    prompts: str = argument("PROMPTS", "A JSONL or Parquet file of prompts or chats, or a data set's hub id."),
    out: Path = option(OUTPUT, ..., "FILE", "JSONL file that the answers are appended to."),
    batch: int = setting(WHAT, DistillOptions, "batch", "N", min=1),
    max_new_tokens: int = setting(WHAT, DistillOptions, "max_new_tokens", "N", min=1),
    drafting: options.Drafting,
    sampling: options.Sampling,
    endpoint: Endpoint,
    system: str | None = option(WHAT, None, "TEXT", "System message of every chat."),
    field: str | None = option(WHAT, None, "NAME", "Field of the prompts, if it is not one of the usual ones."),
    limit: int | None = option(WHAT, None, "N", "Take the first N rows only.", min=1),
    split: str = option(WHAT, "train", "NAME", "Split of a data set from the hub."),
    as_json: bool = options.JSON,
) -> None:
    """Let the model answer prompts, one row of training data each.

    Rows of PROMPTS hold prompt (text to continue), prompt_ids (tokens), or a chat: messages, conversations, turns,
    question or instruction, which goes through the tokenizer's chat template up to its last user message.

    The file only grows. After a kill, the same command goes on where it stopped. Prompts that got no answer are listed
    beside it, in FILE.failed.jsonl, and tried again by the next run; the exit code is 1 if there are any.

    For example:

        ladon distill prompts.jsonl --out answers.jsonl --batch 32
        ladon distill org/chats --split train --limit 50000 --out answers.jsonl --model path/to/model --temperature 0.7
        ladon distill chats.jsonl --out answers.jsonl --model org/name --endpoint http://localhost:8000/v1
    """
    budget, tree = options.parse_budget(drafting.budget), options.parse_tree(drafting.tree)
    check_writable(out)
    key = endpoint.key(target.heads)
    from ladon.train.data.prompts import read_prompts
    from ladon.train.distill.distill import distill as run

    common = {**asdict(sampling), "max_new_tokens": max_new_tokens}
    drafts = {"batch": batch, "tree": tree, "budget": budget}
    answerer, settings, tokenizer = _answerer(target, endpoint, key, common, **drafts)
    asked = read_prompts(prompts, tokenizer, field=field, system=system, limit=limit, split=split)
    with _progress() as progress:
        report = run(
            asked,
            out,
            answerer,
            settings,
            first=lambda answer: _show_sample(answer, tokenizer),
            progress=progress,
            notice=lambda line: say(f"ladon: {line}"),
        )
    document = _document(report, getattr(answerer, "acceptance_length", None))
    for line in _lines(document, out):
        say(line)
    if as_json:
        print_json(document)
    if report.failures:
        raise Exit(_SOME_FAILED)


def _answerer(
    target: options.Target, endpoint: Endpoint, key: str | None, common: dict[str, Any], **drafting: Any
) -> tuple[Answerer, Settings, PreTrainedTokenizerBase]:
    """Who answers, a server or the model here; what all rows have in common; and the tokenizer."""
    from ladon.cli.loading import dtype_name, load, load_tokenizer
    from ladon.train.distill.distill import Settings
    from ladon.train.distill.endpoint import EndpointModel
    from ladon.train.distill.local import LocalModel, ignored_settings, weights_hash

    if endpoint.endpoint is not None:
        settings = Settings(model=endpoint.endpoint_model or target.model, dtype="unknown", **common)
        tokenizer = load_tokenizer(target)
        server = EndpointModel(endpoint.endpoint, tokenizer, concurrency=endpoint.concurrency, api_key=key)
        return server, settings, tokenizer
    loaded = load(target)
    ignored = ignored_settings(loaded.model)
    if ignored:
        say(f"ladon: warning: the generation config asks for {', '.join(ignored)}; answers are written without")
    weights, dtype = weights_hash(loaded.model), dtype_name(loaded.model)
    settings = Settings(model=loaded.name, dtype=dtype, weights=weights, **common)
    return LocalModel(loaded.model, loaded.heads, loaded.tokenizer, **drafting), settings, loaded.tokenizer


def _show_sample(answer: Answer, tokenizer: PreTrainedTokenizerBase) -> None:
    """What is learned of one row and what is not, special tokens included."""
    say(f"--- a sample: prompt, {len(answer.prompt.token_ids)} tokens, read but not learned ---")
    say(tokenizer.decode(answer.prompt.token_ids))
    say(f"--- its answer, {len(answer.token_ids)} tokens, learned; finish: {answer.finish} ---")
    say(tokenizer.decode(answer.token_ids))
    say("--- end of the sample ---")


@contextmanager
def _progress() -> Iterator[Callable[[Report], None]]:
    """A bar on a terminal; elsewhere a line now and then."""
    last = time.monotonic()
    with progress_bar() as bar:

        def show(report: Report) -> None:
            nonlocal last
            speed = f"{report.tokens_per_second:.0f} tokens/s"
            if sys.stderr.isatty():
                bar("answers", report.done, report.total, speed)
            elif time.monotonic() - last >= _LINE_SECONDS:
                last = time.monotonic()
                say(f"ladon: {report.done} of {report.total} rows, {speed}, {report.seconds_left / 60:.0f} min left")

        yield show


def _document(report: Report, acceptance_length: float | None) -> dict[str, Any]:
    counts = {name: getattr(report, name) for name in ("rows", "total", "tokens", "seconds", "tokens_per_second")}
    rest = {"acceptance_length": acceptance_length, "repeated_8grams": finite(report.repetition.share)}
    return counts | rest | {"resumed_rows": report.resumed, "failures": dict(report.failures)}


def _lines(document: dict[str, Any], out: Path) -> list[str]:
    """The same for people."""
    from ladon.train.distill.distill import failed_path

    speed = f"{document['tokens_per_second']:.0f} tokens/s"
    about = f"{document['rows']} rows written to {out}, {document['tokens']} tokens, {speed}"
    if document["resumed_rows"]:
        about += f"; {document['resumed_rows']} rows were there before"
    if document["acceptance_length"] is not None:
        about += f"; acceptance length {document['acceptance_length']:.2f}"
    if document["repeated_8grams"] is not None:
        about += f"; repeated 8-grams {document['repeated_8grams']:.1%}"
    lines = [f"no answer to {count} prompts: {reason}" for reason, count in document["failures"].items()]
    return [about, *lines, f"they are listed in {failed_path(out)}"] if lines else [about]
