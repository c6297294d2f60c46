"""What people have reported of other systems that decode several tokens at once: `docs/log/reports.md` has the list."""

from __future__ import annotations

import json
import warnings
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

import families
import ladon
from ladon.errors import InputError, UnsupportedModelError

TEXTS = ["import os\nimport sys\n\ndef main():\n", "class A:\n    def __init__(self", "x = [1, 2, 3]\nfor"]
KINDS = {"heads": dict(budget=24), "n-grams": dict(budget=16), "plain": dict(budget=1)}


@cache
def demo() -> tuple[Any, Any, Any]:
    return ladon.load_demo(torch.float64)


def ids_of(text: str) -> Tensor:
    return demo()[1](text, return_tensors="pt").input_ids


def decoder(kind: str) -> ladon.Decoder:
    model, _, heads = demo()
    return ladon.Decoder(model, heads if kind == "heads" else None, **KINDS[kind])


def theirs(ids: Tensor, model: Any = None, **options: Any) -> Any:
    model = model or demo()[0]
    mask = torch.ones_like(ids)
    return type(model).generate(model, ids, **{"attention_mask": mask, "do_sample": False, **options})


@pytest.mark.parametrize("kind", ["heads", "n-grams"])
def test_an_end_in_the_middle_of_a_draft(kind: str) -> None:
    """huggingface/transformers 31301: an end-of-sequence token that was accepted within a draft ends the text there."""
    ids = ids_of(TEXTS[0])
    whole = theirs(ids, max_new_tokens=24, eos_token_id=None)[0, ids.shape[1] :].tolist()
    ours = decoder(kind)
    for end in sorted(set(whole)):
        output = ours.generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=end)[0, ids.shape[1] :]
        assert output.tolist() == whole[: whole.index(end) + 1]


def test_n_grams_without_an_end_token() -> None:
    """huggingface/transformers 46790: drafting from the prompt where no token ends a text."""
    ids, options = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 7, 8]]), dict(max_new_tokens=15, eos_token_id=None)
    assert torch.equal(decoder("n-grams").generate(ids, do_sample=False, **options), theirs(ids, **options))


@pytest.mark.parametrize("kind", ["heads", "n-grams"])
def test_a_constraint_whose_text_the_prompt_holds(kind: str) -> None:
    """vllm-project/vllm 10442, sgl-project/sglang 21723: JSON is whole, and nothing follows where the grammar ends."""
    schema = {"type": "array", "items": {"enum": ["abc", "abd"]}, "minItems": 2, "maxItems": 3}
    ids = ids_of('["abc", "abd", "abc"]\n["abc", "abd", "abc"]\n')
    texts = set()
    for ours in (decoder(kind), decoder("plain")):
        constraint = ladon.json_schema(schema, demo()[1])
        output = ours.generate(ids, max_new_tokens=40, do_sample=False, constraint=constraint)
        assert ours.complete == [True]
        texts.add(demo()[1].decode(output[0, ids.shape[1] :], skip_special_tokens=True))
    assert len(texts) == 1 and 2 <= len(json.loads(texts.pop())) <= 3


def test_log_probabilities_with_n_grams_and_a_penalty() -> None:
    """vllm-project/vllm 17876: they are those of plain decoding, for every token."""
    ids = ids_of(TEXTS[0])
    options = dict(
        max_new_tokens=20, repetition_penalty=1.1, output_scores=True, output_logits=True, return_dict_in_generate=True
    )
    ours, expected = decoder("n-grams").generate(ids, do_sample=False, **options), theirs(ids, **options)
    for name in ("sequences", "scores", "logits"):
        torch.testing.assert_close(ours[name], expected[name], rtol=1e-5, atol=1e-5)


def test_logits_at_prompt_lengths_around_a_chunk() -> None:
    """vllm-project/vllm 53488: prompts of certain lengths, read in chunks between others' steps, had wrong ones."""
    dice = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 4096, (size,), generator=dice) for size in (1, 2, 63, 64, 65, 127, 128, 129, 257, 513)]
    ours = decoder("heads")
    rows = ours.rows(prompts, max_new_tokens=3, output_logits=True, return_dict_in_generate=True)
    list(ours.decode(rows, max_rows=4))
    for row, prompt in zip(rows, prompts, strict=True):
        expected = theirs(prompt[None], max_new_tokens=3, output_logits=True, return_dict_in_generate=True)
        assert row.tokens == expected.sequences[0, len(prompt) :].tolist()
        torch.testing.assert_close(torch.stack(row.kept["logits"]), torch.cat(expected.logits), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_drafts_beyond_the_context(family: str) -> None:
    """turboderp-org/exllamav2 274: the last tokens that fit are decoded, though drafts would go further."""
    model = families.build(family, torch.float64)
    model.generation_config.eos_token_id = None
    ours = ladon.Decoder(model, ladon.new_heads(model, num_heads=4), budget=32)
    for left in (1, 3, 9):
        ids = torch.randint(3, 97, (1, model.config.max_position_embeddings - left))
        expected = theirs(ids, model, max_new_tokens=left)
        assert torch.equal(ours.generate(ids, max_new_tokens=left, do_sample=False), expected)


def test_a_stop_string_in_a_draft_that_crosses_the_limit() -> None:
    """sgl-project/sglang 31599, vllm-project/vllm 47616: the stop comes first, and no score is left beyond it."""
    ids, tokenizer = ids_of(TEXTS[0]), demo()[1]
    whole = tokenizer.decode(theirs(ids, max_new_tokens=14, eos_token_id=None)[0, ids.shape[1] :])
    ours = decoder("heads")
    for place in range(2, len(whole) - 3, 9):
        for limit in (4, 7, 14):
            options: dict[str, Any] = dict(max_new_tokens=limit, stop_strings=[whole[place : place + 3]])
            options |= dict(tokenizer=tokenizer, output_scores=True, return_dict_in_generate=True)
            output, expected = ours.generate(ids, do_sample=False, **options), theirs(ids, **options)
            assert torch.equal(output.sequences, expected.sequences) and len(output.scores) == len(expected.scores)


@pytest.mark.parametrize("limit", range(1, 12))
def test_as_many_tokens_as_were_asked_for(limit: int) -> None:
    """ikawrakow/ik_llama.cpp 2358: a draft that crosses the limit is neither cut short nor counted whole."""
    ours, ids = decoder("heads"), ids_of(TEXTS[0])
    output = ours.generate(ids, max_new_tokens=limit, do_sample=False, eos_token_id=None)
    assert output.shape[1] - ids.shape[1] == limit and ours.stats.tokens == limit - 1  # the prefill's is not counted


def test_a_seed_holds_whatever_else_is_in_the_batch() -> None:
    """vllm-project/vllm 51226: the row's text is its own; a row without a seed beside it is refused, not mixed in."""
    ours, ids = decoder("heads"), ids_of(TEXTS[0])
    options: dict[str, Any] = dict(max_new_tokens=12, do_sample=True)
    alone = ours.generate(ids, seed=[42], **options)[0]
    for other in (7, 9):
        assert torch.equal(ours.generate(ids.repeat(2, 1), seed=[42, other], **options)[0], alone)
    with pytest.raises(InputError, match=r"give a number from 0 .* or one for each row"):
        ours.generate(ids.repeat(2, 1), seed=[42, None], **options)


def test_without_a_seed_every_text_is_drawn_anew() -> None:
    """NVIDIA/TensorRT-LLM 19487: neither the rows of a call nor two calls share their noise."""
    ours, ids = decoder("heads"), ids_of(TEXTS[0])
    options: dict[str, Any] = dict(max_new_tokens=20, do_sample=True, temperature=1.5, top_k=0)
    outputs = [ours.generate(ids, num_return_sequences=3, **options) for _ in range(2)]
    assert len({tuple(row.tolist()) for output in outputs for row in output}) == 6


def test_a_processor_that_ends_a_thought_after_so_many_tokens() -> None:
    """sgl-project/sglang 26330: a user's processor that looks at the text so far is asked for every token."""
    ids, end = ids_of(TEXTS[1]), demo()[1]("\n").input_ids[0]

    class Budget(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            if input_ids.shape[1] - ids.shape[1] < 5 or (input_ids[:, ids.shape[1] + 5 :] == end).any():
                return scores
            forced = torch.full_like(scores, -torch.inf)
            forced[:, end] = 0.0
            return forced

    with warnings.catch_warnings(action="ignore"):  # it is decoded plainly, and told so
        output = decoder("heads").generate(
            ids, max_new_tokens=16, do_sample=False, logits_processor=LogitsProcessorList([Budget()])
        )
    assert torch.equal(output, theirs(ids, max_new_tokens=16, logits_processor=LogitsProcessorList([Budget()])))
    assert output[0, ids.shape[1] + 5] == end


def test_a_model_in_training() -> None:
    """huggingface/transformers 36051: with gradient checkpointing `generate` says other things; Ladon refuses."""
    model = families.build("llama", torch.float64)
    ours = ladon.Decoder(model, ladon.new_heads(model, num_heads=3), budget=12)
    model.train()
    with pytest.raises(UnsupportedModelError, match=r"is in training mode, .*Call model.eval\(\)"):
        ours.generate(torch.arange(3, 15)[None], max_new_tokens=4)


def test_a_prompt_that_is_padding_altogether() -> None:
    """huggingface/transformers 23334: a text that begins with the token that also pads needs a mask."""
    ours, ids = decoder("heads"), torch.tensor([[demo()[0].generation_config.pad_token_id]])
    options: dict[str, Any] = dict(max_new_tokens=6, eos_token_id=None)
    output = ours.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **options)
    assert torch.equal(output, theirs(ids, **options))
    with pytest.raises(InputError, match="prompt 0 is empty: its attention mask is 0 everywhere"):
        ours.generate(ids, do_sample=False, **options)


def test_ids_of_half_the_width() -> None:
    """huggingface/tokenizers 1187: int32 ids are read, and what is returned is int64, as from transformers."""
    ids = ids_of(TEXTS[0]).int()
    ours, expected = decoder("heads").generate(ids, max_new_tokens=6, do_sample=False), theirs(ids, max_new_tokens=6)
    assert torch.equal(ours, expected) and ours.dtype == expected.dtype


def test_another_tree_says_the_same() -> None:
    """FasterDecoding/Medusa 99: with another tree the text was another."""
    model, _, heads = demo()
    trees = [dict(tree="chain", budget=5), dict(budget=8), dict(budget=64), dict(tree=ladon.FixedTree(((0,), (0, 0))))]
    ids = ids_of(TEXTS[2])
    for options in trees:
        output = ladon.Decoder(model, heads, **options).generate(ids, max_new_tokens=24, do_sample=False)
        assert torch.equal(output, theirs(ids, max_new_tokens=24)), options
