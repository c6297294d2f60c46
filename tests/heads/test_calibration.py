"""The calibration file beside heads: written whole, read strictly, used only with its own heads."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from ladon import Decoder
from ladon.errors import HeadsError
from ladon.heads import Heads, load_heads, new_heads
from ladon.heads.calibration import CALIBRATION_FILE, FORMAT, Calibration, read_calibration
from ladon.heads.formats.export import export_heads
from ladon.trees import lattice

BEST = {"layer": 1, "keep": 4, "criterion": "siblings", "weight": 0.5, "top_k": 8, "trained": False}
READABLE = {"format": FORMAT, "version": 1, "heads": "0", "temperatures": [1.0], "hit_rates": [[1]], "simulated": []}


def calibration(heads: str, num_heads: int = 2) -> Calibration:
    return Calibration(heads=heads, temperatures=[1.5] * num_heads, hit_rates=[[0.5, 0.2]] * num_heads)


def test_round_trip(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    heads = new_heads(tiny_llama, 2)
    heads.save(tmp_path)
    saved = calibration(heads.weights_hash)
    saved.save(tmp_path)
    assert json.loads((tmp_path / CALIBRATION_FILE).read_text(encoding="utf-8"))["temperatures"] == [1.5, 1.5]
    assert load_heads(tmp_path, tiny_llama).calibration == read_calibration(tmp_path)


@pytest.mark.parametrize("pruning", [{}, {"best": None}, {"best": BEST}, {"place": {"cpu": "x"}, "best": BEST}])
def test_pruning_is_read(tmp_path: Path, pruning: dict[str, Any]) -> None:
    replace(calibration("0"), pruning=pruning).save(tmp_path)
    found = read_calibration(tmp_path)
    assert found is not None and found.pruning == pruning


def test_what_damaged_files_are_made_from_can_be_read(tmp_path: Path) -> None:
    (tmp_path / CALIBRATION_FILE).write_text(json.dumps(READABLE), encoding="utf-8")
    assert read_calibration(tmp_path) is not None


def test_none_without_the_file(tmp_path: Path) -> None:
    assert read_calibration(tmp_path) is None


def test_other_heads_calibration_is_left_aside(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    new_heads(tiny_llama, 2).save(tmp_path)
    calibration("0123456789abcdef").save(tmp_path)
    with pytest.warns(UserWarning, match="made for other heads"):
        assert load_heads(tmp_path, tiny_llama).calibration is None


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "\ud800",
        '{"format": "ladon-calibration", "version": 2}',
        '{"format": "ladon-calibration", "version": 1}',
        *(
            json.dumps({**READABLE, "temperatures": temperatures})
            for temperatures in ([math.nan], [math.inf], [0], [-1.0], ["1"], [True], 1.0, [1.0, 1.0])
        ),
        *(
            json.dumps({**READABLE, **wrong})
            for wrong in (
                {"hit_rates": [1]},
                {"hit_rates": [["x"]]},
                {"hit_rates": [[1.5]]},
                {"marginal_hit_rates": [None]},
                {"fixed_trees": []},
                {"step_times": 3},
                {"simulated": {}},
                {"heads": 0},
                {"prefixes": []},
                {"pruning": []},
                {"pruning": {"place": "here"}},
                {"pruning": {"best": []}},
                {"pruning": {"best": {}}},
                *({"pruning": {"best": {**BEST, name: None}}} for name in BEST),
                {"pruning": {"best": {**BEST, "layer": 0}}},
                {"pruning": {"best": {**BEST, "keep": True}}},
                {"pruning": {"best": {**BEST, "weight": math.nan}}},
            )
        ),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, text: str) -> None:
    (tmp_path / CALIBRATION_FILE).write_text(text, encoding="utf-8", errors="surrogatepass")
    with pytest.raises(HeadsError, match="Remove the file, and run `ladon calibrate` again") as error:
        read_calibration(tmp_path)
    assert "\n" not in str(error.value)


def test_temperatures_flatten_or_sharpen_each_depth() -> None:
    logits = torch.tensor([[[2.0, 1.0, 0.0], [2.0, 1.0, 0.0]]])
    found = lattice.from_logits(logits, 3, temperatures=torch.tensor([1.0, 2.0]))
    torch.testing.assert_close(found.log_probs[0, 0, 0], logits[0, 0].log_softmax(-1))
    torch.testing.assert_close(found.log_probs[0, 1, 0], (logits[0, 1] / 2).log_softmax(-1))


def test_tokens_of_a_vocabulary_of_the_heads_own() -> None:
    logits = torch.tensor([[[0.0, 3.0, 1.0]]])
    found = lattice.from_logits(logits, 2, token_ids=torch.tensor([40, 7, 99]))
    assert found.tokens.tolist() == [[[[7, 99]]]]


def test_a_temperature_for_each_head(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    heads = new_heads(tiny_llama, 2)
    heads.save(tmp_path)
    calibration(heads.weights_hash, num_heads=3).save(tmp_path)
    with pytest.raises(HeadsError, match="has 3 temperatures for 2 heads"):
        load_heads(tmp_path, tiny_llama)


def test_heads_take_their_calibration_along(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    heads = new_heads(tiny_llama, 2)
    heads.calibration = calibration(heads.weights_hash)
    heads.save(tmp_path / "a")
    copied = load_heads(tmp_path / "a")
    copied.save(tmp_path / "b")
    assert read_calibration(tmp_path / "b") == read_calibration(tmp_path / "a") is not None


def test_heads_that_were_trained_further_leave_it(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    heads = new_heads(tiny_llama, 2)
    heads.calibration = calibration(heads.weights_hash)
    with torch.no_grad():
        next(heads.parameters()).add_(1.0)
    heads.save(tmp_path)
    assert not (tmp_path / CALIBRATION_FILE).exists()


@pytest.mark.parametrize("family", ["shared", "medusa", "lowrank"])
def test_the_hash_is_that_of_the_stored_weights(tiny_llama: PreTrainedModel, tmp_path: Path, family: str) -> None:
    """In whatever dtype they are loaded, stored in bfloat16 they are the same heads."""
    options = {"rank": 8} if family == "lowrank" else {}
    heads = new_heads(tiny_llama.bfloat16(), 2, family, **options)
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    expected = heads.weights_hash
    heads.save(tmp_path / "stored")
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        loaded = load_heads(tmp_path / "stored", tiny_llama.to(dtype))
        assert next(loaded.parameters()).dtype == dtype
        assert loaded.weights_hash == expected
        loaded.save(tmp_path / "again")
        assert load_heads(tmp_path / "again").weights_hash == expected
    with torch.no_grad():
        next(loaded.parameters())[0] += 1.0
    assert loaded.weights_hash != expected


def test_decoding_divides_by_the_temperatures_and_stays_exact(decoder: Decoder) -> None:
    """Paths of the tree have the probabilities of the divided logits; the text is the model's own."""
    model, heads = decoder.model, decoder.heads
    assert isinstance(heads, Heads)
    prompt = torch.tensor([[5, 6, 7, 8]])
    temperatures = [0.5, 2.0, 3.0]

    def first_tree() -> dict[tuple[int, ...], float]:
        trace = Decoder(model, heads, budget=8).trace(prompt[0], max_new_tokens=30)
        step = next(trace)
        return dict(zip(zip(step.depths, step.tokens, strict=True), step.log_probs, strict=True))

    plain = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=30, do_sample=False)
    before = first_tree()
    heads.calibration = Calibration(heads=heads.weights_hash, temperatures=temperatures, hit_rates=[])
    after = first_tree()
    assert before != after
    with torch.no_grad():
        hidden = model.base_model(prompt).last_hidden_state[:, -1]
        best = (heads(hidden)[0, 0].float() / temperatures[0]).log_softmax(-1)
    depth_1 = {token: log_prob for (depth, token), log_prob in after.items() if depth == 1}
    assert depth_1 == pytest.approx({token: float(best[token]) for token in depth_1}, abs=1e-4)
    for tree in ("dynamic", "chain"):
        output = Decoder(model, heads, tree=tree).generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=30, do_sample=False
        )
        assert torch.equal(output, plain)


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    with pytest.raises(HeadsError, match="cannot write"):
        calibration("0").save(tmp_path / "missing")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calibration("0").save(tmp_path)
    old = (tmp_path / CALIBRATION_FILE).read_bytes()
    write_bytes = Path.write_bytes

    def full_disk(self: Path, data: bytes) -> int:
        write_bytes(self, data[:20])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(HeadsError, match="No space left on device"):
        calibration("1").save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [CALIBRATION_FILE]
    assert (tmp_path / CALIBRATION_FILE).read_bytes() == old


def test_two_processes_write_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another one writes the file between this one's two steps: each writes whole, the last one stays."""
    rename, saved = Path.replace, []

    def late(self: Path, target: Path) -> Path:
        if not saved:
            saved.append(self)
            with monkeypatch.context() as patch:
                patch.setattr(os, "getpid", lambda: 1)
                calibration("other").save(tmp_path)
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", late)
    calibration("own").save(tmp_path)
    found = read_calibration(tmp_path)
    assert found is not None and found.heads == "own"
    assert [path.name for path in tmp_path.iterdir()] == [CALIBRATION_FILE]


def test_calibration_beside_heads_of_other_formats_is_used(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    heads = new_heads(tiny_llama, 2, "medusa", projection="own")
    heads.base_name = "someone/tiny"
    export_heads(heads, "tgi", tmp_path / "tgi")
    calibration(load_heads(tmp_path / "tgi").weights_hash).save(tmp_path / "tgi")
    with pytest.warns(UserWarning, match="cannot verify"):
        found = load_heads(tmp_path / "tgi", tiny_llama).calibration
    assert found is not None and list(found.temperatures) == [1.5, 1.5]
