"""`ladon generate` with --json-schema, --regex and --grammar."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path

import pytest
import torch

from ladon.cli.main import run

SCHEMA = {"type": "array", "items": {"enum": ["red", "green"]}, "minItems": 2, "maxItems": 3}
ASK = ["generate", "--prompt", "colours = ", "--max-new-tokens", "40", "--budget", "8", "--threads", "1"]


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)


def test_a_schema_as_text_or_in_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "schema.json"
    file.write_text(json.dumps(SCHEMA), encoding="utf-8")
    texts = []
    for given in (json.dumps(SCHEMA), str(file)):
        assert run([*ASK, "--json-schema", given, "--json"]) == 0
        document = json.loads(capsys.readouterr().out.splitlines()[-1])
        colours = json.loads(document["text"])
        assert 2 <= len(colours) <= 3 and set(colours) <= {"red", "green"} and document["complete"] is True
        stats = document["stats"]
        assert stats["illegal_share"] == stats["drafts_illegal"] / stats["drafts_checked"]
        texts.append(document["text"])
    assert texts[0] == texts[1]


def test_many_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grammar = tmp_path / "names.lark"
    grammar.write_text('start: ("a" | "b") "_" ("c" | "d")\n', encoding="utf-8")
    assert run([*ASK, "--prompt", "x = ", "--grammar", str(grammar), "--json"]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert all(re.fullmatch("[ab]_[cd]", answer["text"]) and answer["complete"] for answer in document["answers"])
    assert run([*ASK, "--json", "--prompt", "x = "]) == 0
    assert all(a["complete"] is None for a in json.loads(capsys.readouterr().out.splitlines()[-1])["answers"])


def test_what_is_not_complete_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*ASK[:3], "--max-new-tokens", "2", "--regex", "[a-z]{9,}", "--stats"]) == 0
    captured = capsys.readouterr()
    assert re.fullmatch("[a-z]+", captured.out.strip()) and "the text is not complete" in captured.err
    dead = tmp_path / "dead.lark"
    dead.write_text('start: "ab" /[a-z]/ /[^\\s\\S]/\n', encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("always")  # shown, not raised
        assert run([*ASK, "--grammar", str(dead)]) == 0
    captured = capsys.readouterr()
    assert re.fullmatch("ab[a-z]", captured.out.strip())
    assert "ladon: warning: row 0 ended after 1 tokens: the constraint allows no token here" in captured.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--json-schema", "{", "--regex", "a"], "--json-schema and --regex were given; give one of them"),
        (["--json-schema", ""], "the JSON schema is empty"),
        (["--json-schema", "{}"], "the JSON schema is empty"),
        (["--json-schema", "{not json"], "the JSON schema is no JSON"),
        (["--json-schema", '{"type": "integer", "minimum": 5, "maximum": 3}'], "greater than maximum"),
        (["--json-schema", "nowhere.json"], "cannot read nowhere.json"),
        (["--regex", "[a"], "the regular expression cannot be used"),
        (["--grammar", "nowhere.lark"], "cannot read nowhere.lark"),
    ],
)
def test_mistakes_are_one_line(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*ASK, *options]) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("ladon: ")]
    assert captured.out == "" and len(lines) == 1 and message in lines[0]
