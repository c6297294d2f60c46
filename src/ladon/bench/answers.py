"""Answers in the rows that FastChat's MT-Bench tools read, one row per question and mode."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ladon.bench.runner import Measured, Subject

if TYPE_CHECKING:
    from collections.abc import Sequence


def answer_rows(subject: Subject, measured: Sequence[Measured], stamp: float) -> Iterator[str]:
    """JSON lines; `model_id` is the model's name and the mode.

    Of each turn: its text, `idxs` (decode steps), `new_tokens` (all new tokens) and `wall_time` (seconds of the call,
    prefill included; rows decoded together share it), from the first timed repeat.
    """
    for entry in measured:
        label = entry.system if entry.budget is None else f"{entry.system}-{entry.budget}"
        turns: dict[int | str, list[tuple[str, int, int, float]]] = {}
        for group, run in zip(entry.groups, entry.timed[0], strict=True):
            for request, output in zip(group, run.outputs, strict=True):
                text = str(subject.tokenizer.decode(output, skip_special_tokens=True))
                row = (text, run.stats.forwards, len(output), run.seconds)
                turns.setdefault(request.question.question_id, []).append(row)
        for question_id, rows in turns.items():
            texts, steps, tokens, seconds = (list(column) for column in zip(*rows, strict=True))
            model_id = f"{subject.name}-{label}"
            choice = {"index": 0, "turns": texts, "idxs": steps, "new_tokens": tokens, "wall_time": seconds}
            yield json.dumps(
                {
                    "question_id": question_id,
                    "answer_id": uuid.uuid4().hex[:22],
                    "model_id": model_id,
                    "choices": [choice],
                    "tstamp": stamp,
                },
                ensure_ascii=False,
            )
