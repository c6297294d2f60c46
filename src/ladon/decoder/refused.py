"""Options of `generate` that are refused, and why: the one list that calls are checked by and the docs are made from.

Everything else in a `GenerationConfig` gives what `transformers` gives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ladon.errors import InputError

UNSET = "unset it, in the call or in model.generation_config (on the command line: --ignore-generation-config)"
Get = Callable[[str], Any]  # an option's value, from its name; None if it is not set


@dataclass(frozen=True, kw_only=True, slots=True)
class Refusal:
    """An option that is refused.

    Attributes:
        option: its name.
        values: which of its values, as they follow the name; empty for all.
        reason: a clause, and what else to do; without a full stop.
        applies: whether a call of so many prompts asks for it.
    """

    option: str
    values: str
    reason: str
    applies: Callable[[Get, int], bool]


def _is_set(name: str) -> Callable[[Get, int], bool]:
    return lambda get, _: get(name) is not None


def _is_true(name: str) -> Callable[[Get, int], bool]:
    return lambda get, _: bool(get(name))


def _is_contrastive(get: Get, _: int) -> bool:
    top_k = 50 if get("top_k") is None else get("top_k")
    return not get("do_sample") and top_k > 1 and (get("penalty_alpha") or 0) > 0


def _is_synth_id(get: Get, num_prompts: int) -> bool:
    config = get("watermarking_config")
    kind = config.get("watermarking_type", "") if isinstance(config, dict) else type(config).__name__
    return num_prompts > 1 and "synthid" in kind.lower()


# Options that have no effect on a text, in Ladon or in transformers, and in Ladon none at all.
WITHOUT_EFFECT = {
    "use_cache": "keys and values are kept while a text is decoded; False only leaves them out of the output",
    "cache_implementation": "Ladon has a cache of its own; the text is the same with any other of transformers' kinds",
    "cache_config": "as cache_implementation",
    "max_cache_len": "the cache grows with the text",
    "compile_config": "nothing is compiled",
    "disable_compile": "as compile_config",
    "prefill_chunk_size": "prompts are read in chunks of Ladon's own size",
    "low_memory": "it belonged to methods that transformers has dropped",
}


def _is_healed_too(name: str, neutral: float) -> Callable[[Get, int], bool]:
    return lambda get, _: bool(get("token_healing")) and get(name) not in (None, neutral)


_ASSISTED = "it asks for transformers' own drafting in place of Ladon's"
_MOVED = "it is a decoding method of its own, which transformers keeps on the hub"
_OLD_PROMPT = "it reads the prompt as it was before it was healed; leave one of them out"
_IN_STEP = "its processor keeps state from call to call, and rows are not decoded in step: give one prompt at a time"

REFUSED = (
    Refusal(
        option="num_beams",
        values=" above 1 (beam_search)",
        reason="beam search keeps several texts of each prompt; Ladon decodes one, greedily or sampled",
        applies=lambda get, _: (get("num_beams") or 1) > 1,
    ),
    Refusal(option="constraints", values=" of beam search", reason=_MOVED, applies=_is_set("constraints")),
    Refusal(option="force_words_ids", values=" of beam search", reason=_MOVED, applies=_is_set("force_words_ids")),
    Refusal(
        option="penalty_alpha",
        values=" above 0 (contrastive search)",
        reason=_MOVED,
        applies=_is_contrastive,
    ),
    Refusal(option="dola_layers", values="", reason=_MOVED, applies=_is_set("dola_layers")),
    Refusal(
        option="use_mtp",
        values="=True",
        reason="it is transformers' own loop; in Ladon's, the decoder gets the model's MTP modules: "
        "ladon.Decoder(model, ladon.load_mtp(model))",
        applies=_is_true("use_mtp"),
    ),
    Refusal(
        option="prompt_lookup_num_tokens",
        values="",
        reason=f"{_ASSISTED}, which drafts from n-grams too, without being asked",
        applies=_is_set("prompt_lookup_num_tokens"),
    ),
    Refusal(
        option="assistant_early_exit",
        values="",
        reason=_ASSISTED,
        applies=_is_set("assistant_early_exit"),
    ),
    Refusal(
        option="is_assistant",
        values="=True",
        reason="it is for a model that drafts for another one inside transformers' loop",
        applies=_is_true("is_assistant"),
    ),
    Refusal(
        option="cache_implementation",
        values='="quantized"',
        reason="keys and values in few bits change the text, and Ladon's cache holds them as the model makes them",
        applies=lambda get, _: get("cache_implementation") == "quantized",
    ),
    Refusal(
        option="cache_implementation",
        values='="paged"',
        reason="it is transformers' continuous batching, another loop; Decoder.decode is Ladon's",
        applies=lambda get, _: get("cache_implementation") == "paged",
    ),
    Refusal(
        option="encoder_repetition_penalty",
        values=" together with token_healing",
        reason=_OLD_PROMPT,
        applies=_is_healed_too("encoder_repetition_penalty", 1.0),
    ),
    Refusal(
        option="encoder_no_repeat_ngram_size",
        values=" together with token_healing",
        reason=_OLD_PROMPT,
        applies=_is_healed_too("encoder_no_repeat_ngram_size", 0),
    ),
    Refusal(
        option="output_attentions",
        values="=True",
        reason="a step's attention is that of a tree, not of a text",
        applies=_is_true("output_attentions"),
    ),
    Refusal(
        option="output_hidden_states",
        values="=True",
        reason="a step's states are those of a tree, not of a text",
        applies=_is_true("output_hidden_states"),
    ),
    Refusal(
        option="top_p",
        values="=0 with do_sample=True",
        reason="transformers takes it for greedy decoding; give a probability above 0, or do_sample=False",
        applies=lambda get, _: bool(get("do_sample")) and get("top_p") == 0,
    ),
    Refusal(
        option="guidance_scale",
        values=" other than 1 with several prompts",
        reason=_IN_STEP,
        applies=lambda get, num: num > 1 and get("guidance_scale") not in (None, 1),
    ),
    Refusal(
        option="watermarking_config",
        values=" of SynthID with several prompts",
        reason=_IN_STEP,
        applies=_is_synth_id,
    ),
)


def refuse_options(get: Get, num_prompts: int) -> None:
    """Raise `InputError` for the first option of a call that is refused.

    Args:
        get: the call's options, as `generate` merges them with those of the model.
        num_prompts: B.
    """
    for refusal in REFUSED:
        if refusal.applies(get, num_prompts):
            raise InputError(f"{refusal.option}{refusal.values} is not supported: {refusal.reason}; {UNSET}")
