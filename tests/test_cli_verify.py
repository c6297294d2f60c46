"""`ladon verify`: identical, a near-tie, a real difference, and the exit code."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

import ladon.sampling.acceptance
from ladon.bench.quality.verification import Proof, said_from
from ladon.cli.main import run
from ladon.decoder.decoder import Decoder
from ladon.sampling.acceptance import Accepted, longest_match
from ladon.target.target import Target
from ladon.trees.token_tree import TokenTree

QUICK = ["verify", "--limit", "3", "--max-new-tokens", "12", "--batch", "2", "--dtype", "float32", "--threads", "1"]


def document(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_the_bundled_model_is_exact(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*QUICK, "--json", "--budget", "8"]) == 0
    found = document(capsys)
    assert [law["law"] for law in found["laws"]] == ["greedy", "sampled"] and found["repeatable"] is True
    for law in found["laws"]:
        assert law["exact"] and law["prompts"] == 3 and law["tokens"] == 36 and law["differences"] == []
        assert law["acceptance_length"] > 1.0


def test_the_distance_of_lossy_rules(capsys: pytest.CaptureFixture[str]) -> None:
    """They end with exit code 0: what is lossy by name is no mistake."""
    rules = ["--accept", "typical", "--accept", "nucleus:top_p=0.001", "--temperature", "0.7"]
    assert run([*QUICK, "--json", "--budget", "8", *rules]) == 0
    out = capsys.readouterr().out.splitlines()
    assert sum("NOT exact, total variation" in line for line in out) == 2
    typical, strict = json.loads(out[-1])["lossy"]
    assert (typical["accept"], typical["settings"]) == ("typical", {"epsilon": 0.09, "delta": 0.3})
    assert (strict["accept"], strict["settings"]) == ("nucleus", {"top_p": 0.001})
    assert typical["tokens"] == strict["tokens"] == 33 and 0 < strict["total_variation"] < 1
    assert typical["acceptance_length"] > typical["exact_acceptance_length"] > 1


def test_a_decoder_that_errs_is_found(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is drafted first is taken for right."""

    def gullible(tree: TokenTree, picks: torch.Tensor, ancestors: torch.Tensor | None = None) -> Accepted:
        if tree.num_nodes > 1:
            picks = picks.clone()
            picks[:, 0] = tree.tokens[:, 1]
        return longest_match(tree, picks, ancestors)

    monkeypatch.setattr(ladon.sampling.acceptance, "longest_match", gullible)
    assert run([*QUICK, "--json", "--budget", "8"]) == 1
    found = document(capsys)
    assert not all(law["exact"] for law in found["laws"])
    worst = max(d["margin"] for law in found["laws"] for d in law["differences"] if d["margin"] is not None)
    assert worst > 0.1


def test_scores_are_those_that_were_picked_from(tiny_llama: Any) -> None:
    """Replaying any token of a sampled row gives that token."""
    rows = Decoder(tiny_llama).rows([torch.arange(3, 9)], max_new_tokens=10, do_sample=True, temperature=1.3, seed=5)
    for _ in Decoder(tiny_llama).decode(rows):
        pass
    for place, token in enumerate(rows[0].tokens):
        scores, _ = said_from(Target(tiny_llama), rows[0], place)
        assert int(scores.argmax()) == token


def test_verdicts_of_a_law(tiny_llama: Any) -> None:
    heads = ladon.new_heads(tiny_llama, num_heads=2)
    prompts = [torch.arange(3, 9), torch.arange(5, 8)]
    proof = Proof(model=tiny_llama, heads=heads, prompts=prompts, batch=2, max_new_tokens=9, tree={"budget": 6})
    verdict = proof.verdict("penalty", {"do_sample": True, "repetition_penalty": 1.2, "seed": 3})
    assert verdict.is_exact and verdict.near_ties == 0 and (verdict.prompts, verdict.tokens) == (2, 18)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--temperature", "0"], "greedy"),
        (["--top-p", "0"], "top_p"),
        (["--seed", "-4"], "seed"),
        (["--prompts", "no/such/file.jsonl"], "no/such/file.jsonl"),
        (["--tree", "bush"], "bush"),
        (["--prune", "perhaps"], "perhaps"),
        (["--accept", "foo"], "accept is 'foo'"),
        (["--accept", "exact"], "verified anyway"),
        (["--accept", "typical:epsilon=-1"], "epsilon is -1"),
        (["--accept", "typical:top_p=0.5"], "typical has no setting 'top_p'; it has epsilon, delta"),
        (["--accept", "nucleus:top_p=half"], "'half' is no number"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["verify", *arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert words in lines[-1] and "Traceback" not in "".join(lines)
