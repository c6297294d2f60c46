"""Token ids to text as they come: each token's own text, and never half a character.

What a token adds depends on the tokens before it: a byte-level token may hold a part of a character, a sentencepiece
tokenizer drops the space before the first word it sees. So a token is decoded behind the last few others, and what
they gave is cut off. The window is bounded, and so is the work per token, however long the text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

_UNKNOWN = "\N{REPLACEMENT CHARACTER}"
_HELD = 3  # a character has four bytes at most: so many of them are an unfinished one, each shown as one sign
_CONTEXT = 8  # tokens kept before the next one
_LONGEST = 24  # tokens in the window at most


class Detokenizer:
    """Gives the text that each new token adds.

    All texts together, `flush` included, are what the tokenizer makes of all tokens at once (without
    `clean_up_tokenization_spaces`, which takes back spaces that have been shown). There is one exception: where
    byte-fallback tokens (`<0xE2>`) go on from a whole character with bytes that are none, the tokenizer takes the
    character back, and here it stays.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, context: Sequence[int] = (), *, skip_special_tokens: bool = False
    ) -> None:
        """Start after the tokens `context`, whose text is not given again, but for a character they leave unfinished.

        Args:
            tokenizer: its `decode` is called for each token.
            context: what comes before, such as a prompt.
            skip_special_tokens: special tokens have no text.
        """
        self._tokenizer, self._skips = tokenizer, skip_special_tokens
        self._skipped: dict[int, bool] = {}
        self._ids = list(context[-_CONTEXT:])
        self._text = self._decode(self._ids)  # of the window
        self._shown = self._text[: len(self._text) - _unfinished(self._text)]

    def push(self, token: int) -> str:
        """The text that `token` adds; empty while a character is unfinished."""
        text = self._decode([*self._ids, token])
        if text == self._text and self._is_skipped(token):
            return ""
        self._ids.append(token)
        self._text = text
        unfinished, is_full = _unfinished(text), len(self._ids) >= _LONGEST
        if unfinished and not is_full and not text.startswith(self._shown):
            return ""  # the bytes of two characters, of which the second is unfinished, may decode as none at all
        end = max(len(text) - unfinished, len(self._shown))
        piece, self._shown = text[len(self._shown) : end], text[:end]
        if is_full or (not unfinished and len(self._ids) >= 2 * _CONTEXT):
            self._shorten(unfinished)
        return piece

    def flush(self) -> str:
        """What is still held back: an unfinished character, as the tokenizer shows it. The text ends here."""
        piece = self._text[len(self._shown) :]
        self._ids, self._text, self._shown = [], "", ""
        return piece

    def _shorten(self, unfinished: int) -> None:
        """Cut the window where its rest means what it meant: at the start of a character."""
        first = len(self._ids) - _CONTEXT
        tails = ((start, self._decode(self._ids[start:])) for start in range(first, first - _HELD - 1, -1))
        whole = ((start, tail) for start, tail in tails if tail and self._text.endswith(tail))
        start, tail = next(whole, (first, self._decode(self._ids[first:])))
        self._ids, self._text, self._shown = self._ids[start:], tail, tail[: len(tail) - unfinished]

    def _is_skipped(self, token: int) -> bool:
        """Whether a token is special and has no text for that. A space at the start of a text has none either."""
        if not self._skips:
            return False
        if token not in self._skipped:
            self._skipped[token] = self._decode([token]) == "" and self._decode([token], skips=False) != ""
        return self._skipped[token]

    def _decode(self, ids: list[int], *, skips: bool | None = None) -> str:
        skips = self._skips if skips is None else skips
        return str(self._tokenizer.decode(ids, skip_special_tokens=skips, clean_up_tokenization_spaces=False))


class PieceStreamer:
    """A streamer for `generate`, Ladon's or transformers', that hands on the text of each new token at once.

    transformers' own `TextStreamer` holds a word back until the next begins, and decodes a line again for each token.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        write: Callable[[str], Any],
        *,
        skip_special_tokens: bool = True,
    ) -> None:
        """`write` gets every piece of text that is not empty; the prompt is left out."""
        self._tokenizer, self._write, self._skips = tokenizer, write, skip_special_tokens
        self._pieces: Detokenizer | None = None  # until the prompt has come

    def put(self, value: Tensor) -> None:
        """The prompt [1, T] first, then new tokens, [1] each."""
        if self._pieces is None:
            self._pieces = Detokenizer(self._tokenizer, skip_special_tokens=self._skips)
            return
        for token in value.reshape(-1).tolist():
            self._hand_on(self._pieces.push(token))

    def end(self) -> None:
        """The answer is complete; the next `put` is a prompt again."""
        if self._pieces is not None:
            self._hand_on(self._pieces.flush())
        self._pieces = None

    def _hand_on(self, piece: str) -> None:
        if piece:
            self._write(piece)


def _unfinished(text: str) -> int:
    """How many signs at the end of a text may still become a character."""
    return min(len(text) - len(text.rstrip(_UNKNOWN)), _HELD)
