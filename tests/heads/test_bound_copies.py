"""A decoder uses a copy of the heads that it is given: what fits is shared, and theirs stay as they are."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

import ladon
from greedy import PROMPT, plain
from ladon.heads import Heads

FAMILIES = [
    ("shared", {}),
    ("shared", {"markov_rank": 4, "markov_successors": 2, "markov_gate": 1}),
    ("shared", {"hidden_correction": 4}),
    ("medusa", {"draft_vocab_size": 40}),
    ("hydra", {"num_blocks": 2}),
]


def random_heads(model: PreTrainedModel, family: str = "shared", **options: int) -> Heads:
    heads = ladon.new_heads(model, 3, family, **options)
    for parameter in heads.parameters():
        nn.init.normal_(parameter, std=0.3)
    return heads


@pytest.fixture
def half(model: PreTrainedModel) -> PreTrainedModel:
    """The same model in bfloat16."""
    return copy.deepcopy(model).bfloat16()


@pytest.mark.parametrize(("family", "options"), FAMILIES)
def test_heads_are_left_as_they_are(
    model: PreTrainedModel, half: PreTrainedModel, family: str, options: dict[str, int]
) -> None:
    """Once truncated by one decoder, they stayed so for all; decoders of different dtypes crashed in turns."""
    heads = random_heads(model, family, **options)
    before = {name: tensor.clone() for name, tensor in heads.state_dict().items()}
    exact, rough = ladon.Decoder(model, heads, budget=8), ladon.Decoder(half, heads, budget=8)
    expected = plain(model)
    for decoder in (rough, exact, rough, exact):
        tokens = decoder.generate(PROMPT, max_new_tokens=16)
        if decoder is exact:
            assert torch.equal(tokens, expected)
    for name, tensor in heads.state_dict().items():
        assert torch.equal(tensor, before[name]) and tensor.dtype == before[name].dtype, name
    assert {p.dtype for p in rough.heads.parameters()} == {torch.bfloat16}
    assert heads.weights_hash == rough.heads.weights_hash


def test_what_fits_is_shared_and_what_does_not_is_copied_once(model: PreTrainedModel, half: PreTrainedModel) -> None:
    heads = random_heads(model, markov_rank=4)
    exact, rough = ladon.Decoder(model, heads), ladon.Decoder(half, heads)
    exact.generate(PROMPT, max_new_tokens=4)
    assert {id(p) for p in exact.heads.parameters()} == {id(p) for p in heads.parameters()}
    first = [id(p) for p in rough.heads.parameters()]
    rough.generate(PROMPT, max_new_tokens=4)
    assert [id(p) for p in rough.heads.parameters()] == first, "made again without need"
    assert rough.heads._placement.former is None, "older copies are let go"


def test_changes_of_the_heads_count(model: PreTrainedModel, half: PreTrainedModel) -> None:
    """They may be trained on, loaded anew or calibrated between calls."""
    heads = random_heads(model)
    decoders = [ladon.Decoder(one, heads) for one in (model, half)]
    with torch.no_grad():
        heads.up_weight.mul_(2)
    heads.training_record = {"steps": 3}
    for decoder in decoders:
        decoder.generate(PROMPT, max_new_tokens=4)
        assert torch.equal(decoder.heads.up_weight, heads.up_weight.to(decoder.model.dtype))
        assert decoder.heads.training_record == {"steps": 3}
    half.double()
    decoders[1].generate(PROMPT, max_new_tokens=4)
    assert decoders[1].heads.up_weight is heads.up_weight, "the model came to the heads' dtype"


def test_heads_that_are_bound_to_no_model_stay_unbound(model: PreTrainedModel, tmp_path) -> None:
    random_heads(model).save(tmp_path)
    heads = ladon.load_heads(tmp_path)
    decoder = ladon.Decoder(model, heads)
    assert decoder.heads.is_bound and not heads.is_bound
    assert torch.equal(decoder.generate(PROMPT, max_new_tokens=16), plain(model))


def test_two_decoders_in_two_threads(model: PreTrainedModel, half: PreTrainedModel) -> None:
    heads = random_heads(model)
    decoders = [ladon.Decoder(one, heads, budget=8) for one in (model, half)]
    found: list[list[torch.Tensor]] = [[], []]

    def run(place: int) -> None:
        found[place] += [decoders[place].generate(PROMPT, max_new_tokens=12) for _ in range(4)]

    threads = [threading.Thread(target=run, args=(place,)) for place in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found[0]) == len(found[1]) == 4
    assert all(torch.equal(tokens, plain(model, max_new_tokens=12)) for tokens in found[0])
