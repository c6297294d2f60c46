"""Prompts to measure with: JSONL files with `prompt`, or with `turns` as MT-Bench and Spec-Bench have them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ladon.demo.bundled import demo_prompts
from ladon.errors import InputError
from ladon.util.files import explained


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """One conversation to hold, or one text to continue.

    Attributes:
        question_id: as the file gives it, else its line number from 1.
        category: as the file gives it, else empty.
        turns: what the user says, turn by turn; a file's `prompt` is the only turn.
        is_chat: whether the turns are messages (`turns`) or raw text to continue (`prompt`).
    """

    question_id: int | str
    category: str
    turns: tuple[str, ...]
    is_chat: bool

    @classmethod
    def to_continue(cls, text: str, question_id: int) -> Question:
        """Raw text to continue."""
        return cls(question_id=question_id, category="", turns=(text,), is_chat=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """Questions with where they came from.

    Attributes:
        name: file name, or what made the questions.
        sha256: of the questions' texts, so that results of different workloads are never compared.
        questions: at least one.
    """

    name: str
    sha256: str
    questions: tuple[Question, ...]

    def summary(self) -> dict[str, Any]:
        """What results say of it: name, hash and number of questions."""
        return {"name": self.name, "sha256": self.sha256, "questions": len(self.questions)}


def make_workload(name: str, questions: Sequence[Question]) -> Workload:
    """A workload of these questions."""
    text = json.dumps([question.turns for question in questions], ensure_ascii=False)
    return Workload(name=name, sha256=hashlib.sha256(text.encode()).hexdigest(), questions=tuple(questions))


def demo_workload(count: int) -> Workload:
    """Held-out code to complete, for the bundled model; `count` prompts at most."""
    questions = [Question.to_continue(text, number) for number, text in enumerate(demo_prompts(count), start=1)]
    return make_workload("held-out standard library modules", questions)


def read_text(path: Path) -> str:
    """A UTF-8 text file without a byte order mark; `InputError` if it cannot be read or is not UTF-8."""
    try:
        with explained(f"cannot read {path}", InputError, "give a readable text file"):
            return path.read_bytes().decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8 text") from error


def read_workload(path: Path, limit: int | None = None) -> Workload:
    """Read a JSONL file: an object per line with `prompt`, or with `turns` and perhaps `category`, `question_id`.

    Args:
        path: the file.
        limit: keep only the first questions.

    Raises:
        InputError: the file cannot be read, a line is no such object, a prompt is empty, two questions have one id, or
            there is none.
    """
    # Not `splitlines`: JSON texts may hold U+2028 and other characters that it takes for line ends.
    lines = [(number, line) for number, line in enumerate(read_text(path).split("\n"), start=1) if line.strip()]
    questions: dict[int | str, Question] = {}
    for number, line in lines[:limit]:
        question = _question(path, number, line)
        if question.question_id in questions:
            raise InputError(
                f"{path} line {number}: an earlier question has the id {question.question_id!r} too; give each its own "
                "`question_id` (a line without one goes by its number)"
            )
        questions[question.question_id] = question
    if not questions:
        raise InputError(f"{path} holds no prompts; give a JSON object with `prompt` or `turns` on each line")
    return make_workload(path.name, list(questions.values()))


def _question(path: Path, number: int, line: str) -> Question:
    def wrong(problem: str) -> InputError:
        return InputError(f'{path} line {number}: {problem}; each line is like {{"prompt": "..."}}')

    try:
        row: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise wrong(f"no JSON ({error.msg})") from error
    if not isinstance(row, dict) or ("prompt" not in row and "turns" not in row):
        raise wrong("neither `prompt` nor `turns`")
    if unread := [name for name in ("tools", "chat_template_kwargs") if row.get(name)]:
        raise wrong(f"`{unread[0]}` would change the prompt, and is not read here; write the whole text as `prompt`")
    is_chat = "turns" in row
    turns = row["turns"] if is_chat else [row["prompt"]]
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) and turn for turn in turns):
        raise wrong("`turns` must be a list of texts, `prompt` a text, and none may be empty")
    question_id, category = row.get("question_id", number), row.get("category", "")
    if not isinstance(question_id, int | str) or not isinstance(category, str):
        raise wrong("`question_id` must be a number or a text, `category` a text")
    return Question(question_id=question_id, category=category, turns=tuple(turns), is_chat=is_chat)


def prompt_ids(tokenizer: PreTrainedTokenizerBase, question: Question, answers: Sequence[str]) -> list[int]:
    """Token ids that ask for the next answer, given the answers to the turns before.

    Chat questions go through the tokenizer's chat template; a tokenizer without one gets the turns and answers as
    plain text, one per line.
    """
    turn = len(answers)
    if not question.is_chat:
        return list(tokenizer(question.turns[turn])["input_ids"])
    if tokenizer.chat_template is None:
        lines = [text for pair in zip(question.turns, answers, strict=False) for text in pair]
        return list(tokenizer("\n".join([*lines, question.turns[turn], ""]))["input_ids"])
    messages: list[dict[str, str]] = []
    for place in range(turn + 1):
        messages.append({"role": "user", "content": question.turns[place]})
        if place < turn:
            messages.append({"role": "assistant", "content": answers[place]})
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
