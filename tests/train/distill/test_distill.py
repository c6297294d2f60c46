"""Answers of the model itself: right, and in the file once each, whatever happens on the way."""

from __future__ import annotations

import copy
import json
import os
import resource
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from ladon import InputError
from ladon.decoder.decoder import Decoder
from ladon.engine.sequence import Row
from ladon.sampling.gumbel import mix
from ladon.sampling.sampling_params import TemperatureSampling
from ladon.train.data.prompts import Prompt
from ladon.train.distill.distill import (
    Answer,
    Failure,
    Report,
    Settings,
    distill,
    failed_path,
    only_writer,
    read_distilled,
)
from ladon.train.distill.local import LocalModel, weights_hash
from user_side import CONTEXT, Tiny

GREEDY = Settings(model="tiny", dtype="float64", max_new_tokens=9)
SAMPLED = replace(GREEDY, temperature=0.9, top_k=40, top_p=0.95, seed=3)


def prompt(index: int, token_ids: list[int]) -> Prompt:
    return Prompt(id=f"row {index}", index=index, token_ids=token_ids)


PROMPTS = [prompt(index, [(7 * index + place) % 280 + 1 for place in range(2 + index % 4)]) for index in range(7)]


class Echo:
    """Answers with what it was asked, `batch` prompts at a time; what each call was asked is kept."""

    def __init__(self, batch: int = 2, stop_after: int | None = None) -> None:
        self.asked: list[str] = []
        self._batch, self._stop_after = batch, stop_after

    def answers(self, prompts: Sequence[Prompt], settings: Settings) -> Iterator[list[Answer | Failure]]:
        for number, start in enumerate(range(0, len(prompts), self._batch)):
            if number == self._stop_after:
                raise KeyboardInterrupt
            batch = prompts[start : start + self._batch]
            self.asked += [prompt.id for prompt in batch]
            yield [self._answer(prompt) for prompt in batch]

    def _answer(self, prompt: Prompt) -> Answer | Failure:
        text = "" if 99 in prompt.token_ids else "é" * len(prompt.token_ids)
        if 98 in prompt.token_ids:
            return Failure(prompt=prompt, reason="no luck", detail="98")
        return Answer(prompt=prompt, token_ids=prompt.token_ids, text=text, finish="stop")


@pytest.fixture(scope="module")
def double(tiny: Tiny) -> PreTrainedModel:
    """The tiny model in float64, where nothing depends on the batch; one of its common tokens ends a text."""
    model = copy.deepcopy(tiny.model).double()
    ids = torch.tensor([PROMPTS[0].token_ids])
    greedy = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    model.generation_config.eos_token_id = [0, int(greedy[0, -1])]
    return model


@pytest.fixture(scope="module")
def local(double: PreTrainedModel, tiny: Tiny) -> LocalModel:
    return LocalModel(double, None, tiny.tokenizer, batch=3)


@pytest.fixture(scope="module")
def whole(local: LocalModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of uninterrupted runs."""
    folder = tmp_path_factory.mktemp("whole")
    for name, asked in (("greedy", GREEDY), ("sampled", SAMPLED)):
        distill(PROMPTS, folder / name, local, asked)
    return {name: (folder / name).read_bytes() for name in ("greedy", "sampled")}


def test_greedy_rows_are_what_generate_says(double, local, tiny, tmp_path):
    distill(PROMPTS, tmp_path / "out.jsonl", local, GREEDY)
    rows = read_distilled(tmp_path / "out.jsonl")
    assert [row.id for row in rows] == [prompt.id for prompt in PROMPTS]
    for row, asked in zip(rows, PROMPTS, strict=True):
        ids = torch.tensor([asked.token_ids])
        said = double.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, do_sample=False)[0]
        assert row.prompt_ids == asked.token_ids and row.answer_ids == said[ids.shape[1] :].tolist()
        ended = row.answer_ids[-1] in double.generation_config.eos_token_id
        assert row.finish == ("stop" if ended else "length") and (ended or len(row.answer_ids) == 9)
        assert row.answer == tiny.tokenizer.decode(row.answer_ids, skip_special_tokens=True)
        assert (row.seed, row.model, row.dtype) == (None, "tiny", "float64")
    assert {row.finish for row in rows} == {"stop", "length"}
    assert not failed_path(tmp_path / "out.jsonl").exists()


def test_a_sampled_row_can_be_replayed_from_itself(double, local, tmp_path):
    distill(PROMPTS, tmp_path / "out.jsonl", local, SAMPLED)
    rows = read_distilled(tmp_path / "out.jsonl")
    assert [row.seed for row in rows] == [mix(3, index) for index in range(len(PROMPTS))]
    for row in rows:
        again = Row(
            prompt=torch.tensor(row.prompt_ids),
            max_new_tokens=int(row.sampling["max_new_tokens"]),
            is_stop=double.generation_config.eos_token_id.__contains__,
            seed=row.seed,
            sampling_params=TemperatureSampling(
                **{name: row.sampling[name] for name in ("temperature", "top_p", "top_k")}
            ),
        )
        for _ in Decoder(double).decode([again]):
            pass
        assert again.tokens == row.answer_ids
    assert len({tuple(row.answer_ids) for row in rows}) == len(rows)


@pytest.mark.parametrize("asked", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_heads_and_batches_change_nothing(double, tiny, whole, tmp_path, asked):
    heads = copy.deepcopy(tiny.heads).double()
    for batch in (1, 4):
        helped = LocalModel(double, heads, tiny.tokenizer, batch=batch, tree="dynamic", budget=8)
        out = tmp_path / f"{batch}.jsonl"
        distill(PROMPTS, out, helped, asked)
        assert out.read_bytes() == whole["sampled" if asked.temperature else "greedy"]
        assert helped.acceptance_length > 1


def test_without_heads_there_is_no_acceptance_length(local, whole):
    assert local.acceptance_length is None


@pytest.mark.parametrize("name", ["greedy", "sampled"])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_cut_at_any_byte_and_resumed_is_as_if_uninterrupted(local, whole, tmp_path_factory, name, data):
    kept = data.draw(st.integers(0, len(whole[name])))
    out = tmp_path_factory.mktemp("cut") / "out.jsonl"
    out.write_bytes(whole[name][:kept])
    report = distill(PROMPTS, out, local, GREEDY if name == "greedy" else SAMPLED)
    assert out.read_bytes() == whole[name]
    assert report.resumed == whole[name][:kept].count(b"\n") and report.resumed + report.rows == len(PROMPTS)


def test_every_byte(tmp_path, monkeypatch):
    """The same at each byte there is, with a model that takes no time: nothing is asked twice, nothing left out."""
    monkeypatch.setattr(os, "fsync", lambda file: None)  # thousands of them take a minute
    out = tmp_path / "out.jsonl"
    distill(PROMPTS[:3], out, Echo(), GREEDY)
    data = out.read_bytes()
    for kept in range(len(data) + 1):
        out.write_bytes(data[:kept])
        echo, lines = Echo(batch=1), []
        distill(PROMPTS[:3], out, echo, GREEDY, notice=lines.append)
        assert out.read_bytes() == data
        assert echo.asked == [prompt.id for prompt in PROMPTS[data[:kept].count(b"\n") : 3]]
        torn = kept - data[:kept].rfind(b"\n") - 1
        assert len(lines) == bool(torn) and all(f"{torn} bytes cut off" in line for line in lines)


def test_failures_are_counted_listed_and_tried_again(tmp_path):
    out = tmp_path / "out.jsonl"
    asked = [prompt(0, [1]), prompt(1, [98]), prompt(2, [99, 5]), prompt(3, []), prompt(4, [98, 2])]
    report = distill(asked, out, Echo(), GREEDY)
    assert report.failures == {"no luck": 2, "empty answer": 1, "empty prompt": 1}
    assert (report.rows, report.done, report.total) == (1, 5, 5)
    listed = [json.loads(line) for line in failed_path(out).read_text().splitlines()]
    assert {(row["id"], row["reason"], row["detail"]) for row in listed} == {
        ("row 1", "no luck", "98"),
        ("row 2", "empty answer", ""),
        ("row 3", "empty prompt", ""),
        ("row 4", "no luck", "98"),
    }
    fewer = distill(asked[:3], out, Echo(), GREEDY)
    assert fewer.failures == {"no luck": 1, "empty answer": 1} and fewer.resumed == 1
    assert len(failed_path(out).read_text().splitlines()) == 2
    healed = [prompt(1, [3]), prompt(2, [5])]
    assert not distill(healed, out, Echo(), GREEDY).failures and not failed_path(out).exists()
    assert [row.id for row in read_distilled(out)] == ["row 0", "row 1", "row 2"]


def test_prompts_that_leave_no_room_fail_and_others_are_cut(local, tmp_path):
    out = tmp_path / "out.jsonl"
    asked = [prompt(0, [3] * CONTEXT), prompt(1, [3] * (CONTEXT - 4)), prompt(2, [3] * (CONTEXT + 50))]
    report = distill(asked, out, local, GREEDY)
    assert report.failures == {"prompt too long": 2}
    [row] = read_distilled(out)
    assert row.id == "row 1" and row.finish == "length" and len(row.answer_ids) == 4
    assert f"{CONTEXT} tokens, the context holds {CONTEXT}" in failed_path(out).read_text()


def test_tokens_of_another_tokenizer_are_refused(local, tmp_path):
    with pytest.raises(InputError, match=r"'row 1' holds token 291, but the model has 291; encode"):
        distill([prompt(0, [1]), prompt(1, [291])], tmp_path / "out.jsonl", local, GREEDY)


@pytest.mark.parametrize(
    ("other", "name"),
    [
        ({"model": "big"}, r"model \(tiny, now big\)"),
        ({"weights": "bb"}, r"model \(aa, now bb\)"),
        ({"dtype": "float32"}, "dtype"),
        ({"temperature": 0.5}, "sampling"),
        ({"max_new_tokens": 10}, "sampling"),
        ({"top_k": 5}, "sampling"),
    ],
)
def test_rows_of_another_run_are_refused(tmp_path, other, name):
    out = tmp_path / "out.jsonl"
    asked = replace(GREEDY, weights="aa")
    distill(PROMPTS[:2], out, Echo(), asked)
    before = out.read_bytes()
    with pytest.raises(InputError, match=f"has a row 'row 0' with another {name}.*; go on with .*--out"):
        distill(PROMPTS, out, Echo(), replace(asked, **other))
    assert out.read_bytes() == before


def test_other_seeds_and_prompts_are_refused_too(tmp_path):
    out = tmp_path / "out.jsonl"
    distill(PROMPTS[:3], out, Echo(), SAMPLED)
    with pytest.raises(InputError, match="another seed"):
        distill(PROMPTS, out, Echo(), replace(SAMPLED, seed=4))
    with pytest.raises(InputError, match="'row 2' with another prompt;"):
        distill([*PROMPTS[:2], prompt(2, [1])], out, Echo(), SAMPLED)
    distill(PROMPTS[5:], out, Echo(), SAMPLED)  # rows of prompts that are not asked for may stand there
    assert len(read_distilled(out)) == 5


def test_different_weights_are_told_apart(double, tiny):
    other = copy.deepcopy(double)
    assert weights_hash(other) == weights_hash(double) == weights_hash(tiny.model.float())
    other.lm_head.weight.data *= 1.01
    assert weights_hash(other) != weights_hash(double)


def test_an_interrupted_run_goes_on(tmp_path):
    out = tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt):
        distill(PROMPTS, out, Echo(stop_after=2), GREEDY)
    assert [row.id for row in read_distilled(out)] == [prompt.id for prompt in PROMPTS[:4]]
    echo = Echo()
    distill(PROMPTS, out, echo, GREEDY)
    assert echo.asked == [prompt.id for prompt in PROMPTS[4:]]


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path):
    """A limit on the size of files stands for the end of the disk: the second batch fits in part."""
    out = tmp_path / "out.jsonl"
    distill(PROMPTS, out, Echo(), GREEDY)
    data = out.read_bytes()
    first = len(b"".join(data.splitlines(keepends=True)[:2]))
    out.unlink()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (first + 10, hard))
    try:
        with pytest.raises(InputError, match=r"^cannot write .*out.jsonl: File too large; .*make room, then run"):
            distill(PROMPTS, out, Echo(), GREEDY)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert out.read_bytes() == data[: first + 10]
    distill(PROMPTS, out, Echo(), GREEDY)
    assert out.read_bytes() == data


def test_what_a_run_tells(tmp_path):
    out, first, told = tmp_path / "out.jsonl", [], []
    asked = [prompt(0, [98]), prompt(1, [1, 2] * 8), prompt(2, [3]), prompt(3, [])]

    def progress(report: Report) -> None:
        told.append((report.done, report.rows, report.tokens))

    report = distill(asked, out, Echo(batch=1), GREEDY, first=first.append, progress=progress)
    assert [answer.prompt.id for answer in first] == ["row 1"]
    assert told == [(0, 0, 0), (1, 0, 0), (2, 0, 0), (3, 1, 16), (4, 2, 17)]
    assert report.repetition.share == 7 / 9
    assert report.tokens_per_second == 17 / report.seconds and report.seconds_left == 0
    half = Report(total=10, resumed=2, rows=3, failures=report.failures, seconds=20.0, tokens=40)
    assert half.seconds_left == pytest.approx(3 * 20 / 5) and half.tokens_per_second == 2


def test_names_beside_the_answers():
    assert failed_path(Path("a/answers.jsonl")) == Path("a/answers.failed.jsonl")
    assert failed_path(Path("answers")) == Path("answers.failed.jsonl")


def test_two_runs_never_write_one_file(tmp_path: Path) -> None:
    """A second run that appended too would double every row."""
    out = tmp_path / "answers.jsonl"
    with only_writer(out), pytest.raises(InputError, match="another run is writing"), only_writer(out):
        pass
    with only_writer(out):
        pass
