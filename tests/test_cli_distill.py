"""`ladon distill` on the command line."""

from __future__ import annotations

import io
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from chats import CHAT, TEMPLATE
from endpoints import KEY, says, serving
from ladon.cli import distill as command
from ladon.cli.main import run
from ladon.train.distill.distill import read_distilled
from user_side import CONTEXT, Tiny, write_jsonl

TEXTS = ["def read(", "for line in self", "é", "return name:\n", "self.lines"]


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": text} for text in TEXTS])


def arguments(tiny: Tiny, prompts: Path, out: Path, *more: str) -> list[str]:
    sizes = ["--max-new-tokens", "12", "--batch", "2"]
    return ["distill", str(prompts), "--out", str(out), *tiny.arguments, *sizes, *more]


def last_json(text: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(text.splitlines()[-1])
    return found


def test_help_shows_examples(capsys):
    assert run(["distill", "--help"]) == 0
    out = capsys.readouterr().out
    assert "For example:" in out and "ladon distill prompts.jsonl --out answers.jsonl" in out
    assert all(option in out for option in ("--endpoint", "--concurrency", "--api-key-env", "--top-p", "--system"))


def test_answers_a_sample_and_a_report(tiny, prompts, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    assert run(arguments(tiny, prompts, out, "--json")) == 0
    rows = read_distilled(out)
    for row, text in zip(rows, TEXTS, strict=True):
        ids = tiny.tokenizer(text, return_tensors="pt")["input_ids"]
        said = tiny.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        assert row.answer_ids == said[0, ids.shape[1] :].tolist()
    said, told = capsys.readouterr()
    document = last_json(said)
    assert len(said.splitlines()) == 1 and document["rows"] == document["total"] == 5 and document["failures"] == {}
    assert document["tokens"] == sum(len(row.answer_ids) for row in rows) and document["acceptance_length"] >= 1
    sample = told[told.index("--- a sample") : told.index("--- end")]
    assert sample.index("read but not learned") < sample.index(TEXTS[0]) < sample.index("learned; finish: length")
    assert sample.rstrip().endswith(tiny.tokenizer.decode(rows[0].answer_ids).rstrip())
    assert re.search(r"5 rows written to .*out.jsonl, \d+ tokens, \d+ tokens/s; acceptance length \d\.\d\d", told)
    before = out.read_bytes()
    assert run(arguments(tiny, prompts, out, "--json")) == 0
    said, told = capsys.readouterr()
    assert last_json(said)["resumed_rows"] == 5 and "a sample" not in told and "5 rows were there before" in told
    assert out.read_bytes() == before


def test_sampling_is_recorded_and_repeatable(tiny, prompts, tmp_path, capsys):
    law = ["--temperature", "0.7", "--top-p", "0.9", "--top-k", "30", "--seed", "5"]
    files = [tmp_path / name for name in ("a.jsonl", "b.jsonl")]
    assert run(arguments(tiny, prompts, files[0], *law)) == 0
    assert run(arguments(tiny, prompts, files[1], *law, "--tree", "off")) == 0
    first, second = (read_distilled(file) for file in files)
    assert first[0].sampling == {"temperature": 0.7, "top_p": 0.9, "top_k": 30, "max_new_tokens": 12}
    assert [(row.id, row.seed, row.answer_ids) for row in first] == [
        (row.id, row.seed, row.answer_ids) for row in second
    ]
    capsys.readouterr()
    assert run(arguments(tiny, prompts, files[0], *law[:-1], "6")) == 2
    assert "another seed" in capsys.readouterr().err


def test_a_torn_line_is_repaired_and_said(tiny, prompts, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    assert run(arguments(tiny, prompts, out)) == 0
    whole = out.read_bytes()
    out.write_bytes(whole[:-40])
    capsys.readouterr()
    assert run(arguments(tiny, prompts, out)) == 0
    assert out.read_bytes() == whole and "was not written to its end" in capsys.readouterr().err


def test_failures_end_with_exit_code_1_and_a_list(tiny, tmp_path, capsys):
    rows = [{"prompt": "def"}, {"id": "long", "prompt_ids": [5] * CONTEXT}, {"id": "none", "prompt": ""}]
    prompts, out = write_jsonl(tmp_path / "p.jsonl", rows), tmp_path / "out.jsonl"
    assert run(arguments(tiny, prompts, out, "--json")) == 1
    said, told = capsys.readouterr()
    assert last_json(said)["failures"] == {"empty prompt": 1, "prompt too long": 1}
    assert "no answer to 1 prompts: prompt too long" in told and "out.failed.jsonl" in told
    listed = [json.loads(line)["id"] for line in (tmp_path / "out.failed.jsonl").read_text().splitlines()]
    assert sorted(listed) == ["long", "none"]


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        (["--temperature", "-1"], "temperature is -1"),
        (["--top-p", "0"], "top_p is 0"),
        (["--field", "nothing"], "line 1: no nothing"),
        (["--system", "be brief"], "--system is for chats"),
        (["--api-key-env", "X"], "--api-key-env is for --endpoint"),
        (["--endpoint-model", "X"], "--endpoint-model is for --endpoint"),
        (["--endpoint", "http://localhost:1/v1"], "--heads does nothing with --endpoint"),
        (["--batch", "0"], "--batch"),
    ],
)
def test_mistakes_are_one_line(tiny, prompts, tmp_path, capsys, more, problem):
    assert run(arguments(tiny, prompts, tmp_path / "out.jsonl", *more)) == 2
    err = capsys.readouterr().err
    assert problem in err and len(err.splitlines()) == 1 and "Traceback" not in err
    assert not (tmp_path / "out.jsonl").exists()


def test_places_that_cannot_be_written_and_prompts_that_are_not_there(tiny, prompts, tmp_path, capsys):
    assert run(arguments(tiny, prompts, tmp_path / "no" / "out.jsonl")) == 2
    assert "there is no folder" in capsys.readouterr().err
    assert run(arguments(tiny, tmp_path / "none.jsonl", tmp_path / "out.jsonl")) == 2
    assert "there is no file" in capsys.readouterr().err
    assert run(arguments(tiny, write_jsonl(tmp_path / "chat.jsonl", [{"messages": CHAT}]), tmp_path / "o.jsonl")) == 2
    assert "the tokenizer has no chat template" in capsys.readouterr().err


def test_a_generation_config_that_is_not_applied_is_named(tiny, prompts, tmp_path, capsys):
    model = shutil.copytree(tiny.folder / "model", tmp_path / "model")
    config = json.loads((model / "generation_config.json").read_text())
    config |= {"repetition_penalty": 1.2, "do_sample": True, "temperature": 0.6, "no_repeat_ngram_size": 0}
    (model / "generation_config.json").write_text(json.dumps(config))
    out = tmp_path / "out.jsonl"
    assert run(["distill", str(prompts), "--out", str(out), "--model", str(model), "--max-new-tokens", "4"]) == 0
    err = capsys.readouterr().err
    assert "warning: the generation config asks for repetition_penalty; answers" in err and "acceptance" not in err


def test_an_endpoint_answers_with_the_key_of_a_variable(tiny, tmp_path, capsys, monkeypatch):
    model = shutil.copytree(tiny.folder / "model", tmp_path / "model")
    (model / "model.safetensors").unlink()  # only the tokenizer is loaded
    (model / "chat_template.jinja").write_text(TEMPLATE)
    prompts = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "def"}, {"messages": CHAT}])
    monkeypatch.setenv("THE_KEY", KEY)
    with serving(lambda number, path, body: says(body)) as server:
        asked = ["distill", str(prompts), "--out", str(tmp_path / "out.jsonl"), "--model", str(model)]
        asked += ["--endpoint", server.url, "--concurrency", "1", "--endpoint-model", "big", "--json"]
        assert run([*asked, "--api-key-env", "THE_KEY"]) == 0
        said, told = capsys.readouterr()
        assert run([*asked, "--api-key-env", "NO_KEY"]) == 2
    assert [headers["Authorization"] for *_, headers in server.requests] == [f"Bearer {KEY}"] * 2
    assert [body["model"] for _, body, _ in server.requests] == ["big", "big"]
    assert last_json(said)["rows"] == 2 and last_json(said)["acceptance_length"] is None
    files = "".join(file.read_text() for file in tmp_path.glob("*.jsonl"))
    assert KEY not in said + told + files and {row.model for row in read_distilled(tmp_path / "out.jsonl")} == {"big"}
    assert "--api-key-env names NO_KEY, which is not set" in capsys.readouterr().err


def test_progress_is_lines_in_a_log_and_a_bar_on_a_terminal(tiny, prompts, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "_LINE_SECONDS", 0.0)
    assert run(arguments(tiny, prompts, tmp_path / "a.jsonl")) == 0
    assert re.search(r"ladon: [1-4] of 5 rows, \d+ tokens/s, 0 min left", capsys.readouterr().err)

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    assert run(arguments(tiny, prompts, tmp_path / "b.jsonl")) == 0
    assert re.search(r"answers.* [1-4]/5 .* tokens/s", terminal.getvalue()) and "min left" not in terminal.getvalue()


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_stopped(tiny, tmp_path):
    """Killed and interrupted while it writes, it ends with the file of one run that was left alone."""
    rows = [{"prompt": f"def read{number}("} for number in range(60)]
    prompts = write_jsonl(tmp_path / "p.jsonl", rows)
    model = ["--model", str(tiny.folder / "model"), "--dtype", "float64", "--temperature", "1.0", "--threads", "1"]
    sizes = ["--batch", "2", "--max-new-tokens", "60"]

    def start(out: Path) -> subprocess.Popen[bytes]:
        asked = ["distill", str(prompts), "--out", str(out), *model, *sizes]
        return subprocess.Popen([sys.executable, "-m", "ladon.cli", *asked], stderr=subprocess.DEVNULL)

    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    assert start(whole).wait(300) == 0
    for share, how in ((0.2, signal.SIGKILL), (0.6, signal.SIGINT)):
        run_once = start(out)
        deadline = time.monotonic() + 300
        while not out.exists() or out.stat().st_size < share * whole.stat().st_size:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        run_once.send_signal(how)
        assert run_once.wait(60) == (130 if how == signal.SIGINT else -how)
    assert start(out).wait(300) == 0
    assert out.read_bytes() == whole.read_bytes()
