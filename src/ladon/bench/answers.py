"""Answers in the files that FastChat's MT-Bench tools read: one file per system, one row per question."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

from ladon.bench.findings import Measured, Subject


def answer_files(path: Path, subject: Subject, measured: Sequence[Measured], stamp: float) -> dict[Path, str]:
    """The text of each answer file: `path` for one system, a file beside it for each of several.

    FastChat takes a model's name from its file's name, and of each question the last row.

    Args:
        path: what the user named, OUT.jsonl; several systems go to OUT-dynamic-16.jsonl and so on.
        subject: what was measured.
        measured: the systems, all at one batch size.
        stamp: seconds since 1970, for all rows.
    """
    if len(measured) == 1:
        return {path: "".join(_rows(subject, measured[0], stamp))}
    return {
        path.with_name(f"{path.stem}-{entry.label}{path.suffix}"): "".join(_rows(subject, entry, stamp))
        for entry in measured
    }


def _rows(subject: Subject, entry: Measured, stamp: float) -> Iterator[str]:
    """JSON lines; `model_id` is the model's name and the mode.

    Of each turn: its text, `idxs` (decode steps), `new_tokens` (all new tokens) and `wall_time` (seconds of the call,
    prefill included; rows decoded together share it), from the first timed repeat.
    """
    turns: dict[int | str, list[tuple[str, int, int, float]]] = {}
    for group, run in zip(entry.groups, entry.timed[0], strict=True):
        for request, output in zip(group, run.outputs, strict=True):
            text = str(subject.tokenizer.decode(output, skip_special_tokens=True))
            row = (text, run.stats.forwards, len(output), run.seconds)
            turns.setdefault(request.question.question_id, []).append(row)
    for question_id, rows in turns.items():
        texts, steps, tokens, seconds = (list(column) for column in zip(*rows, strict=True))
        choice = {"index": 0, "turns": texts, "idxs": steps, "new_tokens": tokens, "wall_time": seconds}
        row_of_file = {
            "question_id": question_id,
            "answer_id": uuid.uuid4().hex[:22],
            "model_id": f"{subject.name}-{entry.label}",
            "choices": [choice],
            "tstamp": stamp,
        }
        yield json.dumps(row_of_file, ensure_ascii=False) + "\n"
