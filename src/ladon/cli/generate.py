"""`ladon generate`: text on standard output, of one prompt as it comes, of several in their order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ladon.cli import options
from ladon.cli.options import OUTPUT, WHAT, flag, option, setting
from ladon.cli.output import print_json, say
from ladon.cli.prompts import encode, read_prompt, read_questions
from ladon.config import BenchOptions, GenerateOptions
from ladon.errors import InputError
from ladon.util.files import finite

if TYPE_CHECKING:
    from ladon.bench.workloads import Question
    from ladon.cli.loading import Loaded
    from ladon.constraints.state import Constraint
    from ladon.decoder.decoder import Decoder
    from ladon.engine.sequence import Row
    from ladon.engine.stats import DecodeStats


@options.command()
def generate(
    *,
    target: options.Target,
    prompt: list[str] | None = option(WHAT, None, "TEXT", "The text to continue; several: give it several times."),
    prompt_file: Path | None = options.PROMPT_FILE,
    prompts: Path | None = option(
        WHAT,
        None,
        "FILE",
        "Many prompts: JSONL with `prompt`, or MT-Bench `turns` (the first is asked); or a .txt file with one on "
        "each line.",
    ),
    batch: int = setting(WHAT, GenerateOptions, "batch", "N", min=1),
    max_new_tokens: int = options.new_tokens(BenchOptions.max_new_tokens),
    drafting: options.Drafting,
    sampling: options.Sampling,
    json_schema: str | None = option(
        WHAT, None, "SCHEMA", "Write JSON that fits this schema: JSON text, or a file with it."
    ),
    regex: str | None = option(WHAT, None, "PATTERN", "Write what matches this regular expression as a whole."),
    grammar: Path | None = option(WHAT, None, "FILE", "Write what this grammar, in Lark's notation, allows."),
    stats: bool = flag(OUTPUT, "--stats", "Show counts and times on standard error at the end."),
    as_json: bool = options.JSON,
) -> None:
    """Continue one prompt, from --prompt, --prompt-file or standard input; or many, from --prompts.

    The text of one prompt comes as it is decoded. Many are answered together, --batch at a time, and whenever one is
    done the next takes its place; the answers come in the order of the prompts, each below a line with its number.
    In float32 and float64 an answer is what greedy decoding with transformers gives, whatever else is answered;
    in half precision, where two tokens are all but equally likely, the other one may come. With --temperature it is
    sampled: the same --seed gives the same answers, whatever the trees. With --accept typical or nucleus sampled text
    comes in fewer steps and is not exact: it leaves the model's distribution, and depends on the trees. With
    --json-schema, --regex or --grammar, which need llguidance, answers are of that form, unless --max-new-tokens cuts
    them.

    For example:

        ladon generate --prompt "def read_config(path):" --max-new-tokens 64 --stats
        ladon generate --prompt "def read_config(path):" --temperature 0.8 --top-p 0.95 --seed 7
        ladon generate --prompt "version = " --regex "[1-3]([.][0-9])+"
        ladon generate --prompts prompts.jsonl --batch 4 --max-new-tokens 32
        ladon generate --model path/to/model --heads path/to/heads --prompt-file prompt.txt --budget 32
    """
    texts = prompt or []
    if prompt_file is not None and (prompts is not None or len(texts) > 1):
        raise InputError("--prompt-file was given beside other prompts; give one or the other")
    is_many = prompts is not None or len(texts) > 1
    questions = read_questions(texts, prompts) if is_many else []
    text = "" if is_many else read_prompt(texts[0] if texts else None, prompt_file)
    for_decoder, wanted = drafting.for_decoder(), sampling.for_generate()
    make_constraint = _read_constraint(json_schema, regex, grammar)
    from ladon.cli.loading import dtype_name, load

    loaded = load(target)
    decoder = loaded.decoder(profile=stats, **for_decoder)
    wanted |= {"constraint": make_constraint(loaded.tokenizer), "max_new_tokens": max_new_tokens}
    if is_many:
        document = _answer_many(decoder, loaded, questions, batch, wanted, is_silent=as_json)
    else:
        document = _answer_one(decoder, loaded, text, wanted, is_silent=as_json)
    if stats:
        for line in _stats_lines(decoder.stats):
            say(line)
    if as_json:
        print_json(document | {"dtype": dtype_name(loaded.model), "stats": _stats_json(decoder.stats)})


def _read_constraint(
    json_schema: str | None, regex: str | None, grammar: Path | None
) -> Callable[[Any], Constraint | None]:
    """What makes the constraint that was asked for, given the tokenizer; None if none was.

    Raises:
        InputError: several were asked for, or a file cannot be read.
    """
    given = {"--json-schema": json_schema, "--regex": regex, "--grammar": grammar}
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise InputError(f"{' and '.join(names)} were given; give one of them")
    from ladon.bench.workloads import read_text
    from ladon.constraints import llguidance_backend as structured

    if json_schema is not None:
        is_text = json_schema.lstrip()[:1] in ("", "{", "[", '"') or json_schema in ("true", "false")
        return partial(structured.json_schema, json_schema if is_text else read_text(Path(json_schema)))
    if regex is not None:
        return partial(structured.regex, regex)
    if grammar is not None:
        return partial(structured.grammar, read_text(grammar))
    return lambda tokenizer: None


def _answer_one(
    decoder: Decoder, loaded: Loaded, text: str, wanted: dict[str, Any], *, is_silent: bool
) -> dict[str, Any]:
    """Write one answer as it comes; what is known of it."""
    from ladon.decoder.detokenizer import PieceStreamer

    ids = encode(loaded.tokenizer, text).to(loaded.model.device)
    streamer = None if is_silent else PieceStreamer(loaded.tokenizer, partial(print, end="", flush=True))
    output = decoder.generate(ids[None], attention_mask=ids.new_ones(1, len(ids)), streamer=streamer, **wanted)
    if not is_silent:
        print(flush=True)
    new = output[0, len(ids) :].tolist()
    _say_if_cut(decoder.complete)
    return {"text": _text(loaded, new), "token_ids": new, "prompt_tokens": len(ids), "complete": decoder.complete[0]}


def _answer_many(
    decoder: Decoder,
    loaded: Loaded,
    questions: Sequence[Question],
    batch: int,
    wanted: dict[str, Any],
    *,
    is_silent: bool,
) -> dict[str, Any]:
    """Answer prompts together, and write each answer once it and all before it are done; what is known of them."""
    from ladon.engine.sequence import warn_of_dead_ends

    sequences, shown = _sequences(decoder, loaded, questions, wanted), 0
    for _ in decoder.decode(sequences, max_rows=batch):
        while shown < len(sequences) and sequences[shown].finished:
            if not is_silent:
                text = _text(loaded, sequences[shown].tokens)
                print(f"=== prompt {shown + 1} of {len(sequences)} ===", text, sep="\n", flush=True)
            shown += 1
    answers = [
        {
            "id": question.question_id,
            "text": _text(loaded, each.tokens),
            "token_ids": each.tokens,
            "prompt_tokens": len(each.prompt),
            "seed": each.seed if each.sampling_params.draws else None,
            "acceptance_length": finite(each.stats.acceptance_length),
            "complete": each.complete,
        }
        for question, each in zip(questions, sequences, strict=True)
    ]
    warn_of_dead_ends(sequences)
    _say_if_cut([each.complete for each in sequences])
    return {"answers": answers, "batch": batch}


def _sequences(decoder: Decoder, loaded: Loaded, questions: Sequence[Question], wanted: dict[str, Any]) -> list[Row]:
    """The prompts for the engine; `InputError` for one that has no tokens, or leaves no room for an answer."""
    import torch

    from ladon.bench.workloads import prompt_ids

    limit = loaded.context_limit
    prompts = [prompt_ids(loaded.tokenizer, question, []) for question in questions]
    for number, ids in enumerate(prompts, start=1):
        if not ids or (limit is not None and len(ids) >= limit):
            allowed = "1 or more" if limit is None else f"1 to {limit - 1}"
            raise InputError(f"prompt {number} has {len(ids)} tokens; give {allowed} for this model")
    return decoder.rows([torch.tensor(ids, device=loaded.model.device) for ids in prompts], **wanted)


def _text(loaded: Loaded, token_ids: Sequence[int]) -> str:
    return str(loaded.tokenizer.decode(list(token_ids), skip_special_tokens=True))


def _say_if_cut(complete: list[bool | None]) -> None:
    """Tell on standard error how many texts their constraint does not call whole."""
    cut = complete.count(False)
    if cut:
        texts = "the text is" if len(complete) == 1 else f"{cut} of {len(complete)} texts are"
        say(f"{texts} not complete: cut at --max-new-tokens, or ended before")


def _stats_json(stats: DecodeStats) -> dict[str, Any]:
    """Counts, times and the metrics made from them, as JSON values; None for what was not measured."""
    counts = ("tokens", "row_steps", "forwards", "drafts_checked", "drafts_illegal")
    times = ("prefill_seconds", "decode_seconds")
    metrics = ("acceptance_length", "tokens_per_second", "step_ms", "forward_ms", "overhead", "tree_efficiency")
    known = {name: getattr(stats, name) for name in (*counts, *times)}
    return known | {name: finite(getattr(stats, name)) for name in (*metrics, "illegal_share")}


def _stats_lines(stats: DecodeStats) -> list[str]:
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
