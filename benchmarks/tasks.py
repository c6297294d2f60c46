"""The kinds of prompts that benchmarks of the bundled model share."""

from __future__ import annotations

from typing import Any

from ladon.bench.workloads import Question, Workload, demo_workload, make_workload
from ladon.demo.bundled import demo_prompts

TASKS = ("code", "edits")
_EDIT = "\n\n\n# The same code again, with `self` renamed to `this`:\n\n"
_EDIT_TOKENS = 160  # of the code that is to be written again


def edit_of(piece: str, tokenizer: Any) -> str:
    """A piece of code, a comment that asks for it again with a change, and its first line again."""
    code = tokenizer.decode(tokenizer(piece)["input_ids"][:_EDIT_TOKENS]).rstrip("\n")
    return f"{code}{_EDIT}{code.lstrip().splitlines()[0]}"


def workload_of(task: str, count: int, tokenizer: Any) -> Workload:
    """At most `count` prompts: held-out code to go on with ("code"), or to write again with a change ("edits")."""
    if task == "code":
        return demo_workload(count)
    texts = [edit_of(piece, tokenizer) for piece in demo_prompts(count)]
    return make_workload("repetitive edits", [Question.to_continue(text, n) for n, text in enumerate(texts, start=1)])
