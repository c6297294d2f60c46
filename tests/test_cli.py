from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaMLP

from ladon.bench.systems import LadonSystem
from ladon.cli import loading
from ladon.cli.main import app, run
from ladon.decoder.decoder import Decoder
from ladon.decoder.detokenizer import PieceStreamer
from ladon.viz import png
from user_side import CONTEXT, Tiny, write_jsonl

COMMANDS = ("demo", "generate", "bench", "trace")
PROMPT = "for line in self.lines:\n    é"


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands set torch's threads for the whole process; --threads is tested in a process of its own."""
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)


def expected(tiny: Tiny, prompt: str, tokens: int) -> list[int]:
    """What transformers' greedy generate adds to a prompt."""
    ids = tiny.tokenizer(prompt, return_tensors="pt")["input_ids"]
    whole = tiny.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
    new: list[int] = whole[0, ids.shape[1] :].tolist()
    return new


def last_json(output: str) -> dict[str, object]:
    document: dict[str, object] = json.loads(output.splitlines()[-1], parse_constant=lambda name: pytest.fail(name))
    return document


def test_help_is_quick_and_complete(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 0 and run(["--help"]) == 0 and run(["--version"]) == 0
    out = capsys.readouterr().out
    assert all(f" {command} " in out for command in COMMANDS) and "ladon 0." in out
    script = """
import sys
from ladon.cli.main import run
run(["bench", "--help"])
print({"torch", "transformers", "numpy", "matplotlib"} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "set()", done.stdout + done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([command, "--help"]) == 0
    assert "For example:\n" in re.sub(r" +\n", "\n", capsys.readouterr().out)
    (registered,) = [entry.callback for entry in app.registered_commands if entry.callback.__name__ == command]
    assert f"\n        ladon {command}" in (registered.__doc__ or "")


@pytest.mark.parametrize("tree", ["dynamic", "chain", "off", "file"])
def test_generate_writes_what_transformers_writes(
    tiny: Tiny, tree: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if tree == "file":
        tree = str(tmp_path / "tree.json")
        Path(tree).write_text("[[0], [1], [0, 0]]", encoding="utf-8")
    options = [*tiny.arguments, "--prompt", PROMPT, "--max-new-tokens", "24", "--tree", tree, "--budget", "8"]
    assert run(["generate", *options]) == 0
    new = expected(tiny, PROMPT, 24)
    assert capsys.readouterr().out == tiny.tokenizer.decode(new, skip_special_tokens=True) + "\n"
    assert run(["generate", *options, "--json"]) == 0
    captured = capsys.readouterr()
    document = last_json(captured.out)
    assert document["token_ids"] == new and len(captured.out.splitlines()) == 1 and captured.err == ""
    assert document["stats"]["tokens"] == 23  # type: ignore[index]


TEXTS = ["def read", "for line in self.lines:\n    é", "return", "x", "def name(self):"]


def many(tiny: Tiny, source: list[str], *more: str) -> int:
    return run(["generate", *tiny.arguments, *source, "--max-new-tokens", "12", "--budget", "8", *more])


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_generate_answers_many_prompts_in_their_order(
    tiny: Tiny, batch: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": text} for text in TEXTS])
    answers = [expected(tiny, text, 12) for text in TEXTS]
    assert many(tiny, ["--prompts", str(file)], "--batch", str(batch), "--json", "--stats") == 0
    captured = capsys.readouterr()
    document: Any = last_json(captured.out)
    assert len(captured.out.splitlines()) == 1 and "acceptance length" in captured.err
    assert [answer["token_ids"] for answer in document["answers"]] == answers
    assert [answer["id"] for answer in document["answers"]] == [1, 2, 3, 4, 5] and document["batch"] == batch
    tokens = [len(tiny.tokenizer(text)["input_ids"]) for text in TEXTS]
    assert [answer["prompt_tokens"] for answer in document["answers"]] == tokens
    assert document["stats"]["tokens"] == sum(len(answer) - 1 for answer in answers)
    assert many(tiny, ["--prompts", str(file)], "--batch", str(batch)) == 0
    shown = [f"=== prompt {n} of 5 ===\n{tiny.tokenizer.decode(a)}\n" for n, a in enumerate(answers, start=1)]
    assert capsys.readouterr().out == "".join(shown)


def test_generate_takes_prompts_from_a_text_file_and_several_options(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = tmp_path / "prompts.txt"
    lines.write_text("def read\n\nreturn\r\n", encoding="utf-8")
    answers = [expected(tiny, text, 12) for text in ("def read", "return")]
    for source in (["--prompts", str(lines)], ["--prompt", "def read", "--prompt", "return"]):
        assert many(tiny, source, "--json") == 0
        document: Any = last_json(capsys.readouterr().out)
        assert [answer["token_ids"] for answer in document["answers"]] == answers


def test_generate_refuses_prompts_it_cannot_answer(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "def"}, {"prompt": "x" * 200}])
    empty = tmp_path / "empty.txt"
    empty.write_text("\n", encoding="utf-8")
    for source, message in [
        (["--prompts", str(file)], f"prompt 2 has 200 tokens; give 1 to {CONTEXT - 1} for this model"),
        (["--prompts", str(file), "--prompt", "x"], "both --prompt and --prompts were given"),
        (["--prompts", str(file), "--prompt-file", str(file)], "--prompt-file was given beside other prompts"),
        (["--prompts", str(empty)], "holds no prompts; give one on each line"),
        (["--prompts", str(tmp_path / "none.jsonl")], "cannot read"),
        (["--prompt", "x", "--prompt", ""], "the prompt is empty"),
    ]:
        assert many(tiny, source) == 2
        captured = capsys.readouterr()
        assert message in captured.err and captured.out == "" and len(captured.err.splitlines()) == 1


def test_generate_reads_files_and_standard_input(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT, encoding="utf-8")
    assert run(["generate", *tiny.arguments, "--prompt-file", str(file), "--max-new-tokens", "9", "--json"]) == 0
    assert last_json(capsys.readouterr().out)["token_ids"] == expected(tiny, PROMPT, 9)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "ladon.cli",
            "generate",
            *tiny.arguments,
            "--max-new-tokens",
            "9",
            "--json",
            "--threads",
            "1",
        ],
        input=PROMPT.encode(),
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert last_json(done.stdout.decode())["token_ids"] == expected(tiny, PROMPT, 9)


def test_statistics_go_to_standard_error(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", *tiny.arguments, "--prompt", "def", "--max-new-tokens", "16", "--stats"]) == 0
    captured = capsys.readouterr()
    assert re.search(r"15 tokens in \d+ decode steps: acceptance length \d\.\d\d", captured.err)
    assert "acceptance" not in captured.out
    assert run(["generate", *tiny.arguments, "--prompt", "def", "--max-new-tokens", "1", "--stats", "--json"]) == 0
    captured = capsys.readouterr()
    assert "no decode step" in captured.err
    assert last_json(captured.out)["stats"]["acceptance_length"] is None  # type: ignore[index]


def test_trace_in_the_terminal_and_as_files(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["trace", *tiny.arguments, "--prompt", "def", "--max-new-tokens", "8", "--budget", "6"]
    assert run(options) == 0
    shown = capsys.readouterr().out
    assert "step 0" in shown and "root" in shown and "bonus" in shown and "mask: row sees column" in shown
    page, picture = tmp_path / "t.html", tmp_path / "t.png"
    assert run([*options, "--html", str(page), "--png", str(picture), "--json"]) == 0
    captured = capsys.readouterr()
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert picture.read_bytes().startswith(b"\x89PNG")
    document = last_json(captured.out)
    steps = document["steps"]
    assert [step["index"] for step in steps] == list(range(len(steps)))  # type: ignore[index,arg-type]
    emitted = [token for step in steps for token in step["emitted"]]  # type: ignore[attr-defined]
    assert [document["first_token"], *emitted] == expected(tiny, "def", 8)
    assert f"t.html: {len(steps)} of {len(steps)} steps" in captured.err  # type: ignore[arg-type]
    assert f"t.png: {len(steps)} of {len(steps)} steps" in captured.err  # type: ignore[arg-type]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t.html", "t.png"]


def test_trace_of_one_token_shows_it(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["trace", *tiny.arguments, "--prompt", "def", "--max-new-tokens", "1"]
    (token,) = expected(tiny, "def", 1)
    assert run([*options, "--html", str(tmp_path / "t.html"), "--json"]) == 0
    document = last_json(capsys.readouterr().out)
    assert document == {"prompt": "def", "first_token": token, "acceptance_length": None, "steps": []}
    assert "no decode step" in (tmp_path / "t.html").read_text(encoding="utf-8")
    assert run(options) == 0
    assert "no decode step" in capsys.readouterr().out
    assert run([*options, "--html", str(tmp_path / "u.html"), "--png", str(tmp_path / "u.png")]) == 2
    assert "no tree to draw" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["t.html"], "the page is not written if the picture fails"


@pytest.mark.parametrize("command", ["generate", "trace"])
def test_models_that_ship_a_generation_config(
    tiny: Tiny, command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As Qwen2.5 does: what only sampling reads is no hindrance; a penalty changes greedy text."""
    model = tmp_path / "model"
    shutil.copytree(tiny.folder / "model", model)
    sampling = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20}
    tokens = {"eos_token_id": [tiny.tokenizer.eos_token_id, 299], "pad_token_id": tiny.tokenizer.eos_token_id}
    options = [command, "--model", str(model), "--heads", str(tiny.folder / "heads"), "--prompt", "def read"]
    options += ["--max-new-tokens", "20", "--json"]
    answer = expected(tiny, "def read", 20)
    assert 299 not in answer

    def shipped(config: dict[str, object], *more: str) -> int:
        (model / "generation_config.json").write_text(json.dumps(config), encoding="utf-8")
        return run([*options, *more])

    assert shipped(sampling | tokens) == 0
    assert answer_of(last_json(capsys.readouterr().out)) == answer
    assert shipped(sampling | tokens | {"repetition_penalty": 1.3}) == 0
    assert answer_of(last_json(capsys.readouterr().out)) != answer
    assert shipped(sampling | tokens | {"repetition_penalty": 1.3}, "--ignore-generation-config") == 0
    assert answer_of(last_json(capsys.readouterr().out)) == answer
    stop = next(token for token in answer if token != answer[0])
    assert shipped({"eos_token_id": [stop, 299], "num_beams": 3}, "--ignore-generation-config") == 0
    captured = capsys.readouterr()
    assert answer_of(last_json(captured.out)) == answer[: answer.index(stop) + 1], "special tokens stay"
    assert captured.err == ""


def answer_of(document: dict[str, Any]) -> list[int]:
    """The new tokens in the document of `generate` or of `trace`."""
    if "token_ids" in document:
        return list(document["token_ids"])
    return [document["first_token"], *(token for step in document["steps"] for token in step["emitted"])]


@pytest.mark.parametrize("flags", [set(), {"avx512_bf16"}, {"amx_bf16"}])
def test_the_dtype_that_auto_means(flags: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "cpu_flags", lambda: flags)
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    half = torch.bfloat16 if flags else torch.float32
    stored = {torch.float64: torch.float64, torch.float32: torch.float32, torch.bfloat16: half}
    for dtype, found in (stored | {torch.float16: torch.float32}).items():
        assert loading._dtype("auto", dtype, cpu) == found
        assert loading._dtype("auto", dtype, gpu) == dtype
        assert loading._dtype(str(dtype).removeprefix("torch."), torch.float32, cpu) == dtype


def test_bench_prints_a_table_and_one_document(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = write_jsonl(
        tmp_path / "p.jsonl",
        [
            {"prompt": "def read", "category": "code"},
            {"turns": ["for", "return"], "question_id": 7, "category": "chat"},
        ],
    )
    answers, output = tmp_path / "answers.jsonl", tmp_path / "result.json"
    options = ["--prompts", str(prompts), "--max-new-tokens", "8", "--repeats", "1", "--budget", "4,6", "--json"]
    code = run(["bench", *tiny.arguments, *options, "--answers", str(answers), "--output", str(output)])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    assert "calibrated on the measured prompts" in captured.err
    document = last_json(captured.out)
    assert json.loads(output.read_text(encoding="utf-8")) == document
    assert document["environment"]["load_before"].keys() == document["environment"]["load_after"].keys()  # type: ignore[index]
    results = document["results"]
    assert [(row["mode"], row["budget"]) for row in results] == [  # type: ignore[attr-defined]
        *[("plain", 1), ("chain", 4)],
        *[("fixed", 4), ("fixed", 6), ("dynamic", 4), ("dynamic", 6), ("auto", "auto")],
    ]
    assert all(row["identical"] and set(row["categories"]) == {"code", "chat"} for row in results)  # type: ignore[attr-defined]
    table = captured.out.splitlines()[:-1]
    assert max(map(len, table)) <= 120 and any(line.startswith("dynamic") and "yes" in line for line in table)
    files = sorted(tmp_path.glob("answers-*.jsonl"))  # one per system, transformers among them
    assert [len(file.read_text(encoding="utf-8").splitlines()) for file in files] == [2] * (len(results) + 1)  # type: ignore[arg-type]
    assert sorted(tmp_path.iterdir()) == sorted([*files, prompts, output])


def test_demo_shows_and_measures(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--prompts", "2", "--live", "1", "--max-new-tokens", "16", "--repeats", "1", "--budget", "8", "--json"]
    assert run(["demo", *options]) == 0
    captured = capsys.readouterr()
    assert "drafted, depth 1" in captured.out and "15 tokens in" in captured.out and "identical: yes" in captured.out
    document = last_json(captured.out)
    modes = document["modes"]
    assert list(modes) == ["plain", "chain", "fixed", "dynamic", "auto"]  # type: ignore[call-overload]
    promised = ("acceptance_length", "tokens_per_second", "step_ms", "forward_ms", "overhead", "identical", "near_ties")
    for mode in modes.values():  # type: ignore[attr-defined]
        assert mode["identical"] is True and all(mode[name] is not None for name in promised)
    assert document["transformers"]["tokens_per_second"] > 0  # type: ignore[index]
    assert document["dtype"] in ("bfloat16", "float32")


def test_bench_takes_a_tree_or_other_prompts_for_mode_fixed(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "def read"}])
    others = write_jsonl(tmp_path / "o.jsonl", [{"prompt": "return line"}])
    tree = tmp_path / "tree.json"
    tree.write_text("[[0], [1], [2]]", encoding="utf-8")
    options = ["bench", *tiny.arguments, "--prompts", str(prompts), "--modes", "fixed", "--max-new-tokens", "6"]
    for more in (["--fixed-tree", str(tree)], ["--calibration", str(others)]):
        assert run([*options, "--repeats", "1", "--budget", "4", *more, "--json"]) == 0
        captured = capsys.readouterr()
        assert "calibrated on the measured" not in captured.err
        results = last_json(captured.out)["results"]
        assert [row["mode"] for row in results] == ["plain", "fixed"]  # type: ignore[attr-defined]


def bad(*arguments: str) -> list[str]:
    return list(arguments)


MISTAKES = {
    "no such command": (bad("teach"), "No such command"),
    "no such option": (bad("generate", "--nonsense"), "--nonsense"),
    "no such model folder": (bad("generate", "--model", "./none", "--prompt", "a"), "no model folder ./none"),
    "no such hub model": (bad("generate", "--model", "none", "--prompt", "a"), "cannot load the model none"),
    "a file as model": (bad("generate", "--model", "{file}", "--prompt", "a"), "no model folder"),
    "not a model": (bad("generate", "--model", "{folder}", "--prompt", "a"), "cannot load the model"),
    "broken model": (bad("generate", "--model", "{broken}", "--prompt", "a"), "cannot load the model"),
    "no heads named": (bad("generate", "--model", "{model}", "--prompt", "a", "--ngrams", "off"), "give --heads"),
    "no such heads": (bad("generate", "--model", "{model}", "--heads", "./none", "--prompt", "a"), "./none"),
    "model as heads": (bad("generate", "--model", "{model}", "--heads", "{model}", "--prompt", "a"), "heads"),
    "heads of another model": (
        bad("generate", "--model", "{other}", "--heads", "{heads}", "--prompt", "a"),
        "trained on",
    ),
    "heads of another size": (
        bad("generate", "--model", "{wide}", "--heads", "{heads}", "--prompt", "a"),
        "hidden size",
    ),
    "tree too deep": (bad("generate", "{tiny}", "--tree", "{deep}", "--prompt", "a"), "4 deep but there are 3 heads"),
    "tree pasted": (bad("generate", "{tiny}", "--tree", "[[0],[0,0]]", "--prompt", "a"), "a file with a tree"),
    "large tree pasted": (bad("trace", "{tiny}", "--tree", str([[0, 0]] * 999), "--prompt", "a"), "a file with a tree"),
    "long model": (bad("generate", "--model", "m" * 5000, "--prompt", "a"), "too long for a name"),
    "long model folder": (bad("generate", "--model", "./" + "m" * 300, "--prompt", "a"), "too long for a name"),
    "long heads": (bad("generate", "--model", "{model}", "--heads", "h" * 5000, "--prompt", "a"), "too long"),
    "long page": (bad("trace", "{tiny}", "--prompt", "a", "--html", "p" * 300), "File name too long"),
    "picture of too many": (bad("trace", "{tiny}", "--prompt", "a", "--png-steps", "65"), "png-steps"),
    "tree unknown": (bad("generate", "{tiny}", "--tree", "bushy", "--prompt", "a"), "--tree is 'bushy'"),
    "tree no JSON": (bad("generate", "{tiny}", "--tree", "{file}", "--prompt", "a"), "neither JSON nor"),
    "budget 0": (bad("generate", "{tiny}", "--budget", "0", "--prompt", "a"), "--budget is '0'"),
    "budget no number": (bad("trace", "{tiny}", "--budget", "many", "--prompt", "a"), "--budget is 'many'"),
    "empty prompt": (bad("generate", "{tiny}", "--prompt", ""), "the prompt is empty"),
    "empty prompt file": (bad("generate", "{tiny}", "--prompt-file", "{empty}"), "is empty"),
    "no such prompt file": (bad("trace", "{tiny}", "--prompt-file", "none.txt"), "cannot read the prompt file"),
    "prompt file not UTF-8": (bad("generate", "{tiny}", "--prompt-file", "{latin}"), "is not UTF-8 (byte 3)"),
    "two prompts": (bad("generate", "{tiny}", "--prompt", "a", "--prompt-file", "{file}"), "both --prompt and"),
    "prompt at the limit": (bad("generate", "{tiny}", "--prompt-file", "{limit}"), f"context limit is {CONTEXT}"),
    "prompt past the limit": (bad("trace", "{tiny}", "--prompt-file", "{long}"), f"context limit is {CONTEXT}"),
    "no tokens asked for": (bad("generate", "{tiny}", "--max-new-tokens", "0", "--prompt", "a"), "max-new-tokens"),
    "tokens no number": (bad("trace", "{tiny}", "--max-new-tokens", "x", "--prompt", "a"), "max-new-tokens"),
    "dtype unknown": (bad("generate", "{tiny}", "--dtype", "int3", "--prompt", "a"), "--dtype is 'int3'"),
    "device unknown": (bad("generate", "{tiny}", "--device", "abacus", "--prompt", "a"), "--device abacus"),
    "page nowhere": (bad("trace", "{tiny}", "--prompt", "a", "--html", "none/t.html"), "there is no folder"),
    "picture onto a folder": (bad("trace", "{tiny}", "--prompt", "a", "--png", "{folder}"), "it is a folder"),
    "bench without prompts": (bad("bench", "{tiny}"), "give --prompts"),
    "bench no such prompts": (bad("bench", "{tiny}", "--prompts", "none.jsonl"), "cannot read none.jsonl"),
    "bench prompts no JSON": (bad("bench", "{tiny}", "--prompts", "{file}"), "line 1: no JSON"),
    "bench prompts not UTF-8": (bad("bench", "{tiny}", "--prompts", "{latin}"), "is not UTF-8"),
    "bench mode unknown": (
        bad("bench", "{tiny}", "--modes", "plain,fast", "--prompts", "{prompts}"),
        "--modes has 'fast'",
    ),
    "bench budget 0": (bad("bench", "{tiny}", "--budget", "8,0", "--prompts", "{prompts}"), "--budget is '8,0'"),
    "bench batch 0": (bad("bench", "{tiny}", "--batch", "0", "--prompts", "{prompts}"), "--batch is '0'"),
    "bench repeats 0": (bad("bench", "{tiny}", "--repeats", "0", "--prompts", "{prompts}"), "repeats"),
    "bench tree too deep": (bad("bench", "{tiny}", "--fixed-tree", "{deep}", "--prompts", "{prompts}"), "4 deep"),
    "bench no room": (bad("bench", "{tiny}", "--max-new-tokens", "999", "--prompts", "{prompts}"), "context limit"),
    "bench answers nowhere": (bad("bench", "{tiny}", "--answers", "none/a", "--prompts", "{prompts}"), "no folder"),
    "bench heads missing": (
        bad("bench", "--model", "{model}", "--prompts", "{prompts}", "--modes", "dynamic"),
        "needs heads",
    ),
    "demo prompts 0": (bad("demo", "--prompts", "0"), "prompts"),
}


@pytest.fixture(scope="module")
def places(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Files and folders that are wrong in one way each."""
    from transformers import LlamaConfig, LlamaForCausalLM

    root = tmp_path_factory.mktemp("places")
    ids = tiny.tokenizer("a" * CONTEXT)["input_ids"]
    files = {
        "file": b"just text\n",
        "empty": b"",
        "latin": b"caf\xe9",
        "deep": b"[[0], [0, 0], [0, 0, 0], [0, 0, 0, 0]]",
        "limit": b"a" * CONTEXT,
        "long": b"a" * (2 * CONTEXT),
        "prompts": b'{"prompt": "def"}\n',
    }
    assert len(ids) == CONTEXT
    for name, data in files.items():
        (root / name).write_bytes(data)
    for name in ("folder", "broken"):
        (root / name).mkdir()
    (root / "broken" / "config.json").write_bytes((tiny.folder / "model" / "config.json").read_bytes())
    (root / "broken" / "model.safetensors").write_bytes(b"no tensors")
    config = tiny.model.config.to_dict()
    for name, changes in {"other": {}, "wide": {"hidden_size": 64}}.items():
        torch.manual_seed(7)
        LlamaForCausalLM(LlamaConfig(**(config | changes))).save_pretrained(root / name)
        tiny.tokenizer.save_pretrained(root / name)
    own = {"model": str(tiny.folder / "model"), "heads": str(tiny.folder / "heads")}
    return {name: str(root / name) for name in [*files, "folder", "broken", "other", "wide"]} | own


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_give_one_line_and_2(
    name: str,
    tiny: Tiny,
    places: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments, message = MISTAKES[name]
    filled = [part for argument in arguments for part in (tiny.arguments if argument == "{tiny}" else [argument])]
    monkeypatch.chdir(tmp_path)
    assert run([argument.format(**places) for argument in filled]) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if not line.startswith("ladon: warning: ")]
    assert len(lines) == 1 and lines[0].startswith("ladon: ") and len(lines[0]) < 600, captured.err
    assert message in lines[0] and captured.out == ""
    assert list(tmp_path.iterdir()) == []


def test_no_prompt_at_a_terminal_is_a_mistake(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    assert run(["generate", *tiny.arguments]) == 2
    assert "no prompt; give --prompt" in capsys.readouterr().err


def test_interrupted_runs_end_with_130_and_leave_nothing(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    prompts = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "def read"}])
    answers, page = tmp_path / "a.jsonl", tmp_path / "t.html"
    monkeypatch.setattr(LadonSystem, "run", interrupt)
    monkeypatch.setattr(Decoder, "trace", interrupt)
    modes = ["--modes", "dynamic", "--max-new-tokens", "8", "--answers", str(answers)]
    assert run(["bench", *tiny.arguments, "--prompts", str(prompts), *modes]) == 130
    assert run(["trace", *tiny.arguments, "--prompt", "a", "--html", str(page)]) == 130
    lines = [line for line in capsys.readouterr().err.splitlines() if "warning" not in line]
    assert lines == ["ladon: interrupted"] * 2
    assert list(tmp_path.iterdir()) == [prompts]


def state_of(model: torch.nn.Module) -> dict[str, object]:
    """Everything that hangs on a model's modules by name: hooks, parameters, and any attribute of its own."""
    return {
        f"{name}.{attribute}": dict(value) if isinstance(value, dict) else value
        for name, module in model.named_modules()
        for attribute, value in vars(module).items()
    }


@pytest.mark.parametrize("place", ["streamer", "layer", "stopping criterion"])
def test_ctrl_c_in_the_middle_of_decoding_leaves_the_model_as_it_was(
    place: str, tiny: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = 0

    def interrupt_later(*_: object, **__: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 8:
            raise KeyboardInterrupt

    model, ids = tiny.model, tiny.tokenizer(PROMPT, return_tensors="pt")
    loaded = loading.Loaded(name="tiny", model=model, tokenizer=tiny.tokenizer, heads=tiny.heads, is_demo=False)
    monkeypatch.setattr(loading, "load", lambda *_, **__: loaded)
    before, config = state_of(model), (model.config.to_dict(), model.generation_config.to_dict())
    answer = expected(tiny, PROMPT, 24)
    with monkeypatch.context() as patch:
        if place == "streamer":
            patch.setattr(PieceStreamer, "put", interrupt_later)
        if place == "layer":  # in the middle of a forward, where hooks sit on the model
            forward = LlamaMLP.forward
            patch.setattr(LlamaMLP, "forward", lambda self, x: (interrupt_later(), forward(self, x))[1])
        if place == "stopping criterion":
            with pytest.raises(KeyboardInterrupt):
                Decoder(model, tiny.heads, profile=True).generate(
                    **ids, max_new_tokens=24, stopping_criteria=[lambda *_, **__: bool(interrupt_later())]
                )
        else:
            assert run(["generate", "--prompt", PROMPT, "--max-new-tokens", "24", "--stats"]) == 130
            assert capsys.readouterr().err == "ladon: interrupted\n"
    assert calls == 8 and state_of(model) == before
    assert config == (model.config.to_dict(), model.generation_config.to_dict())
    assert run(["generate", "--prompt", PROMPT, "--max-new-tokens", "24", "--json"]) == 0
    assert last_json(capsys.readouterr().out)["token_ids"] == answer


WAITING = """
import sys, time
from ladon.cli import main

class Slow:
    def read(self):
        print("reading", flush=True)
        time.sleep(100)

class Stdin:
    buffer = Slow()
    def isatty(self):
        return False

sys.stdin = Stdin()
sys.argv[1:] = ["generate"]
main()
"""


@pytest.mark.skipif(os.name == "nt", reason="Ctrl-C reaches a process group there")
def test_ctrl_c_in_a_real_process() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Tests that a shell runs in the background start with Ctrl-C ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None and process.stdout.readline() == "reading\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130 and errors == "ladon: interrupted\n"


def test_a_failed_write_leaves_the_old_file(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "t.png"
    page.write_text("old", encoding="utf-8")

    def fail(*_: object) -> bytes:
        raise RuntimeError("the renderer broke")

    monkeypatch.setattr(png, "png", fail)
    assert run(["trace", *tiny.arguments, "--prompt", "a", "--max-new-tokens", "4", "--png", str(page)]) == 1
    assert "internal error: RuntimeError: the renderer broke (LADON_DEBUG=1" in capsys.readouterr().err
    assert page.read_text(encoding="utf-8") == "old" and list(tmp_path.iterdir()) == [page]
    monkeypatch.setenv("LADON_DEBUG", "1")
    with pytest.raises(RuntimeError, match="renderer"):
        run(["trace", *tiny.arguments, "--prompt", "a", "--max-new-tokens", "4", "--png", str(page)])


def test_output_into_a_closed_pipe_is_no_error(tiny: Tiny) -> None:
    arguments = ["trace", *tiny.arguments, "--prompt", "a", "--max-new-tokens", "40"]
    process = subprocess.Popen(
        [sys.executable, "-m", "ladon.cli", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    with process.stderr:
        errors = process.stderr.read()
    assert process.wait(timeout=120) == 0 and errors == ""
