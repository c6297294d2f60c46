"""Workloads: what files of prompts may hold, and the prompts of later turns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ladon.bench.workloads import Question, prompt_ids, read_workload
from ladon.errors import InputError
from user_side import Tiny, write_jsonl


def test_workload_of_prompts_and_turns(tmp_path: Path) -> None:
    path = write_jsonl(
        tmp_path / "w.jsonl",
        [
            {"prompt": "one"},
            {"turns": ["two", "three"], "category": "writing", "question_id": 81},
            {"prompt": "four", "other": 1},
        ],
    )
    found = read_workload(path)
    assert [question.turns for question in found.questions] == [("one",), ("two", "three"), ("four",)]
    assert [question.question_id for question in found.questions] == [1, 81, 3]
    assert [question.is_chat for question in found.questions] == [False, True, False]
    assert found.questions[1].category == "writing"
    assert len(read_workload(path, limit=2).questions) == 2
    assert read_workload(path, limit=2).sha256 != found.sha256 == read_workload(path).sha256


def test_lines_end_at_line_feeds_only(tmp_path: Path) -> None:
    """JSON texts may hold what Python takes for line ends; a byte order mark and CRLF do no harm."""
    texts = ["a\u2028b", "c\x85d", "e\u2029f"]
    lines = [json.dumps({"prompt": text}, ensure_ascii=False) for text in texts]
    path = tmp_path / "w.jsonl"
    path.write_bytes("\r\n".join(["\ufeff" + lines[0], "", *lines[1:]]).encode())
    found = read_workload(path)
    assert [question.turns[0] for question in found.questions] == texts
    assert [question.question_id for question in found.questions] == [1, 3, 4]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "holds no prompts"),
        (b"{]\n", "line 1: no JSON"),
        (b'{"prompt": "a"}\n{"question": "b"}\n', "line 2: neither"),
        (b'{"prompt": ""}\n', "none may be empty"),
        (b'{"turns": []}\n', "must be a list"),
        (b'{"turns": ["a"], "tools": [{}]}\n', "line 1: `tools` would change the prompt"),
        (b'{"turns": "text"}\n', "must be a list"),
        (b'{"prompt": "a", "category": 3}\n', "category"),
        (b'{"prompt": "\xff"}\n', "not UTF-8"),
        (b'{"prompt": "a", "question_id": 7}\n{"prompt": "b", "question_id": 7}\n', "line 2: an earlier .* id 7"),
        (b'{"prompt": "a", "question_id": 2}\n{"prompt": "b"}\n', "line 2: an earlier question has the id 2 too"),
    ],
)
def test_bad_workloads_are_refused(tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "w.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match=problem):
        read_workload(path)


def test_second_turn_contains_the_first_answer(tiny: Tiny) -> None:
    question = Question(question_id=1, category="", turns=("def read", "return"), is_chat=True)
    tokenizer = tiny.tokenizer
    assert tokenizer.decode(prompt_ids(tokenizer, question, [])) == "def read\n"
    assert tokenizer.decode(prompt_ids(tokenizer, question, ["ANSWER"])) == "def read\nANSWER\nreturn\n"
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    try:
        text = tokenizer.decode(prompt_ids(tokenizer, question, ["ANSWER"]))
    finally:
        tokenizer.chat_template = None
    assert text == "[user] def read\n[assistant] ANSWER\n[user] return\n[assistant]"
