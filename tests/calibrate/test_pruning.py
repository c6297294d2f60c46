"""Whether pruning pays: what is judged, what it is compared with, and what the calibration makes of it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import ladon
from families import build
from ladon import Pruning
from ladon.calibrate.pruning import (
    Survival,
    Survivals,
    best_everywhere,
    find_pruning,
    judge,
    record_survival,
    usable_ways,
    ways_to_prune,
)
from ladon.calibrate.timing import LayerTimes, Trials, measure_layer_times
from ladon.cli.main import run
from ladon.errors import UnsupportedModelError
from ladon.heads.calibration import CALIBRATION_FILE
from ladon.heads.early_exit import EarlyExit
from ladon.target.pruning.pruner import Pruner
from ladon.target.target import Target
from ladon.trees.check import check_tree
from ladon.trees.token_tree import TokenTree
from toys import Packed, deep_llama
from user_side import Tiny, write_jsonl

PROMPTS = [torch.arange(3, 9), torch.arange(40, 60), torch.tensor([7])]
WAY = Pruning(layer=1, keep=1)


def survivals_of(model: PreTrainedModel, ways: list[Pruning]) -> Survivals:
    heads = ladon.new_heads(model, num_heads=3)
    return record_survival(model, heads, PROMPTS, ways, sizes=[6, 12], keeps=[1, 2, 4, 8], max_new_tokens=20)


def test_the_own_order_of_the_tree_is_the_unpruned_tree(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores that fall with the index keep the first nodes: exactly what the smaller tree accepts."""

    def first(self: Pruner, hidden: Tensor, tree: TokenTree, ancestors: Tensor) -> Tensor:
        assert hidden.shape[:2] == tree.tokens.shape == ancestors.shape[:2]
        return -torch.arange(tree.num_nodes).float().expand(tree.batch_size, -1)

    monkeypatch.setattr(Pruner, "score", first)
    found = survivals_of(model, [WAY])
    assert found.row_steps > 20
    assert {(survival.nodes, survival.pruning.keep) for survival in found.pruned} == {
        (6, 1), (6, 2), (6, 4), (12, 1), (12, 2), (12, 4), (12, 8)
    }  # fmt: skip
    for survival in found.pruned:
        assert survival.acceptance_length == pytest.approx(found.unpruned[survival.pruning.keep])
        assert (survival.whole == 1.0) == (survival.acceptance_length == pytest.approx(found.unpruned[survival.nodes]))
    assert 1.0 == found.unpruned[1] < found.unpruned[12]


def test_a_judge_that_knows_keeps_everything(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The truth first: the accepted path survives whole as soon as there is room for it."""
    from ladon.calibrate import pruning as survival_module
    from ladon.sampling.acceptance import longest_match

    truth: list[Tensor] = []

    def noted(tree: TokenTree, picks: Tensor, ancestors: Tensor) -> object:
        accepted = longest_match(tree, picks, ancestors)
        truth.append(torch.zeros(tree.tokens.shape).scatter_(1, accepted.path, 1.0))
        return accepted

    def knowing(self: Pruner, hidden: Tensor, tree: TokenTree, ancestors: Tensor) -> Tensor:
        known = truth[-1][:, : tree.num_nodes] if truth else 0.0  # before the first tree the model is tested
        return (known - torch.arange(tree.num_nodes) / 1e3).expand(tree.batch_size, -1)

    monkeypatch.setattr(survival_module, "longest_match", noted)
    monkeypatch.setattr(Pruner, "score", knowing)
    found = survivals_of(model, [WAY])
    for survival in found.pruned:
        if survival.pruning.keep == 4:  # the heads' three tokens and the root
            assert survival.whole == 1.0
            assert survival.acceptance_length == pytest.approx(found.unpruned[survival.nodes])


def linear_times(fixed: float, per_node: float) -> LayerTimes:
    sizes = (1, 2, 4, 8, 16)
    layer = {size: fixed + per_node * size for size in sizes}
    return LayerTimes(batch=1, context=10, num_layers=10, layer_ms=layer, rest_ms=dict.fromkeys(sizes, 0.0))


def test_times_add_up() -> None:
    times = linear_times(1.0, 0.5)
    assert times.whole_ms(16) == 90.0
    assert times.pruned_ms(16, 2, 4, 0.25) == 2 * 9.0 + 8 * 3.0 + 0.25


def test_pruning_must_beat_every_smaller_tree() -> None:
    """Where nodes are dear, half the whole tree's time is no gain if a smaller tree is better still."""
    unpruned = {1: 1.0, 4: 1.9, 16: 2.4}
    kept = Survival(nodes=16, pruning=replace(WAY, layer=2, keep=4), acceptance_length=2.2, whole=0.9)
    survivals = Survivals(row_steps=100, unpruned=unpruned, pruned=[kept])
    dear, cheap = linear_times(0.0, 1.0), linear_times(10.0, 0.01)
    way = replace(kept.pruning, keep=1)
    (found,) = judge(survivals, dear, {way: 0.0}, 0.0)
    assert found.ms == 2 * 16 + 8 * 4
    assert found.gain == pytest.approx((2.2 / 64) / (1.0 / 10)) and found.gain < 1
    (found,) = judge(survivals, cheap, {way: 0.0}, 0.0)
    assert found.gain == pytest.approx((2.2 / found.ms) / (2.4 / cheap.whole_ms(16)))
    (slow_score,) = judge(survivals, cheap, {way: 50.0}, 0.0)
    assert slow_score.score_ms == 50.0 and slow_score.gain < found.gain


def test_it_must_pay_on_every_batch_size() -> None:
    def verdicts(*gains: float) -> list:
        found = []
        for keep, gain in zip((2, 4), gains, strict=True):
            kept = Survival(nodes=16, pruning=replace(WAY, keep=keep), acceptance_length=2.0, whole=0.9)
            (verdict,) = judge(
                Survivals(row_steps=1, unpruned={1: 1.0}, pruned=[kept]), linear_times(1.0, 0.0), {WAY: 0.0}, 0.0
            )
            found.append(replace(verdict, gain=gain))
        return found

    assert best_everywhere([verdicts(1.5, 0.9), verdicts(0.8, 1.2)]) is None
    assert best_everywhere([verdicts(1.5, 1.02), verdicts(1.02, 1.2)]) is None, "that may be luck"
    best = best_everywhere([verdicts(1.5, 1.1), verdicts(1.05, 1.2)])
    assert best is not None and (best["keep"], best["nodes"], best["gain"]) == (4, 16, 1.1)


def test_which_ways_are_tried() -> None:
    trained = EarlyExit(layer=3, num_layers=8, hidden_size=8, width=1)
    ways = ways_to_prune(8, trained)
    assert {way.layer for way in ways} == {1, 2, 3, 4}
    assert {way.layer for way in ways if way.early_exit is not None} == {3}
    assert {way.criterion for way in ways} == {"evidence", "siblings", "top-k"}
    assert {way.layer for way in ways_to_prune(2, None)} == {1}
    assert len(set(ways)) == len(ways)


def test_what_is_timed() -> None:
    trials = Trials(deep_llama(), torch.arange(3, 30), 2)
    for size in (1, 2, 5, 14):
        check_tree(trials.tree(size))
        assert trials.tree(size).tokens.shape == (2, size)
    times = measure_layer_times(trials, [1, 4], rounds=1)
    assert (times.batch, times.context, times.num_layers) == (2, 27, 5)
    assert times.layer_ms.keys() == times.rest_ms.keys() == {1, 4} and min(times.layer_ms.values()) > 0
    assert trials.score_ms(replace(WAY, keep=3), 8) > 0
    whole, pruned = trials.compare(8, replace(WAY, keep=2), rounds=1)
    assert whole > 0 and pruned > 0


def test_what_is_found(tmp_path: Path) -> None:
    """All of it is JSON, and what `prune="auto"` needs is in `best`."""
    model = deep_llama()
    heads = ladon.new_heads(model, num_heads=3)
    found = find_pruning(model, heads, PROMPTS, sizes=(4, 8), context=30, batches=(1, 2), max_new_tokens=8)
    assert json.loads(json.dumps(found)) == found
    assert [measured["batch"] for measured in found["measured"]] == [1, 2]
    for measured in found["measured"]:
        gains = [row["gain"] for row in measured["pruned"]]
        assert gains == sorted(gains, reverse=True) and len(gains) == len(ways_to_prune(5, None))
        assert measured["check"].keys() == {"whole_ms", "pruned_ms", "predicted_ms"}
    names = {"nodes", "layer", "keep", "criterion", "weight", "top_k", "trained", "gain"}
    assert found["best"] is None or found["best"].keys() == names


def test_nothing_is_measured_on_a_model_that_cannot_be_pruned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ladon.calibrate.pruning.record_survival", lambda *args, **options: pytest.fail("too late"))
    for model, reason in (
        (build("gemma3n_text"), r"cannot be pruned after layer 1: .*several per token"),
        (deep_llama(1), "has a single decoder layer"),
    ):
        with pytest.raises(UnsupportedModelError, match=rf"{reason}.*prune='off'"):
            find_pruning(model, ladon.new_heads(model, num_heads=3), PROMPTS)


def test_ways_that_do_not_fit_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Criteria that a packed projection has no rows for, and layers after which the model fails the test."""
    model = deep_llama()
    heads = ladon.new_heads(model, num_heads=3)
    assert usable_ways(model, heads) == ways_to_prune(5, None)
    monkeypatch.setattr("ladon.target.target.check_pruning", only_after_layer_1)
    assert {way.layer for way in usable_ways(model, heads)} == {1}
    monkeypatch.undo()
    model = build("llama")
    heads = ladon.new_heads(model, num_heads=3)
    model.lm_head = Packed(model.lm_head)
    ways = usable_ways(model, heads)
    assert ways and {way.criterion for way in ways} == {"top-k"}


def only_after_layer_1(target: Target, layer: int) -> None:
    if layer > 1:
        raise UnsupportedModelError("not there")


def test_the_command_keeps_what_it_has_measured(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that cannot be pruned is refused at once; what goes wrong later costs the pruning alone."""
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    shutil.copytree(tiny.folder / "heads", tmp_path / "heads")
    prompts = write_jsonl(tmp_path / "p.jsonl", [{"prompt": text} for text in ("def read", "for line in")])
    command = ["calibrate", str(prompts), "--model", str(tiny.folder / "model"), "--heads", str(tmp_path / "heads")]
    command += ["--max-new-tokens", "12", "--no-step-times", "--simulate", "4", "--pruning"]

    def refuse(*args: object, **options: object) -> None:
        raise UnsupportedModelError("it cannot be done")

    with monkeypatch.context() as patch:
        patch.setattr("ladon.target.target.check_pruning", refuse)
        patch.setattr("ladon.calibrate.findings.record", lambda *args, **options: pytest.fail("too late"))
        assert run(command) == 2
        assert "it cannot be done" in capsys.readouterr().err
    monkeypatch.setattr("ladon.calibrate.pruning.record_survival", refuse)
    assert run(command) == 2
    assert "it cannot be done" in capsys.readouterr().err
    assert (tmp_path / "heads" / CALIBRATION_FILE).exists()
    heads = ladon.load_heads(tmp_path / "heads", tiny.model)
    assert heads.calibration is not None and heads.calibration.pruning == {}


def test_the_command(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    shutil.copytree(tiny.folder / "heads", tmp_path / "heads")
    prompts = write_jsonl(tmp_path / "p.jsonl", [{"prompt": text} for text in ("def read", "for line in")])
    command = ["calibrate", str(prompts), "--model", str(tiny.folder / "model"), "--heads", str(tmp_path / "heads")]
    quick = ["--max-new-tokens", "12", "--no-step-times", "--simulate", "4"]
    assert run([*command, *quick, "--pruning"]) == 0
    out = capsys.readouterr().out
    assert "Early pruning, against the best tree that is not pruned" in out and 'prune="auto"' in out
    written = json.loads((tmp_path / "heads" / CALIBRATION_FILE).read_text(encoding="utf-8"))
    assert written["pruning"]["measured"] and written["pruning"]["place"]["dtype"] == "float32"
    heads = ladon.load_heads(tmp_path / "heads", tiny.model)
    assert heads.calibration is not None and heads.calibration.pruning == written["pruning"]
    assert run([*command[:1], *command[2:], *quick, "--pruning", "--from-trace", "t"]) == 2
    assert "--trace and --pruning" in capsys.readouterr().err
