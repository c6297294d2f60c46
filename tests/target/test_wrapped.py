"""Adapters in models and modules around them: decoded as they are, token for token, or refused with what to give."""

from __future__ import annotations

import copy
import warnings

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model

import ladon
from greedy import BATCH, MASK, PROMPT, plain
from ladon.heads.formats.export import export_heads
from ladon.heads.wrapped import active_adapters, unwrapped

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),  # peft reads it
]
LAYERS = ["q_proj", "v_proj", "down_proj"]
IN_LAYERS = {
    "LoRA": LoraConfig(task_type="CAUSAL_LM", target_modules=LAYERS),
    "LoRA on the projection": LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "lm_head"]),
    "DoRA": LoraConfig(task_type="CAUSAL_LM", target_modules=LAYERS, use_dora=True),
    "saved modules": LoraConfig(task_type="CAUSAL_LM", target_modules=LAYERS, modules_to_save=["lm_head"]),
    "trained tokens": LoraConfig(task_type="CAUSAL_LM", target_modules=LAYERS, trainable_token_indices=[5, 9]),
    "IA3": peft.IA3Config(task_type="CAUSAL_LM"),
    "LoHa": peft.LoHaConfig(task_type="CAUSAL_LM", target_modules=LAYERS),
    "OFT": peft.OFTConfig(task_type="CAUSAL_LM", target_modules=LAYERS, oft_block_size=4),
    "VeRA": peft.VeraConfig(task_type="CAUSAL_LM", target_modules=["o_proj"], r=4),
    "adaption prompt": peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=4, adapter_layers=2),
}
VIRTUAL = {
    "PROMPT_TUNING": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "PREFIX_TUNING": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "P_TUNING": peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
}


def adapted(model, config, seed=1, name="default"):
    """A peft model whose adapter changes what the model says."""
    found = model if isinstance(model, peft.PeftModel) else None
    torch.manual_seed(seed)
    if found is None:
        found = get_peft_model(model, config, adapter_name=name)
    else:
        found.add_adapter(name, config)
    for parameter_name, parameter in found.named_parameters():
        if name in parameter_name.split(".") or "adaption" in parameter_name:
            torch.nn.init.normal_(parameter, std=1.0 if "vera" in parameter_name else 0.3)
    return found.double().eval()


def heads_of(model):
    heads = ladon.new_heads(model, num_heads=3)
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return heads


def assert_equal(decoder, reference):
    """The same tokens as its own `generate`, one prompt and three."""
    assert torch.equal(decoder.generate(PROMPT, max_new_tokens=16), plain(reference))
    batch = decoder.generate(BATCH, attention_mask=MASK, max_new_tokens=16)
    assert torch.equal(batch, plain(reference, BATCH, attention_mask=MASK))


@pytest.fixture
def lora(model):
    return adapted(model, IN_LAYERS["LoRA"])


@pytest.mark.parametrize("kind", IN_LAYERS)
def test_adapters_in_layers_run(model, kind):
    before = plain(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's own advice
        tuned = adapted(model, IN_LAYERS[kind])
    assert not torch.equal(plain(tuned), before)
    assert_equal(ladon.Decoder(tuned, heads_of(tuned)), tuned)
    assert_equal(ladon.Decoder(tuned.get_base_model(), tree="off"), tuned)


@pytest.mark.parametrize("kind", VIRTUAL)
def test_virtual_tokens_are_refused_by_name(model, kind):
    ladon.attach(model)
    tuned = adapted(model, VIRTUAL[kind])
    with pytest.raises(ladon.UnsupportedModelError, match=f"its {kind} adapter puts virtual tokens.*own generate"):
        ladon.Decoder(tuned)
    with pytest.raises(ladon.UnsupportedModelError, match=r"prepares its inputs with PeftModelForCausalLM\.prepare"):
        tuned.generate(PROMPT, max_new_tokens=4)
    with tuned.disable_adapter():
        assert torch.equal(ladon.Decoder(tuned).generate(PROMPT, max_new_tokens=16), plain(tuned))
    ladon.detach(model)
    with pytest.raises(ladon.UnsupportedModelError, match="prepares its inputs with"):
        tuned.generate(input_ids=PROMPT, custom_generate=ladon.Decoder(model), max_new_tokens=4)


def test_virtual_tokens_switched_on_later_are_refused(model):
    tuned = adapted(model, VIRTUAL["PROMPT_TUNING"])
    with tuned.disable_adapter():
        decoder = ladon.Decoder(tuned)
        decoder.generate(PROMPT, max_new_tokens=2)
    with pytest.raises(ladon.UnsupportedModelError, match="virtual tokens"):
        decoder.generate(PROMPT, max_new_tokens=2)


def test_invocation_tokens_and_skills_by_row_are_refused(model):
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], alora_invocation_tokens=[5, 6])
    with pytest.raises(ladon.UnsupportedModelError, match="begins at invocation tokens"):
        ladon.Decoder(adapted(model, config))


def test_adapters_chosen_row_by_row_are_refused(lora, model):
    with pytest.raises(ladon.InputError, match="adapter_names"):
        ladon.Decoder(lora).generate(PROMPT, max_new_tokens=2, adapter_names=["__base__"])
    ladon.attach(model)
    with pytest.raises(ladon.UnsupportedModelError, match="carries hooks"):
        lora.generate(input_ids=BATCH, attention_mask=MASK, max_new_tokens=2, adapter_names=["default"] * 3)


def test_switching_adapters_between_calls_is_noticed(lora):
    decoder = ladon.Decoder(lora, heads_of(lora))
    texts = [plain(lora)]
    assert_equal(decoder, lora)
    with pytest.warns(UserWarning, match="with an adapter, and now none is active"), lora.disable_adapter():
        assert_equal(decoder, lora)
        texts.append(plain(lora))
    adapted(lora, LoraConfig(task_type="CAUSAL_LM", target_modules=["k_proj", "lm_head"]), seed=2, name="other")
    lora.set_adapter("other")
    with pytest.warns(UserWarning, match=r"another \('other'\) is active"):
        assert_equal(decoder, lora)
    texts.append(plain(lora))
    lora.set_adapter("default")
    assert_equal(decoder, lora)
    lora.merge_adapter()
    with pytest.warns(UserWarning, match="none is active"):
        assert_equal(decoder, lora)
    lora.unmerge_adapter()
    merged = lora.merge_and_unload()
    assert_equal(ladon.Decoder(merged, tree="off"), merged)
    assert not any(torch.equal(texts[0], other) for other in texts[1:])


def test_an_adapter_that_comes_after_the_decoder_is_noticed(model):
    decoder = ladon.Decoder(model, heads_of(model))
    assert_equal(decoder, model)
    tuned = adapted(model, IN_LAYERS["LoRA on the projection"])
    with pytest.warns(UserWarning, match="without an adapter, and now adapter 'default' is active"):
        assert_equal(decoder, tuned)
    assert decoder.heads._projection[0] is tuned.get_output_embeddings(), "heads go through the adapter too"


def test_adapters_of_several_kinds_at_once(model):
    mixed = get_peft_model(model, IN_LAYERS["LoRA"], "one", mixed=True)
    mixed.add_adapter("two", IN_LAYERS["LoHa"])
    mixed.set_adapter(["one", "two"])
    for name, parameter in mixed.named_parameters():
        if {"one", "two"} & set(name.split(".")):
            torch.nn.init.normal_(parameter, std=0.3)
    mixed = mixed.double().eval()
    assert_equal(ladon.Decoder(mixed, heads_of(mixed)), mixed)
    mixed.set_adapter("two")
    assert_equal(ladon.Decoder(mixed), mixed)


def test_a_whole_model_is_not_exported_with_adapters_in_it(lora, tmp_path):
    heads = ladon.new_heads(lora, num_heads=2, family="medusa")
    with pytest.raises(ladon.HeadsError, match="has no place for the model's adapters"):
        export_heads(heads, "modelopt", tmp_path / "out", model=lora)


def test_a_scaled_adapter_is_noticed(lora):
    decoder = ladon.Decoder(lora)
    assert_equal(decoder, lora)
    for module in lora.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", 0.1)
    assert_equal(decoder, lora)


def test_adapters_of_transformers_itself(model):
    model.add_adapter(IN_LAYERS["LoRA"], "mine")
    for name, parameter in model.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.eval()
    decoder = ladon.Decoder(model)
    assert_equal(decoder, model)
    model.disable_adapters()
    assert_equal(decoder, model)


def test_what_one_adapter_has_read_does_not_serve_another(lora):
    decoder = ladon.Decoder(lora)
    kept = decoder.generate(PROMPT, max_new_tokens=4, return_dict_in_generate=True)
    longer = kept.sequences
    assert_equal(decoder, lora)
    again = decoder.generate(longer, max_new_tokens=8, past_key_values=kept.past_key_values)
    assert decoder.stats.reused_tokens > 0 and torch.equal(again, plain(lora, longer, max_new_tokens=8))
    with lora.disable_adapter(), pytest.raises(ladon.InputError, match="adapters, hooks or layers have changed"):
        decoder.generate(longer, max_new_tokens=8, past_key_values=kept.past_key_values)


def test_attach_to_a_peft_model(lora):
    expected = plain(lora)
    decoder = ladon.attach(lora, heads_of(lora))
    assert torch.equal(lora.generate(input_ids=PROMPT, max_new_tokens=16), expected)
    assert decoder.stats.row_steps > 0
    assert torch.equal(lora.generate(input_ids=PROMPT, max_new_tokens=16, custom_generate=decoder), expected)
    ladon.detach(lora)
    assert "generate" not in vars(lora)


def test_options_of_the_peft_model_hold(lora):
    lora.generation_config.max_new_tokens = 5
    assert torch.equal(ladon.Decoder(lora).generate(PROMPT), plain(lora, max_new_tokens=5))


def test_heads_of_the_base_say_that_an_adapter_is_active(model, tmp_path):
    heads_of(model).save(tmp_path / "base")
    tuned = adapted(model, IN_LAYERS["LoRA"])
    with pytest.warns(UserWarning, match="without an adapter, and now adapter 'default' is active: the text stays"):
        assert_equal(ladon.Decoder(tuned, ladon.load_heads(tmp_path / "base")), tuned)
    heads_of(tuned).save(tmp_path / "tuned")
    ladon.Decoder(tuned, ladon.load_heads(tmp_path / "tuned"))  # without a warning
    with tuned.disable_adapter():
        ladon.Decoder(tuned, ladon.load_heads(tmp_path / "base"))
        with pytest.warns(UserWarning, match="none is active"):
            ladon.load_heads(tmp_path / "tuned", tuned)
    tuned.merge_adapter()
    with pytest.raises(ladon.HeadsError, match="whose weights differ"):
        ladon.load_heads(tmp_path / "base", tuned)


def test_the_fingerprint_of_a_base_is_the_same_with_adapters(model):
    before = ladon.heads.fingerprint.fingerprint(model)
    for kind in IN_LAYERS:
        tuned = adapted(copy.deepcopy(model), IN_LAYERS[kind])
        found = ladon.heads.fingerprint.fingerprint(tuned)
        assert (found.embedding, found.projection, found.body) == (before.embedding, before.projection, before.body)
        assert found.adapters and not before.adapters and active_adapters(tuned)


def test_a_compiled_module_runs(model, lora):
    compiled = torch.compile(lora, backend="eager")
    assert unwrapped(compiled) == (lora, model)
    assert_equal(ladon.Decoder(compiled, heads_of(compiled)), lora)
    decoder = ladon.attach(compiled)
    assert torch.equal(compiled.generate(input_ids=PROMPT, max_new_tokens=16), plain(lora))
    assert decoder.stats.row_steps > 0
    ladon.detach(compiled)
    assert "generate" not in vars(lora)


def test_a_model_compiled_in_place_runs(model):
    expected = plain(model), plain(model, BATCH, attention_mask=MASK)
    model.compile(backend="eager")
    decoder = ladon.Decoder(model, heads_of(model))
    assert torch.equal(decoder.generate(PROMPT, max_new_tokens=16), expected[0])
    assert torch.equal(decoder.generate(BATCH, attention_mask=MASK, max_new_tokens=16), expected[1])


def test_a_compiled_part_runs(model):
    expected = plain(model)
    model.model = torch.compile(model.model, backend="eager")
    assert torch.equal(ladon.Decoder(model, heads_of(model)).generate(PROMPT, max_new_tokens=16), expected)


def test_a_compiled_forward_runs(model):
    expected = plain(model)
    model.forward = torch.compile(model.forward, backend="eager")
    decoder = ladon.Decoder(model, heads_of(model))
    assert torch.equal(decoder.generate(PROMPT, max_new_tokens=16), expected)


def test_compiled_code_that_takes_no_tree_says_what_to_give(model):
    torch._dynamo.reset()  # after many recompilations torch runs such code without compiling it
    model.compile(backend="eager", fullgraph=True)
    with pytest.raises(ladon.UnsupportedModelError, match="It is compiled: give it uncompiled"):
        ladon.Decoder(model, heads_of(model))


def test_other_wrappers_say_what_to_give(model, lora):
    for wrapped in (torch.nn.DataParallel(model), torch.nn.DataParallel(lora)):
        for call in (ladon.Decoder, ladon.attach, ladon.new_heads):
            with pytest.raises(ladon.UnsupportedModelError, match=r"DataParallel is not .*: give that, its \.module"):
                call(wrapped)
    for other in (torch.nn.Linear(3, 3), "gpt2", None):
        with pytest.raises(ladon.UnsupportedModelError, match="give a causal language model of transformers"):
            ladon.Decoder(other)


def test_a_model_prepared_by_accelerate(model):
    from accelerate import Accelerator

    prepared = Accelerator(cpu=True).prepare(model)
    assert_equal(ladon.Decoder(prepared.eval(), heads_of(prepared)), model)
