"""The rows of training data: what is written is what is read, torn lines are cut off, and only answers are learned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from chats import CALL, CHAT, TEMPLATE, TOOL_CHATS, TOOL_TEMPLATE, TOOLS, template_call
from ladon import InputError
from ladon.train.data.rows import Example, read_rows
from ladon.train.distill import distill
from ladon.train.distill.distill import DistilledRow, read_distilled, repair
from user_side import make_tokenizer, write_jsonl

ROW = DistilledRow(
    id="a#2",
    prompt_ids=[1, 2],
    answer_ids=[3],
    answer="é\u2028\ud83d",
    finish="stop",
    seed=2**53 - 1,
    sampling={"temperature": 0.5, "top_p": 0.9, "top_k": 0, "max_new_tokens": 8},
    model="demo",
    dtype="float32",
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    made = make_tokenizer()
    made.chat_template = TEMPLATE
    return made


def examples(tokenizer: Any, folder: Path, *found: dict[str, Any], **options: Any) -> list[Example]:
    return read_rows(str(write_jsonl(folder / "rows.jsonl", list(found))), tokenizer, **options)


def learned_text(tokenizer: PreTrainedTokenizerFast, example: Example) -> str:
    """What is learned, with what is not as dots."""
    parts = []
    for token, is_learned in zip(example.token_ids, example.learned, strict=True):
        parts.append(tokenizer.decode([token]) if is_learned else "." * len(tokenizer.decode([token])))
    return "".join(parts)


def test_what_is_written_is_what_is_read(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(ROW.to_json() * 2, encoding="utf-8")
    assert read_distilled(file) == [ROW, ROW]
    assert read_distilled(tmp_path / "none.jsonl") == []
    old = {name: value for name, value in json.loads(ROW.to_json()).items() if name != "weights"}
    assert DistilledRow.from_json(json.dumps(old).encode(), "x") == ROW


@pytest.mark.parametrize("line", [b"{", b"[]", b'{"id": "a"}', b"\xff\xff", b"\0\0"])
def test_a_line_of_another_kind_is_named(tmp_path, line):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(ROW.to_json().encode() + line + b"\n")
    with pytest.raises(InputError, match=r"rows.jsonl line 2: no .* ladon distill"):
        read_distilled(file)


@given(
    lines=st.lists(st.binary(max_size=20).map(lambda b: b.replace(b"\n", b"")), max_size=5), tail=st.binary(max_size=20)
)
def test_repair_keeps_whole_lines_and_nothing_else(tmp_path_factory, lines, tail):
    tail = tail.replace(b"\n", b"")
    file = tmp_path_factory.mktemp("repair") / "rows.jsonl"
    whole = b"".join(line + b"\n" for line in lines)
    file.write_bytes(whole + tail)
    assert repair(file) == len(tail) and file.read_bytes() == whole
    assert repair(file) == 0
    with file.open("rb") as opened:
        assert distill._end_of_lines(opened, len(whole)) == len(whole)
    assert repair(file.with_name("none")) == 0


def test_distilled_rows(tokenizer, tmp_path):
    [example] = examples(tokenizer, tmp_path, json.loads(ROW.to_json()))
    assert example == Example("a#2", [1, 2, 3], [False, False, True])


def test_texts_are_learned_whole(tokenizer, tmp_path):
    first, second = examples(tokenizer, tmp_path, {"text": "def read"}, {"id": 7, "text": "for é"})
    assert first.id == "0" and learned_text(tokenizer, first) == "def read" and all(first.learned)
    assert second.id == "7" and all(second.learned)
    [named] = examples(tokenizer, tmp_path, {"text": "no", "code": "for line"}, field="code", limit=1)
    assert learned_text(tokenizer, named) == "for line"


@pytest.mark.parametrize("name", ["answer", "response", "completion", "output"])
def test_answers_are_learned_to_their_end(tokenizer, tmp_path, name):
    [example] = examples(tokenizer, tmp_path, {"prompt": "def read", name: "(self)"})
    assert learned_text(tokenizer, example) == "........(self)<|end|>"
    assert example.token_ids[:2] == tokenizer("def read")["input_ids"]


def test_of_chats_the_assistants_turns_are_learned(tokenizer, tmp_path):
    chat = [{"role": "system", "content": "s"}, *CHAT, {"role": "user", "content": "self"}, *CHAT[1:]]
    shared = [{"from": m["role"].replace("user", "human"), "value": m["content"]} for m in chat]
    for row in ({"messages": chat}, {"conversations": shared}):
        [example] = examples(tokenizer, tmp_path, row)
        whole = tokenizer.apply_chat_template(chat, tokenize=False)
        assert tokenizer.decode(example.token_ids) == whole
        said = learned_text(tokenizer, example)
        assert said.replace(".", "") == "line<|end|>line<|end|>"
        assert len(said) == len(whole) and said.endswith("line<|end|>.")
    [nothing] = examples(tokenizer, tmp_path, {"messages": CHAT[:1]})
    assert not any(nothing.learned)


@pytest.mark.parametrize("name", TOOL_CHATS)
def test_tools_parts_and_calls_go_to_the_template_as_they_are(tmp_path, name):
    tokenizer, row = make_tokenizer(), TOOL_CHATS[name]
    tokenizer.chat_template = TOOL_TEMPLATE
    chat = [*row["messages"], {"role": "assistant", "content": [{"type": "text", "text": "line"}]}]
    [example] = examples(tokenizer, tmp_path, {**row, "messages": chat})
    assert tokenizer.decode(example.token_ids) == template_call(tokenizer, row, chat)
    said = learned_text(tokenizer, example)
    assert said.endswith("[text]line<|end|>.") and (CALL in chat) == ('.[{"type": "function", "function"' in said)


def test_rows_whose_tools_nothing_reads_are_dropped_with_the_reason(tokenizer, tmp_path):
    rows = [{"prompt": "def", "answer": "(", "tools": TOOLS}, {"messages": CHAT, "tools": 7}]
    assert [one.refused for one in examples(tokenizer, tmp_path, *rows)] == [
        "tools or template options without a chat", "tools that are no list of objects"
    ]  # fmt: skip


def test_a_token_that_begins_before_the_answer_is_not_learned(tmp_path):
    """A template without any mark between the turns: `)` of the user and `:` of the assistant are one token."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    chat = [{"role": "user", "content": "def read(self, name)"}, {"role": "assistant", "content": ":\n    for"}]
    [example] = examples(tokenizer, tmp_path, {"messages": chat})
    straddling = [t for t in tokenizer.convert_ids_to_tokens(example.token_ids) if t.startswith("):")]
    assert straddling, "the tokenizer of the tests joins them"
    assert learned_text(tokenizer, example).lstrip(".").strip() == "for"


def test_a_template_that_rewrites_earlier_turns_is_refused(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for message in messages %}{{ '[think]' if loop.last and message['role'] == 'assistant' }}"
        "{{ message['content'] }}{% endfor %}"
    )
    assert examples(tokenizer, tmp_path, {"messages": CHAT}), "one turn nests"
    with pytest.raises(InputError, match="line 1: the chat template writes earlier turns differently"):
        examples(tokenizer, tmp_path, {"messages": CHAT * 2})


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"prompt": "a"}, "it has prompt; give prompt_ids and answer_ids"),
        ({"prompt": "a", "answer": 3}, "`answer` is a int; give a text"),
        ({"prompt_ids": [1], "answer_ids": ["x"]}, "`answer_ids` must be a list of token ids"),
        ({"text": None}, "it has text; give"),
    ],
)
def test_rows_of_another_form_are_refused(tokenizer, tmp_path, row, problem):
    with pytest.raises(InputError, match=f"rows.jsonl line 2: {problem}"):
        examples(tokenizer, tmp_path, {"text": "a"}, row)
    with pytest.raises(InputError, match="`code` is a NoneType; give a text"):
        examples(tokenizer, tmp_path, row, field="code")
