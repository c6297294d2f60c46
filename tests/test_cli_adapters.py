"""`--model` of an adapter's folder: the model that it names, with the adapter in it."""

from __future__ import annotations

import shutil

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from ladon.cli.loading import load, load_tokenizer
from ladon.cli.main import run
from ladon.cli.options import Target
from user_side import Tiny

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),  # peft reads it
    pytest.mark.filterwarnings("ignore:these heads were trained on:UserWarning"),
]


def saved_adapter(tiny: Tiny, folder, config):
    base = AutoModelForCausalLM.from_pretrained(tiny.folder / "model")
    tuned = peft.get_peft_model(base, config)
    for name, parameter in tuned.named_parameters():
        if "default" in name.split("."):
            torch.nn.init.normal_(parameter, std=0.3)
    tuned.save_pretrained(folder)
    return tuned.eval()


def test_generate_with_the_folder_of_an_adapter(tiny: Tiny, tmp_path, capsys):
    tuned = saved_adapter(tiny, tmp_path / "adapter", peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    folder, prompt = str(tmp_path / "adapter"), "def read"
    ids = tiny.tokenizer(prompt, return_tensors="pt")
    expected = tuned.generate(**ids, max_new_tokens=12, do_sample=False)
    assert not torch.equal(expected, tiny.model.float().generate(**ids, max_new_tokens=12, do_sample=False))
    for heads in ([], ["--heads", str(tiny.folder / "heads")]):
        arguments = ["generate", "--model", folder, *heads, "--max-new-tokens", "12", "--prompt", prompt]
        assert run(arguments) == 0
        text = tiny.tokenizer.decode(expected[0, ids.input_ids.shape[1] :], skip_special_tokens=True)
        assert capsys.readouterr().out.rstrip("\n") == text.rstrip("\n")


def test_its_tokenizer_is_the_one_beside_it(tiny: Tiny, tmp_path):
    folder = tmp_path / "adapter"
    saved_adapter(tiny, folder, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    assert len(load_tokenizer(Target(model=str(folder)))) == len(tiny.tokenizer)
    tiny.tokenizer.save_pretrained(folder)
    shutil.copy(folder / "tokenizer.json", folder / "copy.json")
    loaded = load(Target(model=str(folder)))
    assert loaded.name == "adapter" and len(loaded.tokenizer) == len(tiny.tokenizer)


@pytest.mark.parametrize("case", ["virtual", "nameless", "without peft"])
def test_adapters_that_cannot_be_loaded(tiny: Tiny, tmp_path, capsys, monkeypatch, case):
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    if case == "virtual":
        config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    saved_adapter(tiny, tmp_path, config)
    reason = {"virtual": "PROMPT_TUNING adapter", "nameless": "names no model", "without peft": "pip install"}[case]
    if case == "nameless":
        path = tmp_path / "adapter_config.json"
        path.write_text(path.read_text().replace(str(tiny.folder / "model"), ""))
    elif case == "without peft":
        monkeypatch.setattr("ladon.cli.adapters.find_spec", lambda name: None)
    assert run(["generate", "--model", str(tmp_path), "--prompt", "a"]) == 2
    error = capsys.readouterr().err.strip()
    assert reason in error and "\n" not in error.replace("\n  ", " ")
