"""Rows of training data: examples as `ladon train` reads them, and the documents that can be learned from."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from ladon.errors import InputError
from ladon.train.data.prompts import encode_chat, messages_of, refuse_template_options, token_list
from ladon.train.data.records import Record, UnusableRow, read_records

_ANSWERS = ("answer", "response", "completion", "output")
_FORMS = "prompt_ids and answer_ids, messages, conversations, prompt with answer, response or completion, or text"
_SHOWN_CHARS = 600


@dataclass(frozen=True)
class Example:
    """What heads are trained on.

    Attributes:
        id: the row's own, or its place in the data set.
        token_ids: the whole sequence.
        learned: for each token, whether it is one that the model would have to say.
        refused: why the row cannot be used; empty if it can.
    """

    id: str
    token_ids: list[int]
    learned: list[bool]
    refused: str = ""


def read_rows(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    field: str | None = None,
    limit: int | None = None,
    split: str = "train",
) -> list[Example]:
    """Training examples of a data set.

    Rows may hold `prompt_ids` and `answer_ids` (what `ladon distill` writes), `messages` or `conversations` (the
    assistant's turns are learned), `prompt` with `answer`, `response`, `completion` or `output`, or `text` (all of it
    is learned). An answer given as text ends with the tokenizer's end-of-sequence token.

    Args:
        source: what `ladon.train.data.records.read_records` takes.
        tokenizer: the model's own.
        field: a field with text, all of which is learned, instead of these.
        limit: rows to read at most.
        split: of a hub id or a folder.

    Raises:
        InputError: what `read_records` raises; a row of another form; a chat that cannot be encoded or marked.
    """
    examples = []
    for record in read_records(source, limit=limit, split=split):
        name = record.own_id or str(record.index)
        try:
            examples.append(Example(name, *_encode(record, tokenizer, field)))
        except UnusableRow as error:
            examples.append(Example(name, [], [], error.reason))
    return examples


def _encode(record: Record, tokenizer: PreTrainedTokenizerBase, field: str | None) -> tuple[list[int], list[bool]]:
    """A row's tokens, and which of them are learned."""
    row = {name for name, value in record.fields.items() if value is not None}
    if field is not None:
        return _text(record, tokenizer, field)
    if {"prompt_ids", "answer_ids"} <= row:
        return _joined(token_list(record, "prompt_ids"), token_list(record, "answer_ids"))
    for name in ("messages", "conversations"):
        if name in row:
            return encode_chat(tokenizer, messages_of(record, name), record)
    answer = next((name for name in _ANSWERS if name in row), None)
    if "prompt" in row and answer is not None:
        refuse_template_options(record)
        prompt_ids, said = _text(record, tokenizer, "prompt")[0], _text(record, tokenizer, answer, special=False)[0]
        end = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
        return _joined(prompt_ids, [*said, *end])
    if "text" in row:
        return _text(record, tokenizer, "text")
    raise record.wrong(f"it has {', '.join(record.fields) or 'nothing'}; give {_FORMS}, or name a text with --field")


def _text(
    record: Record, tokenizer: PreTrainedTokenizerBase, name: str, *, special: bool = True
) -> tuple[list[int], list[bool]]:
    text = record.fields.get(name)
    if not isinstance(text, str):
        raise record.wrong(f"`{name}` is a {type(text).__name__}; give a text")
    ids = [int(token) for token in tokenizer(text, add_special_tokens=special)["input_ids"]] if text else []
    return ids, [True] * len(ids)


def _joined(prompt_ids: Sequence[int], answer_ids: Sequence[int]) -> tuple[list[int], list[bool]]:
    return [*prompt_ids, *answer_ids], [False] * len(prompt_ids) + [True] * len(answer_ids)


@dataclass(frozen=True, slots=True)
class Document:
    """An example as it is trained on.

    Attributes:
        id: the example's.
        tokens: [T] int32.
        learned: [T] bool.
    """

    id: str
    tokens: NDArray[np.int32]
    learned: NDArray[np.bool_]

    def all_learned(self) -> Document:
        """The same with its prompt learned too."""
        return replace(self, learned=np.ones_like(self.learned))


def documents_from(examples: Sequence[Example], vocab_size: int, length: int) -> tuple[list[Document], dict[str, int]]:
    """The examples that have something to learn, cut to `length` tokens, and how many were cut or dropped and why.

    Raises:
        InputError: no example, none with anything to learn, or one with a token that the model does not know.
    """
    if not examples:
        raise InputError("the data set has no row; give rows with a text or an answer to learn from")
    documents, notes = [], Counter[str]()
    for example in examples:
        tokens = np.asarray(example.token_ids, dtype=np.int64)
        if len(tokens) and not 0 <= tokens.min() <= tokens.max() < vocab_size:
            wrong = int(tokens[(tokens < 0) | (tokens >= vocab_size)][0])
            raise InputError(
                f"row {example.id} has the token id {wrong}, but the model's vocabulary has {vocab_size}; encode with "
                "this model's tokenizer"
            )
        learned = np.asarray(example.learned, dtype=np.bool_)
        reason = example.refused or _nothing_to_learn(learned, length)
        if reason:
            notes[f"dropped: {reason}"] += 1
            continue
        if len(tokens) > length:
            notes[f"cut to {length} tokens"] += 1
        documents.append(Document(example.id, tokens[:length].astype(np.int32), learned[:length]))
    if not documents:
        counts = ", ".join(f"{count} {reason}" for reason, count in notes.items())
        raise InputError(f"no row has anything to learn ({counts}); look at the rows' mask, or give a longer --length")
    return documents, dict(notes)


def _nothing_to_learn(learned: NDArray[np.bool_], length: int) -> str:
    """Why no head learns anything from a document; "" if one does."""

    def has_two(mask: NDArray[np.bool_]) -> bool:  # a next token and one after it, both learned, and one to read before
        return bool((mask[1:-1] & mask[2:]).any())

    if has_two(learned[:length]):
        return ""
    if has_two(learned):
        return f"its answer comes after the first {length} tokens"
    return "fewer than two learned tokens in a row" if learned.any() else "no learned token"


def split(documents: Sequence[Document], share: float) -> tuple[list[Document], list[Document]]:
    """Documents to learn from, and a share of them for the reports: 1 at least, chosen by the hash of their ids."""
    count = min(len(documents) - 1, max(1, round(share * len(documents)))) if share > 0 else 0
    ranked = sorted(range(len(documents)), key=lambda i: hashlib.sha256(documents[i].id.encode()).digest())
    chosen = set(ranked[:count])
    learning = [document for i, document in enumerate(documents) if i not in chosen]
    return learning, [documents[i] for i in sorted(chosen)]


def data_hash(documents: Sequence[Document]) -> str:
    """What names the data: a run goes on only with the same."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(document.id.encode() + document.tokens.tobytes() + document.learned.tobytes())
    return digest.hexdigest()[:16]


def shown(document: Document, tokenizer: PreTrainedTokenizerBase) -> str:
    """The beginning of a document as text, what is learned between double angle brackets."""
    parts, start = [], 0
    edges = (document.learned[1:] != document.learned[:-1]).nonzero()[0] + 1
    for stop in [*edges.tolist(), len(document.tokens)]:
        text = str(tokenizer.decode(document.tokens[start:stop].tolist()))
        if len(text) > _SHOWN_CHARS:
            text = f"{text[: _SHOWN_CHARS // 2]} … {text[-_SHOWN_CHARS // 2 :]}"
        parts.append(f"«{text}»" if document.learned[start] else text)
        start = stop
    return f"row {document.id}; learned is what stands between « and »:\n{''.join(parts)}"
