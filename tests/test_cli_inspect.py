"""`ladon inspect`: what it says about heads, models and trees, and that a wrong path is one line."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from ladon.cli.formats import inspect
from ladon.cli.main import run
from ladon.heads import load_heads, new_heads
from ladon.heads.calibration import Calibration
from ladon.heads.early_exit import new_early_exit
from ladon.trees.fixed_tree import FixedTree, best_fixed_tree
from ladon.viz.fixed_tree import fixed_view, path_values
from user_side import Tiny

RATES = [[0.5, 0.2, 0.1], [0.4, 0.1], [0.3]]


@pytest.fixture(autouse=True)
def _narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture
def folder(tiny: Tiny, tmp_path: Path) -> Path:
    """Heads with a training record, a calibration and an early exit."""
    heads = load_heads(tiny.folder / "heads")
    report = {"loss": [2.0] * 3, "accuracy": [[0.5, 0.6], [0.3, 0.4], [0.1, 0.2]], "chain_length": 1.7, "budget": 16}
    heads.training_record = {
        "settings": {"updates": 120},
        "rows": 4321,
        "skipped_rows": 2,
        "history": [report | {"after": name, "tree_length": length} for name, length in (("1%", 1.5), ("100%", 2.25))],
    }
    heads.calibration = Calibration(
        heads=heads.weights_hash,
        temperatures=[0.8, 1.0, 1.25],
        hit_rates=RATES,
        marginal_hit_rates=[[0.45, 0.15], [0.2, 0.1], [0.1, 0.05]],
        error={
            "before": {"top": [0.1] * 3, "all": [0.105, 0.04, None]},
            "after": {"top": [0.1] * 3, "all": [0.012, 0.01, None]},
        },
        simulated=[{"tree": "dynamic", "nodes": 32, "temperatures": True, "acceptance_length": 2.61, "accepted": []}],
        step_times={
            "place": {"cpu": "Some CPU"},
            "measured": [
                {"batch": 1, "context": 64, "nodes": [1, 16], "ms": [10.0, 12.5], "rounds": 3, "relative": [1.0, 1.25]}
            ],
            "projected": {"acceptance_length": [1.0, 2.5], "speedup": [1.0, 2.0], "best_budget": 16},
        },
        measured_on={"answers": 12, "positions": 345},
    )
    heads.save(tmp_path / "heads")
    new_early_exit(tiny.model, 1).save(tmp_path / "heads")
    return tmp_path / "heads"


def output(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert run(["inspect", *arguments]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    return re.sub(r"[ \n]+", " ", out)


def document(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert run(["inspect", *arguments, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_says_all_that_is_known(folder: Path, tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    text = output(capsys, str(folder), "--model", str(tiny.folder / "model"), "--nodes", "5")
    count = sum(p.numel() for p in tiny.heads.parameters())
    for part in (
        "3 heads, Ladon format",
        "shared (expansion 2, activation silu)",
        f"width 32, {tiny.heads.vocab_size} tokens",
        f"{count:,} parameters",
        "early exit after layer 1 of 2; 320 parameters, 1.3 kB in float32",
        "fits yes: model (weights that agree: embedding 100%, projection 100%, body 100%)",
        "the shared projection included",
        "Training: 4,321 rows, 120 updates, 2 skipped rows",
        "100% 50.0 % 30.0 % 10.0 % 1.70 2.25",
        "Calibration: 12 answers, 345 positions",
        "1 0.800 45.0 % 60.0 % 10.5 % 1.2 %",
        "3 1.250 10.0 % 15.0 % - -",
        "2.61 with a dynamic tree of 32 nodes",
        "10.00 ms plain, 12.50 ms with 16 nodes: 2.00x projected on Some CPU",
        "Best fixed tree: 5 nodes, 2 deep, 2.00 tokens per step expected",
    ):
        assert part in text, part


def test_json_holds_the_same(folder: Path, tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    found = document(capsys, str(folder), "--model", str(tiny.folder / "model"), "--nodes", "5")
    heads, model = tiny.heads, tiny.model
    own = sum(p.numel() for p in heads.parameters())
    assert (found["kind"], found["format"], found["family"]) == ("heads", "Ladon", "shared")
    assert (found["num_heads"], found["hidden_size"], found["vocab_size"]) == (3, 32, heads.vocab_size)
    assert found["memory"] == {"parameters": own, "bytes": 4 * own, "dtype": "float32"}
    assert found["early_exit"]["layer"] == 1
    assert found["calibration"]["temperatures"] == [0.8, 1.0, 1.25]
    assert found["training"]["rows"] == 4321 and found["training"]["history"][1]["tree_length"] == 2.25
    assert found["tree"]["paths"] == [list(path) for path in best_fixed_tree(RATES, 5).paths]
    assert found["tree"]["expected_tokens"] == pytest.approx(1 + 0.5 + 0.2 + 0.2 + 0.1)
    assert found["model"]["fits"] is True and set(found["model"]["agreement"].values()) == {1.0}
    # A step reads all weights but the embedding, whose rows are looked up; a draft reads the projection once more.
    projection = heads.vocab_size * 32
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    weights = sum(p.numel() for p in model.parameters())
    assert found["model"]["draft_bytes"] == 4 * (own + projection)
    assert found["model"]["step_bytes"] == 4 * (weights - (0 if tied else projection))


def test_other_models_are_told_apart(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny.folder / "model", other)
    torch.manual_seed(5)
    changed = type(tiny.model)(tiny.model.config)
    changed.save_pretrained(other)
    heads = str(tiny.folder / "heads")
    assert document(capsys, heads, "--model", str(other))["model"]["fits"] is False
    assert "no, another model's: other" in output(capsys, heads, "--model", str(other))
    text = output(capsys, heads, "--model", "demo")
    assert "fits no: " in text and "width 256, 4,096 tokens" in text and "a draft reads" not in text
    assert document(capsys, heads, "--model", "demo")["model"]["fits"] is False


def test_bare_heads_and_the_bundled_ones(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    text = output(capsys, str(tiny.folder / "heads"))
    assert "training nothing is recorded" in text and "calibration none; `ladon calibrate`" in text
    assert "Best fixed tree" not in text
    text = output(capsys, "demo")
    assert "heads, Ladon format" in text and "the llama model of recipes/tiny" in text


def test_a_model_without_heads(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(tiny.folder / "model")
    count = sum(p.numel() for p in tiny.model.parameters())
    text = output(capsys, path)
    assert "a model without heads (LlamaForCausalLM)" in text and "`ladon train` makes heads for it" in text
    found = document(capsys, path)
    assert (found["kind"], found["parameters"], found["layers"], found["hidden_size"]) == ("model", count, 2, 32)
    assert found["dtype"] == "float32" and found["bytes"] >= 4 * count


def test_heads_of_another_format(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """MEDUSA's own, without a word about their base."""
    heads = new_heads(tiny.model, num_heads=2, family="medusa")
    tensors = {}
    for head in range(2):
        tensors[f"{head}.0.linear.weight"] = heads.block_weight[0, head]
        tensors[f"{head}.0.linear.bias"] = heads.block_bias[0, head]
        tensors[f"{head}.1.weight"] = heads.projection[head]
    save_file({name: t.detach().clone() for name, t in tensors.items()}, tmp_path / "medusa_lm_head.safetensors")
    found = document(capsys, str(tmp_path), "--model", str(tiny.folder / "model"))
    assert found["kind"] == "heads" and "MEDUSA" in found["format"] and found["num_heads"] == 2
    assert found["model"]["fits"] is None and found["model"]["uses_projection"] is False
    text = output(capsys, str(tmp_path), "--model", str(tiny.folder / "model"))
    assert "made for a model that is not named (no fingerprint of it)" in text
    assert "the sizes do; more cannot be told" in text


def test_a_tree_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "tree.json"
    path.write_text("[[0], [0, 0], [1], [2], [4]]", encoding="utf-8")
    assert run(["inspect", "--tree", str(path)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "Fixed tree: 6 nodes, 2 deep",
        "each number is a candidate's rank, 0 the best",
        "root",
        "├── 0",
        "│   └── 0",
        "├── 1-2",
        "└── 4",
    ]
    assert document(capsys, "--tree", str(path))["tree"]["paths"] == [[0], [0, 0], [1], [2], [4]]


def test_a_tree_with_the_rates_of_heads(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "tree.json"
    path.write_text("[[0], [0, 0], [1], [2], [9]]", encoding="utf-8")
    text = output(capsys, str(folder), "--tree", str(path))
    assert "Fixed tree: 6 nodes, 2 deep, 2.00 tokens per step expected" in text  # 1 + .5 + .2 + .2 + .1 + 0
    assert "├── 0 50.0%" in text and "├── 1-2 30.0%" in text and "└── 9 0.0%" in text


def test_a_tree_given_by_its_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "tree.json"
    path.write_text('{"num_steps": 3, "eagle_topk": 4, "num_draft_tokens": 16}', encoding="utf-8")
    assert "16 nodes, 4 candidates per node, 3 deep at most" in output(capsys, "--tree", str(path))


def test_each_node_is_drawn_once() -> None:
    tree = best_fixed_tree([[0.3, 0.2, 0.1, 0.05]] * 4, 40)
    console = Console(width=80)
    with console.capture() as capture:
        console.print(fixed_view(tree))
    drawn = 0
    for ranks in re.findall(r"── (\d+(?:-\d+)?)", capture.get()):
        first, _, last = ranks.partition("-")
        drawn += int(last or first) - int(first) + 1
    assert drawn == tree.num_nodes - 1
    assert path_values(FixedTree(((0,), (0, 1))), [[0.5], [0.25, 0.1]]) == {(0,): 0.5, (0, 1): 0.05}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to inspect; give PATH"),
        (["./missing"], "does not exist"),
        (["{file}"], "is no checkpoint"),
        (["{empty}"], "holds no weights"),
        (["--tree", "./missing.json"], "there is no tree file missing.json; give a JSON file of rank paths"),
        (["--tree", "dynamic"], "there is no tree file dynamic"),
        (["--tree", "{tree}", "--model", "demo"], "give PATH, their folder, too"),
        (["{empty}", "--nodes", "0"], "--nodes"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.jsonl").write_text("{}\n", encoding="utf-8")
    (tmp_path / "tree.json").write_text("[[0]]", encoding="utf-8")
    (tmp_path / "empty").mkdir()
    places = {
        name: str(tmp_path / path)
        for name, path in (("file", "notes.jsonl"), ("empty", "empty"), ("tree", "tree.json"))
    }
    assert run(["inspect", *(argument.format(**places) for argument in arguments)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("ladon: ") and message in err


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", "--help"]) == 0
    assert "For example:" in capsys.readouterr().out
    assert "\n        ladon inspect" in (inspect.__doc__ or "")
