"""`ladon generate`: one prompt, text on standard output."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from ladon.cli import options
from ladon.cli.output import print_json, say
from ladon.cli.prompts import encode, read_prompt
from ladon.config import BenchOptions, DecoderOptions

if TYPE_CHECKING:
    from ladon.stats import DecodeStats

_DEFAULTS = DecoderOptions()
_NEW_TOKENS = BenchOptions().max_new_tokens


_StatsOption = Annotated[bool, Option("--stats", help="Show counts and times on standard error at the end.")]


def generate(
    model: options.ModelOption = "demo",
    heads: options.HeadsOption = None,
    prompt: options.PromptOption = None,
    prompt_file: options.PromptFileOption = None,
    max_new_tokens: options.NewTokensOption = _NEW_TOKENS,
    tree: options.TreeOption = _DEFAULTS.tree,
    budget: options.BudgetOption = str(_DEFAULTS.budget),
    stats: _StatsOption = False,
    dtype: options.DtypeOption = "auto",
    device: options.DeviceOption = "auto",
    threads: options.ThreadsOption = None,
    trust_remote_code: options.TrustOption = False,
    ignore_generation_config: options.IgnoreConfigOption = False,
    as_json: options.JsonOption = False,
) -> None:
    """Continue one prompt, from --prompt, --prompt-file or standard input.

    The text comes as it is decoded. In float32 and float64 it is what greedy decoding with transformers gives;
    in half precision, where two tokens are all but equally likely, the other one may come.

    For example:

        ladon generate --prompt "def read_config(path):" --max-new-tokens 64 --stats
        ladon generate --model path/to/model --heads path/to/heads --prompt-file prompt.txt --budget 32
    """
    text, nodes, shape = read_prompt(prompt, prompt_file), options.parse_budget(budget), options.parse_tree(tree)
    from transformers import TextStreamer

    from ladon.cli.loading import dtype_name, load, require_heads
    from ladon.generation import Decoder

    loaded = load(
        model,
        heads,
        dtype=dtype,
        device=device,
        threads=threads,
        trust_remote_code=trust_remote_code,
        ignore_generation_config=ignore_generation_config,
    )
    require_heads(loaded, shape)
    decoder = Decoder(loaded.model, loaded.heads, tree=shape, budget=nodes, profile=stats)
    ids = encode(loaded.tokenizer, text).to(loaded.model.device)
    streamer = None if as_json else TextStreamer(loaded.tokenizer, skip_prompt=True, skip_special_tokens=True)
    output = decoder.generate(
        ids[None],
        attention_mask=ids.new_ones(1, len(ids)),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        streamer=streamer,
    )
    if stats:
        for line in stats_lines(decoder.stats):
            say(line)
    if as_json:
        new = output[0, len(ids) :].tolist()
        answer = {"text": loaded.tokenizer.decode(new, skip_special_tokens=True), "token_ids": new}
        about = {"prompt_tokens": len(ids), "dtype": dtype_name(loaded.model), "stats": stats_json(decoder.stats)}
        print_json(answer | about)


def stats_json(stats: DecodeStats) -> dict[str, Any]:
    """Counts, times and the metrics made from them, as JSON values; None for what was not measured."""
    from ladon.bench.report import finite

    metrics = ("acceptance_length", "tokens_per_second", "step_ms", "forward_ms", "overhead", "tree_efficiency")
    return {
        "tokens": stats.tokens,
        "row_steps": stats.row_steps,
        "forwards": stats.forwards,
        "prefill_seconds": stats.prefill_seconds,
        "decode_seconds": stats.decode_seconds,
        **{name: finite(getattr(stats, name)) for name in metrics},
    }


def stats_lines(stats: DecodeStats) -> list[str]:
    """The same for people."""
    from ladon.viz.text import NO_STEP

    if not stats.forwards:
        return [NO_STEP]
    stages = ", ".join(
        f"{name} {seconds / stats.decode_seconds:.0%}"
        for name, seconds in stats.stage_seconds.items()
        if name != "forward"
    )
    return [
        f"{stats.tokens} tokens in {stats.forwards} decode steps: acceptance length {stats.acceptance_length:.2f}, "
        f"{stats.tokens_per_second:.0f} tokens per second (prefill of {stats.prefill_tokens} tokens apart: "
        f"{1e3 * stats.prefill_seconds:.0f} ms)",
        f"a step takes {stats.step_ms:.2f} ms, the model's forward {stats.forward_ms:.2f} ms of it, overhead "
        f"{stats.overhead:.1%}; by stage: {stages}",
    ]
