"""`ladon generate`: text on standard output, of one prompt as it comes, of several in their order."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from ladon.cli import constraints, options
from ladon.cli.output import print_json, say
from ladon.cli.prompts import encode, read_prompt, read_questions
from ladon.config import BenchOptions, DecoderOptions, GenerateOptions, help_of
from ladon.errors import InputError

if TYPE_CHECKING:
    from ladon.bench.workloads import Question
    from ladon.cli.loading import Loaded
    from ladon.decoder.decoder import Decoder
    from ladon.engine.sequence import Row
    from ladon.engine.stats import DecodeStats

_DEFAULTS = DecoderOptions()
_NEW_TOKENS = BenchOptions().max_new_tokens
_SAMPLING = GenerateOptions()

_StatsOption = Annotated[bool, Option("--stats", help="Show counts and times on standard error at the end.")]
_PromptOption = Annotated[
    list[str] | None, Option("--prompt", metavar="TEXT", help="The text to continue; several: give it several times.")
]
_PromptsOption = Annotated[
    Path | None,
    Option(
        "--prompts",
        metavar="FILE",
        help="Many prompts: JSONL with `prompt`, or MT-Bench `turns` (the first is asked); or a .txt file with one on "
        "each line.",
    ),
]
_BatchOption = Annotated[
    int, Option("--batch", metavar="N", min=1, help=f"{help_of(GenerateOptions, 'batch').capitalize()}.")
]


def generate(
    model: options.ModelOption = "demo",
    heads: options.HeadsOption = None,
    prompt: _PromptOption = None,
    prompt_file: options.PromptFileOption = None,
    prompts: _PromptsOption = None,
    batch: _BatchOption = _SAMPLING.batch,
    max_new_tokens: options.NewTokensOption = _NEW_TOKENS,
    tree: options.TreeOption = _DEFAULTS.tree,
    budget: options.BudgetOption = str(_DEFAULTS.budget),
    prune: options.PruneOption = _DEFAULTS.prune,
    accept: options.AcceptOption = _DEFAULTS.accept,
    ngrams: options.NgramsOption = _DEFAULTS.ngrams,
    joint: options.JointOption = _DEFAULTS.joint,
    temperature: options.TemperatureOption = _SAMPLING.temperature,
    top_p: options.TopPOption = _SAMPLING.top_p,
    top_k: options.TopKOption = _SAMPLING.top_k,
    seed: options.SeedOption = _SAMPLING.seed,
    json_schema: constraints.SchemaOption = None,
    regex: constraints.RegexOption = None,
    grammar: constraints.GrammarOption = None,
    stats: _StatsOption = False,
    dtype: options.DtypeOption = "auto",
    device: options.DeviceOption = "auto",
    threads: options.ThreadsOption = None,
    trust_remote_code: options.TrustOption = False,
    ignore_generation_config: options.IgnoreConfigOption = False,
    as_json: options.JsonOption = False,
) -> None:
    """Continue one prompt, from --prompt, --prompt-file or standard input; or many, from --prompts.

    The text of one prompt comes as it is decoded. Many are answered together, --batch at a time, and whenever one is
    done the next takes its place; the answers come in the order of the prompts, each below a line with its number.
    In float32 and float64 an answer is what greedy decoding with transformers gives, whatever else is answered;
    in half precision, where two tokens are all but equally likely, the other one may come. With --temperature it is
    sampled: the same --seed gives the same answers, whatever the trees. With --accept typical or nucleus sampled text
    comes in fewer steps and is not exact: it leaves the model's law, and depends on the trees. With --json-schema,
    --regex or --grammar, which need llguidance, answers are of that form, unless --max-new-tokens cuts them.

    For example:

        ladon generate --prompt "def read_config(path):" --max-new-tokens 64 --stats
        ladon generate --prompt "def read_config(path):" --temperature 0.8 --top-p 0.95 --seed 7
        ladon generate --prompt "version = " --regex "[1-3]([.][0-9])+"
        ladon generate --prompts prompts.jsonl --batch 4 --max-new-tokens 32
        ladon generate --model path/to/model --heads path/to/heads --prompt-file prompt.txt --budget 32
    """
    from ladon.sampling.lossy import parsed_rule

    nodes, shape, texts = options.parse_budget(budget), options.parse_tree(tree), prompt or []
    if prompt_file is not None and (prompts is not None or len(texts) > 1):
        raise InputError("--prompt-file was given beside other prompts; give one or the other")
    is_many = prompts is not None or len(texts) > 1
    questions = read_questions(texts, prompts) if is_many else []
    text = "" if is_many else read_prompt(texts[0] if texts else None, prompt_file)
    law, rule = options.sampling(temperature, top_k, top_p, seed), parsed_rule(accept)
    make_constraint = constraints.read_constraint(json_schema, regex, grammar)
    from ladon.cli.loading import load, require_heads
    from ladon.decoder.decoder import Decoder

    loaded = load(
        model,
        heads,
        dtype=dtype,
        device=device,
        threads=threads,
        trust_remote_code=trust_remote_code,
        ignore_generation_config=ignore_generation_config,
    )
    require_heads(loaded, shape, ngrams)
    law["constraint"] = make_constraint(loaded.tokenizer)
    drafting: dict[str, Any] = {"tree": shape, "budget": nodes, "prune": prune, "accept": rule or _DEFAULTS.accept}
    drafting |= {"ngrams": ngrams, "joint": joint}
    decoder = Decoder(loaded.model, loaded.heads, profile=stats, **drafting)
    if is_many:
        rows = _rows(decoder, loaded, questions, max_new_tokens, law)
        document = _answer_many(decoder, loaded, questions, rows, batch, is_silent=as_json)
    else:
        document = _answer_one(decoder, loaded, text, max_new_tokens, law, is_silent=as_json)
    if stats:
        for line in stats_lines(decoder.stats):
            say(line)
    if as_json:
        from ladon.cli.loading import dtype_name

        print_json(document | {"dtype": dtype_name(loaded.model), "stats": stats_json(decoder.stats)})


def _answer_one(
    decoder: Decoder, loaded: Loaded, text: str, max_new_tokens: int, law: dict[str, Any], *, is_silent: bool
) -> dict[str, Any]:
    """Write one answer as it comes; what is known of it."""
    from ladon.decoder.detokenizer import PieceStreamer

    ids = encode(loaded.tokenizer, text).to(loaded.model.device)
    streamer = None if is_silent else PieceStreamer(loaded.tokenizer, partial(print, end="", flush=True))
    output = decoder.generate(
        ids[None],
        attention_mask=ids.new_ones(1, len(ids)),
        max_new_tokens=max_new_tokens,
        streamer=streamer,
        **law,
    )
    if not is_silent:
        print(flush=True)
    new = output[0, len(ids) :].tolist()
    constraints.say_if_cut(decoder.complete)
    return {"text": _text(loaded, new), "token_ids": new, "prompt_tokens": len(ids), "complete": decoder.complete[0]}


def _answer_many(
    decoder: Decoder, loaded: Loaded, questions: Sequence[Question], rows: list[Row], batch: int, *, is_silent: bool
) -> dict[str, Any]:
    """Answer prompts together, and write each answer once it and all before it are done; what is known of them."""
    from ladon.bench.report import finite
    from ladon.engine.sequence import warn_of_dead_ends

    shown = 0
    for _ in decoder.decode(rows, max_rows=batch):
        while shown < len(rows) and rows[shown].finished:
            if not is_silent:
                print(
                    f"=== prompt {shown + 1} of {len(rows)} ===",
                    _text(loaded, rows[shown].tokens),
                    sep="\n",
                    flush=True,
                )
            shown += 1
    answers = [
        {
            "id": question.question_id,
            "text": _text(loaded, row.tokens),
            "token_ids": row.tokens,
            "prompt_tokens": len(row.prompt),
            "seed": row.seed if row.sampling_params.draws else None,
            "acceptance_length": finite(row.stats.acceptance_length),
            "complete": row.complete,
        }
        for question, row in zip(questions, rows, strict=True)
    ]
    warn_of_dead_ends(rows)
    constraints.say_if_cut([row.complete for row in rows])
    return {"answers": answers, "batch": batch}


def _rows(
    decoder: Decoder, loaded: Loaded, questions: Sequence[Question], max_new_tokens: int, law: dict[str, Any]
) -> list[Row]:
    """The prompts for the engine; `InputError` for one that has no tokens, or leaves no room for an answer."""
    import torch

    from ladon.bench.workloads import prompt_ids
    from ladon.target.support import context_limit

    limit = context_limit(loaded.model.config.get_text_config(decoder=True))
    prompts = [prompt_ids(loaded.tokenizer, question, []) for question in questions]
    for number, ids in enumerate(prompts, start=1):
        if not ids or (limit is not None and len(ids) >= limit):
            allowed = "1 or more" if limit is None else f"1 to {limit - 1}"
            raise InputError(f"prompt {number} has {len(ids)} tokens; give {allowed} for this model")
    ids_on_device = [torch.tensor(ids, device=loaded.model.device) for ids in prompts]
    return decoder.rows(ids_on_device, max_new_tokens=max_new_tokens, **law)


def _text(loaded: Loaded, token_ids: Sequence[int]) -> str:
    return str(loaded.tokenizer.decode(list(token_ids), skip_special_tokens=True))


def stats_json(stats: DecodeStats) -> dict[str, Any]:
    """Counts, times and the metrics made from them, as JSON values; None for what was not measured."""
    from ladon.bench.report import finite

    metrics = ("acceptance_length", "tokens_per_second", "step_ms", "forward_ms", "overhead", "tree_efficiency")
    return {
        "tokens": stats.tokens,
        "row_steps": stats.row_steps,
        "forwards": stats.forwards,
        "drafts_checked": stats.drafts_checked,
        "drafts_illegal": stats.drafts_illegal,
        "prefill_seconds": stats.prefill_seconds,
        "decode_seconds": stats.decode_seconds,
        **{name: finite(getattr(stats, name)) for name in (*metrics, "illegal_share")},
    }


def stats_lines(stats: DecodeStats) -> list[str]:
    """The same for people."""
    from ladon.viz.record import NO_STEP

    if not stats.forwards:
        return [NO_STEP]
    stages = ", ".join(
        f"{name} {seconds / stats.decode_seconds:.0%}"
        for name, seconds in stats.stage_seconds.items()
        if name != "forward"
    )
    lines = [
        f"{stats.tokens} tokens in {stats.forwards} decode steps: acceptance length {stats.acceptance_length:.2f}, "
        f"{stats.tokens_per_second:.0f} tokens per second (prefill of {stats.prefill_tokens} tokens apart: "
        f"{1e3 * stats.prefill_seconds:.0f} ms)",
        f"a step takes {stats.step_ms:.2f} ms, the model's forward {stats.forward_ms:.2f} ms of it, overhead "
        f"{stats.overhead:.1%}; by stage: {stages}",
    ]
    if stats.drafts_checked:
        lines.append(
            f"{stats.illegal_share:.0%} of {stats.drafts_checked} drafts were dropped: the constraint forbids them"
        )
    return lines
