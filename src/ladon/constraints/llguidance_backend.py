"""Constraints by JSON schema, regular expression or grammar, with the package llguidance.

It is an optional part of the installation (`pip install 'ladon-llm[structured]'`), imported when a constraint is made.
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ladon.errors import InputError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from transformers import PreTrainedTokenizerFast

_KEPT_TOKENIZERS = 8
_EXAMPLE = '{"type": "object"}'
_NO_WAY_ON = "NoExtension"  # how llguidance's message begins where a grammar ends in nothing
_SEPARATORS = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def json_schema(
    schema: dict[str, Any] | bool | str, tokenizer: PreTrainedTokenizerFast, *, any_whitespace: bool = False
) -> Grammar:
    """Texts that are JSON and fit a schema.

    Args:
        schema: a JSON schema, as a dict or as JSON text; True for any JSON value.
        tokenizer: the model's, a fast one.
        any_whitespace: let the model put spaces and line breaks where JSON has them, as in indented text; a model may
            then write nothing else for long. Otherwise a space follows each comma and colon, as `json.dumps` writes.

    Raises:
        InputError: the schema is empty, is no JSON, uses what is not supported, or allows nothing; or llguidance is not
            installed, or the tokenizer is not a fast one.
    """
    overrides = None if any_whitespace else _SEPARATORS
    text = _library().LLMatcher.grammar_from_json_schema(json.dumps(_read_schema(schema)), overrides=overrides)
    return Grammar("the JSON schema", text, tokenizer)


def regex(pattern: str, tokenizer: PreTrainedTokenizerFast) -> Grammar:
    """Texts that match a regular expression from their first to their last character.

    Args:
        pattern: in the syntax of Rust's `regex` crate: no look-around and no references to groups.
        tokenizer: the model's, a fast one.

    Raises:
        InputError: the pattern is empty, is none, or allows nothing; and as `json_schema`.
    """
    _refuse_empty("the regular expression", pattern)
    return Grammar("the regular expression", _library().LLMatcher.grammar_from_regex(pattern), tokenizer)


def grammar(text: str, tokenizer: PreTrainedTokenizerFast) -> Grammar:
    """Texts of a context-free grammar.

    Args:
        text: rules in llguidance's kind of Lark's notation; `start` is the first.
        tokenizer: the model's, a fast one.

    Raises:
        InputError: the grammar is empty, is none, or allows nothing; and as `json_schema`.
    """
    _refuse_empty("the grammar", text)
    return Grammar("the grammar", _library().LLMatcher.grammar_from_lark(text), tokenizer)


class Grammar:
    """What `json_schema`, `regex` and `grammar` make; see `ladon.constraints.state.Constraint`."""

    def __init__(self, name: str, text: str, tokenizer: PreTrainedTokenizerFast) -> None:
        """`text` is llguidance's own form of it, and `name` what errors call it."""
        self._tokenizer = _made_for_library(tokenizer, len(tokenizer) if hasattr(tokenizer, "__len__") else 0)
        self._start = _Matched(_library().LLMatcher(self._tokenizer, text, log_level=0), self._tokenizer)
        problem = self._start.problem
        if problem:
            raise InputError(f"{name} cannot be used: {problem}")
        if not any(self._start.allowed()):
            what = "only the empty text" if self._start.is_complete else "no text at all"
            raise InputError(f"{name} allows {what}; give one that allows at least one token")

    def start(self) -> _Matched:
        """The state before the first token."""
        return self._start


class _Matched:
    """A state: a matcher that is never moved on, only copied, in several threads if need be."""

    def __init__(self, matcher: LLMatcher, tokenizer: LLTokenizer) -> None:
        self._matcher, self._tokenizer = matcher, tokenizer
        self.problem = _problem_of(matcher)
        self.is_complete = not self.problem and bool(matcher.is_accepting())
        bits = bytearray(matcher.compute_bitmask())
        for token in tokenizer.eos_tokens:  # whoever asks knows which tokens end a text
            bits[token // 8] &= ~(1 << token % 8)
        self._allowed = b"" if matcher.is_error() else bytes(bits)
        self.problem = _problem_of(matcher)

    def allowed(self) -> bytes:
        return self._allowed

    def after(self, token: int) -> _Matched:
        matcher = self._matcher.deep_copy()
        matcher.consume_token(token)
        return _Matched(matcher, self._tokenizer)


def _problem_of(matcher: LLMatcher) -> str:
    """What a matcher complains of; that it knows no way on is no complaint."""
    message = matcher.get_error()
    return "" if message.startswith(_NO_WAY_ON) else _first_line(message)


@lru_cache(maxsize=_KEPT_TOKENIZERS)
def _made_for_library(tokenizer: PreTrainedTokenizerFast, num_tokens: int) -> LLTokenizer:
    """The tokenizer, which has so many tokens, as llguidance has it: made once, as that may take a second."""
    from llguidance.hf import from_tokenizer

    try:
        made: LLTokenizer = from_tokenizer(tokenizer)
    except ValueError as error:
        raise InputError(
            f"constraints need a fast tokenizer of transformers, and {type(tokenizer).__name__} cannot be used: "
            f"{_first_line(str(error))}"
        ) from error
    return made


def _read_schema(schema: dict[str, Any] | bool | str) -> dict[str, Any]:
    """The schema as an object, {} for true; `InputError` if it is none, an empty one, or false."""
    document: Any = schema
    if isinstance(schema, str):
        _refuse_empty("the JSON schema", schema)
        try:
            document = json.loads(schema)
        except ValueError as error:
            raise InputError(f"the JSON schema is no JSON: {_first_line(str(error))}") from error
    if document is True:
        return {}
    if document == {}:
        raise InputError("the JSON schema is empty; say what JSON you want, or give true for any JSON")
    if document is False:
        raise InputError(f"the JSON schema is false, which allows no text at all; give an object, such as {_EXAMPLE}")
    if not isinstance(document, dict):
        raise InputError(f"the JSON schema is {type(document).__name__}; give an object, such as {_EXAMPLE}")
    return document


def _refuse_empty(name: str, text: str) -> None:
    if not isinstance(text, str):
        raise InputError(f"{name} is {type(text).__name__}; give its text")
    if not text.strip():
        raise InputError(f"{name} is empty; say what texts are allowed")


def _first_line(text: str) -> str:
    """What a library says, without its parser's state or pictures."""
    lines = [line.strip() for line in text.split("<state>")[0].splitlines()]
    return " ".join(line for line in lines if line)[:300]


def _library() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise InputError(
            "constraints need the package llguidance, which is not installed; run: pip install 'ladon-llm[structured]'"
        ) from error
    return llguidance
