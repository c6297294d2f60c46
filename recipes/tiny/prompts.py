"""Beginnings of texts for `ladon distill` to continue, and texts for `ladon train`, cut from the corpus."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from corpus import SourceFile

CHARS = (200, 900)  # of a prompt, from and to; the bundled prompts have 900
TEXT_CHARS = 4000  # of a text, about 1,200 tokens


Row = dict[str, str]


def draw_prompts(sources: Sequence[SourceFile], shares: Sequence[float], count: int, seed: int) -> list[Row]:
    """About `count` rows `{"id", "prompt"}`, their files drawn by `shares`.

    A prompt starts at the start of a line and ends at the end of one, without its line break: the tokenizer joins that
    with the indentation of the line after it.
    """
    rng = np.random.default_rng((seed, 7))
    lines = [source.text.splitlines() for source in sources]
    drawn = rng.choice(len(sources), size=count, p=np.asarray(shares) / sum(shares))
    rows = []
    for number, file in enumerate(drawn):
        start, size = int(rng.integers(0, max(1, len(lines[file]) - 10))), int(rng.integers(*CHARS))
        prompt = _lines_of(lines[file], start, size)
        if prompt.strip() and len(prompt) < 2 * CHARS[1]:  # longer: one line of data, which no model can go on with
            rows.append({"id": f"{number}:{sources[file].path}:{start}", "prompt": prompt})
    return rows


def write_texts(path: Path, sources: Sequence[SourceFile]) -> None:
    """Write the files themselves as JSONL, `{"id", "text"}`, in pieces of whole lines; a file may come twice."""
    rows = []
    for number, source in enumerate(sources):
        lines, start = source.text.splitlines(), 0
        while start < len(lines):
            text = _lines_of(lines, start, TEXT_CHARS)
            rows.append({"id": f"{number}:{source.path}:{start}", "text": text})
            start += text.count("\n") + 1
    write_rows(path, [row for row in rows if row["text"].strip()])


def _lines_of(lines: Sequence[str], start: int, chars: int) -> str:
    """Whole lines from `start` on, at least one, until `chars` characters are reached or the file ends."""
    end, size = start, 0
    while end < len(lines) and size < chars:
        size += len(lines[end]) + 1
        end += 1
    return "\n".join(lines[start:end])


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write rows as JSONL; whoever looks sees nothing or all of them."""
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    partial.replace(path)
