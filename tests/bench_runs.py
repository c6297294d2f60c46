"""What the tests of the benchmark share: a few prompts, what is measured, and a fixed tree."""

from __future__ import annotations

from ladon.bench.findings import Subject
from ladon.bench.workloads import Question, Workload, make_workload
from ladon.trees.fixed_tree import FixedTree
from user_side import Tiny

TREE = FixedTree(((0,), (0, 0), (1,), (0, 0, 0), (0, 1)))
TEXTS = ["def read", "for line in self.lines:\n", "return", "class Reader:"]


def silent(what: str, done: int, total: int) -> None:
    assert 0 < done <= total


def workload(*categories: str) -> Workload:
    names = categories or ("",) * len(TEXTS)
    return make_workload(
        "test",
        [
            Question(question_id=number, category=name, turns=(text,), is_chat=False)
            for number, (text, name) in enumerate(zip(TEXTS, names, strict=False))
        ],
    )


def subject(tiny: Tiny) -> Subject:
    return Subject(
        name="tiny", model=tiny.model, tokenizer=tiny.tokenizer, heads=tiny.heads, fixed_tree=lambda size: TREE
    )
