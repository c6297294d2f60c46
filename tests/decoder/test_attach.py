"""`attach` and `detach`: one model object decodes with Ladon; its copies, what is saved of it, and others do not."""

from __future__ import annotations

import copy
import io
import pickle

import torch
from transformers import GenerationConfig, StoppingCriteriaList
from transformers.generation.stopping_criteria import MaxLengthCriteria

import ladon
from greedy import PROMPT, plain


def with_other_weights(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def test_a_copy_of_an_attached_model_decodes_with_its_own_weights(model):
    decoder = ladon.attach(model, ladon.new_heads(model, num_heads=3))
    other = with_other_weights(copy.deepcopy(model))
    before = decoder.stats
    assert torch.equal(other.generate(PROMPT, max_new_tokens=16, do_sample=False), plain(other))
    assert decoder.stats is before and not torch.equal(plain(other), plain(model))
    ladon.detach(other)
    assert "generate" not in vars(other)
    model.generate(PROMPT, max_new_tokens=4)
    assert decoder.stats is not before, "the model itself is still attached"


def test_an_attached_model_can_be_pickled_and_saved(model):
    ladon.attach(model)
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    for other in (pickle.loads(pickle.dumps(model)), torch.load(saved, weights_only=False)):
        with_other_weights(other)
        assert torch.equal(other.generate(PROMPT, max_new_tokens=16, do_sample=False), plain(other))
        decoder = ladon.attach(other)
        assert torch.equal(other.generate(PROMPT, max_new_tokens=16), plain(other)) and decoder.stats.row_steps == 15


def test_attached_generate_takes_positional_arguments(model):
    ladon.attach(model)
    config = GenerationConfig(max_new_tokens=9)
    stops = StoppingCriteriaList([MaxLengthCriteria(15)])
    assert model.generate(PROMPT, config).shape == (1, 21)
    assert torch.equal(model.generate(PROMPT, config, None, stops), plain(model, max_new_tokens=3))


def test_detach_puts_back_what_was_there(model):
    def mine(*args, **kwargs):
        return "mine"

    model.generate = mine
    ladon.detach(model)
    assert model.generate() == "mine", "not Ladon's to take away"
    ladon.attach(model)
    ladon.attach(model, tree="off")
    assert torch.equal(model.generate(PROMPT, max_new_tokens=16), plain(model))
    ladon.detach(model)
    assert model.generate() == "mine"


def test_detach_leaves_an_override_that_came_later(model):
    ladon.attach(model)
    model.generate = len
    ladon.detach(model)
    assert model.generate is len
