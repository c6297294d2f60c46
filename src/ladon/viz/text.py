"""Token ids to text, one token at a time and without decoding everything again."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_STEP = "the answer ended with the prefill's token: no decode step"
_VISIBLE = str.maketrans({"\n": "⏎", "\t": "⇥", "\r": "␍", " ": "·"})


class TextPieces:
    """Gives the text that each new token adds.

    A token may hold part of a character or lose its leading space when decoded alone, so it is decoded together with
    the tokens before it, back to the last clean cut.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, context: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = list(context[-8:])
        self._shown = self._decode(self._ids)

    def push(self, token: int) -> str:
        """The text that `token` adds; empty while a character is incomplete."""
        self._ids.append(token)
        text = self._decode(self._ids)
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        piece = text[len(self._shown) :]
        self._ids = self._ids[-8:]
        self._shown = self._decode(self._ids)
        return piece

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def label(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """One token as a short visible label: spaces and line ends become signs, repeats are counted."""
    text = str(tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False))
    if not text.strip("\N{REPLACEMENT CHARACTER}"):
        return f"<{token}>"
    text = re.sub(" {4,}", lambda run: f"·×{len(run[0])}", text).translate(_VISIBLE)
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)
