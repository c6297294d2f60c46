"""Answers written by the target itself, one row each, in a file that only grows and can be resumed after any kill."""

from __future__ import annotations

import json
import mmap
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, fields
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from ladon.bench.quality.repetition import Repetition
from ladon.errors import InputError
from ladon.sampling.gumbel import mix
from ladon.sampling.sampling_params import check_settings
from ladon.train.data.prompts import Prompt

pass


@dataclass(frozen=True, kw_only=True, slots=True)
class DistilledRow:
    """One answer, as it stands in the file.

    Attributes:
        id: of the prompt.
        prompt_ids: what the model read.
        answer_ids: what it said, an end-of-sequence token included if it ended with one.
        answer: the same as text, without special tokens.
        finish: "stop" if it ended by itself, "length" if it was cut.
        seed: of its noise; None if it is greedy.
        sampling: temperature, top_p, top_k and max_new_tokens.
        model: whose answer it is.
        dtype: the model's.
        weights: a short hash of some of its weights; None if they are out of reach.
    """

    id: str
    prompt_ids: list[int]
    answer_ids: list[int]
    answer: str
    finish: str
    seed: int | None
    sampling: dict[str, float | int]
    model: str
    dtype: str
    weights: str | None = None

    def to_json(self) -> str:
        """One line, its line break included."""
        return json.dumps(asdict(self)) + "\n"

    @classmethod
    def from_json(cls, line: bytes, where: str) -> DistilledRow:
        """The row in a line; `InputError` if it is none."""
        try:
            values: Any = json.loads(line)
        except ValueError as error:  # UnicodeDecodeError among them
            raise InputError(f"{where}: no JSON ({error}); is this a file of ladon distill?") from error
        names = {field.name for field in fields(cls)}
        if not isinstance(values, dict) or not names - {"weights"} <= set(values):
            raise InputError(
                f"{where}: no row of ladon distill, which has {', '.join(sorted(names))}; give another file"
            )
        return cls(**{name: values[name] for name in names if name in values})


@contextmanager
def only_writer(path: Path) -> Iterator[None]:
    """While this lasts, no other run can write `path`: two that append to one file would double its rows.

    Raises:
        InputError: another run is at it, or the file cannot be made.
    """
    try:
        import fcntl
    except ImportError:  # not a POSIX system: no lock
        yield
        return
    with ExitStack() as stack:
        try:
            file = stack.enter_context(path.open("ab"))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"another run is writing {path}; wait for its end, or give another file") from error
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror}; give another place") from error
        yield


def repair(path: Path) -> int:
    """Cut off a last line that was not written to its end.

    Returns:
        The number of bytes cut, 0 if there is no such line, or no file.

    Raises:
        InputError: the file cannot be changed.
    """
    try:
        with path.open("r+b") as file:
            size = file.seek(0, os.SEEK_END)
            end = _end_of_lines(file, size)
            if end < size:
                file.truncate(end)
                os.fsync(file.fileno())
            return size - end
    except FileNotFoundError:
        return 0
    except OSError as error:
        raise InputError(f"cannot go on with {path}: {error.strerror}; give another place") from error


def _end_of_lines(file: BinaryIO, size: int) -> int:
    """Where the last whole line ends in a file of that size, searched from its end."""
    if size == 0:  # which cannot be mapped
        return 0
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.rfind(b"\n") + 1


def read_distilled(path: Path) -> list[DistilledRow]:
    """All rows of a file of whole lines; [] if there is no file."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        return [DistilledRow.from_json(line, f"{path} line {number}") for number, line in enumerate(file, start=1)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What every row of a file has in common.

    Attributes:
        model: whose answers they are.
        dtype: the model's.
        weights: a short hash of some of its weights; None if they are out of reach.
        max_new_tokens: tokens per answer at most.
        temperature: 0 is greedy.
        top_p: total probability of the tokens that are sampled from.
        top_k: how many tokens are sampled from at most; 0 for no bound.
        seed: what each row's own seed is made from.
    """

    model: str
    dtype: str
    max_new_tokens: int
    weights: str | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise `InputError` for a temperature, top_k or top_p that cannot be used."""
        check_settings(self.temperature, self.top_k, self.top_p)

    @property
    def sampling(self) -> dict[str, float | int]:
        """As each row records it."""
        return {name: getattr(self, name) for name in ("temperature", "top_p", "top_k", "max_new_tokens")}

    def seed_of(self, prompt: Prompt) -> int | None:
        """The seed of one row's noise; None if there is no noise."""
        return mix(self.seed, prompt.index) if self.temperature > 0 else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What the model said.

    Attributes:
        prompt: what it was asked.
        token_ids: an end-of-sequence token included if it ended with one.
        text: the same without special tokens.
        finish: "stop" or "length".
    """

    prompt: Prompt
    token_ids: list[int]
    text: str
    finish: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """A prompt without an answer: why in a few words that rows share, and what there is to know of this one."""

    prompt: Prompt
    reason: str
    detail: str = ""


class Answerer(Protocol):
    """Answers prompts, some at a time; what comes together is written together."""

    def answers(self, prompts: Sequence[Prompt], settings: Settings) -> Iterator[list[Answer | Failure]]:
        """Answers and failures, each prompt once, in any order."""


@dataclass(kw_only=True)
class Report:
    """What a run did.

    Attributes:
        total: prompts asked for.
        resumed: of them, those that the file had answers to before.
        rows: answers written by this run.
        tokens: tokens in these.
        seconds: of wall clock.
        failures: prompts without an answer, by reason.
        repetition: loops in the answers.
    """

    total: int
    resumed: int
    rows: int = 0
    tokens: int = 0
    seconds: float = 0.0
    failures: Counter[str] = field(default_factory=Counter)
    repetition: Repetition = field(default_factory=Repetition)

    @property
    def done(self) -> int:
        """Prompts that are dealt with, those of earlier runs and failures included."""
        return self.resumed + self.rows + self.failures.total()

    @property
    def seconds_left(self) -> float:
        """Estimate for the rest, at the mean speed of this run; 0 before the first answer."""
        return (self.total - self.done) * self.seconds / max(1, self.done - self.resumed)

    @property
    def tokens_per_second(self) -> float:
        """Tokens of the answers per second of the whole run; 0 before the first."""
        return self.tokens / self.seconds if self.seconds else 0.0


def failed_path(out: Path) -> Path:
    """Where the prompts without an answer are listed, beside the answers."""
    return out.with_name(f"{out.name.removesuffix('.jsonl')}.failed.jsonl")


def distill(
    prompts: Sequence[Prompt],
    out: Path,
    answerer: Answerer,
    settings: Settings,
    *,
    first: Callable[[Answer], None] = lambda answer: None,
    progress: Callable[[Report], None] = lambda report: None,
    notice: Callable[[str], None] = lambda line: None,
) -> Report:
    """Answer every prompt that `out` has no answer to, and append the answers.

    What comes together is written in one piece and synchronised; a row is in the file as a whole or not at all, except
    for a last line that a kill has torn: the next run cuts it off and answers its prompt again.

    Args:
        prompts: what to answer.
        out: a JSONL file; made if it is not there.
        answerer: who answers.
        settings: what the rows record; those of the rows in `out` must be the same.
        first: called with the first answer.
        progress: called at the start, and whenever rows have been written.
        notice: called with a line for people.

    Raises:
        InputError: the file's rows are of another model, other settings or other prompts; it cannot be written; another
            run is writing it.
    """
    with only_writer(out):
        cut = repair(out)
        if cut:
            notice(
                f"{out}: the last line was not written to its end; {cut} bytes cut off, its prompt is answered again"
            )
        done = _done(read_distilled(out), prompts, settings, out)
        left = [prompt for prompt in prompts if prompt.id not in done]
        report = Report(total=len(prompts), resumed=len(prompts) - len(left))
        failed = failed_path(out)
        failed.unlink(missing_ok=True)  # what failed before is tried again
        asked = [prompt for prompt in left if prompt.token_ids]
        empty: list[Answer | Failure] = [
            Failure(prompt=prompt, reason=prompt.refused or "empty prompt") for prompt in left if not prompt.token_ids
        ]
        progress(report)
        started = time.perf_counter()
        for outcomes in chain([empty] if empty else [], answerer.answers(asked, settings)):
            outcomes = [_not_empty(outcome) for outcome in outcomes]
            answers = [outcome for outcome in outcomes if isinstance(outcome, Answer)]
            failures = [outcome for outcome in outcomes if isinstance(outcome, Failure)]
            append(out, [_row(answer, settings).to_json() for answer in answers])
            append(failed, [_failed_line(failure) for failure in failures])
            if answers and report.rows == 0:
                first(answers[0])
            report.rows += len(answers)
            report.tokens += sum(len(answer.token_ids) for answer in answers)
            report.seconds = time.perf_counter() - started
            report.failures.update(failure.reason for failure in failures)
            for answer in answers:
                report.repetition.add(answer.token_ids, [])
            progress(report)
        return report


def append(path: Path, lines: Sequence[str]) -> None:
    """Add whole lines to a file and wait until they are on the disk.

    Raises:
        InputError: the file cannot be written; what it held before stays.
    """
    if not lines:
        return
    try:
        with path.open("ab", buffering=0) as file:
            data = memoryview("".join(lines).encode())
            while data:
                data = data[file.write(data) :]
            os.fsync(file.fileno())
    except OSError as error:
        raise InputError(
            f"cannot write {path}: {error.strerror}; the rows written before are whole: make room, then run the same "
            "command again to go on"
        ) from error


def _not_empty(outcome: Answer | Failure) -> Answer | Failure:
    """An answer without text teaches nothing and is a failure."""
    if isinstance(outcome, Answer) and not outcome.text:
        return Failure(prompt=outcome.prompt, reason="empty answer")
    return outcome


def _done(rows: Sequence[DistilledRow], prompts: Sequence[Prompt], settings: Settings, out: Path) -> set[str]:
    """Ids of the rows in the file; `InputError` if they are not what this run would have written."""
    asked = {prompt.id: prompt for prompt in prompts}
    for row in rows:
        pairs: list[tuple[str, object, object]] = [
            ("model", row.model, settings.model),
            ("dtype", row.dtype, settings.dtype),
            ("sampling", row.sampling, settings.sampling),
        ]
        if row.weights is not None:
            pairs.append(("model", row.weights, settings.weights))
        prompt = asked.get(row.id)
        if prompt is not None:
            pairs += [("seed", row.seed, settings.seed_of(prompt)), ("prompt", row.prompt_ids, prompt.token_ids)]
        for name, old, new in pairs:
            if old != new:
                values = "" if name == "prompt" else f" ({old}, now {new})"
                raise InputError(
                    f"{out} has a row {row.id!r} with another {name}{values}; go on with the options that it was "
                    "written with, or give another --out"
                )
    return {row.id for row in rows}


def _row(answer: Answer, settings: Settings) -> DistilledRow:
    return DistilledRow(
        id=answer.prompt.id,
        prompt_ids=answer.prompt.token_ids,
        answer_ids=answer.token_ids,
        answer=answer.text,
        finish=answer.finish,
        seed=settings.seed_of(answer.prompt),
        sampling=settings.sampling,
        model=settings.model,
        dtype=settings.dtype,
        weights=settings.weights,
    )


def _failed_line(failure: Failure) -> str:
    about = {"id": failure.prompt.id, "index": failure.prompt.index}
    return json.dumps(about | {"reason": failure.reason, "detail": failure.detail}) + "\n"
