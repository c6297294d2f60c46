"""Training heads: what an update is, packed rows, resuming bit for bit, saves that fail, steps that are skipped."""

from __future__ import annotations

import errno
import gc
import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import ladon.train.trainer as checkpoints
from families import build
from ladon.errors import InputError
from ladon.heads import load_heads
from ladon.train.config import TrainOptions
from ladon.train.modules import HeadsModule, hidden_states, keeps_apart
from ladon.train.run import make_module, train
from ladon.train.trainer import schedule
from training_runs import OPTIONS, examples, run, run_until
from user_side import make_tokenizer


@pytest.fixture(autouse=True, scope="module")
def _quick_collections() -> Iterator[None]:
    """Every run of the Trainer collects garbage: leave out what was imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def test_heads_are_trained_saved_and_reported(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    before = [p.clone() for p in tiny_llama.parameters()]
    said: list[str] = []
    report = run(tiny_llama, tmp_path, said, steps=30, learning_rate=0.01)
    heads = load_heads(tmp_path, tiny_llama)
    assert heads.down_weight.abs().sum() > 0
    assert all(torch.equal(a, b) for a, b in zip(before, tiny_llama.parameters(), strict=True))
    assert [entry["after"] for entry in report["history"]] == ["1%", "10%", "100%"]
    assert heads.training_record["history"] == report["history"]
    assert heads.training_record["settings"]["learning_rate"] == 0.01
    assert any("learned is what stands between" in line for line in said)
    assert any(line.startswith("step 30/30: loss") for line in said)
    assert not list(tmp_path.glob(".partial"))


def test_training_lowers_the_loss_on_what_it_sees(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    said: list[str] = []
    run(tiny_llama, tmp_path, said, steps=60, learning_rate=0.02, held_out="0", log_every=10)
    losses = [float(line.split("loss ")[1].split(" ")[0]) for line in said if line.startswith("step")]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_killed_and_resumed_is_uninterrupted_bit_for_bit(
    tiny_llama: PreTrainedModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    optimizer: str,
    accumulation: int,
) -> None:
    options = {"optimizer": optimizer, "accumulation": accumulation}
    whole = run(tiny_llama, tmp_path / "whole", **options)
    run_until(3, monkeypatch, lambda: run(tiny_llama, tmp_path / "parts", **options))
    said: list[str] = []
    parts = run(tiny_llama, tmp_path / "parts", said, **options)
    assert any("going on from" in line and "checkpoint-2" in line for line in said)
    assert parts["history"] == whole["history"]
    one, other = load_heads(tmp_path / "whole").state_dict(), load_heads(tmp_path / "parts").state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_finished_run_is_not_run_again(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    first = run(tiny_llama, tmp_path)
    said: list[str] = []
    assert run(tiny_llama, tmp_path, said)["history"] == first["history"]
    assert not any(line.startswith("step") for line in said)


def test_other_settings_are_refused_by_name(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    run(tiny_llama, tmp_path)
    with pytest.raises(InputError, match=r"decay 0\.8, this one has 0\.5; give the same settings.*--no-resume"):
        run(tiny_llama, tmp_path, decay=0.5)
    run(tiny_llama, tmp_path, log_every=1)  # what reaches no weight may change
    assert run(tiny_llama, tmp_path, decay=0.5, resume=False)["settings"]["decay"] == 0.5


def test_other_data_and_another_model_are_refused(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    run(tiny_llama, tmp_path)
    with pytest.raises(InputError, match="data"):
        train(tiny_llama, make_tokenizer(), examples(12), TrainOptions(**OPTIONS), tmp_path, lambda _: None)
    with torch.no_grad():
        for parameter in tiny_llama.parameters():
            parameter.neg_()
    with pytest.raises(InputError, match="a training with model"):
        run(tiny_llama, tmp_path)


@pytest.mark.parametrize("failing", ["save_file", "torch.save"])
def test_a_full_disk_leaves_the_old_checkpoint(
    tiny_llama: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    expected = run(tiny_llama, tmp_path / "whole")

    def broken(*_: Any, **__: Any) -> None:
        if (tmp_path / "parts" / "checkpoint-2").exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        return plain(*_, **__)

    place: Any = checkpoints if failing == "save_file" else torch
    plain = getattr(place, failing.rpartition(".")[2])
    with monkeypatch.context() as patch:
        patch.setattr(place, failing.rpartition(".")[2], broken)
        with pytest.raises(InputError, match=r"No space left on device; checkpoint-2 is intact. Make room") as error:
            run(tiny_llama, tmp_path / "parts")
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in (tmp_path / "parts").iterdir()) == ["checkpoint-2"]
    assert run(tiny_llama, tmp_path / "parts")["history"] == expected["history"]


def test_a_torn_checkpoint_is_one_line(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    run(tiny_llama, tmp_path)
    state = tmp_path / "checkpoint-6" / checkpoints.STATE_FILE
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(InputError, match=r"cannot be read .*--no-resume"):
        run(tiny_llama, tmp_path)


def test_accumulated_updates_are_those_of_the_larger_batch(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    """Rows have different numbers of learned positions: means of means would differ."""
    run(tiny_llama, tmp_path / "one", batch_size=4, accumulation=1, held_out="0")
    run(tiny_llama, tmp_path / "two", batch_size=2, accumulation=2, held_out="0")
    one, other = load_heads(tmp_path / "one").state_dict(), load_heads(tmp_path / "two").state_dict()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("packing", ["off", "auto"])
def test_packed_rows_are_learned_from_as_if_alone(tiny_llama: PreTrainedModel, tmp_path: Path, packing: str) -> None:
    said: list[str] = []
    everything = {"steps": 1, "held_out": "0", "batch_size": 11, "length": 200, "clip": 0.0}
    run(tiny_llama, tmp_path, said, packing=packing, **everything)
    rows = next(line for line in said if "documents in" in line)
    assert ("in 1 rows" in rows) == (packing == "auto")
    heads = load_heads(tmp_path)
    torch.manual_seed(0)
    other = load_heads(_alone(tiny_llama, tmp_path / "alone", everything))
    for name, tensor in heads.state_dict().items():
        torch.testing.assert_close(tensor, other.state_dict()[name], rtol=1e-6, atol=1e-8)


def _alone(model: PreTrainedModel, out: Path, options: dict[str, Any]) -> Path:
    """The same documents, one per forward."""
    run(model, out, packing="off", **options | {"batch_size": 1, "accumulation": 11})
    return out


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt_neo"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packing_is_used_only_where_documents_stay_apart(name: str, attention: str) -> None:
    model = build(name)
    model.set_attn_implementation(attention)
    ids = torch.randint(3, 90, (2, 5))
    places = torch.arange(5).repeat(2)[None]
    packed = hidden_states(model, {"input_ids": ids.view(1, -1), "position_ids": places}, packed=True)[0]
    alone = hidden_states(model, {"input_ids": ids}, packed=False).flatten(0, 1)
    assert keeps_apart(model) == torch.allclose(packed, alone, atol=1e-5)
    if name == "llama":
        assert keeps_apart(model)


@pytest.mark.parametrize("name", ["bloom", "mamba2"])
def test_models_without_positions_are_not_packed(name: str) -> None:
    assert not keeps_apart(build(name))


def test_a_step_without_a_finite_gradient_moves_nothing(
    tiny_llama: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(tiny_llama, tmp_path / "good", steps=2, held_out="0")
    plain = HeadsModule.heads_loss

    def wild(self: HeadsModule, *arguments: Any) -> Any:
        loss = plain(self, *arguments)
        return loss * math.inf if self._step == 2 else loss

    monkeypatch.setattr(HeadsModule, "heads_loss", wild)
    said: list[str] = []
    options = {"steps": 3, "held_out": "0", "schedule": "constant", "warmup": 0.0, "optimizer": "muon"}
    report = run(tiny_llama, tmp_path / "wild", said, **options)
    assert report["skipped_steps"] == 1 and expected["skipped_steps"] == 0
    assert any(line.startswith("skipped steps: 1") for line in said)
    assert all(torch.isfinite(p).all() for p in load_heads(tmp_path / "wild").parameters())


def test_nothing_is_learned_from_filling(tiny_llama: PreTrainedModel) -> None:
    """Rows are filled with a token that the model knows, whatever its pad token is, and it changes nothing."""
    tiny_llama.config.pad_token_id = 5000
    module = make_module(tiny_llama, TrainOptions(num_heads=2, packing="off"))
    short = {"input_ids": torch.tensor([[5, 6, 7, 8]]), "position_ids": torch.arange(4)[None]}
    long = {"input_ids": torch.tensor([[5, 6, 7, 8, 0, 0]]), "position_ids": torch.arange(6)[None]}
    torch.testing.assert_close(module.read(short)[0], module.read(long)[0][:4])


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
def test_schedules_rise_then_fall(name: str) -> None:
    share = schedule(TrainOptions(schedule=name, warmup=0.1), 100)
    values = [share(step) for step in range(101)]
    assert all(a < b for a, b in pairwise(values[:11])) and values[10] == 1.0
    assert all(a >= b for a, b in pairwise(values[10:]))
    assert values[100] == pytest.approx(1.0 if name == "constant" else 0.0)
    late = schedule(TrainOptions(schedule=name, warmup=0.1), 100, start=20)
    assert [late(step) for step in range(20)] == [0.0] * 20 and 0 < late(20) < 1


def test_families_and_labels(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    for family in ("medusa", "lowrank"):
        options = (("rank", 8),) if family == "lowrank" else ()
        run(tiny_llama, tmp_path / family, family=family, family_options=options, labels="target", steps=2)
        assert load_heads(tmp_path / family, tiny_llama).family == family
    run(tiny_llama, tmp_path / "more", init_heads=str(tmp_path / "medusa"), steps=1)
    assert load_heads(tmp_path / "more").family == "medusa"


def test_a_correction_is_trained_on_frozen_heads(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    run(tiny_llama, tmp_path / "heads", steps=2)
    said: list[str] = []
    options = {"init_heads": str(tmp_path / "heads"), "markov_rank": 8, "freeze_heads": True, "held_out": "0"}
    run(tiny_llama, tmp_path / "corrected", said, steps=60, learning_rate=0.05, log_every=10, **options)
    before, after = load_heads(tmp_path / "heads", tiny_llama), load_heads(tmp_path / "corrected", tiny_llama)
    assert before.correction is None and after.correction is not None
    assert torch.equal(before.up_weight, after.up_weight) and torch.equal(before.down_weight, after.down_weight)
    assert after.correction.after.abs().sum() > 0 and after.options["markov_rank"] == 8
    losses = [float(line.split("loss ")[1].split(" ")[0]) for line in said if line.startswith("step")]
    assert losses[-1] < 0.7 * losses[0]


def test_a_gate_is_trained_with_its_correction(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    run(tiny_llama, tmp_path / "heads", steps=2)
    gated, ungated = tmp_path / "gated", tmp_path / "ungated"
    new = {"init_heads": str(tmp_path / "heads"), "markov_rank": 4, "freeze_heads": True}
    run(tiny_llama, gated, markov_gate=True, **new)
    run(tiny_llama, ungated, **new)
    before, after = load_heads(tmp_path / "heads", tiny_llama), load_heads(gated, tiny_llama)
    assert torch.equal(before.up_weight, after.up_weight) and torch.equal(before.down_weight, after.down_weight)
    assert (after.correction.gate.abs().sum(1) > 0).all() and load_heads(ungated).correction.gate is None

    run(tiny_llama, tmp_path / "again", init_heads=str(gated), freeze_heads=True)  # goes on with the gate there is
    assert not torch.equal(load_heads(tmp_path / "again", tiny_llama).correction.gate, after.correction.gate)
    run(tiny_llama, tmp_path / "named", steps=1, init_heads=str(gated), markov_rank=4, markov_gate=True)
    with pytest.raises(InputError, match="training goes on with these, so leave out markov-gate, or --init-heads"):
        run(tiny_llama, tmp_path / "none", init_heads=str(ungated), markov_rank=4, markov_gate=True)
    with pytest.raises(InputError, match="give markov_rank too"):
        run(tiny_llama, tmp_path / "none", markov_gate=True)


def test_a_hidden_correction_is_trained_on_frozen_heads(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    said: list[str] = []
    run(tiny_llama, tmp_path / "heads", steps=2)
    options = {"init_heads": str(tmp_path / "heads"), "hidden_correction": 8, "freeze_heads": True, "held_out": "0"}
    run(tiny_llama, tmp_path / "corrected", said, steps=60, learning_rate=0.02, log_every=10, **options)
    before, after = load_heads(tmp_path / "heads", tiny_llama), load_heads(tmp_path / "corrected", tiny_llama)
    assert after.correction is not None and after.options["hidden_correction"] == 8
    kept = {name: tensor for name, tensor in after.state_dict().items() if not name.startswith("correction.")}
    assert all(torch.equal(kept[name], tensor) for name, tensor in before.state_dict().items())
    assert all(parameter.abs().sum() > 0 for parameter in after.correction.parameters())
    losses = [float(line.split("loss ")[1].split()[0]) for line in said if line.startswith("step ")]
    assert losses[-1] < losses[0] - 0.1
    with pytest.raises(InputError, match="both given; heads take one correction, leave one out"):
        run(tiny_llama, tmp_path / "none", markov_rank=4, hidden_correction=4)
    with pytest.raises(InputError, match="training goes on with these, so leave out hidden-correction"):
        run(tiny_llama, tmp_path / "none", init_heads=str(tmp_path / "corrected"), hidden_correction=9)
    with pytest.raises(InputError, match="hidden_correction is -1; give 0 or more"):
        run(tiny_llama, tmp_path / "none", hidden_correction=-1)


def test_heads_and_their_correction_learn_together(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    run(tiny_llama, tmp_path, markov_rank=4, steps=3)
    heads = load_heads(tmp_path, tiny_llama)
    assert heads.correction is not None and heads.correction.after.abs().sum() > 0
    assert heads.down_weight.abs().sum() > 0
    with pytest.raises(InputError, match="--freeze-heads trains a correction on given heads"):
        run(tiny_llama, tmp_path / "none", markov_rank=4, freeze_heads=True)
    with pytest.raises(InputError, match="markov_rank is -1; give 0 or more"):
        run(tiny_llama, tmp_path / "none", markov_rank=-1)
    with pytest.raises(InputError, match="give markov_rank too"):
        run(tiny_llama, tmp_path / "none", markov_successors=2)
    with pytest.raises(InputError, match="leave out markov-successors, markov-start"):
        again = {"init_heads": str(tmp_path), "markov_rank": 4, "markov_start": "bigrams"}
        run(tiny_llama, tmp_path / "none", markov_successors=2, **again)
    with pytest.raises(InputError, match=r"variation is 0\.5; give 0 to 1, with labels target"):
        run(tiny_llama, tmp_path / "none", variation=0.5)


def test_a_correction_may_start_from_pairs_of_tokens(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    said: dict[str, list[str]] = {"zero": [], "bigrams": []}
    for start, lines in said.items():
        settings = {"markov_rank": 8, "markov_start": start, "held_out": "0", "log_every": 1, "labels": "text"}
        run(tiny_llama, tmp_path / start, lines, steps=1, **settings)
    first = {
        start: next(float(line.split("loss ")[1].split(" ")[0]) for line in lines if line.startswith("step"))
        for start, lines in said.items()
    }
    assert first["bigrams"] < first["zero"]


def test_bfloat16_products_leave_float32_weights(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    model = tiny_llama.to(torch.bfloat16)
    run(model, tmp_path, precision="bf16", steps=2)
    assert all(p.dtype == torch.float32 for p in load_heads(tmp_path).parameters())
    with pytest.raises(InputError, match=r"precision is fp32, but the model is in torch\.bfloat16"):
        run(model, tmp_path / "other", precision="fp32")
