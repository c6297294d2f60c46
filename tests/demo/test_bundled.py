"""The bundled model: it loads offline, knows its limits, and its prompts were never trained on."""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path

import pytest
import torch

from ladon.config import DecoderOptions
from ladon.demo import bundled
from ladon.demo.bundled import demo_fixed_tree, demo_path, demo_prompts, fallback_prompts, load_demo
from ladon.errors import InputError, TreeError

SIZES = (8, 16, 32, 64)
SPLITS = ("prompts", "calibration")


def test_size_and_files() -> None:
    files = [path for path in demo_path().rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {"README.md", "corpus.json", "calibration.json", "heads.safetensors"}
    assert sum(path.stat().st_size for path in files) < 25_000_000


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_load_demo(dtype: torch.dtype | None) -> None:
    model, tokenizer, heads = load_demo(dtype)
    expected = dtype or torch.float32
    assert {p.dtype for p in model.parameters()} == {p.dtype for p in heads.parameters()} == {expected}
    assert heads.is_bound and not model.training and not heads.training
    assert len(tokenizer) == model.config.vocab_size == heads.vocab_size
    text = "def f(x):\n    return x\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_model_and_heads_have_learnt_what_the_card_says() -> None:
    """On a held-out prompt the model is far from chance, and so are the heads, on text that is not the model's own."""
    model, tokenizer, heads = load_demo()
    hits, count, loss = torch.zeros(heads.num_heads), 0, 0.0
    prompts = demo_prompts(16)
    with torch.inference_mode():
        for prompt in prompts:
            ids = torch.tensor([tokenizer.encode(prompt)])
            loss += model(input_ids=ids, labels=ids).loss.item() / len(prompts)
            hidden = model.base_model(input_ids=ids).last_hidden_state[0]
            guesses = heads(hidden).argmax(-1)  # [T, K]
            rows = ids.shape[1] - heads.num_heads - 1
            for k in range(1, heads.num_heads + 1):
                hits[k - 1] += (guesses[:rows, k - 1] == ids[0, k + 1 : k + 1 + rows]).sum()
            count += rows
    assert loss < 4.0  # ln V is 8.3
    assert hits[0] / count > 0.15 and (hits / count).tolist() == sorted((hits / count).tolist(), reverse=True)
    calibration = heads.calibration  # on the model's own text they are right more often
    assert calibration is not None and all(
        rates[0] > float(hit) / count for rates, hit in zip(calibration.marginal_hit_rates, hits, strict=True)
    )


def test_fixed_trees() -> None:
    num_heads = load_demo()[2].num_heads
    calibration = load_demo()[2].calibration
    assert calibration is not None
    shipped = calibration.fixed_trees
    assert shipped.keys() == {str(size) for size in SIZES}
    for size in (1, 9, *SIZES):
        tree = demo_fixed_tree(size)
        assert tree.num_nodes == size
        tree.check_fits(num_heads=num_heads, num_candidates=DecoderOptions().num_candidates)
        assert [list(path) for path in tree.paths] == shipped.get(str(size), [list(path) for path in tree.paths])
    with pytest.raises(TreeError, match="num_nodes is 0"):
        demo_fixed_tree(0)


def test_prompts_come_from_held_out_modules() -> None:
    corpus = json.loads((demo_path() / "corpus.json").read_text(encoding="utf-8"))
    library = Path(sysconfig.get_paths()["stdlib"])
    trained_on = set(corpus["file_sha256"])
    texts = {}
    for split in SPLITS:
        modules = corpus["held_out"][split]
        assert not trained_on & {f"{name}.py" for name in modules}
        texts[split] = {name: (library / f"{name}.py").read_text(encoding="utf-8") for name in modules}
    assert not set(texts["prompts"]) & set(texts["calibration"])
    for split in SPLITS:
        for prompt in demo_prompts(100, split):
            sources = [text for text in texts[split].values() if prompt in text]
            assert sources
            start = sources[0].index(prompt)
            assert start == 0 or sources[0][start - 1] == "\n"
            assert sources[0][start + len(prompt)] == "\n"


def test_prompts_do_not_overlap_and_alternate() -> None:
    prompts = demo_prompts(100)
    assert len(prompts) == len(set(prompts)) == 100
    assert demo_prompts(10) == prompts[:10]
    tokenizer = load_demo()[1]
    lengths = [len(tokenizer.encode(prompt)) for prompt in prompts]
    assert min(lengths) > 100 and max(lengths) < 700


def test_bad_requests() -> None:
    with pytest.raises(InputError, match="count is 0"):
        demo_prompts(0)
    with pytest.raises(InputError, match="split 'train' is unknown; splits: calibration, prompts"):
        demo_prompts(1, "train")


def test_fallback_without_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bundled.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    ours = {split: demo_prompts(100, split) for split in SPLITS}
    assert ours == {split: fallback_prompts(100, split) for split in SPLITS}
    assert all(len(set(texts)) >= 4 for texts in ours.values())
    assert not set(ours["prompts"]) & set(ours["calibration"])
    for text in ours["prompts"] + ours["calibration"]:
        assert text == text.strip("\n") and 400 < len(text) < 1500 and "----" not in text
    assert demo_prompts(1) == ours["prompts"][:1]
