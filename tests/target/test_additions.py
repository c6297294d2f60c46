"""Hooks on a model, and classes that prepare their own inputs: exact, or refused with their names."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaForCausalLM

import ladon
from greedy import BATCH, MASK, PROMPT, plain
from ladon.target import self_test
from ladon.target.additions import Additions


def steer(module, args, output):
    """Acts alike on every position."""
    return output + torch.linspace(-0.5, 0.5, output.shape[-1], dtype=output.dtype)


def last_only(module, args, output):
    output = output.clone()
    output[:, -1, 7] += 5
    return output


def last_input_only(module, args):
    hidden = args[0].clone()
    hidden[:, -1] *= -1
    return (hidden,)


def while_decoding(module, args, output):
    return steer(module, args, output) if output.shape[1] == 1 else output


def while_reading(module, args, output):
    return output if output.shape[1] == 1 else steer(module, args, output)


def of_the_model(module, args, output):
    output.logits = last_only(module, args, output.logits)
    return output


UNEVEN = {
    "logits": lambda model: model.lm_head.register_forward_hook(last_only),
    "model": lambda model: model.register_forward_hook(of_the_model),
    "projection's input": lambda model: model.lm_head.register_forward_pre_hook(last_input_only),
    "layer": lambda model: model.model.layers[0].mlp.register_forward_hook(last_only),
    "decoding": lambda model: model.model.layers[0].register_forward_hook(while_decoding),
    "reading": lambda model: model.model.layers[0].register_forward_hook(while_reading),
    "everywhere": lambda model: torch.nn.modules.module.register_module_forward_hook(
        lambda module, args, output: last_only(module, args, output) if module is model.lm_head else None
    ),
}


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("place", UNEVEN)
def test_hooks_that_single_out_positions_are_refused(model, place, before):
    decoder = ladon.Decoder(model, ladon.new_heads(model, num_heads=3))
    text = decoder.generate(PROMPT, max_new_tokens=16)
    handle = UNEVEN[place](model)
    try:
        with pytest.raises(ladon.UnsupportedModelError, match=r"carries hooks \(\S+ on [\w. ]+\): remove those"):
            if before:
                ladon.Decoder(model, ladon.new_heads(model, num_heads=3))
            else:
                decoder.generate(PROMPT, max_new_tokens=16)
    finally:
        handle.remove()
    assert torch.equal(decoder.generate(PROMPT, max_new_tokens=16), text)


@pytest.mark.parametrize("where", ["model.layers.0", "lm_head", "model.embed_tokens"])
def test_hooks_that_treat_all_positions_alike_run(model, where):
    decoder = ladon.Decoder(model, ladon.new_heads(model, num_heads=3))
    without = plain(model)
    model.get_submodule(where).register_forward_hook(steer)
    assert not torch.equal(plain(model), without)
    for made in (decoder, ladon.Decoder(model, ladon.new_heads(model, num_heads=3))):
        assert torch.equal(made.generate(PROMPT, max_new_tokens=16), plain(model))
        batch = made.generate(BATCH, attention_mask=MASK, max_new_tokens=16)
        assert torch.equal(batch, plain(model, BATCH, attention_mask=MASK))


def test_a_hook_that_reads_what_generate_gives_runs(model):
    def by_position(module, args, kwargs):
        shift = torch.sin(kwargs["position_ids"].double())[..., None]
        embeds = module.embed_tokens(kwargs["input_ids"]) + shift
        return args, {**kwargs, "input_ids": None, "inputs_embeds": embeds}

    without = plain(model)
    model.model.register_forward_pre_hook(by_position, with_kwargs=True)
    decoder = ladon.Decoder(model, ladon.new_heads(model, num_heads=3))
    assert not torch.equal(plain(model), without)
    assert torch.equal(decoder.generate(PROMPT, max_new_tokens=16), plain(model))


def test_a_hook_that_is_switched_on_later_is_tested_again(model):
    switch = {"on": False}
    model.lm_head.register_forward_hook(lambda *given: last_only(*given) if switch["on"] else None)
    decoder = ladon.Decoder(model)
    assert torch.equal(decoder.generate(PROMPT, max_new_tokens=16), plain(model))
    switch["on"] = True
    with pytest.raises(ladon.UnsupportedModelError, match="carries hooks"):
        decoder.generate(PROMPT, max_new_tokens=16)


def test_hooks_that_declare_that_they_only_look_are_left_alone(model):
    decoder = ladon.Decoder(model)
    kept = decoder.generate(PROMPT, max_new_tokens=4, return_dict_in_generate=True)
    widths = []

    def note(module, args, kwargs):
        widths.append(kwargs["input_ids"].shape[1])

    note.only_looks = True
    model.register_forward_pre_hook(note, with_kwargs=True)
    decoder.generate(kept.sequences, max_new_tokens=1, past_key_values=kept.past_key_values)
    assert widths == [1] and decoder.stats.reused_tokens == len(kept.sequences[0]) - 1


def test_nothing_is_kept_under_hooks(model):
    strength = {"of": 1.0}
    model.model.layers[0].register_forward_hook(lambda module, args, output: output * strength["of"])
    decoder = ladon.Decoder(model)
    kept = decoder.generate(PROMPT, max_new_tokens=4, return_dict_in_generate=True)
    strength["of"] = 1.5
    again = decoder.generate(kept.sequences, max_new_tokens=12, past_key_values=kept.past_key_values)
    assert decoder.stats.reused_tokens == 0 and torch.equal(again, plain(model, kept.sequences, max_new_tokens=12))


def test_a_verdict_on_known_layers_does_not_hold_for_others(model, monkeypatch):
    ladon.Decoder(model).generate(PROMPT, max_new_tokens=2)
    tests = []
    monkeypatch.setattr(self_test, "_judge", lambda *_: tests.append(1) or self_test.Verdict(trees=True))
    ladon.Decoder(model).generate(PROMPT, max_new_tokens=2)
    assert not tests and Additions.of(model).are_known

    class Mlp(type(model.model.layers[0].mlp)):
        pass

    model.model.layers[0].mlp.__class__ = Mlp
    decoder = ladon.Decoder(model)
    for _ in range(2):
        decoder.generate(PROMPT, max_new_tokens=2)
    assert len(tests) == 1, "once for each decoder"


def test_a_forward_of_the_object_is_tested(model):
    decoder = ladon.Decoder(model)
    decoder.generate(PROMPT, max_new_tokens=2)
    own = model.lm_head.forward
    model.lm_head.forward = lambda hidden: last_only(None, None, own(hidden))
    with pytest.raises(ladon.UnsupportedModelError, match="against plain decoding"):
        decoder.generate(PROMPT, max_new_tokens=2)


def subclass_of(model, **methods):
    model.__class__ = type("Mine", (LlamaForCausalLM,), methods)
    return model


def shifted(self, input_ids, **kwargs):
    inputs = LlamaForCausalLM.prepare_inputs_for_generation(self, input_ids, **kwargs)
    inputs["input_ids"] = (inputs["input_ids"] + 1) % 97
    return inputs


def shortened(self, input_ids, **kwargs):
    inputs = LlamaForCausalLM.prepare_inputs_for_generation(self, input_ids[:, -20:], **kwargs)
    if inputs.get("attention_mask") is not None:
        inputs["attention_mask"] = inputs["attention_mask"].clone()
        inputs["attention_mask"][:, :-20] = 0
    return inputs


def harmless(self, input_ids, **kwargs):
    inputs = LlamaForCausalLM.prepare_inputs_for_generation(self, input_ids, **kwargs)
    return {"output_attentions": None, **inputs}


def of_old(self, input_ids, past_key_values=None, attention_mask=None, **kwargs):
    """As code on the hub wrote it for years."""
    positions = kwargs.get("position_ids")
    if attention_mask is not None:
        positions = attention_mask.long().cumsum(-1) - 1
        positions.masked_fill_(attention_mask == 0, 1)
    if past_key_values is not None and past_key_values.get_seq_length():
        input_ids, positions = input_ids[:, -1:], positions[:, -1:]
    return {
        "input_ids": input_ids,
        "position_ids": positions,
        "past_key_values": past_key_values,
        "use_cache": kwargs.get("use_cache"),
        "attention_mask": attention_mask,
    }


@pytest.mark.parametrize("on", ["class", "object"])
def test_inputs_prepared_otherwise_are_refused(model, on):
    if on == "class":
        subclass_of(model, prepare_inputs_for_generation=shifted)
    else:
        model.prepare_inputs_for_generation = shifted.__get__(model)
    assert not torch.equal(plain(model), plain(LlamaForCausalLM(model.config).double().eval()))
    with pytest.raises(ladon.UnsupportedModelError, match="prepares its inputs with shifted, which changes input_ids"):
        ladon.Decoder(model)


def test_inputs_prepared_otherwise_at_some_length_are_refused(model):
    decoder = ladon.Decoder(subclass_of(model, prepare_inputs_for_generation=shortened))
    assert torch.equal(decoder.generate(PROMPT, max_new_tokens=8), plain(model, max_new_tokens=8))
    with pytest.raises(ladon.UnsupportedModelError, match="with shortened, which changes attention_mask"):
        decoder.generate(BATCH, attention_mask=MASK, max_new_tokens=16)
    with pytest.raises(ladon.UnsupportedModelError, match=r"which changes (attention_mask, )?input_ids, position_ids"):
        decoder.generate(torch.arange(3, 40)[None], max_new_tokens=1)


def test_a_method_that_comes_later_is_noticed(model):
    decoder = ladon.Decoder(model)
    decoder.generate(PROMPT, max_new_tokens=2)
    model.prepare_inputs_for_generation = shifted.__get__(model)
    with pytest.raises(ladon.UnsupportedModelError, match="prepares its inputs with shifted"):
        decoder.generate(PROMPT, max_new_tokens=2)


@pytest.mark.parametrize("method", [harmless, of_old])
def test_a_method_that_hands_on_the_same_runs(model, method):
    decoder = ladon.Decoder(subclass_of(model, prepare_inputs_for_generation=method))
    assert torch.equal(decoder.generate(PROMPT, max_new_tokens=16), plain(model))
    batch = decoder.generate(BATCH, attention_mask=MASK, max_new_tokens=16)
    assert torch.equal(batch, plain(model, BATCH, attention_mask=MASK))


def test_loops_of_a_class_of_its_own_are_refused(model):
    def loop(self, *args, **kwargs):
        return LlamaForCausalLM._sample(self, *args, **kwargs)

    with pytest.raises(ladon.UnsupportedModelError, match="in a loop of its own \\(_sample\\)"):
        ladon.Decoder(subclass_of(model, _sample=loop))


def test_a_generate_of_its_own_runs_if_it_hands_on_what_it_is_given(model):
    def handed_on(self, *args, **kwargs):
        return LlamaForCausalLM.generate(self, *args, **kwargs)

    def cut(self, *args, **kwargs):
        return handed_on(self, *args, **kwargs)[:, -3:]

    def deaf(self, input_ids, custom_generate=None, **kwargs):
        return handed_on(self, input_ids, **kwargs)

    expected = plain(model)
    decoder = ladon.Decoder(subclass_of(model, generate=handed_on))
    assert torch.equal(decoder.generate(PROMPT, max_new_tokens=16), expected)
    for own in (cut, deaf):
        with pytest.raises(ladon.UnsupportedModelError, match="a generate of its own"):
            ladon.Decoder(subclass_of(model, generate=own)).generate(PROMPT, max_new_tokens=16)
