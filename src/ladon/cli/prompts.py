"""Where a prompt comes from: the command line, a file, or standard input."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ladon.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


def read_prompt(prompt: str | None, prompt_file: Path | None) -> str:
    """The one prompt that was given, as it stands, line ends included.

    Raises:
        InputError: two were given, or none; it is empty or not UTF-8; or the file cannot be read.
    """
    if prompt is not None and prompt_file is not None:
        raise InputError("both --prompt and --prompt-file were given; give one of them")
    if prompt is not None:
        source, data = "the prompt", prompt.encode("utf-8", "surrogateescape")
    elif prompt_file is not None:
        source, data = str(prompt_file), _read(prompt_file)
    elif sys.stdin is None or sys.stdin.isatty():
        raise InputError("no prompt; give --prompt TEXT, --prompt-file FILE, or text on standard input")
    else:
        source, data = "standard input", sys.stdin.buffer.read()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{source} is not UTF-8 (byte {error.start}); give UTF-8 text") from error
    if not text:
        raise InputError(f"{source} is empty; give some text to continue")
    return text


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """Token ids of a prompt, [T]; `InputError` if there is none."""
    ids: Tensor = tokenizer(text, return_tensors="pt")["input_ids"][0].long()
    if len(ids) == 0:
        raise InputError("the prompt is empty: it has no tokens; give some text to continue")
    return ids


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read the prompt file {path}: {error.strerror}; give a readable text file") from error
