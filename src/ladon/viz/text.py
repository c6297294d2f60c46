"""Tokens as labels."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_STEP = "the answer ended with the prefill's token: no decode step"
_VISIBLE = str.maketrans({"\n": "⏎", "\t": "⇥", "\r": "␍", " ": "·"})


def label(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """One token as a short visible label: spaces and line ends become signs, repeats are counted."""
    text = str(tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False))
    if not text.strip("\N{REPLACEMENT CHARACTER}"):
        return f"<{token}>"
    text = re.sub(" {4,}", lambda run: f"·×{len(run[0])}", text).translate(_VISIBLE)
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)
