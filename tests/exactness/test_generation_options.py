"""Every option of `GenerationConfig`: the tokens, scores and warnings of transformers' `generate`, or refused by name.

Alone with several values, and in random pairs; one prompt and three of different lengths; float64. An option that the
installed transformers has and the table below has not fails the tests, so that new ones are noticed.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import cache
from typing import Any

import pytest
import torch
from transformers import (
    CompileConfig,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    SynthIDTextWatermarkingConfig,
    WatermarkingConfig,
)

import families
import ladon
from ladon.decoder.refused import REFUSED
from ladon.decoder.request import merged_option
from ladon.errors import InputError, UnsupportedModelError

PROMPTS = {
    1: torch.arange(3, 15)[None],
    3: torch.tensor([[0, 0, 0, 5, 6, 7], [11, 12, 13, 14, 15, 16], [0, 7, 5, 7, 5, 7]]),
}
PAIRS, SEED = 400, 20270214
ENDS = list(range(0, 97, 6))  # so that rows end at different places
# Where Ladon does what transformers refuses, or cannot do here: greedy copies, offloading without a GPU, padding by -1,
# prompts in chunks (its 5.0).
BEYOND = {"num_return_sequences", "cache_implementation", "pad_token_id", "prefill_chunk_size"}
DRAWN, DICT = {"do_sample": True, "seed": 7}, {"return_dict_in_generate": True}

# Each option's values. What else a value needs is given beside it, as in `(value, {other option: its value})`.
VALUES: dict[str, list[Any]] = {
    "max_length": [14, 40, (15, {"max_new_tokens": None})],
    "max_new_tokens": [1, 7, 0, -3],
    "min_length": [0, 9, 30],
    "min_new_tokens": [1, 4, 30],
    "early_stopping": [False, True, "never"],
    "max_time": [1e9, 0.0],
    "stop_strings": ["A", ["bc", "?", "dd"]],
    "do_sample": [False, (True, {"seed": 7})],
    "num_beams": [1, 2],
    "use_mtp": [False, True],
    "use_cache": [True, False],
    "cache_implementation": [
        "dynamic",
        "static",
        "offloaded",
        "offloaded_static",
        "quantized",
        "hybrid",
        "paged",
        "none",
    ],
    "cache_config": [{}, {"nbits": 4}],
    "max_cache_len": [64, 4, (64, {"cache_implementation": "static"})],
    "temperature": [1.0, (0.6, DRAWN), (2.5, DRAWN), 0.6, (0.0, DRAWN)],
    "top_k": [0, (5, DRAWN), (1, DRAWN), 5, (-1, DRAWN)],
    "top_p": [1.0, (0.7, DRAWN), (0.1, DRAWN), 0.7, (0.0, DRAWN), (1.5, DRAWN)],
    "min_p": [(0.2, DRAWN), (0.9, DRAWN), 0.2, (2.0, DRAWN)],
    "top_h": [(0.3, DRAWN), (0.8, DRAWN), 0.3],
    "typical_p": [1.0, (0.3, DRAWN), (0.9, DRAWN), 0.3],
    "epsilon_cutoff": [0.0, (0.02, DRAWN), 0.02],
    "eta_cutoff": [0.0, (0.02, DRAWN), 0.02],
    "repetition_penalty": [1.0, 1.3, 0.5, (1.3, DRAWN), -1.0],
    "encoder_repetition_penalty": [1.0, 1.5, 0.5, (1.5, DRAWN)],
    "length_penalty": [1.0, 2.0, -1.0],
    "no_repeat_ngram_size": [0, 1, 2, 3],
    "bad_words_ids": [[[7]], [[5], [8, 9], [40, 41, 42]], []],
    "renormalize_logits": [True, (True, DRAWN), False],
    "forced_bos_token_id": [5],
    "forced_eos_token_id": [2, [2, 5]],
    "remove_invalid_values": [True, False],
    "exponential_decay_length_penalty": [(3, 1.5), (0, 1.01), (50, 2.0)],
    "suppress_tokens": [[7, 8, 9], list(range(40)), []],
    "begin_suppress_tokens": [[7, 8], list(range(60))],
    "sequence_bias": [[[[7], 5.0], [[8, 9], -3.0]], {(7,): 2.0}],
    "token_healing": [False, True],
    "guidance_scale": [1.0, 1.5, (1.5, DRAWN)],
    "watermarking_config": [
        WatermarkingConfig(bias=4.0, seeding_scheme="selfhash", context_width=2),
        WatermarkingConfig(bias=2.5),
        (SynthIDTextWatermarkingConfig(ngram_len=3, keys=[1, 2, 3]), DRAWN),
    ],
    "num_return_sequences": [1, 2, (2, DRAWN), 0],
    "output_attentions": [False, True, (True, DICT)],
    "output_hidden_states": [False, True, (True, DICT)],
    "output_scores": [False, True, (True, DICT), (True, DICT | DRAWN)],
    "output_logits": [False, True, (True, DICT)],
    "return_dict_in_generate": [False, True],
    "pad_token_id": [0, 5, -1],
    "bos_token_id": [1, 5],
    "eos_token_id": [2, 5, [5, 7, 9], list(range(0, 97, 5)), -1],
    "encoder_no_repeat_ngram_size": [0, 1, 2],
    "decoder_start_token_id": [1, [1, 1, 1]],
    "is_assistant": [False, True],
    "num_assistant_tokens": [3],
    "num_assistant_tokens_schedule": ["constant", "heuristic"],
    "assistant_confidence_threshold": [0.4],
    "prompt_lookup_num_tokens": [3],
    "max_matching_ngram_size": [2],
    "assistant_early_exit": [1],
    "assistant_lookbehind": [5],
    "target_lookbehind": [5],
    "assistant_ensemble_weight": [0.5, 2.0],
    "speculation_type": ["dflash"],
    "compile_config": [CompileConfig(), {"mode": "default"}],
    "disable_compile": [True, False],
    "continuous_batching_config": [{}],
    "low_memory": [True, False],
    "penalty_alpha": [0.6, (0.6, {"top_k": 4})],
    "dola_layers": ["low"],
    "diversity_penalty": [0.5, 0.0],
    "num_beam_groups": [1, 2, (2, {"num_beams": 4})],
    "constraints": [[]],
    "force_words_ids": [[[5, 6]]],
    "prefill_chunk_size": [4, 64],
}
NOT_OPTIONS = {"transformers_version", "_from_model_config", "_commit_hash"}
INSTALLED = sorted(set(GenerationConfig().to_dict()) - NOT_OPTIONS)


@cache
def model() -> PreTrainedModel:
    made = families.build("llama", torch.float64)
    made.generation_config.eos_token_id, made.generation_config.pad_token_id = None, 0
    return made


@cache
def heads() -> ladon.Heads:
    made = ladon.new_heads(model(), num_heads=3)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made


@cache
def decoder(budget: int) -> ladon.Decoder:
    return ladon.Decoder(model(), heads(), budget=budget)


@cache
def tokenizer() -> Any:
    return ladon.load_demo()[1]  # of the model's 97 tokens, the greater part are characters


def settings(value: Any, name: str) -> dict[str, Any]:
    """An option with one of its values, as keyword arguments."""
    has_more = isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], dict)
    own, others = value if has_more else (value, {})
    return {**others, name: own}


@contextmanager
def given(how: str, options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What a call gets besides, where its options are given in the call, in a `GenerationConfig`, or in the model's."""
    in_call = {name: value for name, value in options.items() if name not in INSTALLED or how == "call"}
    in_config = {name: value for name, value in options.items() if name not in in_call}
    own = model().generation_config
    try:
        with warnings.catch_warnings(action="ignore"):  # of options that transformers is about to drop
            if how == "config":
                in_call["generation_config"] = GenerationConfig(**in_config)
            elif how == "model":
                model().generation_config = deepcopy(own)
                model().generation_config.update(**in_config)
        yield in_call
    finally:
        model().generation_config = own


def outcome(call: Any, ids: torch.Tensor, **options: Any) -> tuple[Any, set[str]]:
    """What a call returns or raises, and its warnings."""
    torch.manual_seed(0)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            result = call(ids.clone(), **options)
        except Exception as error:
            result = error
    return result, {f"{warning.category.__name__}: {warning.message}" for warning in seen}


def plain(ids: torch.Tensor, **options: Any) -> Any:
    """transformers' own, to which a seed is nothing."""
    options.pop("seed", None)
    return type(model()).generate(model(), ids, **options)


def check(options: dict[str, Any], batch: int, how: str = "call") -> str:
    """Compare a call with transformers' own; "equal", "refused" or "beyond" says what came of it."""
    ids, named = PROMPTS[batch], [name for name in options if name in INSTALLED]
    options = {"max_new_tokens": 10, "eos_token_id": ENDS, **options}
    options = {name: value for name, value in options.items() if (name, value) != ("max_new_tokens", None)}
    if options.get("stop_strings"):
        options["tokenizer"] = tokenizer()
    try:
        with given(how, options) as call:
            call["attention_mask"] = (ids != 0).long()
            theirs, their_warnings = outcome(plain, ids, **call)
            ours, our_warnings = outcome(decoder(12).generate, ids, **call)
            if isinstance(ours, Exception):
                return refused(ours, theirs, named)
            if isinstance(theirs, Exception):
                assert BEYOND & set(named), f"transformers refuses it, Ladon does not: {theirs!r}"
                return "beyond"
            extra = {warning for warning in our_warnings - their_warnings if "decoding plainly" not in warning}
            assert not extra, extra
            is_drawn = bool(merged_option(model(), call, "do_sample"))
            equal(ours, outcome(decoder(1).generate, ids, **call)[0] if is_drawn else theirs)
            if is_drawn and not isinstance(theirs, torch.Tensor):
                check_scores(ours, ids, **call)
            return "equal"
    except ValueError as error:  # of a `GenerationConfig` itself
        assert how != "call" and not isinstance(error, InputError), error
        return "refused"


def refused(ours: Exception, theirs: Any, named: list[str]) -> str:
    """An error of ours must be one line, of our own kind, and where transformers has none, name a listed option."""
    assert isinstance(ours, InputError | UnsupportedModelError), repr(ours)
    assert "\n" not in str(ours)
    if not isinstance(theirs, Exception):
        listed = {refusal.option for refusal in REFUSED} & set(named)
        assert any(str(ours).startswith(name) for name in listed), ours
    return "refused"


def equal(ours: Any, expected: Any) -> None:
    """The same tokens, and as long as rows go on the same scores and logits, if they were asked for."""
    if isinstance(expected, torch.Tensor):
        assert torch.equal(ours, expected), f"{ours.tolist()} is not {expected.tolist()}"
        return
    assert torch.equal(ours.sequences, expected.sequences), f"{ours.sequences.tolist()}, {expected.sequences.tolist()}"
    for name in ("scores", "logits"):
        mine, other = getattr(ours, name), getattr(expected, name)
        assert (mine is None) == (other is None), name
        for step, (own, wanted) in enumerate(zip(mine or (), other or (), strict=True)):
            rows = going_on(ours.sequences, step, len(mine))
            torch.testing.assert_close(own[rows].double(), wanted[rows].double(), atol=1e-5, rtol=1e-5)


def going_on(sequences: torch.Tensor, step: int, num_steps: int) -> torch.Tensor:
    """The rows that had not ended before a step: none of their tokens so far is an end."""
    new = sequences[:, sequences.shape[1] - num_steps :]
    return ~torch.isin(new[:, :step], torch.tensor(ENDS)).any(1)


def check_scores(ours: Any, ids: torch.Tensor, **options: Any) -> None:
    """The scores that tokens were drawn from are what transformers' processors make of the logits before them."""
    found: list[LogitsProcessorList] = []

    def keep(_model: Any, input_ids: torch.Tensor, logits_processor: LogitsProcessorList, **_: Any) -> torch.Tensor:
        found.append(logits_processor)
        return input_ids

    expanded = plain(ids.clone(), custom_generate=keep, **options)
    mask = options["attention_mask"].repeat_interleave(len(expanded) // len(ids), 0)
    for step, scores in enumerate(ours.scores or ()):
        prefix = ours.sequences[:, : ids.shape[1] + step]
        whole = torch.cat([mask, torch.ones(len(mask), step, dtype=torch.long)], dim=1)
        positions = (whole.cumsum(1) - 1).clamp(min=0)
        logits = model()(prefix, attention_mask=whole, position_ids=positions, use_cache=False).logits[:, -1]
        rows = going_on(ours.sequences, step, len(ours.scores))
        wanted = found[0](prefix, logits)
        torch.testing.assert_close(scores[rows].double(), wanted[rows], atol=1e-5, rtol=1e-5)
        drawn = ours.sequences[rows, ids.shape[1] + step, None]
        assert (wanted[rows].gather(1, drawn) > -torch.inf).all()


def test_no_option_is_missing() -> None:
    assert not set(INSTALLED) - set(VALUES), "add values for these options of GenerationConfig to the table"


def alone() -> list[tuple[str, int]]:
    """Each value of each option."""
    return [(name, place) for name in INSTALLED for place in range(len(VALUES.get(name, ())))]


def pairs(num: int) -> list[tuple[dict[str, Any], int, str]]:
    """Two options at random, which do not contradict each other in what they need; prompts; where they are given."""
    dice = random.Random(SEED)
    found: list[tuple[dict[str, Any], int, str]] = []
    while len(found) < num:
        first, second = (settings(dice.choice(VALUES[name]), name) for name in dice.sample(INSTALLED, 2))
        if all(first[name] == second[name] for name in first.keys() & second.keys()):
            found.append(({**first, **second}, dice.choice((1, 3)), dice.choice(("call", "config", "model"))))
    return found


@torch.no_grad()
@pytest.mark.parametrize("name", INSTALLED)
def test_one_option(name: str) -> None:
    """One value of each, which does more than the first, with three prompts."""
    check(settings(VALUES[name][:2][-1], name), 3)


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", INSTALLED)
def test_every_value(name: str, batch: int) -> None:
    for value in VALUES[name]:
        options = settings(value, name)
        for how in ("call", "config", "model"):
            check(options, batch, how)
        if options.get("do_sample"):
            assert check({**options, **DICT, "output_scores": True}, batch) in ("equal", "refused")


@torch.no_grad()
def test_some_pairs() -> None:
    outcomes = [check(*pair) for pair in pairs(16)]
    assert outcomes.count("equal") > 5


@torch.no_grad()
@pytest.mark.slow
def test_random_pairs() -> None:
    wrong = []
    for pair in pairs(PAIRS):
        try:
            check(*pair)
        except AssertionError as error:
            wrong.append(f"{pair}: {error}")
    assert not wrong, "\n".join(wrong)
