"""Stopping criteria: the ones that count, and how they are called."""

from __future__ import annotations

import pytest
import torch
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

import ladon
from greedy import BATCH, MASK, PROMPT, plain
from ladon.stopping import StopRules


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


def test_criteria_see_each_row_alone_with_its_padding(decoder):
    notes = Notes()
    output = decoder.generate(BATCH, attention_mask=MASK, max_new_tokens=4, stopping_criteria=[notes])
    assert len(notes.seen) == 3 * 4
    for seen in notes.seen:
        assert seen.dtype == torch.int64 and any(torch.equal(seen[0], row[: seen.shape[1]]) for row in output)


def test_the_row_so_far_is_not_made_anew_for_every_token():
    """Room doubles when it is full; between that, each call gets a view on the device of the prompt."""
    notes = Notes(10**6)
    is_stop = StopRules.of(StoppingCriteriaList([notes])).for_row(torch.arange(4, device="meta"))
    with pytest.raises(RuntimeError):  # a meta tensor's answer cannot be read; what was given is what matters here
        is_stop(7)
    assert notes.seen[0].device.type == "meta" and notes.seen[0].shape == (1, 5)
    notes = Notes(10**6)
    is_stop = StopRules.of(StoppingCriteriaList([notes])).for_row(torch.arange(4))
    assert not any(is_stop(token) for token in range(100, 160))
    assert notes.seen[-1].tolist() == [[0, 1, 2, 3, *range(100, 160)]]
    assert len({seen.data_ptr() for seen in notes.seen}) == 4  # 8, 16, 32, 64


def test_stop_strings_of_a_generation_config(model, decoder):
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import GenerationConfig, PreTrainedTokenizerFast

    characters = Tokenizer(models.WordLevel({chr(33 + i): i for i in range(97)}, unk_token="!"))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex(""), "isolated")
    characters.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=characters, pad_token="!")
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
