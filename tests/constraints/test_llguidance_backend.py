"""JSON schemas, regular expressions and grammars with the bundled model, against transformers' own generate."""

from __future__ import annotations

import json
import re
import sys
from functools import lru_cache

import jsonschema
import pytest
import torch
from llguidance import LLMatcher
from llguidance.hf import from_tokenizer
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerFast

import ladon
from ladon.constraints.llguidance_backend import _SEPARATORS
from ladon.errors import ConstraintError, InputError

SCHEMAS = {
    "object": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 12},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "is_admin": {"type": "boolean"},
        },
        "required": ["name", "age", "is_admin"],
        "additionalProperties": False,
    },
    "enum": {"enum": ["red", "green", {"mixed": ["red", "green"]}, None, 7]},
    "array": {
        "type": "array",
        "items": {"type": "integer", "minimum": -9, "maximum": 99},
        "minItems": 3,
        "maxItems": 5,
    },
    "nested": {
        "type": "object",
        "properties": {
            "module": {
                "type": "object",
                "properties": {
                    "path": {"type": "string", "pattern": "^[a-z]{2,8}[.]py$"},
                    "lines": {"type": "integer"},
                },
                "required": ["path"],
                "additionalProperties": False,
            },
            "imports": {"type": "array", "items": {"enum": ["os", "sys", "json"]}, "maxItems": 2},
        },
        "required": ["module", "imports"],
        "additionalProperties": False,
    },
    "number": {"type": "number", "minimum": 0.5, "exclusiveMaximum": 2},
    "string": {"type": "string", "minLength": 5, "maxLength": 16},
}
PROMPTS = ["def main():\n    settings = ", "# The answer as JSON:\n", "import json\n\nconfig = json.loads("]
LIMIT = 90


@lru_cache
def demo():
    return ladon.load_demo(dtype=torch.float64)


def ids_of(prompt: str) -> torch.Tensor:
    return torch.tensor(demo()[1](prompt).input_ids)


def schema_grammar(schema: object) -> str:
    return LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=_SEPARATORS)


class Reference(LogitsProcessor):
    """One row: a matcher of llguidance's own that reads the whole text anew before each token."""

    def __init__(self, grammar: str, prompt_length: int) -> None:
        self._tokenizer, self._grammar, self._length = from_tokenizer(demo()[1]), grammar, prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        matcher = LLMatcher(self._tokenizer, self._grammar)
        assert matcher.consume_tokens(input_ids[0, self._length :].tolist())
        bits = torch.frombuffer(bytearray(matcher.compute_bitmask()), dtype=torch.uint8)
        allowed = (bits[:, None] >> torch.arange(8) & 1).bool().flatten()[: scores.shape[-1]]
        return scores.masked_fill(~allowed, -torch.inf)


@lru_cache
def reference(grammar: str | None, prompt: str, limit: int = LIMIT, **options: float) -> list[int]:
    """What transformers' greedy generate says after a prompt."""
    model, ids = demo()[0], ids_of(prompt)[None]
    processors = LogitsProcessorList([] if grammar is None else [Reference(grammar, ids.shape[1])])
    mask = torch.ones_like(ids)
    output = model.generate(
        ids, attention_mask=mask, max_new_tokens=limit, do_sample=False, logits_processor=processors, **options
    )
    return output[0, ids.shape[1] :].tolist()


def make_decoder(**options) -> ladon.Decoder:
    model, _, heads = demo()
    return ladon.Decoder(model, heads, **options)


def new_tokens(decoder: ladon.Decoder, prompt: str, **options) -> list[int]:
    ids = ids_of(prompt)
    return decoder.generate(ids[None], max_new_tokens=LIMIT, **options)[0, len(ids) :].tolist()


def text_of(tokens: list[int]) -> str:
    return demo()[1].decode(tokens, skip_special_tokens=True)


def check_valid(tokens: list[int], schema: dict) -> None:
    jsonschema.validate(json.loads(text_of(tokens)), schema, format_checker=jsonschema.FormatChecker())


TREES = {
    "1": dict(budget=1),
    "8": dict(budget=8),
    "64": dict(budget=64),
    "chain": dict(tree="chain", budget=16),
    "pruned": dict(budget=24, prune=ladon.Pruning(layer=1, keep=6)),
}


@pytest.mark.parametrize("tree", TREES)
def test_every_schema_is_met_token_for_token(tree: str) -> None:
    """Greedy: the tokens of generate with a mask per token; complete, and valid as another package sees it."""
    decoder, steps = make_decoder(**TREES[tree]), {}
    for number, (name, schema) in enumerate(SCHEMAS.items()):
        prompt = PROMPTS[number % len(PROMPTS)]
        tokens = new_tokens(decoder, prompt, do_sample=False, constraint=ladon.json_schema(schema, demo()[1]))
        assert tokens == reference(schema_grammar(schema), prompt), name
        assert decoder.complete == [True], name
        check_valid(tokens, schema)
        steps[name] = decoder.stats.row_steps, len(tokens)
    saved = sum(length - 1 - count for count, length in steps.values())
    assert saved == 0 if tree == "1" else saved > 10, steps


@pytest.mark.parametrize("tree", ["8", "64", "pruned"])
def test_rows_of_one_batch(tree: str) -> None:
    """Constrained by different things or by nothing, two at a time: each says what it says alone."""
    tokenizer = demo()[1]
    schemas = [SCHEMAS["nested"], None, SCHEMAS["array"]]
    constraints = [None if schema is None else ladon.json_schema(schema, tokenizer) for schema in schemas]
    decoder = make_decoder(**TREES[tree])
    rows = decoder.rows([ids_of(prompt) for prompt in PROMPTS], max_new_tokens=40, constraint=constraints)
    list(decoder.decode(rows, max_rows=2))
    for row, schema, prompt in zip(rows, schemas, PROMPTS, strict=True):
        assert row.tokens == reference(None if schema is None else schema_grammar(schema), prompt, 40)
    assert rows[1].stats.drafts_checked == 0 < rows[0].stats.drafts_illegal < rows[0].stats.drafts_checked
    assert decoder.stats.drafts_illegal == sum(row.stats.drafts_illegal for row in rows)


def test_penalties_come_after_the_mask() -> None:
    schema, law = SCHEMAS["array"], dict(repetition_penalty=3.0)
    expected = reference(schema_grammar(schema), PROMPTS[0], **law)
    assert expected != reference(schema_grammar(schema), PROMPTS[0])
    constraint = ladon.json_schema(schema, demo()[1])
    for tree in ("1", "8", "chain"):
        assert new_tokens(make_decoder(**TREES[tree]), PROMPTS[0], do_sample=False, constraint=constraint, **law) == (
            expected
        )


@pytest.mark.parametrize("law", [dict(), dict(top_p=0.8, temperature=1.4, repetition_penalty=1.2)], ids=["bare", "cut"])
def test_sampled_texts_are_those_of_plain_decoding(law: dict) -> None:
    for seed, name in enumerate(("object", "nested", "string")):
        constraint = ladon.json_schema(SCHEMAS[name], demo()[1])
        options = dict(do_sample=True, top_k=0, seed=seed, constraint=constraint, **law)
        texts = [new_tokens(make_decoder(**TREES[tree]), PROMPTS[0], **options) for tree in TREES]
        assert all(tokens == texts[0] for tokens in texts)
        check_valid(texts[0], SCHEMAS[name])


@pytest.mark.parametrize("budget", [1, 16])
def test_regular_expressions_and_grammars(budget: int) -> None:
    tokenizer, decoder = demo()[1], make_decoder(budget=budget)
    pattern = r"[a-z]{1,8}_[0-9]{2,4}\.(py|txt)"
    tokens = new_tokens(decoder, PROMPTS[0], do_sample=False, constraint=ladon.regex(pattern, tokenizer))
    assert re.fullmatch(pattern, text_of(tokens)) and decoder.complete == [True]
    assert tokens == reference(LLMatcher.grammar_from_regex(pattern), PROMPTS[0])
    rules = 'start: call ("+" call){1,2}\ncall: NAME "(" [call] ")"\nNAME: "f" | "g"\n'
    tokens = new_tokens(decoder, PROMPTS[0], do_sample=False, constraint=ladon.grammar(rules, tokenizer))
    assert tokens == reference(LLMatcher.grammar_from_lark(rules), PROMPTS[0])
    assert set(text_of(tokens)) <= set("fg()+")


def test_white_space_is_the_models_choice_if_asked_for() -> None:
    loose = ladon.json_schema(SCHEMAS["array"], demo()[1], any_whitespace=True).start()
    fixed = ladon.json_schema(SCHEMAS["array"], demo()[1]).start()
    open_, line_break = demo()[1]("[").input_ids[0], demo()[1]("\n").input_ids[0]
    allowed = [state.after(open_).allowed()[line_break // 8] >> line_break % 8 & 1 for state in (loose, fixed)]
    assert allowed == [1, 0]


def test_a_text_that_is_cut_is_not_complete() -> None:
    constraint, decoder = ladon.json_schema(SCHEMAS["nested"], demo()[1]), make_decoder(budget=16)
    ids = ids_of(PROMPTS[0])[None]
    output = decoder.generate(
        ids, max_new_tokens=7, do_sample=False, constraint=constraint, return_dict_in_generate=True
    )
    cut = output.sequences[0, ids.shape[1] :].tolist()
    assert decoder.complete == [False] and output.complete == [False]
    assert cut == new_tokens(decoder, PROMPTS[0], do_sample=False, constraint=constraint)[:7]


def test_one_constraint_serves_rows_at_the_same_time() -> None:
    constraint, decoder = ladon.json_schema(SCHEMAS["object"], demo()[1]), make_decoder(budget=8)
    rows = decoder.rows([ids_of(prompt) for prompt in PROMPTS], max_new_tokens=60, constraint=constraint)
    list(decoder.decode(rows))
    assert [row.tokens for row in rows] == [reference(schema_grammar(SCHEMAS["object"]), p, 60) for p in PROMPTS]


def test_a_dead_end_keeps_what_was_written() -> None:
    constraint = ladon.grammar('start: "import " /[a-z]/ /[^\\s\\S]/\n', demo()[1])
    decoder = make_decoder(budget=8)
    rows = decoder.rows([ids_of(p) for p in PROMPTS[:2]], max_new_tokens=12, constraint=[constraint, None])
    list(decoder.decode(rows))
    assert re.fullmatch("import [a-z]", text_of(rows[0].tokens)) and isinstance(rows[0].error, ConstraintError)
    assert rows[1].tokens == reference(None, PROMPTS[1], 12) and rows[1].error is None


BAD_SCHEMAS = [
    ("", "the JSON schema is empty"),
    ({}, "the JSON schema is empty"),
    ("{}", "the JSON schema is empty"),
    ("{not json", "the JSON schema is no JSON"),
    ([1], "the JSON schema is list; give an object"),
    ("7", "the JSON schema is int; give an object"),
    (False, "the JSON schema is false, which allows no text"),
    ("false", "the JSON schema is false, which allows no text"),
    ({"type": "nope"}, "Invalid type: nope"),
    ({"type": "integer", "minimum": 5, "maximum": 3}, "minimum .5. is greater than maximum"),
    ({"type": "string", "minLength": 5, "maxLength": 2}, "minLength .5. is greater than maxLength"),
    ({"enum": []}, "the JSON schema cannot be used"),
    ({"type": "array", "items": {"type": "integer"}, "uniqueItems": True}, "uniqueItems"),
    ({"$ref": "#/nowhere"}, "does not exist"),
    ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
    ({"type": "string", "format": "nonsense"}, "Unknown format"),
]


@pytest.mark.parametrize(("schema", "message"), BAD_SCHEMAS)
def test_a_schema_that_cannot_be_used_is_one_line(schema: object, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        ladon.json_schema(schema, demo()[1])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "text", "message"),
    [
        (ladon.regex, "", "the regular expression is empty"),
        (ladon.regex, 7, "the regular expression is int"),
        (ladon.regex, "[a", "the regular expression cannot be used: .*unclosed"),
        (ladon.regex, "[^\\s\\S]", "the regular expression allows no text at all"),
        (ladon.regex, "()", "the regular expression allows only the empty text"),
        (ladon.grammar, " \n", "the grammar is empty"),
        (ladon.grammar, "start: missing", "the grammar cannot be used: .*unknown name"),
        (ladon.grammar, "start: /[^\\s\\S]/", "the grammar allows no text at all"),
        (ladon.grammar, "not a grammar {", "the grammar cannot be used"),
    ],
)
def test_a_pattern_or_grammar_that_cannot_be_used_is_one_line(make, text: object, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        make(text, demo()[1])
    assert "\n" not in str(caught.value)


def test_true_allows_any_json() -> None:
    assert any(ladon.json_schema(True, demo()[1]).start().allowed())
    assert any(ladon.json_schema("true", demo()[1]).start().allowed())


def test_tokenizers_that_do_not_do() -> None:
    from tokenizers import Tokenizer, models

    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")))
    for tokenizer in (words, "a name", None):
        with pytest.raises(InputError, match="need a fast tokenizer"):
            ladon.regex("a+", tokenizer)


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    for make in (lambda: ladon.json_schema({"type": "null"}, demo()[1]), lambda: ladon.regex("a", demo()[1])):
        with pytest.raises(InputError, match=r"pip install 'ladon-llm\[structured\]'"):
            make()
