"""Stopping criteria: the ones that count, and how they are called."""

from __future__ import annotations

import itertools
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation import stopping_criteria as kinds
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

import ladon
from drafts import SIZES, oracle_decoder
from greedy import BATCH, MASK, PROMPT, one_character_per_token, plain
from ladon.decoder.stopping import StopRules
from ladon.engine.sequence import Row


@pytest.mark.parametrize("length", [10, 13, 15, 40])
def test_the_users_length_limit_replaces_the_default_one(model, decoder, length):
    """Beyond max_new_tokens too, and at least one token where the prompt is past it already, as in `generate`."""
    criteria = StoppingCriteriaList([MaxLengthCriteria(length)])
    expected = plain(model, stopping_criteria=criteria)
    assert expected.shape[1] == max(length, 13)
    assert torch.equal(decoder.generate(PROMPT, max_new_tokens=16, stopping_criteria=criteria), expected)


def test_the_users_end_tokens_replace_the_default_ones(model, decoder):
    free = plain(model)[0, 12:].tolist()
    own, default = free[8], free[2]
    assert own not in free[:8], "another seed is needed"
    for criterion in (EosTokenCriteria(own), EosTokenCriteria([own, 96]), EosTokenCriteria(torch.tensor([own]))):
        options = {"stopping_criteria": StoppingCriteriaList([criterion]), "eos_token_id": default, "pad_token_id": 0}
        expected = plain(model, **options)
        assert expected.shape[1] == 12 + 9
        assert torch.equal(decoder.generate(PROMPT, max_new_tokens=16, **options), expected)


class Halves(MaxLengthCriteria):
    """A subclass that means something else: it must be called."""

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), 2 * input_ids.shape[1] >= self.max_length)


def test_a_subclass_is_called(model, decoder):
    criteria = StoppingCriteriaList([Halves(40)])
    expected = plain(model, stopping_criteria=criteria)
    assert expected.shape[1] == 20
    assert torch.equal(decoder.generate(PROMPT, max_new_tokens=16, stopping_criteria=criteria), expected)


class Notes(StoppingCriteria):
    """Ends at a length; notes what it is given."""

    def __init__(self, length=99) -> None:
        self.length, self.seen = length, []

    def __call__(self, input_ids, scores, **kwargs):
        self.seen.append(input_ids)
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length, device=input_ids.device)


def test_every_criterion_is_asked_after_every_token(model, decoder):
    """One that keeps count must not miss a token because another has said yes first."""
    criteria = StoppingCriteriaList([Notes(15), Notes(15)])
    decoder.generate(PROMPT, max_new_tokens=16, stopping_criteria=criteria)
    assert [len(notes.seen) for notes in criteria] == [3, 3]


def test_criteria_see_the_rows_with_their_padding(decoder):
    notes = Notes()
    output = decoder.generate(BATCH, attention_mask=MASK, max_new_tokens=4, stopping_criteria=[notes])
    assert len(notes.seen) == 4
    for new, seen in enumerate(notes.seen, start=1):
        assert seen.dtype == torch.int64 and torch.equal(seen, output[:, : 8 + new])


def test_criteria_see_a_row_of_an_engine_alone(decoder):
    notes = Notes()
    rows = decoder.rows(
        [row[mask.bool()] for row, mask in zip(BATCH, MASK, strict=True)], max_new_tokens=4, stopping_criteria=[notes]
    )
    for _ in decoder.decode(rows):
        pass
    output = decoder.generate(BATCH, attention_mask=MASK, max_new_tokens=4)
    assert len(notes.seen) == 3 * 4
    for seen in notes.seen:
        assert seen.dtype == torch.int64 and any(torch.equal(seen[0], row[: seen.shape[1]]) for row in output)


def test_the_row_so_far_is_not_made_anew_for_every_token():
    """Room doubles when it is full; between that, each call gets a view on the device of the prompt."""

    def judged(device: str) -> tuple[Notes, Row]:
        notes, prompt = Notes(10**6), torch.arange(4, device=device)
        (judge,) = StopRules.of(StoppingCriteriaList([notes])).judges(prompt[None], 0, together=True)
        judge.rows.append(Row(prompt=prompt, max_new_tokens=99, is_stop=judge.rule()))
        return notes, judge.rows[0]

    notes, row = judged("meta")
    row.take([7])
    assert isinstance(row.error, RuntimeError)  # a meta tensor's answer cannot be read; what was given matters here
    assert notes.seen[0].device.type == "meta" and notes.seen[0].shape == (1, 5)
    notes, row = judged("cpu")
    assert row.take(range(100, 160)) == list(range(100, 160)) and not row.finished
    assert notes.seen[-1].tolist() == [[0, 1, 2, 3, *range(100, 160)]]
    assert len({seen.data_ptr() for seen in notes.seen}) == 4  # 8, 16, 32, 64


def test_stop_strings_of_a_generation_config(model, decoder):
    from transformers import GenerationConfig

    tokenizer = one_character_per_token()
    stop = tokenizer.decode(plain(model)[0, 12:])[5:7]
    expected = plain(model, stop_strings=[stop], tokenizer=tokenizer)
    assert expected.shape[1] < 12 + 16
    config = GenerationConfig(max_new_tokens=16, stop_strings=[stop])
    assert torch.equal(decoder.generate(PROMPT, generation_config=config, tokenizer=tokenizer), expected)
    assert config.stop_strings == [stop], "the user's config is as it was"
    model.generation_config.stop_strings = [stop]
    assert torch.equal(decoder.generate(PROMPT, max_new_tokens=16, tokenizer=tokenizer), expected)
    other = decoder.generate(PROMPT, max_new_tokens=16, tokenizer=tokenizer, stop_strings=None)
    assert torch.equal(other, plain(model, stop_strings=None))
    with pytest.raises(ladon.InputError, match="tokenizer"):
        decoder.generate(PROMPT, max_new_tokens=16)


def test_stop_strings_of_rows(model, decoder):
    tokenizer = one_character_per_token()
    stop = tokenizer.decode(plain(model)[0, 12:])[5:7]
    expected = plain(model, stop_strings=[stop], tokenizer=tokenizer)[0, 12:].tolist()
    rows = decoder.rows([PROMPT[0]], max_new_tokens=16, stop_strings=[stop], tokenizer=tokenizer)
    for _ in decoder.decode(rows):
        pass
    assert rows[0].tokens == expected
    with pytest.raises(ladon.InputError, match="stop_strings needs the tokenizer"):
        decoder.rows([PROMPT[0]], max_new_tokens=16, stop_strings=[stop])


def check_usage(decoder: ladon.Decoder, output, new: int) -> None:
    """Tokens that were cut off are counted nowhere and are not in the cache."""
    assert output.sequences.shape[1] == 12 + new and decoder.stats.tokens == new - 1
    (row,) = output.past_key_values.rows
    assert list(row.token_ids) in (output.sequences[0].tolist(), output.sequences[0, :-1].tolist())


@pytest.mark.parametrize(("tree", "budget"), SIZES)
@pytest.mark.parametrize("place", range(9))
def test_ends_and_limits_at_every_place_of_a_block(model, tree, budget, place):
    truth = plain(model)[0, 12:].tolist()
    assert len(set(truth[:9])) == 9, "another seed is needed"
    decoder = oracle_decoder(model, truth, tree, budget)
    ends = {"eos_token_id": [truth[place], truth[8], 96], "pad_token_id": 0, "max_new_tokens": 16}
    for options in (ends, {"max_new_tokens": place + 1}, {"max_length": 13 + place}):
        expected = plain(model, **{"max_new_tokens": None, **options})
        output = decoder.generate(PROMPT, return_dict_in_generate=True, **options)
        assert torch.equal(output.sequences, expected)
        check_usage(decoder, output, place + 1)
        assert decoder.stats.row_steps < place or budget == 1 or place < 2


@pytest.mark.parametrize(("tree", "budget"), SIZES)
@pytest.mark.parametrize("length", [1, 2, 5])
def test_stop_strings_across_tokens_and_blocks(model, tree, budget, length):
    """Of several the first to be complete ends the text, wherever it begins and ends among accepted paths."""
    truth, tokenizer = plain(model)[0, 12:].tolist(), one_character_per_token()
    decoder, text = oracle_decoder(model, truth, tree, budget), tokenizer.decode(truth)
    for start in range(0, 16 - length):
        stops = [text[start : start + length], text[-2:] + "never"]
        expected = plain(model, stop_strings=stops, tokenizer=tokenizer)
        output = decoder.generate(
            PROMPT, max_new_tokens=16, stop_strings=stops, tokenizer=tokenizer, return_dict_in_generate=True
        )
        assert torch.equal(output.sequences, expected)
        check_usage(decoder, output, text.index(stops[0]) + length)


class Calls(StoppingCriteria):
    """Notes everything that it is given, and ends at a token."""

    def __init__(self, token: int) -> None:
        self.token, self.seen = token, []

    def __call__(self, input_ids, scores, **kwargs):
        self.seen.append((input_ids.tolist(), scores, kwargs))
        return input_ids[:, -1] == self.token


@pytest.mark.parametrize(("tree", "budget"), SIZES)
def test_criteria_get_the_calls_that_transformers_makes(model, tree, budget):
    truth = plain(model)[0, 12:].tolist()
    decoder = oracle_decoder(model, truth, tree, budget)
    for token in (truth[0], truth[6], truth[7], 1000):
        mine, theirs = Calls(token), Calls(token)
        output = decoder.generate(PROMPT, max_new_tokens=16, stopping_criteria=[mine])
        assert torch.equal(output, plain(model, stopping_criteria=StoppingCriteriaList([theirs])))
        assert mine.seen == theirs.seen


@pytest.mark.parametrize(("tree", "budget"), SIZES)
@pytest.mark.parametrize("max_time", [0.5, 3.5, 6.5, 100])
def test_max_time_is_asked_after_every_token(model, tree, budget, max_time, monkeypatch):
    """With a clock that goes on by one second whenever it is read, the text ends where transformers ends it."""
    truth = plain(model)[0, 12:].tolist()
    decoder = oracle_decoder(model, truth, tree, budget)
    monkeypatch.setattr(kinds, "time", SimpleNamespace(time=partial(next, itertools.count())))
    expected = plain(model, max_time=max_time)
    assert expected.shape[1] == 12 + min(int(max_time) + 1, 16)
    output = decoder.generate(PROMPT, max_new_tokens=16, max_time=max_time, return_dict_in_generate=True)
    assert torch.equal(output.sequences, expected)
    check_usage(decoder, output, expected.shape[1] - 12)
