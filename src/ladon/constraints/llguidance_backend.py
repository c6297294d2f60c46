"""Constraints by JSON schema, regular expression or grammar, with the package llguidance.

It is an optional part of the installation (`pip install 'ladon-llm[structured]'`), imported when a constraint is made.
"""

from __future__ import annotations

import json
from copy import copy
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ladon.errors import InputError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from transformers import PreTrainedTokenizerFast

_KEPT_TOKENIZERS = 8
_STATES_LOOKED_AT, _FEW_WAYS = 64, 5
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
        text: rules in llguidance's kind of Lark's notation; `start` is the first. `<name>` is the special token of that
            name; the same in quotes is text, which is written with tokens of text.
        tokenizer: the model's, a fast one.

    Raises:
        InputError: the grammar is empty, is none, or allows nothing; and as `json_schema`.
    """
    _refuse_empty("the grammar", text)
    return Grammar("the grammar", _library().LLMatcher.grammar_from_lark(text), tokenizer)


class Grammar:
    """What `json_schema`, `regex` and `grammar` make; see `ladon.constraints.state.Constraint`.

    Text is written with tokens of text: a special token stands in a text only where a grammar names it, as `<think>`.
    """

    def __init__(self, name: str, text: str, tokenizer: PreTrainedTokenizerFast) -> None:
        """`text` is llguidance's own form of it, and `name` what errors call it."""
        made = _made_for_library(
            tokenizer,
            len(tokenizer) if hasattr(tokenizer, "__len__") else 0,
            getattr(tokenizer, "eos_token_id", None),
        )
        self._name = name
        self._tokens = _Tokens(made, frozenset(made.eos_tokens), _misread(tokenizer), made.vocab_size)
        self._start = _Matched(_library().LLMatcher(made, text, log_level=0), self._tokens)
        self._for_models: dict[_Tokens, Grammar] = {self._tokens: self}
        self._check()

    def start(self) -> _Matched:
        """The state before the first token."""
        return self._start

    def for_model(self, vocab_size: int | None, end_ids: frozenset[int]) -> Grammar:
        """The same for a model that has so many tokens, of which these end a text.

        Raises:
            InputError: it demands a token that the model has not, or that ends the text.
        """
        made = self._tokens.library
        size = made.vocab_size if vocab_size is None else min(vocab_size, made.vocab_size)
        tokens = replace(self._tokens, ends=self._tokens.ends | end_ids, size=size)
        if tokens not in self._for_models:
            bound = copy(self)
            bound._tokens, bound._start = tokens, _Matched(self._start.matcher, tokens)
            bound._check()
            self._for_models[tokens] = bound
        return self._for_models[tokens]

    def _check(self) -> None:
        """Raise `InputError` for a grammar in error, and for one of which no text can be written."""
        problem = self._start.problem
        if problem:
            raise InputError(f"{self._name} cannot be used: {problem}")
        stuck = _dead_end(self._start)
        if stuck is None:
            return
        if not stuck and not self._start.matcher.compute_ff_bytes():
            what = "only the empty text" if self._start.is_complete else "no text at all"
            raise InputError(f"{self._name} allows {what}; give one that allows at least one token")
        raise InputError(
            f"{self._name} allows no text that this model can finish: no token may come after "
            f"{self._tokens.library.decode_str(stuck)!r}. Special tokens must be among the model's "
            f"{self._tokens.size}, and one that ends the text must come last"
        )


def _dead_end(start: _Matched) -> list[int] | None:
    """The tokens of a beginning, if no way on from the start gives a text of at least one token; None if one may.

    Looked for where there are few ways, as in a text that is fixed.
    """
    ways: list[tuple[_Matched, list[int]]] = [(start, [])]
    written: list[int] = []
    for _ in range(_STATES_LOOKED_AT):
        if not ways:
            return written
        state, written = ways.pop()
        followers = _first_bits(state.allowed(), _FEW_WAYS)
        if (state.is_complete and written) or len(followers) == _FEW_WAYS:
            return None
        ways += [(state.after(token), [*written, token]) for token in followers]
    return None


@dataclass(frozen=True)
class _Tokens:
    """The tokens of a tokenizer that a model can write.

    Attributes:
        library: the tokenizer as llguidance has it.
        ends: tokens that end a text; whoever asks knows where they may come.
        misread: see `_misread`.
        size: tokens from this one on are not the model's.
    """

    library: LLTokenizer
    ends: frozenset[int]
    misread: frozenset[int]
    size: int

    def in_text(self, mask: bytes) -> bytearray:
        """Of a mask, the tokens that the model can write as text, ends aside."""
        bits = bytearray(mask[: (self.size + 7) // 8])
        if self.size % 8 and len(bits) > self.size // 8:
            bits[-1] &= (1 << self.size % 8) - 1
        for token in self.ends | self.misread:
            if token < self.size:
                bits[token // 8] &= ~(1 << token % 8)
        return bits

    def beginnings_of(self, text: bytes) -> list[int]:
        """Tokens of text that a text may begin with, and nothing that comes after it be known."""
        found = (_texts_of(self).get(text[: length + 1]) for length in range(len(text)))
        return [token for token in found if token is not None]


@lru_cache(maxsize=_KEPT_TOKENIZERS)
def _texts_of(tokens: _Tokens) -> dict[bytes, int]:
    """The token of each text, those aside that do not stand for their text."""
    unfit, library = tokens.ends | tokens.misread, tokens.library
    fit = (token for token in range(tokens.size) if token not in unfit and not library.is_special_token(token))
    return {library.decode_bytes([token]): token for token in fit}


def _misread(tokenizer: PreTrainedTokenizerFast) -> frozenset[int]:
    """Added tokens whose text the tokenizer itself reads as another: with a blank before, where it puts one there."""
    added = tokenizer.added_tokens_decoder.items()
    return frozenset(token for token, one in added if tokenizer.convert_ids_to_tokens(token) != one.content)


class _Matched:
    """A state: a matcher that is never moved on, only copied, in several threads if need be.

    Attributes:
        matcher: llguidance's.
        problem: see `State`.
        is_complete: see `State`.
    """

    def __init__(self, matcher: LLMatcher, tokens: _Tokens) -> None:
        self.matcher, self._tokens = matcher, tokens
        self.problem = _problem_of(matcher)
        self.is_complete = not self.problem and bool(matcher.is_accepting())
        mask = matcher.compute_bitmask()
        self._allowed = b"" if matcher.is_error() else self._writable(mask)
        self.problem = _problem_of(matcher)
        if not self.is_complete and not self.problem:
            self.is_complete = any(self._ends_with(token) for token in tokens.ends if _has_bit(mask, token))

    def allowed(self) -> bytes:
        return self._allowed

    def after(self, token: int) -> _Matched:
        return _Matched(self._moved_on(token), self._tokens)

    def _moved_on(self, token: int) -> LLMatcher:
        matcher = self.matcher.deep_copy()
        matcher.consume_token(token)
        return matcher

    def _ends_with(self, token: int) -> bool:
        """Whether the grammar itself demands this token, which ends a text, as its last."""
        return bool(self._moved_on(token).is_accepting())

    def _writable(self, mask: bytes) -> bytes:
        """A mask without what cannot be written here.

        Where only one text can come, llguidance allows but its first token, as the tokenizer splits it; that may be a
        special token, which it then refuses, or none of the model's. The text is then written with other tokens.
        """
        bits = self._tokens.in_text(mask)
        if len(bits) - bits.count(0) > 1:
            return bytes(bits)
        tokens = _first_bits(bits, 2)
        if len(tokens) > 1 or (tokens and self.matcher.validate_tokens(tokens) == 1):
            return bytes(bits)
        others = bytearray(len(bits))
        for token in self._tokens.beginnings_of(self.matcher.compute_ff_bytes()):
            if self.matcher.validate_tokens([token]) == 1:
                others[token // 8] |= 1 << token % 8
        return bytes(others)


def _has_bit(mask: bytes | bytearray, token: int) -> bool:
    return token // 8 < len(mask) and bool(mask[token // 8] >> token % 8 & 1)


def _first_bits(mask: bytes | bytearray, most: int) -> list[int]:
    """The first so many tokens of a mask."""
    found: list[int] = []
    for place in range(len(mask) - len(mask.lstrip(b"\0")), len(mask)):
        found += [token for token in range(place * 8, place * 8 + 8) if _has_bit(mask, token)]
        if len(found) >= most:
            break
    return found[:most]


def _problem_of(matcher: LLMatcher) -> str:
    """What a matcher complains of; that it knows no way on is no complaint."""
    message = matcher.get_error()
    return "" if message.startswith(_NO_WAY_ON) else _first_line(message)


@lru_cache(maxsize=_KEPT_TOKENIZERS)
def _made_for_library(tokenizer: PreTrainedTokenizerFast, num_tokens: int, end_id: int | None) -> LLTokenizer:
    """The tokenizer, with so many tokens and this end, as llguidance has it: made once, as that may take a second."""
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
