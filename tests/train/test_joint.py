"""Model and heads trained together: stages, losses, adapters, what is saved, resuming; the early exit beside them."""

from __future__ import annotations

import copy
import gc
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedModel

from ladon.errors import HeadsError, InputError
from ladon.heads import load_heads, new_heads
from ladon.heads.early_exit import load_early_exit
from ladon.train.config import TrainOptions
from ladon.train.data.batches import Collator
from ladon.train.data.rows import documents_from
from ladon.train.modules import JointModule
from ladon.train.run import make_module
from training_runs import examples, run, run_until

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")


@pytest.fixture(autouse=True, scope="module")
def _quick_collections() -> Iterator[None]:
    """Every run of the Trainer collects garbage: leave out what was imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def joint_module(model: PreTrainedModel, **options: Any) -> JointModule:
    module = make_module(model, TrainOptions(**{"num_heads": 2, "joint": "full"} | options))
    assert isinstance(module, JointModule)
    return module


def batch_of() -> dict[str, torch.Tensor]:
    documents, _ = documents_from(examples(4), 97, 24)
    return Collator(2, 97)([[documents[0], documents[1]], [documents[2]], [documents[3]]])


def same(one: PreTrainedModel, other: PreTrainedModel) -> bool:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_the_loss_is_the_models_and_the_weighted_heads(tiny_llama: PreTrainedModel) -> None:
    batch = batch_of()
    module = joint_module(tiny_llama, heads_weight=0.3, decay=0.5)
    loss = module(**batch)
    hidden = tiny_llama.model(
        batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
    ).last_hidden_state.flatten(0, 1)
    own = functional.cross_entropy(tiny_llama.lm_head(hidden[batch["next_rows"]]), batch["next_labels"])
    logits = module.heads(hidden[batch["rows"]])
    heads = sum(
        0.5 ** (k + 1)
        * functional.cross_entropy(logits[batch["mask"][:, k], k], batch["labels"][batch["mask"][:, k], k])
        for k in range(2)
    )
    torch.testing.assert_close(loss, own + 0.3 * heads)
    trained = [p for p in module.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, trained)
    torch.testing.assert_close(found, torch.autograd.grad(own + 0.3 * heads, trained))


def test_the_model_joins_after_the_heads_warm_up(tiny_llama: PreTrainedModel) -> None:
    module = joint_module(tiny_llama, heads_warmup_steps=3)
    for step, joined in ((2, False), (3, True)):
        module.zero_grad()
        module.set_step(step)
        module.train()
        module(**batch_of()).backward()
        assert all((p.grad is not None) == joined for p in tiny_llama.parameters())
        assert tiny_llama.training == joined
        assert module.heads.down_weight.grad is not None


def test_the_heads_weight_may_come_in_as_a_quarter_sine(tiny_llama: PreTrainedModel) -> None:
    module = joint_module(tiny_llama, heads_warmup_steps=2, heads_ramp="sine", heads_weight=0.2)
    module.total_steps = 10
    weights = []
    for step in (2, 5, 9):
        module.set_step(step)
        weights.append(module.heads_weight())
    assert weights == pytest.approx([0.2 * math.sin(math.pi / 2 * x) for x in (1 / 8, 4 / 8, 1.0)])


@pytest.mark.parametrize("joint", ["full", "lora"])
def test_distilling_from_itself_is_no_loss_until_it_moves(tiny_llama: PreTrainedModel, joint: str) -> None:
    original = copy.deepcopy(tiny_llama)
    module = joint_module(tiny_llama, joint=joint, base_loss="distill", heads_weight=0.0, lora_dropout=0.0)
    batch = batch_of()
    assert module(**batch).abs() < 1e-6
    with torch.no_grad():
        for parameter in module.base.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05)
    hidden, _ = module.read(batch)
    own = tiny_llama.lm_head(hidden[batch["next_rows"]]).log_softmax(-1)
    said = original(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits.flatten(0, 1)[
        batch["next_rows"]
    ]
    expected = functional.kl_div(own, said.softmax(-1), reduction="batchmean")
    assert expected > 1e-3
    torch.testing.assert_close(module(**batch), expected)


@pytest.mark.parametrize("joint", ["full", "lora"])
def test_the_tuned_model_is_saved_beside_its_heads_and_the_original_stays(
    tiny_llama: PreTrainedModel, tmp_path: Path, joint: str
) -> None:
    tiny_llama.save_pretrained(tmp_path / "original")
    files = {path: path.read_bytes() for path in (tmp_path / "original").iterdir()}
    before = copy.deepcopy(tiny_llama)
    run(tiny_llama, tmp_path / "out", joint=joint, learning_rate=0.05, heads_warmup_steps=1)
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model", dtype=torch.float64)
    assert not same(tuned, before)
    heads = load_heads(tmp_path / "out" / "heads", tuned)
    with pytest.raises(HeadsError, match="weights differ"):
        load_heads(tmp_path / "out" / "heads", before)
    ids = torch.randint(3, 97, (1, 9))
    torch.testing.assert_close(tuned(ids).logits, tiny_llama(ids).logits, rtol=1e-4, atol=1e-4)
    assert heads.training_record["settings"]["joint"] == joint
    assert (tmp_path / "out" / "adapter" / "adapter_config.json").exists() == (joint == "lora")
    assert files == {path: path.read_bytes() for path in (tmp_path / "original").iterdir()}


@pytest.mark.parametrize("joint", ["full", "lora"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_killed_and_resumed_is_uninterrupted_bit_for_bit(
    tiny_llama: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, joint: str, optimizer: str
) -> None:
    """Both stages, dropout of the adapters, the original model as teacher, an early exit."""
    options: dict[str, Any] = {
        "joint": joint,
        "optimizer": optimizer,
        "base_loss": "distill",
        "heads_warmup_steps": 1,
        "lora_dropout": 0.5,
        "early_exit": 1,
    }
    fresh = [copy.deepcopy(tiny_llama) for _ in range(3)]
    whole = run(fresh[0], tmp_path / "whole", **options)
    run_until(3, monkeypatch, lambda: run(fresh[1], tmp_path / "parts", **options))
    parts = run(fresh[2], tmp_path / "parts", **options)
    assert parts["history"] == whole["history"]
    assert same(fresh[0], fresh[2])
    one, other = (load_heads(tmp_path / name / "heads").state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    exits = [load_early_exit(tmp_path / name / "heads") for name in ("whole", "parts")]
    assert all(torch.equal(a, b) for a, b in zip(*(e.parameters() for e in exits if e is not None), strict=True))


def test_a_quantised_model_is_not_trained(tiny_llama: PreTrainedModel) -> None:
    tiny_llama.is_quantized = True
    with pytest.raises(InputError, match="quantised and cannot be trained"):
        joint_module(tiny_llama)


def test_the_early_exit_learns_what_the_model_says_at_the_end(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    said: list[str] = []
    run(tiny_llama, tmp_path, said, early_exit=1, steps=40, learning_rate=0.02, log_every=10, held_out="0")
    losses = [float(line.split("exit ")[1].split(")")[0]) for line in said if line.startswith("step")]
    assert losses[-1] < 0.7 * losses[0]
    found = load_early_exit(tmp_path, tiny_llama)
    assert found is not None and found.layer == 1
    assert load_heads(tmp_path, tiny_llama).num_heads == 2


def test_the_early_exits_loss_is_a_divergence_at_the_same_place(tiny_llama: PreTrainedModel) -> None:
    module = make_module(tiny_llama, TrainOptions(num_heads=2, early_exit=1))
    batch = batch_of()
    alone = make_module(tiny_llama, TrainOptions(num_heads=2))(**batch)
    found = module(**batch) - alone
    states = tiny_llama(
        batch["input_ids"], position_ids=batch["position_ids"], use_cache=False, output_hidden_states=True
    )
    assert module.early_exit is not None
    rows = batch["next_rows"]
    early = tiny_llama.lm_head(module.early_exit(states.hidden_states[1].flatten(0, 1)[rows])).log_softmax(-1)
    final = states.logits.flatten(0, 1)[rows].softmax(-1)
    torch.testing.assert_close(found, functional.kl_div(early, final, reduction="batchmean"))
    found.backward()
    assert all(p.grad is not None for p in module.early_exit.parameters())


def test_untrained_heads_and_base_agree_with_new_heads(tiny_llama: PreTrainedModel) -> None:
    """The heads of a joint module are those that new_heads makes for the original model."""
    expected = new_heads(tiny_llama, 2, seed=7).state_dict()
    module = joint_module(tiny_llama, seed=7)
    assert all(torch.equal(expected[name], tensor) for name, tensor in module.heads.state_dict().items())
