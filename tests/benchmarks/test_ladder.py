"""The scripts that measure acceptance lengths, small: what they compare, what each rung is, and that they go on."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import PreTrainedModel

from ladon import load_demo, new_heads
from ladon.drafting.head_chaining import product
from ladon.heads.calibration import Calibration
from taught_heads import PROMPTS, taught
from user_side import ROOT


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.syspath_prepend(str(ROOT / "docs"))


@pytest.fixture
def script() -> ModuleType:
    return importlib.import_module("ladder")


@pytest.fixture
def rungs() -> ModuleType:
    return importlib.import_module("ladder_rungs")


@pytest.fixture
def acceptance() -> ModuleType:
    return importlib.import_module("acceptance")


def document_of(capsys: pytest.CaptureFixture[str]) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_a_ladder_of_two_prompts(
    script: ModuleType,
    rungs: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Interrupted once, and the table that its document makes."""
    monkeypatch.setattr(rungs, "_PROMPTS", 4)
    monkeypatch.setattr(rungs, "_NEW_TOKENS", 32)
    quick = replace(script.TURNS, groups=2, most_repeats=1)
    monkeypatch.setattr(script, "TURNS", quick)
    monkeypatch.setattr(script, "BUDGETS", (4, 16))
    work = tmp_path / "work.jsonl"
    asked = ["--prompts", "2", "--max-new-tokens", "8", "--work", str(work), "--timed", "--cells", "*code/*"]
    own, done = script.Ladder.measured, []

    def interrupted(self, name: str) -> dict:
        if len(done) == 7:
            raise KeyboardInterrupt
        done.append(name)
        return own(self, name)

    monkeypatch.setattr(script.Ladder, "measured", interrupted)
    with pytest.raises(KeyboardInterrupt):
        script.main(asked)
    monkeypatch.setattr(script.Ladder, "measured", lambda self, name: done.append(name) or own(self, name))
    capsys.readouterr()
    script.main([*asked, "--output", str(tmp_path / "out.json")])
    document = document_of(capsys)
    assert document == json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    names = [cell["cell"] for cell in document["results"]]
    assert names == done and len(set(names)) == len(names), "each cell was measured once"
    rows = {(cell["law"], cell["rung"], cell["budget"]): cell for cell in document["results"]}
    names_of_rungs = ["fixed", "candidates", "softmax", "calibrated", "markov", "ngrams"]
    expected = [("chain", 4), ("chain", 5), *((rung, nodes) for rung in names_of_rungs for nodes in (4, 16))]
    assert list(rows) == [(law, *entry) for law in ("greedy", "sampled") for entry in expected]
    for (_, rung, _), cell in rows.items():
        assert cell["different"] == 0 and cell["prompts"] == 2
        assert (cell["diagnosis"] is None) == (rung == "ngrams")
    assert rows["greedy", "calibrated", 16]["acceptance_length"] > 1.5
    for cell in document["timed"]:
        assert list(cell["systems"]) == ["plain", "chain", *names_of_rungs]
        assert cell["systems"]["plain"]["vs_plain"] == 1.0
        assert all(found["tokens_per_second"] > 0 for found in cell["systems"].values())
    assert [cell["runs_different"] for cell in document["timed"]] == [0, 0]
    page = importlib.import_module("tables").ladder_rows(document, "code/greedy")
    assert page[0] == ["", "4 nodes", "16 nodes", "tokens/s over plain, 16 nodes"]
    assert [row[0] for row in page[1:4]] == [
        "chain",
        "fixed tree (MEDUSA)",
        importlib.import_module("tables").RUNGS[names_of_rungs[1]],
    ]
    assert all(len(row) == 4 for row in page) and page[1][2].startswith(
        f"{rows['greedy', 'chain', 5]['acceptance_length']:.2f} ("
    )


def test_rungs_of_heads_with_a_correction(
    script: ModuleType, rungs: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their product has a calibration of its own, and each rung goes by the one that it should."""
    monkeypatch.setattr(rungs, "_PROMPTS", 2)
    monkeypatch.setattr(rungs, "_NEW_TOKENS", 6)
    model, _, _ = load_demo()
    heads, hydra = new_heads(model, 3, markov_rank=2), new_heads(model, 2, family="hydra")
    with pytest.raises(SystemExit, match="no calibration"):
        heads.save(tmp_path / "markov")
        rungs.Rungs(tmp_path / "markov", None)
    heads.calibration = Calibration(
        heads=heads.weights_hash, temperatures=[2.0] * 3, hit_rates=[[0.5] * 32] * 3, joint="markov"
    )
    heads.save(tmp_path / "markov")
    hydra.save(tmp_path / "hydra")
    found = rungs.Rungs(tmp_path / "markov", tmp_path / "hydra")
    assert found.names == ["chain", "fixed", "candidates", "softmax", "calibrated", "markov", "ngrams", "hydra"]
    assert found.about["joint"] == "markov" and found.about["hydra"] == hydra.weights_hash
    plain = script.plain_rows(found.model, [[5, 6, 7]], 6, 0.0)
    for rung in found.names:
        decoder = found.diagnosed(rung, 8)
        calibration = decoder.heads.calibration
        if rung in ("markov", "ngrams"):
            assert calibration.joint == "markov" and calibration.temperatures == [2.0] * 3
        elif rung == "calibrated":
            assert calibration.joint == "product" and calibration.temperatures != [2.0] * 3
        else:
            assert calibration is None
        assert script.measure(decoder, plain, 0.0)["different"] == 0


def test_probabilities_among_the_candidates_alone(rungs: ModuleType, tiny_llama: PreTrainedModel) -> None:
    heads = taught(tiny_llama, new_heads(tiny_llama, 3))
    decoder = rungs.DiagnosedAmongCandidates(tiny_llama, heads, budget=4, ngrams="off")
    (row,) = decoder.rows(PROMPTS[:1], max_new_tokens=3)
    next(decoder.decode([row]))
    lattice, tree = decoder.take_drafts()
    torch.testing.assert_close(lattice.log_probs.exp().sum(-1), torch.ones(1, 3, 1))
    with torch.no_grad():
        hidden = tiny_llama.base_model(input_ids=PROMPTS[0][None]).last_hidden_state[:, -1]
        own = product(heads, 32)(hidden, torch.tensor(row.tokens))
    assert torch.equal(own.tokens, lattice.tokens) and tree.num_nodes == 4
    assert bool((own.log_probs < lattice.log_probs).all())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_text_is_compared(acceptance: ModuleType, tiny_llama: PreTrainedModel, temperature: float) -> None:
    heads = taught(tiny_llama, new_heads(tiny_llama, 3), updates=200)
    prompts = [prompt.tolist() for prompt in PROMPTS]
    plain = acceptance.plain_rows(tiny_llama, prompts, 20, temperature)
    decoder = acceptance.DiagnosedDecoder(tiny_llama, heads, budget=16, ngrams="off")
    found = acceptance.measure(decoder, plain, temperature)
    assert found["different"] == found["near_ties"] == 0 and found["acceptance_length"] > 1.05
    assert found["diagnosis"]["accepted"]["mean"] > 0
    spoilt = [*plain[:-1], replace_last(plain[-1])]
    assert acceptance.measure(decoder, spoilt, temperature)["different"] == 1


def replace_last(row):
    copied = replace(row)
    copied.tokens = [*row.tokens[:-1], (row.tokens[-1] + 1) % 97]
    return copied


def test_acceptance_of_edits_that_are_sampled(
    acceptance: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    monkeypatch.setattr(acceptance, "BUDGETS", (8,))
    acceptance.main(["--prompts", "1", "--max-new-tokens", "8", "--workload", "edits", "--temperature", "1"])
    document = document_of(capsys)
    assert document["workload"]["name"] == "repetitive edits" and document["temperature"] == 1.0
    assert [row["mode"] for row in document["results"]] == ["plain", "chain", "fixed", "dynamic"]
    assert all(row["different"] == 0 for row in document["results"])
    pages = [ROOT / "docs" / "reference" / name for name in ("metrics.md", "benchmark-files.md")]
    page = "\n".join(each.read_text(encoding="utf-8") for each in pages)
    assert all(f"`{key}`" in page for key in [*document, *document["results"][0]])


def test_edits_are_the_same_everywhere() -> None:
    tasks, cells = importlib.import_module("tasks"), importlib.import_module("never_slower_cells")
    materials = cells.Materials(None, None)
    cell = cells.Cell(model="demo", heads="bundled", task="edits", context=None, batch=3)
    _, tokenizer, _ = load_demo()
    texts = [question.turns[0] for question in tasks.workload_of("edits", 3, tokenizer).questions]
    assert [tokenizer(text)["input_ids"] for text in texts] == materials.prompts(cell)
    assert all("renamed to `this`" in text for text in texts)
