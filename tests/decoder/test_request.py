"""What a request may hold: prompts, limits and model inputs, each refused with one line where it cannot be honoured."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    DynamicCache,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

import ladon
from greedy import BATCH, MASK, PROMPT, plain
from ladon.errors import InputError


@pytest.fixture
def decoder(model):
    return ladon.Decoder(model)


def one_line(error: pytest.ExceptionInfo[InputError]) -> bool:
    return "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        (None, {}, "there is no prompt"),
        (None, {"inputs_embeds": torch.zeros(1, 4, 32)}, "inputs_embeds is not supported"),
        ([[3, 4, 5]], {}, "list"),
        (PROMPT.float(), {}, "torch.float32"),
        (PROMPT[0], {}, r"shape \[12\], not \[B, T\]"),
        (PROMPT[None], {}, r"shape \[1, 1, 12\]"),
        (torch.tensor([[3, 97]]), {}, "token 97, which is not among the model's 97"),
        (torch.tensor([[3, -1]]), {}, "token -1"),
        (PROMPT, {"max_length": 12}, "max_length"),
        (PROMPT, {"max_length": 5}, "max_length"),
        (PROMPT, {"max_new_tokens": "3"}, "max_new_tokens is '3'"),
        (PROMPT, {"max_new_tokens": -2}, "max_new_tokens is -2"),
        (PROMPT, {"attention_mask": torch.ones(1, 5)}, r"attention mask has shape \[1, 5\]"),
        (PROMPT, {"attention_mask": torch.ones(1, 1, 12, 12)}, "attention mask has shape"),
        (PROMPT, {"max_new_tokns": 4}, "max_new_tokns"),
        (PROMPT, {"past_key_values": DynamicCache()}, "past_key_values is a DynamicCache"),
        (PROMPT, {"do_sample": True, "temperature": 0.0}, "temperature"),
        (PROMPT, {"do_sample": True, "top_p": 0.0}, "top_p"),
        (PROMPT, {"do_sample": True, "top_k": -3}, "top_k"),
        (PROMPT, {"num_beams": 2, "num_return_sequences": 2}, "beam_search"),
    ],
)
def test_bad_requests_are_one_line(decoder, prompt, options, message):
    with pytest.raises(InputError, match=message) as error:
        decoder.generate(prompt, **{"max_new_tokens": 4, **options} if "max_length" not in options else options)
    assert one_line(error)


@pytest.mark.parametrize("limits", [{"min_new_tokens": 9, "max_new_tokens": 4}, {"min_length": 30, "max_length": 20}])
def test_limits_that_contradict_each_other_are_warned_of(model, decoder, limits):
    """By transformers, a line each; the text is `generate`'s, which ends where it may be longest."""
    with pytest.warns(UserWarning, match="Unfeasible length constraints") as seen:
        output = decoder.generate(PROMPT, **limits)
    assert all("\n" not in str(warning.message) for warning in seen)
    with pytest.warns(UserWarning, match="Unfeasible"):
        expected = model.generate(PROMPT, attention_mask=torch.ones_like(PROMPT), do_sample=False, **limits)
    assert torch.equal(output, expected)


def test_limits_are_those_of_the_merged_config(model, decoder):
    for name, value in {"max_new_tokens": 0, "max_length": 12}.items():
        config = GenerationConfig()
        setattr(config, name, value)
        with pytest.raises(InputError, match=name) as error:
            decoder.generate(PROMPT, generation_config=config)
        assert one_line(error)
    model.generation_config.max_new_tokens = 0
    with pytest.raises(InputError, match="max_new_tokens is 0"):
        decoder.generate(PROMPT)


def test_token_ids_in_the_padding_may_be_anything(model, decoder):
    ids = BATCH.masked_fill(MASK == 0, -100)
    output = decoder.generate(ids, attention_mask=MASK, max_new_tokens=4)
    assert torch.equal(output[:, 8:], decoder.generate(BATCH, attention_mask=MASK, max_new_tokens=4)[:, 8:])


def test_copies_asked_for_in_a_config(model, decoder):
    expected = plain(model, max_new_tokens=4).repeat(3, 1)
    config = GenerationConfig(max_new_tokens=4)
    config.num_return_sequences = 3
    assert torch.equal(decoder.generate(PROMPT, generation_config=config), expected)
    assert config.num_return_sequences == 3, "the user's config is as it was"
    assert torch.equal(decoder.generate(PROMPT, num_return_sequences=3, max_new_tokens=4), expected)
    model.generation_config.num_return_sequences = 3
    assert torch.equal(decoder.generate(PROMPT, max_new_tokens=4), expected)
    assert torch.equal(decoder.generate(PROMPT, max_new_tokens=4, num_return_sequences=1), expected[:1])
    ladon.attach(model)
    assert torch.equal(model.generate(PROMPT, max_new_tokens=4), expected)


def test_an_assistant_model_is_refused(model, decoder):
    with pytest.raises(InputError, match="assistant_model"):
        decoder.generate(PROMPT, max_new_tokens=4, assistant_model=model)


def test_a_cache_with_content_is_refused_wherever_it_is_given(model, decoder):
    cache = model(PROMPT[:, :5]).past_key_values
    with pytest.raises(InputError, match="past_key_values is a DynamicCache"):
        model.generate(PROMPT, custom_generate=decoder, max_new_tokens=4, past_key_values=cache)


def test_position_ids_that_count_the_tokens_are_allowed(model, decoder):
    counted = MASK.cumsum(-1) - 1
    expected = decoder.generate(BATCH, attention_mask=MASK, max_new_tokens=4)
    for padding in (0, 1, -1):
        given = counted.masked_fill(MASK == 0, padding)
        output = decoder.generate(BATCH, attention_mask=MASK, position_ids=given, max_new_tokens=4)
        assert torch.equal(output, expected)
    copies = decoder.generate(PROMPT, position_ids=torch.arange(12)[None], max_new_tokens=4, num_return_sequences=2)
    assert copies.shape == (2, 16)


@pytest.mark.parametrize("ids", [torch.arange(12)[None] + 50, torch.arange(11)[None], torch.arange(12).repeat(3, 1)])
def test_other_position_ids_are_refused(model, decoder, ids):
    for generate in (decoder.generate, lambda *args, **kw: model.generate(*args, custom_generate=decoder, **kw)):
        with pytest.raises(InputError, match="position_ids"):
            generate(PROMPT, position_ids=ids, max_new_tokens=4)


def test_model_inputs_that_change_the_answer_are_refused():
    config = GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)
    gpt2 = GPT2LMHeadModel(config).double().eval()
    decoder = ladon.Decoder(gpt2)
    with pytest.raises(InputError, match="token_type_ids: Ladon gives the model token ids and positions") as error:
        decoder.generate(PROMPT, token_type_ids=torch.full_like(PROMPT, 7), max_new_tokens=4)
    assert one_line(error)
    with pytest.raises(InputError, match="token_type_ids"):
        gpt2.generate(PROMPT, token_type_ids=torch.zeros_like(PROMPT), custom_generate=decoder, max_new_tokens=4)
    output = decoder.generate(PROMPT, token_type_ids=None, use_cache=False, logits_to_keep=1, max_new_tokens=4)
    assert torch.equal(output, plain(gpt2, max_new_tokens=4, pad_token_id=0))


def test_a_model_that_reads_images_decodes_text():
    text = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=16,
        patch_size=8,
        projection_dim=32,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=96)
    llava = LlavaForConditionalGeneration(config).double().eval()
    decoder = ladon.Decoder(llava)
    assert torch.equal(decoder.generate(PROMPT, max_new_tokens=8), plain(llava, max_new_tokens=8))
    with pytest.raises(InputError, match="no images or other inputs"):
        decoder.generate(PROMPT, max_new_tokens=8, pixel_values=torch.zeros(1, 3, 16, 16, dtype=torch.float64))


TEXT: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
VISION = {"hidden_size": 32, "intermediate_size": 48, "image_size": 16, "patch_size": 8}


def gemma3():
    text = {**TEXT, "sliding_window": 8, "sliding_window_pattern": 2}
    vision = {**VISION, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = Gemma3Config(text_config=text, vision_config=vision, image_token_index=96, mm_tokens_per_image=4)
    return Gemma3ForConditionalGeneration(config)


def qwen2_5_vl():
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    vision = {"depth": 1, "num_heads": 4, "out_hidden_size": 32, "fullatt_block_indexes": [0], **VISION}
    tokens = {"image_token_id": 96, "video_token_id": 95, "vision_start_token_id": 94, "vision_end_token_id": 93}
    config = Qwen2_5_VLConfig(text_config={**TEXT, "rope_parameters": rope}, vision_config=vision, **tokens)
    return Qwen2_5_VLForConditionalGeneration(config)


@pytest.mark.parametrize(("make", "name"), [(gemma3, "token_type_ids"), (qwen2_5_vl, "mm_token_type_ids")])
def test_token_types_of_text_alone(make, name):
    """As the processors of models that also read images return them."""
    torch.manual_seed(0)
    model = make().double().eval()
    model.generation_config.eos_token_id = None
    decoder = ladon.Decoder(model, budget=8)
    try:
        plain(model, PROMPT, max_new_tokens=1, **{name: torch.zeros_like(PROMPT)})
    except ValueError as error:
        pytest.skip(f"the installed transformers refuses it itself: {str(error)[:60]}")
    for ids, mask in ((PROMPT, torch.ones_like(PROMPT)), (BATCH, MASK)):
        options = {"attention_mask": mask, "max_new_tokens": 12, "pad_token_id": 0, name: torch.zeros_like(ids)}
        assert torch.equal(decoder.generate(ids, **options), plain(model, ids, **options))
        for types in (torch.ones_like(ids), torch.zeros_like(ids[:, 1:])):
            with pytest.raises(InputError, match=f"{name}: Ladon gives the model token ids"):
                decoder.generate(ids, **{**options, name: types})


def test_decoders_of_two_models_may_share_heads(model):
    """The second takes the heads with it, to its own dtype and projection; a run of the first fetches them back."""
    heads = ladon.new_heads(model, num_heads=3)
    first = ladon.Decoder(model, heads)
    expected = first.generate(PROMPT, max_new_tokens=16)
    second = ladon.Decoder(copy.deepcopy(model).float(), heads)
    assert torch.equal(first.generate(PROMPT, max_new_tokens=16), expected)
    second.generate(PROMPT, max_new_tokens=4)
    assert [len(step.path) for step in first.trace(PROMPT, max_new_tokens=16)]


def test_a_trace_of_several_prompts_is_refused(decoder):
    with pytest.raises(InputError, match="one sequence, but there are 2"):
        decoder.trace(torch.arange(3, 13).reshape(2, 5), max_new_tokens=4)
    one = decoder.trace(torch.arange(3, 13), max_new_tokens=4)
    assert [step.emitted for step in one] == [
        step.emitted for step in decoder.trace(torch.arange(3, 13)[None], max_new_tokens=4)
    ]
