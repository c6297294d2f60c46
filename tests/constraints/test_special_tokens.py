"""Constraints whose text holds added and special tokens, ends of texts, or more tokens than the model has.

A random model of the tokenizer's size draws texts: all that it writes must be legal, and the whole text must match.
"""

from __future__ import annotations

import json
import re
import warnings
from functools import cache

import pytest
import torch
from tokenizers import AddedToken as RustToken
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from transformers import AddedToken, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import ladon
from ladon.errors import InputError

ADDED = ["<think>", "</think>", "[INST]", "zebra"]
CORPUS = ["import os <think>zebra</think> [INST] abc the them think end of text"] * 3


def byte_level() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=290, initial_alphabet=alphabet, special_tokens=["</s>"])
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def sentencepiece() -> PreTrainedTokenizerFast:
    """As Llama 2 has it: blanks are ▁, one goes before the text, unknown characters fall back on bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += '▁abcdefghijklmnopqrstuvwxyz<>[]"{}'
    merges = [("t", "h"), ("i", "n"), ("▁", "a"), ("th", "in"), ("thin", "k")]
    pieces += ["".join(pair) for pair in merges]
    places = {piece: place for place, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(places, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens([RustToken(name, special=True) for name in ("<unk>", "<s>", "</s>")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>", unk_token="<unk>")


TOKENIZERS = {"bytes": byte_level, "sentencepiece": sentencepiece}


@cache
def make(kind: str, special: bool, missing: int = 0, spare: int = 0):
    """A tokenizer with added tokens, and a decoder of a model that lacks some of these, or has more tokens."""
    tokenizer = TOKENIZERS[kind]()
    tokenizer.add_tokens([AddedToken(name, special=special, lstrip=False) for name in ADDED], special_tokens=special)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer) - missing + spare,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=256,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).double().eval()
    return tokenizer, ladon.Decoder(model, ladon.new_heads(model, num_heads=3), budget=12)


def written(decoder: ladon.Decoder, tokenizer, constraint: object, seed: int, **options) -> list[int]:
    inputs = tokenizer("import os", return_tensors="pt", add_special_tokens=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a row that ends early would say so
        output = decoder.generate(
            inputs.input_ids, max_new_tokens=120, do_sample=True, seed=seed, constraint=constraint, **options
        )
    assert decoder.complete == [True]
    return output[0, inputs.input_ids.shape[1] :].tolist()


def text_of(tokenizer: PreTrainedTokenizerFast, tokens: list[int], ends: set[int] | None = None) -> str:
    """The text as users see it, special tokens aside; an end of text may only come last."""
    ends = ends or {tokenizer.eos_token_id}
    assert not ends & set(tokens[:-1])
    kept = tokens[:-1] if tokens[-1] in ends else tokens
    inner = tokenizer.decode([*tokenizer("b", add_special_tokens=False).input_ids, *kept], skip_special_tokens=True)
    return inner.removeprefix("b")


PATTERNS = [
    "<think>[a-z]{2}",
    "[a-z]{2}</think>",
    "(<think>)?[a-z]{3}",
    "<thi.{1,5}",
    "x<think><think>y",
    "(<think>|zebra|\\[INST\\]){3}",
    "zebra\\[INST\\]zebra",
    " zebra  zebra <think> ",
    "a</s>b",
    "[a-c]{2}</s>",
    "é<think>é",
]


@pytest.mark.parametrize("special", [False, True], ids=["added", "special"])
@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("lacks", [0, 4], ids=["all", "lacks"])
def test_texts_match(kind: str, special: bool, lacks: int) -> None:
    tokenizer, decoder = make(kind, special, missing=lacks)
    for pattern in PATTERNS:
        constraint = ladon.regex(pattern, tokenizer)
        for seed in range(3):
            tokens = written(decoder, tokenizer, constraint, seed)
            assert re.fullmatch(pattern, text_of(tokenizer, tokens)), (pattern, seed, tokens)
            assert max(tokens) < len(tokenizer) - lacks


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_json_with_special_tokens_in_it(kind: str) -> None:
    tokenizer, decoder = make(kind, True)
    for schema in ({"const": "<think>x"}, {"enum": ["a</s>b", "zebra"]}, {"const": {"<think>": "</s>", "zebra": [1]}}):
        text = text_of(tokenizer, written(decoder, tokenizer, ladon.json_schema(schema, tokenizer), 0))
        assert json.loads(text) in (schema.get("enum") or [schema["const"]])


def test_a_grammar_may_name_special_tokens() -> None:
    tokenizer, decoder = make("bytes", True)
    think = tokenizer.convert_tokens_to_ids("<think>")
    tokens = written(decoder, tokenizer, ladon.grammar('start: <think> "ab" <think>', tokenizer), 0)
    assert tokens[0] == think == tokens[-2] and tokens[-1] == tokenizer.eos_token_id
    tokens = written(decoder, tokenizer, ladon.grammar("start: /[a-z]{2}/ </s>", tokenizer), 0)
    assert len(text_of(tokenizer, tokens)) == 2 and tokens[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("rules", ["start: </s> /[a-z]{2}/", 'start: "a" </s> "b"', "start: /[ab]/ </s> /[a-z]/"])
def test_an_end_of_text_inside_a_text_is_refused(rules: str) -> None:
    with pytest.raises(InputError, match="one that ends the text must come last") as caught:
        ladon.grammar(rules, make("bytes", True)[0])
    assert "\n" not in str(caught.value)


def test_a_token_that_the_model_lacks_is_refused_where_the_model_is_known() -> None:
    tokenizer, decoder = make("bytes", True, missing=4)
    for rules in ("start: <think> /[a-z]{2}/", 'start: "a" <think> "b"'):
        with pytest.raises(InputError, match=f"must be among the model's {len(tokenizer) - 4},"):
            written(decoder, tokenizer, ladon.grammar(rules, tokenizer), 0)


def test_the_model_has_more_tokens_than_the_tokenizer() -> None:
    tokenizer, decoder = make("bytes", False, spare=11)
    for seed in range(4):
        tokens = written(decoder, tokenizer, ladon.regex("[^x]{1,9}<think>[^x]{1,9}", tokenizer), seed)
        assert re.fullmatch("[^x]{1,9}<think>[^x]{1,9}", text_of(tokenizer, tokens), re.DOTALL), tokens


def test_an_end_of_text_that_is_also_text() -> None:
    """Where it may not end, such a text is spelt; a full stop cannot be, and is refused."""
    tokenizer, decoder = make("bytes", False)
    stop, think = (tokenizer.convert_tokens_to_ids(name) for name in ("z", "zebra"))
    constraint = ladon.regex("ab(zebra)?", tokenizer)
    tokens = written(decoder, tokenizer, constraint, 0, eos_token_id=[stop])
    assert text_of(tokenizer, tokens, {stop}) in ("ab", "abzebra")
    tokens = written(decoder, tokenizer, ladon.regex("zebra[a-c]", tokenizer), 0, eos_token_id=[think, 0])
    assert re.fullmatch("zebra[a-c]", text_of(tokenizer, tokens, {think, 0}))
    with pytest.raises(InputError, match="no text that this model can finish: no token may come after 'a'"):
        written(decoder, tokenizer, ladon.regex("a\\.a", tokenizer), 0, eos_token_id=tokenizer(".").input_ids)


def test_tokens_added_after_a_constraint_was_made() -> None:
    tokenizer, decoder = TOKENIZERS["bytes"](), make("bytes", False)[1]
    early = ladon.regex("<think>[a-c]{2}", tokenizer)
    tokenizer.add_tokens(ADDED)
    late = ladon.regex("<think>[a-c]{2}", tokenizer)
    for constraint in (early, late):
        assert re.fullmatch("<think>[a-c]{2}", text_of(tokenizer, written(decoder, tokenizer, constraint, 1)))


def test_another_end_of_text_is_noticed() -> None:
    tokenizer = TOKENIZERS["bytes"]()
    first = ladon.regex("a+", tokenizer)
    tokenizer.add_tokens(ADDED)
    tokenizer.eos_token = "zebra"
    second = ladon.regex("a+", tokenizer)
    assert first.start().after(tokenizer("a").input_ids[0]).is_complete
    assert second._tokens.ends == {tokenizer.convert_tokens_to_ids("zebra")}
