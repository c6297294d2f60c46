"""Where prompts come from, and what they become."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from chats import CALL, CHAT, TEMPLATE, TOOL_CHATS, TOOL_TEMPLATE, TOOLS, template_call
from ladon import InputError
from ladon.train.data.prompts import read_prompts, turn_end
from ladon.train.data.records import read_records
from user_side import make_tokenizer, write_jsonl


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    made = make_tokenizer()
    made.chat_template = TEMPLATE
    return made


def text_of(tokenizer: PreTrainedTokenizerFast, row: dict[str, Any], folder: Path, **options: Any) -> str:
    """What the model reads of one row."""
    [prompt] = read_prompts(str(write_jsonl(folder / "p.jsonl", [row])), tokenizer, **options)
    return str(tokenizer.decode(prompt.token_ids))


def test_text_is_continued_and_ids_are_taken_as_they_are(tokenizer, tmp_path):
    file = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "def read("}, {"prompt_ids": [5, 6]}, {"text": "for\u2028é"}])
    first, second, third = read_prompts(str(file), tokenizer)
    assert first.token_ids == tokenizer("def read(")["input_ids"] and first.text == "def read("
    assert second.token_ids == [5, 6] and second.text is None
    assert tokenizer.decode(third.token_ids) == "for\u2028é"
    assert all(prompt.messages is None for prompt in (first, second, third))


@pytest.mark.parametrize(
    "row",
    [
        {"messages": CHAT},
        {"messages": CHAT[:1]},
        {"conversations": [{"from": "human", "value": "read"}, {"from": "gpt", "value": "line"}]},
        {"turns": ["read", "and then?"]},
        {"question": "read", "answer": "line"},
        {"instruction": "read", "input": "", "output": "line"},
    ],
)
def test_chats_end_where_the_answer_begins(tokenizer, tmp_path, row):
    assert text_of(tokenizer, row, tmp_path) == "<user>read<|end|>\n<assistant>"
    asked = text_of(tokenizer, row, tmp_path, system="be brief")
    assert asked == "<system>be brief<|end|>\n<user>read<|end|>\n<assistant>"


def test_a_chat_keeps_its_earlier_turns_and_loses_its_last_answer(tokenizer, tmp_path):
    chat = [{"role": "system", "content": "old"}, *CHAT, {"role": "user", "content": "self"}, *CHAT[1:]]
    text = text_of(tokenizer, {"messages": chat}, tmp_path)
    assert text == "<system>old<|end|>\n<user>read<|end|>\n<assistant>line<|end|>\n<user>self<|end|>\n<assistant>"
    replaced = text_of(tokenizer, {"messages": chat}, tmp_path, system="new")
    assert replaced == text.replace("old", "new")
    with_input = {"instruction": "read", "input": "lines"}
    assert text_of(tokenizer, with_input, tmp_path) == "<user>read\n\nlines<|end|>\n<assistant>"


def test_a_field_may_be_named(tokenizer, tmp_path):
    row = {"prompt": "not this", "code": "def read(", "chat": CHAT, "ids": [7, 8]}
    assert text_of(tokenizer, row, tmp_path, field="code") == "def read("
    assert text_of(tokenizer, row, tmp_path, field="chat") == "<user>read<|end|>\n<assistant>"
    assert text_of(tokenizer, row, tmp_path, field="ids") == tokenizer.decode([7, 8])
    assert text_of(tokenizer, {"question": "read"}, tmp_path, field="question") == "read"
    with pytest.raises(InputError, match=r"line 1: no other, it has prompt, code, chat, ids; name .* --field"):
        text_of(tokenizer, row, tmp_path, field="other")


def test_every_prompt_has_an_id_of_its_own(tokenizer, tmp_path):
    rows = [{"prompt": "a"}, {"prompt": "a"}, {"id": "x", "prompt": "b"}, {"id": "x", "prompt": "c"}]
    rows += [
        {"id": "x#2", "prompt": "d"},
        {"question_id": 81, "turns": ["e"]},
        {"task_id": "HumanEval/0", "prompt": "f"},
    ]
    prompts = read_prompts(str(write_jsonl(tmp_path / "p.jsonl", rows)), tokenizer)
    names = [prompt.id for prompt in prompts]
    assert names[2:] == ["x", "x#2", "x#2#2", "81", "HumanEval/0"]
    assert names[0].startswith("0-") and names[1].startswith("1-") and names[0][1:] == names[1][1:]
    assert [prompt.index for prompt in prompts] == list(range(7))
    limited = read_prompts(str(tmp_path / "p.jsonl"), tokenizer, limit=4)
    assert limited == prompts[:4], "the first rows are the same, however many are read"


def test_rows_that_ask_nothing_are_empty(tokenizer, tmp_path):
    rows = [{"prompt": ""}, {"messages": []}, {"messages": CHAT[1:]}, {"prompt_ids": []}]
    prompts = read_prompts(str(write_jsonl(tmp_path / "p.jsonl", rows)), tokenizer)
    assert [prompt.token_ids for prompt in prompts] == [[], [], [], []]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "line 3: no JSON"),
        ("[1]", "line 3: a list, no JSON object"),
        ('{"other": 1}', "line 3: no prompt_ids or prompt or .*, it has other"),
        ('{"prompt": 3}', "line 3: `prompt` is a int"),
        ('{"prompt_ids": [1, -2]}', "line 3: `prompt_ids` must be a list of token ids"),
        ('{"prompt_ids": [1, true]}', "line 3: `prompt_ids` must be a list of token ids"),
        ('{"messages": {"role": "user"}}', "line 3: `messages` is a dict"),
        ('{"prompt": "\udcff"}', r"line 3: not UTF-8 \(byte 12\)"),
    ],
)
def test_a_bad_line_is_named(tokenizer, tmp_path, line, problem):
    file = tmp_path / "p.jsonl"
    file.write_bytes(b'{"prompt": "a"}\n\n' + line.encode("utf-8", "surrogateescape") + b"\n")
    with pytest.raises(InputError, match=f"p.jsonl {problem}"):
        read_prompts(str(file), tokenizer)


def test_chats_need_a_template_that_takes_them(tokenizer, tmp_path):
    with pytest.raises(InputError, match=r"line 1: a chat, but the tokenizer has no chat template; .*--field"):
        text_of(make_tokenizer(), {"messages": CHAT}, tmp_path)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [{"role": "user"}]}, "a message without role and content"),
        ({"messages": ["a", 1]}, "a message without role and content"),
        ({"conversations": [{"from": "robot", "value": "x"}]}, "a message of the role 'robot'"),
        ({"messages": [{"role": "user", "content": "odd"}]}, "the chat template refuses the chat"),
    ],
)
def test_a_chat_that_cannot_be_used_says_why_and_leaves_the_others(tmp_path, row, reason):
    strict = make_tokenizer()
    strict.chat_template = (
        "{% if messages[0]['content'] == 'odd' %}{{ raise_exception('roles must\n alternate') }}{% endif %}"
        "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    )
    rows = [{"messages": CHAT}, row, {"messages": CHAT}]
    prompts = read_prompts(str(write_jsonl(tmp_path / "p.jsonl", rows)), strict)
    assert [prompt.refused for prompt in prompts] == ["", reason, ""]
    assert [bool(prompt.token_ids) for prompt in prompts] == [True, False, True]


@pytest.mark.parametrize("name", TOOL_CHATS)
@pytest.mark.parametrize("as_text", [False, True], ids=["json", "json text"])
def test_tools_parts_and_calls_go_to_the_template_as_they_are(tmp_path, name, as_text):
    tokenizer, row = make_tokenizer(), TOOL_CHATS[name]
    tokenizer.chat_template = TOOL_TEMPLATE
    kept = {key: json.dumps(row[key]) if as_text else row[key] for key in row.keys() - {"messages"}}
    for answer in ([], [{"role": "assistant", "content": "line"}], [CALL]):
        given = {"messages": [*row["messages"], *answer], **kept}
        assert text_of(tokenizer, given, tmp_path) == template_call(tokenizer, row, add_generation_prompt=True)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": CHAT, "tools": "read()"}, "tools that are no JSON"),
        ({"messages": CHAT, "tools": {"name": "read"}}, "tools that are no list of objects"),
        ({"messages": CHAT, "tools": ["read"]}, "tools that are no list of objects"),
        ({"messages": CHAT, "chat_template_kwargs": [1]}, "chat_template_kwargs that are no object"),
        ({"messages": CHAT, "chat_template_kwargs": {"tokenize": True}}, "the chat template refuses the chat"),
        ({"prompt": "def", "tools": TOOLS}, "tools or template options without a chat"),
        ({"prompt": "def", "chat_template_kwargs": {"a": 1}}, "tools or template options without a chat"),
        ({"messages": [{"role": "assistant", "content": None}, *CHAT]}, "a message without role and content"),
        ({"messages": [{"role": "user", "content": ["re", "ad"]}]}, "a message without role and content"),
    ],
)
def test_tools_that_cannot_be_used_say_why_and_leave_the_others(tokenizer, tmp_path, row, reason):
    rows = [{"messages": CHAT, "tools": []}, row, {"prompt": "def", "tools": None, "chat_template_kwargs": {}}]
    prompts = read_prompts(str(write_jsonl(tmp_path / "p.jsonl", rows)), tokenizer)
    assert [prompt.refused for prompt in prompts] == ["", reason, ""]


def test_the_end_of_a_turn_is_the_templates_own():
    tokenizer = make_tokenizer()
    assert turn_end(tokenizer) == tokenizer.eos_token_id  # no template
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    assert turn_end(tokenizer) == tokenizer.eos_token_id
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end_of_turn>"]})
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}<end_of_turn>\n{% endfor %}"
    assert turn_end(tokenizer) == tokenizer.convert_tokens_to_ids("<end_of_turn>") != tokenizer.eos_token_id


@pytest.mark.parametrize("row", [{"prompt": "a"}, {"prompt_ids": [1]}, {"text": "a"}])
def test_a_system_message_is_for_chats(tokenizer, tmp_path, row):
    with pytest.raises(InputError, match="line 1: --system is for chats"):
        text_of(tokenizer, row, tmp_path, system="be brief")


def test_other_kinds_of_files(tokenizer, tmp_path):
    rows = [{"prompt": "a", "n": 1}, {"prompt": "é", "n": 2}, {"prompt": "c", "n": 3}]
    whole = tmp_path / "p.json"
    whole.write_text(json.dumps(rows, indent=1), encoding="utf-8-sig")
    (tmp_path / "folder").mkdir()
    lines = write_jsonl(tmp_path / "folder" / "train.jsonl", rows)
    import datasets

    parquet = tmp_path / "p.parquet"
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(rows).to_parquet(str(parquet))
    for source in (whole, lines, parquet, tmp_path / "folder"):
        assert [record.fields for record in read_records(str(source))] == rows, source
        assert [record.index for record in read_records(str(source), limit=2)] == [0, 1]
    whole.write_text(json.dumps([*rows, 5]))
    with pytest.raises(InputError, match=r"p.json entry 4: a int, no JSON object"):
        list(read_records(str(whole)))


def test_hub_ids_are_given_to_datasets(monkeypatch):
    import datasets

    asked: list[Any] = []

    def load_dataset(*names: Any, **options: Any) -> list[dict[str, str]]:
        asked.append((*names, options["split"]))
        return [{"prompt": "a"}, {"prompt": "b"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert [r.where for r in read_records("org/name:main", limit=2, split="test")] == [
        "org/name:main row 0",
        "org/name:main row 1",
    ]
    assert next(read_records("name")).fields == {"prompt": "a"}
    assert asked == [("org/name", "main", "test[:2]"), ("name", None, "train")]


def test_what_is_not_there_is_said_in_one_line(tmp_path):
    for source in ("missing.jsonl", str(tmp_path / "a" / "b" / "c"), "no such thing"):
        with pytest.raises(InputError, match=r"^there is no file .*; give a JSONL or Parquet file"):
            list(read_records(source))
    with pytest.raises(InputError, match=r"^cannot read the data set org/no-such-set: [^\n]*; give") as error:
        list(read_records("org/no-such-set"))
    assert "\n" not in str(error.value)
    broken = tmp_path / "p.parquet"
    broken.write_bytes(b"no parquet")
    with pytest.raises(InputError, match=r"^cannot read the data set .*p.parquet"):
        list(read_records(str(broken)))
    for name, data in [("empty.jsonl", b"\n \n"), ("empty.json", b"[]")]:
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match=f"{name} holds no rows"):
            list(read_records(str(tmp_path / name)))
