"""`token_healing` with `tokenizer=`: the prompt's last token is chosen anew, as transformers does it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GenerationConfig

import ladon

PROMPTS = ["import os\n", "import os\nimport s", "def foo(sel", "return x ", "x", "im"]


@pytest.fixture(scope="module")
def demo() -> tuple[Any, Any, ladon.Heads]:
    """The bundled model; a tokenizer needs a first token to heal."""
    model, tokenizer, heads = ladon.load_demo(torch.float64)
    tokenizer.bos_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    return model, tokenizer, heads


def skip_if_the_old_mask_stays(demo: Any, prompt: str) -> None:
    """Before it heals a prompt to another length, an older `generate` has made a mask that no longer fits."""
    model, tokenizer, _ = demo
    inputs = tokenizer(prompt, return_tensors="pt")
    masks: list[Any] = []
    type(model).generate(
        model, **inputs, max_new_tokens=1, custom_generate=lambda *_, **made: masks.append(made.get("attention_mask"))
    )
    if masks[0] is not None and model.heal_tokens(inputs.input_ids, tokenizer).shape != inputs.input_ids.shape:
        pytest.skip("generate of the installed transformers goes on with a mask that does not fit; refused by name")


@pytest.mark.parametrize("prompt", PROMPTS)
def test_one_prompt(demo: Any, prompt: str) -> None:
    """Its length may change: spaces at its end are stripped."""
    skip_if_the_old_mask_stays(demo, prompt)
    model, tokenizer, heads = demo
    inputs = tokenizer(prompt, return_tensors="pt")
    options = {"max_new_tokens": 12, "do_sample": False, "tokenizer": tokenizer, "token_healing": True}
    expected = model.generate(**inputs, **options)
    decoder = ladon.Decoder(model, heads, budget=12)
    assert torch.equal(decoder.generate(**inputs, **options), expected)
    assert torch.equal(decoder.generate(inputs.input_ids, **options), model.generate(inputs.input_ids, **options))
    ladon.attach(model, heads, budget=12)
    try:
        assert torch.equal(model.generate(**inputs, **options), expected)
    finally:
        ladon.detach(model)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("second", ["def foo(sel", "def foo(sel "])
def test_a_batch(demo: Any, side: str, second: str) -> None:
    model, tokenizer, heads = demo
    tokenizer.padding_side = side
    try:
        inputs = tokenizer(["import os\nimport s", second, "return x"], return_tensors="pt", padding=True)
        for config in ({"token_healing": True}, {"generation_config": GenerationConfig(token_healing=True)}):
            options = {"max_new_tokens": 8, "do_sample": False, "tokenizer": tokenizer, **config}
            expected = model.generate(**inputs, **options)
            if side == "left":  # transformers itself goes wrong after padding on the right, and says so
                assert torch.equal(ladon.Decoder(model, heads, budget=12).generate(**inputs, **options), expected)
            healed = model.heal_tokens(inputs.input_ids, tokenizer)
            output = ladon.Decoder(model, heads, budget=12).generate(**inputs, **options)
            assert torch.equal(output[:, : healed.shape[1]], healed)
    finally:
        tokenizer.padding_side = "left"


def test_with_other_options(demo: Any) -> None:
    """What counts tokens counts those of the healed prompt."""
    skip_if_the_old_mask_stays(demo, PROMPTS[0])
    model, tokenizer, heads = demo
    decoder = ladon.Decoder(model, heads, budget=12)
    inputs = tokenizer(PROMPTS[0], return_tensors="pt")
    healing = {"do_sample": False, "tokenizer": tokenizer, "token_healing": True}
    for more in (
        {"max_length": 9},
        {"max_new_tokens": 8, "stop_strings": ["import"]},
        {"max_new_tokens": 8, "repetition_penalty": 1.3, "min_new_tokens": 4},
    ):
        assert torch.equal(decoder.generate(**inputs, **healing, **more), model.generate(**inputs, **healing, **more))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer": None}, r"token_healing needs the tokenizer; pass tokenizer"),
        ({"encoder_repetition_penalty": 1.2}, r"encoder_repetition_penalty together with token_healing"),
        ({"encoder_no_repeat_ngram_size": 2}, r"encoder_no_repeat_ngram_size together with token_healing"),
    ],
)
def test_what_is_refused(demo: Any, change: dict[str, Any], message: str) -> None:
    model, tokenizer, heads = demo
    inputs = tokenizer(PROMPTS[1], return_tensors="pt")
    options = {"max_new_tokens": 4, "tokenizer": tokenizer, "token_healing": True, **change}
    with pytest.raises(ladon.InputError, match=message) as error:
        ladon.Decoder(model, heads).generate(**inputs, **options)
    assert "\n" not in str(error.value)


def test_prompts_whose_mask_no_longer_fits_are_refused(demo: Any) -> None:
    model, tokenizer, heads = demo
    inputs = tokenizer(["import os\n", "x"], return_tensors="pt", padding=True)
    with pytest.raises(ladon.InputError, match="makes prompts of 3 tokens into 2"):
        ladon.Decoder(model, heads).generate(**inputs, max_new_tokens=4, tokenizer=tokenizer, token_healing=True)


def test_a_tokenizer_without_a_first_token_is_refused(demo: Any) -> None:
    model, _, heads = demo
    _, tokenizer, _ = ladon.load_demo(torch.float32)
    inputs = tokenizer(PROMPTS[1], return_tensors="pt")
    with pytest.raises(ladon.InputError, match="needs a tokenizer with bos_token and pad_token, and this one has None"):
        ladon.Decoder(model, heads).generate(**inputs, max_new_tokens=4, tokenizer=tokenizer, token_healing=True)
