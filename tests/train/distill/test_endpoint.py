"""An OpenAI-compatible endpoint answers: what is sent, what its answers become, and what happens when it fails."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from chats import CALL, CHAT, TEMPLATE, TOOL_CHATS, TOOL_TEMPLATE
from endpoints import KEY, Server, says, serving
from ladon import InputError
from ladon.sampling.gumbel import mix
from ladon.train.data.prompts import Prompt, read_prompts
from ladon.train.distill.distill import Report, Settings, distill, failed_path, read_distilled
from ladon.train.distill.endpoint import EndpointModel
from user_side import make_tokenizer, write_jsonl

GREEDY = Settings(model="served", dtype="unknown", max_new_tokens=9)
SAMPLED = replace(GREEDY, temperature=0.5, top_p=0.9, top_k=7, seed=2)


def endpoint(url: str, **options: Any) -> EndpointModel:
    made = make_tokenizer()
    made.chat_template = TEMPLATE
    return EndpointModel(url, made, **{"concurrency": 3, "wait": 0.001, **options})


@pytest.fixture
def asked(tmp_path: Path) -> list[Prompt]:
    rows = [
        {"id": "text", "prompt": "def read("},
        {"id": "ids", "prompt_ids": [5, 6]},
        {"id": "chat", "messages": CHAT},
    ]
    made = make_tokenizer()
    made.chat_template = TEMPLATE
    return read_prompts(str(write_jsonl(tmp_path / "p.jsonl", rows)), made, system=None)


def many(num: int) -> list[Prompt]:
    return [Prompt(id=str(index), index=index, token_ids=[index + 1], text=f"{index}") for index in range(num)]


def run(server: Server, prompts: list[Prompt], out: Path, settings: Settings = GREEDY, **options: Any) -> Report:
    return distill(prompts, out, endpoint(server.url, **options), settings)


def test_what_is_sent(asked, tmp_path):
    with serving(lambda number, path, body: says(body)) as server:
        run(server, asked, tmp_path / "out.jsonl", concurrency=1)
        run(server, asked, tmp_path / "sampled.jsonl", SAMPLED, concurrency=1, api_key=KEY)
    common = {"model": "served", "max_tokens": 9, "temperature": 0.0, "top_p": 1.0}
    assert [(path, body) for path, body, _ in server.requests[:3]] == [
        ("/v1/completions", common | {"prompt": "def read("}),
        ("/v1/completions", common | {"prompt": [5, 6]}),
        ("/v1/chat/completions", common | {"messages": CHAT[:1]}),
    ]
    law = {"temperature": 0.5, "top_p": 0.9, "top_k": 7}
    assert [body["seed"] for _, body, _ in server.requests[3:]] == [mix(2, index) for index in range(3)]
    assert all(body.items() >= law.items() for _, body, _ in server.requests[3:])
    assert ["Authorization" in headers for *_, headers in server.requests] == [False] * 3 + [True] * 3
    assert server.requests[-1][2]["Authorization"] == f"Bearer {KEY}"
    assert [row.seed for row in read_distilled(tmp_path / "sampled.jsonl")] == [mix(2, index) for index in range(3)]


def test_tools_and_template_options_are_passed_on(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TOOL_TEMPLATE
    rows = [{"id": name, **row} for name, row in TOOL_CHATS.items()]
    prompts = read_prompts(str(write_jsonl(tmp_path / "p.jsonl", rows)), tokenizer)

    def reply(number: int, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if body["messages"][-1]["role"] == "tool":
            return 200, {"choices": [{"finish_reason": "tool_calls", "message": CALL}]}
        return says(body)

    with serving(reply) as server:
        report = run(server, prompts, tmp_path / "out.jsonl", concurrency=1)
    assert report.rows == len(rows) - 1 and report.failures == {"endpoint keeps tool calls apart": 1}
    for (path, body, _), row in zip(server.requests, TOOL_CHATS.values(), strict=True):
        assert path == "/v1/chat/completions"
        assert {name: body.get(name) for name in row} == row
        assert body.keys() & {"tools", "chat_template_kwargs"} == row.keys() - {"messages"}


def test_a_netrc_does_not_replace_the_key(asked, tmp_path, monkeypatch):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login other password wrong\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with serving(lambda number, path, body: says(body)) as server:
        run(server, asked[:1], tmp_path / "out.jsonl", api_key=KEY)
        run(server, asked[:1], tmp_path / "other.jsonl")
    assert server.requests[0][2]["Authorization"] == f"Bearer {KEY}" and "Authorization" not in server.requests[1][2]


def test_answers_become_tokens(asked, tmp_path):
    def reply(number: int, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        return says(body, "self, name):", "length") if body.get("prompt") == "def read(" else says(body, "line é")

    with serving(reply) as server:
        report = run(server, asked, tmp_path / "out.jsonl")
    tokenizer = make_tokenizer()
    rows = {row.id: row for row in read_distilled(tmp_path / "out.jsonl")}
    text, chat, ids = rows["text"], rows["chat"], rows["ids"]
    assert text.answer_ids == tokenizer("def read(self, name):")["input_ids"][len(text.prompt_ids) :]
    assert text.finish == "length" and text.answer == "self, name):"
    for row in (chat, ids):
        assert row.answer_ids == [*tokenizer("line é")["input_ids"], tokenizer.eos_token_id] and row.finish == "stop"
    assert ids.prompt_ids == [5, 6] and (chat.model, chat.dtype) == ("served", "unknown")
    assert report.tokens == sum(len(row.answer_ids) for row in rows.values())


@pytest.mark.parametrize("choice", [None, {"message": None}, {"message": {"content": [{"type": "text"}]}}, "x"])
def test_what_is_no_completion_is_counted(asked, tmp_path, choice):
    with serving(lambda number, path, body: (200, {"choices": [choice]})) as server:
        report = run(server, asked, tmp_path / "out.jsonl")
    assert report.failures == {"endpoint sends no completion": 3}


def test_an_answer_that_joins_the_prompts_last_token_keeps_its_own(tmp_path):
    """`def` and ` read` join to other tokens than `def rea` and `d`: the prompt's tokens are not taken apart."""
    tokenizer = make_tokenizer()
    prompt = Prompt(id="a", index=0, token_ids=tokenizer("def rea")["input_ids"], text="def rea")
    assert tokenizer("def read")["input_ids"][: len(prompt.token_ids)] != prompt.token_ids
    with serving(lambda number, path, body: says(body, "d", "length")) as server:
        run(server, [prompt], tmp_path / "out.jsonl")
    [row] = read_distilled(tmp_path / "out.jsonl")
    assert row.prompt_ids == prompt.token_ids and row.answer_ids == tokenizer("d")["input_ids"]


def test_many_at_a_time_and_no_more(tmp_path):
    def reply(number: int, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        time.sleep(0.02)
        return says(body, body["prompt"])

    with serving(reply) as server:
        report = run(server, many(20), tmp_path / "out.jsonl", concurrency=4)
    assert 2 <= server.most <= 4 and report.rows == 20
    rows = read_distilled(tmp_path / "out.jsonl")
    assert sorted(int(row.id) for row in rows) == list(range(20)) and all(row.answer == row.id for row in rows)


def test_what_fails_for_a_while_is_tried_again(tmp_path):
    troubles = [(500, b"oops"), (429, b"slow down"), (0, b""), (503, b""), (200, b"no json"), (200, {"choices": []})]
    seen: dict[str, int] = {}

    def reply(number: int, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        first = seen.setdefault(body["prompt"], len(seen))
        return (
            troubles[first % 6] if sum(b["prompt"] == body["prompt"] for _, b, _ in server.requests) < 3 else says(body)
        )

    with serving(reply) as server:
        report = run(server, many(12), tmp_path / "out.jsonl")
    assert not report.failures and report.rows == 12 and len(server.requests) == 36


def test_what_keeps_failing_is_counted_and_tried_again_by_the_next_run(tmp_path):
    out = tmp_path / "out.jsonl"

    def reply(number: int, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        bad = {
            "1": (500, b"key " + KEY.encode()),
            "2": (400, b"context of 8\nis full"),
            "3": says(body, "x", "content_filter"),
        }
        return bad.get(body["prompt"]) or says(body, "" if body["prompt"] == "4" else "x")

    with serving(reply) as server:
        report = run(server, many(6), out, tries=3, api_key=KEY)
    assert report.failures == {
        "endpoint error 500": 1,
        "endpoint error 400": 1,
        "finish reason content_filter": 1,
        "empty answer": 1,
    }
    sent = [body["prompt"] for _, body, _ in server.requests]
    assert sent.count("1") == 3 and sent.count("2") == 1, "a refusal is final, a failure is not"
    listed = failed_path(out).read_text()
    assert "context of 8 is full" in listed and "key ***" in listed and KEY not in listed + out.read_text()
    with serving(lambda number, path, body: says(body)) as server:
        assert run(server, many(6), out).rows == 4 and len(server.requests) == 4
    assert sorted(row.id for row in read_distilled(out)) == list("012345") and not failed_path(out).exists()


@pytest.mark.parametrize("status", [401, 403, 404])
def test_what_cannot_get_better_ends_the_run(tmp_path, status):
    out = tmp_path / "out.jsonl"

    def reply(number: int, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        return says(body) if number < 5 else (status, f"bad {KEY}".encode())

    with (
        serving(reply) as server,
        pytest.raises(InputError, match=rf"/v1/completions .* \(HTTP {status}: bad \*\*\*\)"),
    ):
        run(server, many(30), out, api_key=KEY, concurrency=1)
    assert len(read_distilled(out)) == 5 and len(server.requests) <= 7


def test_reasoning_kept_apart_ends_the_run(asked, tmp_path):
    said = {"content": "line", "reasoning_content": "the user wants"}
    choice = {"choices": [{"finish_reason": "stop", "message": said}]}
    with (
        serving(lambda number, path, body: (200, choice)) as server,
        pytest.raises(InputError, match="reasoning parser"),
    ):
        run(server, asked[2:], tmp_path / "out.jsonl")


def test_an_endpoint_that_is_gone_ends_the_run(tmp_path):
    out = tmp_path / "out.jsonl"
    with serving(lambda number, path, body: says(body)) as server:
        url = server.url
        run(server, many(3), out)
    started = threading.active_count()
    with pytest.raises(InputError, match=r"^http://127.0.0.1:\d+/v1 does not answer \(\w+\); start it"):
        distill(many(500), out, endpoint(url, tries=2), GREEDY)
    listed = failed_path(out).read_text().splitlines()
    assert 6 <= len(listed) < 100 and all("endpoint does not answer" in line for line in listed)
    assert sorted(row.id for row in read_distilled(out)) == ["0", "1", "2"]  # whole; they come as they are answered
    assert threading.active_count() <= started + 3


def test_an_error_of_the_disk_stops_the_threads(tmp_path, monkeypatch):
    def append(path: Path, lines: list[str]) -> None:
        raise InputError("cannot write")

    monkeypatch.setattr("ladon.train.distill.distill.append", append)
    with serving(lambda number, path, body: says(body)) as server:
        with pytest.raises(InputError, match="cannot write"):
            run(server, many(500), tmp_path / "out.jsonl", concurrency=2)
        time.sleep(0.2)
        sent = len(server.requests)
        time.sleep(0.2)
        assert len(server.requests) == sent < 500


def test_the_url_must_be_one():
    for url in ("localhost:8000", "ftp://host", ""):
        with pytest.raises(InputError, match=r"--endpoint is .*; give a URL such as"):
            endpoint(url)
    with pytest.raises(InputError, match=r"^cannot ask http:.*; check --endpoint"):
        distill(many(1), Path(os.devnull), endpoint("http://"), GREEDY)
