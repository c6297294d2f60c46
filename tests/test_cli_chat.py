"""`ladon chat`: the conversation by itself, and the command with a pipe for a terminal."""

from __future__ import annotations

import io
import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaMLP

from ladon.cli.chat import COMMANDS, read_line
from ladon.cli.main import run
from ladon.decoder.conversation import Conversation
from ladon.decoder.detokenizer import Detokenizer
from ladon.errors import InputError
from user_side import CONTEXT, Tiny, make_tokenizer

TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'user' and loop.index0 and messages[loop.index0 - 1].role == 'user' %}"
    "{{ raise_exception('two questions') }}{% endif %}"
    "[{{ m.role[0] }}]{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[a]{% endif %}"
)
STATUS = re.compile(r"\[(?:stopped: )?(\d+) tokens in (\d+) steps, .*?(\d+) prompt tokens reused, (\d+) read\]")
Talk = Callable[..., tuple[str, list[str]]]


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)


@pytest.fixture
def talk(tiny: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Talk:
    """Run the command over lines of input; what it wrote, and its lines on standard error but for the first."""

    def over(lines: str | bytes, *more: str, model: Path | None = None, code: int = 0) -> tuple[str, list[str]]:
        data = lines if isinstance(lines, bytes) else lines.encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        arguments = ["--model", str(model), *tiny.arguments[2:]] if model else tiny.arguments
        assert run(["chat", *arguments, "--budget", "8", "--max-new-tokens", "8", *more]) == code
        out, err = capsys.readouterr()
        notes = err.splitlines()
        return out, notes[1:] if notes and "has no chat template" in notes[0] else notes

    return over


@pytest.fixture(scope="module")
def chatty(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a tokenizer that has a chat template."""
    folder = tmp_path_factory.mktemp("chatty")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tiny.model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def answer(tiny: Tiny, ids: list[int]) -> list[int]:
    """What transformers' greedy generate says after these tokens."""
    whole = tiny.model.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=8, do_sample=False
    )
    said: list[int] = whole[0, len(ids) :].tolist()
    return said


def counts(notes: list[str]) -> list[tuple[int, int, int]]:
    """(said, reused, read) of each status line."""
    found = [match for match in map(STATUS.fullmatch, notes) if match]
    return [(int(match[1]), int(match[3]), int(match[4])) for match in found]


def test_without_a_template_the_text_goes_on(tiny: Tiny, talk: Talk) -> None:
    """Each line is appended as it is; only it and the last token said are read."""
    encode = tiny.tokenizer
    ids, expected, read = [], "", []
    for line in ("def read", "(self", " in "):
        new = encode(line)["input_ids"]
        said = answer(tiny, [*ids, *new])
        read.append((len(said), max(len(ids) - 1, 0), len(new) + bool(ids)))
        expected += text_after(tiny.tokenizer, [*ids, *new], said) + "\n"
        ids += [*new, *said]
    out, notes = talk("def read\n\n(self\r\n   \n in \n")
    assert out == expected and counts(notes) == read
    assert "never read" not in talk("/quit\nnever read\n")[0]


def text_after(tokenizer: PreTrainedTokenizerFast, context: list[int], said: list[int]) -> str:
    pieces = Detokenizer(tokenizer, context, skip_special_tokens=True)
    return "".join(map(pieces.push, said)) + pieces.flush()


def test_with_a_template_the_history_stays_in_the_cache(tiny: Tiny, chatty: Path, talk: Talk) -> None:
    out, notes = talk("read\nself\nline\n", "--system", "be", model=chatty)
    text, ids, expected, read = "[s]be\n", [], "", []
    for line in ("read", "self", "line"):
        new = tiny.tokenizer(f"{text}[u]{line}\n[a]")["input_ids"]
        said = answer(tiny, [*ids, *new])
        assert tiny.tokenizer.eos_token_id not in said, "another seed is needed"
        read.append((8, max(len(ids) - 1, 0), len(new) + bool(ids)))
        expected += tiny.tokenizer.decode(said) + "\n"
        ids, text = [*ids, *new, *said], "\n"
    assert out == expected and counts(notes) == read


def test_regen_draws_anew_and_a_seed_repeats_it(talk: Talk) -> None:
    options = ["--temperature", "1.5", "--seed", "3"]
    out, notes = talk("def read\n/regen\n/regen\n", *options)
    first, again, third = counts(notes)
    assert again[1:] == third[1:] == (first[2] - 1, 1), "the prompt is there but for its last token"
    assert talk("def read\n/regen\n/regen\n", *options)[0] == out
    answers = [talk("def read\n" + n * "/regen\n", *options)[0] for n in range(3)]
    assert out.startswith(answers[1]) and answers[1].startswith(answers[0])
    assert len({answers[0], answers[1][len(answers[0]) :], out[len(answers[1]) :]}) == 3
    greedy = talk("def read\n/regen\n")[0]
    assert greedy[: len(greedy) // 2] == greedy[len(greedy) // 2 :]


def test_files_keep_the_chat(tiny: Tiny, chatty: Path, talk: Talk, tmp_path: Path) -> None:
    """A chat that is read back is encoded anew, whole."""
    file = tmp_path / "chat.json"
    out, _ = talk(f"read\nself\n/save {file}\n", "--system", "é", model=chatty)
    messages = json.loads(file.read_text(encoding="utf-8"))["messages"]
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert messages[0]["content"] == "é" and "".join(m["content"] + "\n" for m in messages[2::2]) == out
    again, notes = talk(f"x\n/load {file}\n/regen\n/reset\n/regen\n", model=chatty)
    text = "".join(f"[{m['role'][0]}]{m['content']}\n" for m in messages[:-1]) + "[a]"
    ids = tiny.tokenizer(text)["input_ids"]
    assert again.endswith(tiny.tokenizer.decode(answer(tiny, ids), skip_special_tokens=True) + "\n")
    assert notes[1] == "5 messages" and notes[3].startswith("ladon: there is no message to answer")
    assert sum(counts(notes)[1][1:]) == len(ids)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read"),
        (b"\xff", "is not JSON"),
        (b"{", "is not JSON"),
        (b"[]", "holds no chat"),
        (b'{"messages": [{"role": "robot", "content": "x"}]}', "holds no chat"),
        (b'{"messages": [{"role": "user", "content": 5}]}', "holds no chat"),
        (b'{"messages": "x"}', "holds no chat"),
        (b'{"messages": [], "tools": []}', "holds tools, which ladon chat cannot go on with"),
        (b'{"messages": [{"role": "assistant", "content": "", "tool_calls": []}]}', "holds tool_calls, which"),
    ],
)
def test_bad_files_are_one_line_and_change_nothing(
    content: bytes | None, message: str, talk: Talk, tmp_path: Path
) -> None:
    file, saved = tmp_path / "bad.json", tmp_path / "saved.json"
    if content is not None:
        file.write_bytes(content)
    _, notes = talk(f"def\n/load {file}\n/save {saved}\n/save {tmp_path}\n")
    assert notes[1].startswith("ladon: ") and message in notes[1]
    assert notes[2].startswith("ladon: cannot write") and len(notes) == 3
    assert len(json.loads(saved.read_text(encoding="utf-8"))["messages"]) == 2


def test_mistakes_are_one_line_and_the_chat_goes_on(talk: Talk) -> None:
    _, notes = talk(b"/regen\n/foo\n/save\n/quit now\n\xff\ndef\n" + b"x" * 200 + b"\n/stats\n")
    assert all(note.startswith("ladon: ") for note in [*notes[:5], notes[6]]) and len(notes) == 8
    for note, said in zip(
        notes, ["no message to answer", "/foo is no command", "name a file", "nothing more"], strict=False
    ):
        assert said in note
    assert "not UTF-8" in notes[4] and STATUS.fullmatch(notes[5])
    assert f"the model's context ends at {CONTEXT}; write a shorter one, or /reset" in notes[6]
    assert notes[7].startswith("answers: 1; 8 tokens in ")


def test_help_names_every_command_and_lines_can_be_joined(talk: Talk, tmp_path: Path) -> None:
    file = tmp_path / "chat.json"
    _, notes = talk(f"/help\ndef\\\n  x\n//y\n/save {file}\nz\\")
    assert [note.split()[0] for note in notes[: len(COMMANDS)]] == [usage.split()[0] for usage in COMMANDS]
    messages = json.loads(file.read_text(encoding="utf-8"))["messages"]
    assert [message["content"] for message in messages[::2]] == ["def\n  x", "/y"]


def test_reset_forgets(talk: Talk) -> None:
    out, notes = talk("def read\n/reset\ndef read\n")
    first, second = counts(notes)
    assert first == second and out[: len(out) // 2] == out[len(out) // 2 :]


def test_colours_change_no_text(talk: Talk) -> None:
    lines = "def read\nself\n"
    plain, _ = talk(lines)
    coloured, notes = talk(lines, "--color-by-depth")
    assert coloured == plain and notes[0] == "drafted, depth 1 · drafted, depth 2 · drafted, depth 3 · bonus token"


def as_its_own(forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A forward that passes for transformers' own: a model that runs others' code is tested anew by each decoder."""
    forward.__module__ = LlamaMLP.__module__
    return forward


@pytest.mark.parametrize("place", ["text", "layer"])
def test_ctrl_c_ends_the_answer_and_not_the_program(
    place: str, talk: Talk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was said stays in the history; the next turn is what it would be after that text."""
    talk("def\n")  # the model's self-test is done
    file, calls, push, forward = tmp_path / "chat.json", [0], Detokenizer.push, LlamaMLP.forward
    at = {"text": 4, "layer": 5}[place]

    def interrupt() -> None:
        calls[0] += 1
        if calls[0] == at:
            raise KeyboardInterrupt

    if place == "text":
        monkeypatch.setattr(Detokenizer, "push", lambda self, token: (interrupt(), push(self, token))[1])
    else:
        monkeypatch.setattr(LlamaMLP, "forward", as_its_own(lambda self, x: (interrupt(), forward(self, x))[1]))
    options = ["--tree", "off"] if place == "layer" else []
    _, notes = talk(f"def read\n/save {file}\n(self\n", *options)
    assert notes[0].startswith("[stopped: ") and notes[1].startswith("[8 tokens")
    messages = json.loads(file.read_text(encoding="utf-8"))["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant"]
    said = counts(notes)[0][0]
    assert 1 <= said < 8


def test_ctrl_c_before_anything_was_said_takes_the_message_back(
    talk: Talk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, forward, calls = tmp_path / "chat.json", LlamaMLP.forward, [0]

    def interrupted(self: LlamaMLP, x: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        if calls[0] == 1 + before[0]:
            raise KeyboardInterrupt
        return forward(self, x)

    before = [10**9]
    monkeypatch.setattr(LlamaMLP, "forward", as_its_own(interrupted))
    talk("def read\n")
    calls[0], before[0] = 0, 0
    _, notes = talk(f"def read\n/save {file}\ndef read\n")
    assert notes[0].startswith("[stopped: 0 tokens") and notes[1].startswith("[8 tokens")
    assert json.loads(file.read_text(encoding="utf-8"))["messages"] == []


def test_ctrl_c_in_a_real_process(tiny: Tiny, tmp_path: Path) -> None:
    """While it answers or while it waits for a line: it goes on."""
    file = tmp_path / "chat.json"
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "ladon.cli", "chat", *tiny.arguments, "--max-new-tokens", "100"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(b"def read\n")
    process.stdin.flush()
    assert process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(f"/save {file}\n/quit\n".encode(), timeout=120)
    assert process.returncode == 0 and b"Traceback" not in errors
    assert [m["role"] for m in json.loads(file.read_text(encoding="utf-8"))["messages"]] == ["user", "assistant"]


def test_what_cannot_be_a_chat_is_one_line(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in [
        (["--system", "x", *tiny.arguments], "no chat template"),
        ([*tiny.arguments[:2], "--ngrams", "off"], "no heads"),
        (["--temperature", "-1"], "temperature"),
    ]:
        assert run(["chat", *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error and len(error.splitlines()) == 1


def test_lines() -> None:
    assert read_line("hello /quit") == ("", "hello /quit") and read_line("//etc") == ("", "/etc")
    assert read_line("/save  a b.json ") == ("/save", "a b.json") and read_line("/quit") == ("/quit", "")
    with pytest.raises(InputError, match="//foo"):
        read_line("/foo")


def test_a_template_that_rewrites_the_past_is_followed() -> None:
    """One that strips what was said: then the tokens are those of the new text."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}[{{ m.content | trim }}]{% endfor %}"
    chat = Conversation(tokenizer)
    chat.ask("read")
    chat.prompt_ids()
    chat.answer(" self ", tokenizer(" self ")["input_ids"])
    chat.ask("x")
    assert tokenizer.decode(chat.prompt_ids()) == "[read][self][x]"


def test_what_was_said_keeps_its_own_tokens() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    chat = Conversation(tokenizer)
    chat.ask("read")
    first = chat.prompt_ids()
    said = [tokenizer(letter)["input_ids"][0] for letter in "return"]
    assert said != tokenizer("return")["input_ids"], "the tokenizer has a token for the word"
    chat.answer("return", [*said, tokenizer.eos_token_id])
    chat.ask("x")
    ids = chat.prompt_ids()
    assert ids[: len(first) + len(said)] == [*first, *said]
    assert tokenizer.decode(ids) == "[u]read\n[a]return\n[u]x\n[a]"
    chat.ask("y")
    with pytest.raises(InputError, match=r"refuses the chat: .*two questions"):
        chat.prompt_ids()
