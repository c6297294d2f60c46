"""`ladon distill`: answers written by the model itself, to train heads on."""

from __future__ import annotations

import os
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
from ladon.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ladon.cli.loading import Loaded
    from ladon.train.distill.distill import Answer, Report

_DEFAULTS, _DRAFTING = DistillOptions(), DecoderOptions()
_SOME_FAILED = 1
_LINE_SECONDS = 30.0  # between lines of progress where standard error is no terminal
# What a checkpoint's generation config may ask for that changes which tokens come; answers are written without it.
_NOT_APPLIED = (
    "repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens",
    "forced_bos_token_id", "forced_eos_token_id", "min_p", "typical_p", "sequence_bias",
)  # fmt: skip
_NEUTRAL = (None, 0, 1, 1.0)


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
_EndpointOption = Annotated[
    str | None,
    Option(
        "--endpoint",
        metavar="URL",
        help="Let an OpenAI-compatible server answer, such as http://localhost:8000/v1; --model then names the "
        "tokenizer alone.",
    ),
]
_ConcurrencyOption = Annotated[int, Option("--concurrency", metavar="N", min=1, help=_help("concurrency"))]
_KeyOption = Annotated[
    str | None, Option("--api-key-env", metavar="NAME", help="Environment variable that holds the endpoint's key.")
]
_EndpointModelOption = Annotated[
    str | None, Option("--endpoint-model", metavar="NAME", help="The model's name there; that of --model if left out.")
]


def distill(
    prompts: _PromptsArgument,
    out: _OutOption,
    model: options.ModelOption = "demo",
    heads: options.HeadsOption = None,
    batch: _BatchOption = _DEFAULTS.batch,
    max_new_tokens: _NewTokensOption = _DEFAULTS.max_new_tokens,
    temperature: options.TemperatureOption = _DEFAULTS.temperature,
    top_p: options.TopPOption = _DEFAULTS.top_p,
    top_k: options.TopKOption = _DEFAULTS.top_k,
    seed: options.SeedOption = _DEFAULTS.seed,
    system: _SystemOption = None,
    field: _FieldOption = None,
    limit: _LimitOption = None,
    split: _SplitOption = "train",
    endpoint: _EndpointOption = None,
    concurrency: _ConcurrencyOption = _DEFAULTS.concurrency,
    api_key_env: _KeyOption = None,
    endpoint_model: _EndpointModelOption = None,
    tree: options.TreeOption = _DRAFTING.tree,
    budget: options.BudgetOption = str(_DRAFTING.budget),
    dtype: options.DtypeOption = "auto",
    device: options.DeviceOption = "auto",
    threads: options.ThreadsOption = None,
    trust_remote_code: options.TrustOption = False,
    as_json: options.JsonOption = False,
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
    nodes, shape = options.parse_budget(budget), options.parse_tree(tree)
    key = _checked(endpoint, api_key_env, endpoint_model, heads, out)
    from ladon.cli.loading import dtype_name, load, load_tokenizer
    from ladon.train.data.prompts import read_prompts
    from ladon.train.distill.distill import Answerer, Settings
    from ladon.train.distill.distill import distill as run
    from ladon.train.distill.endpoint import EndpointModel
    from ladon.train.distill.local import LocalModel, weights_hash

    law: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed}
    law["max_new_tokens"] = max_new_tokens
    local: LocalModel | None = None
    if endpoint is not None:
        settings = Settings(model=endpoint_model or model, dtype="unknown", **law)
        tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
        answerer: Answerer = EndpointModel(endpoint, tokenizer, concurrency=concurrency, api_key=key)
    else:
        loaded = load(model, heads, dtype=dtype, device=device, threads=threads, trust_remote_code=trust_remote_code)
        _warn_of_generation_config(loaded)
        tokenizer, weights = loaded.tokenizer, weights_hash(loaded.model)
        settings = Settings(model=loaded.name, dtype=dtype_name(loaded.model), weights=weights, **law)
        answerer = local = LocalModel(loaded.model, loaded.heads, tokenizer, batch=batch, tree=shape, budget=nodes)
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
    document = _document(report, None if local is None else local.acceptance_length)
    for line in _lines(document, out):
        say(line)
    if as_json:
        print_json(document)
    if report.failures:
        raise Exit(_SOME_FAILED)


def _checked(
    endpoint: str | None, api_key_env: str | None, endpoint_model: str | None, heads: str | None, out: Path
) -> str | None:
    """The endpoint's key, if there is one; `InputError` for options that do not go together."""
    check_writable(out)
    if endpoint is None:
        given = "--api-key-env" if api_key_env is not None else "--endpoint-model" if endpoint_model else None
        if given is not None:
            raise InputError(f"{given} is for --endpoint, which is not given; give both or none")
        return None
    if heads is not None:
        raise InputError("--heads does nothing with --endpoint, where the server decodes; leave it out")
    if api_key_env is None:
        return None
    key = os.environ.get(api_key_env, "").strip()
    if not key:
        raise InputError(f"--api-key-env names {api_key_env}, which is not set; put the key into that variable")
    return key


def _warn_of_generation_config(loaded: Loaded) -> None:
    """Say what the checkpoint asks for and does not get: the answers are the model's own law, as heads learn it."""
    config = loaded.model.generation_config
    asked = [name for name in _NOT_APPLIED if getattr(config, name, None) not in _NEUTRAL]
    if asked:
        say(f"ladon: warning: the generation config asks for {', '.join(asked)}; answers are written without")


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
    failures = document["failures"].items()
    lines = [f"no answer to {count} prompts: {reason}" for reason, count in failures]
    return [about, *lines, f"they are listed in {failed_path(out)}"] if lines else [about]
