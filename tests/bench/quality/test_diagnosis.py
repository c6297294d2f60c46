"""Where tokens are lost, against lattices made anew from the finished text."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from ladon import Decoder
from ladon.bench.quality.diagnosis import DiagnosedDecoder, Diagnosis
from ladon.calibrate.temperatures import expected_calibration_error
from ladon.drafting.proposer import candidates_needed
from ladon.heads import Heads, new_heads
from ladon.trees.lattice import from_logits
from taught_heads import NEW_TOKENS, PROMPTS, taught

PREFIXES = ("known", "oracle", "selected", "accepted")


@pytest.fixture
def heads(tiny_llama: PreTrainedModel) -> Heads:
    return taught(tiny_llama, new_heads(tiny_llama, 3), updates=200)


def diagnosed(decoder: DiagnosedDecoder, batch: int, **law: Any) -> tuple[dict[str, Any], list[list[int]]]:
    diagnosis, texts = Diagnosis(), []
    for start in range(0, len(PROMPTS), batch):
        rows = decoder.rows(PROMPTS[start : start + batch], max_new_tokens=NEW_TOKENS, **law)
        for _ in diagnosis.follow(decoder, rows):
            pass
        texts += [row.tokens for row in rows]
    return diagnosis.document(), texts


def expected(model: PreTrainedModel, heads: Heads, tree: str, budget: int) -> dict[str, Any]:
    """From the recorded steps, and what the heads say after the finished text up to each root."""
    decoder = Decoder(model, heads, tree=tree, budget=budget, ngrams="off")
    counts: list[list[int]] = []
    judged: list[list[tuple[float, bool]]] = [[] for _ in range(heads.num_heads)]
    for prompt in PROMPTS:
        steps = decoder.trace(prompt, max_new_tokens=NEW_TOKENS)
        taken = list(steps)
        text = [*prompt.tolist(), steps.first, *(token for step in taken for token in step.emitted)]
        with torch.no_grad():
            hidden = model.base_model(input_ids=torch.tensor([text])).last_hidden_state[0]
            logits = heads(hidden)
        for step in taken:
            truth = text[step.length + 1 : step.length + 1 + heads.num_heads]
            width = candidates_needed(tree, 32, budget)
            lattice = from_logits(logits[step.length - 1][None], width)
            tokens, chances = lattice.tokens[0, :, 0].tolist(), lattice.log_probs[0, :, 0].exp().tolist()
            oracle = leading([token in tokens[depth] for depth, token in enumerate(truth)])
            nodes = [node for node, value in enumerate(step.log_probs) if node > 0 and value > -torch.inf]
            paths = {tuple(path_of(step, node)) for node in nodes}
            selected = leading([tuple(truth[: n + 1]) in paths for n in range(len(truth))])
            accepted = min(len(step.path) - 1, len(truth))
            counts.append([len(truth), oracle, selected, accepted])
            for depth in range(min(accepted + 1, len(truth))):
                judged[depth] += [
                    (p, token == truth[depth]) for p, token in zip(chances[depth], tokens[depth], strict=True)
                ]
    means = torch.tensor(counts, dtype=torch.double).mean(0).tolist()
    errors = [expected_calibration_error(*map(torch.tensor, zip(*pairs, strict=True))) for pairs in judged]
    return dict(zip(PREFIXES, means, strict=True)) | {"row_steps": len(counts), "error": errors}


def leading(holds: list[bool]) -> int:
    return next((n for n, held in enumerate(holds) if not held), len(holds))


def path_of(step: Any, node: int) -> list[int]:
    return [] if node == 0 else [*path_of(step, step.parents[node]), step.tokens[node]]


@pytest.mark.parametrize(("tree", "budget"), [("chain", 4), ("dynamic", 6), ("dynamic", 24)])
@pytest.mark.parametrize("batch", [1, 3])
def test_prefixes_are_those_of_the_finished_text(
    tiny_llama: PreTrainedModel,
    heads: Heads,
    tree: str,
    budget: int,
    batch: int,
) -> None:
    """Rows end at an end token or their limit, some of them in the middle of an accepted path."""
    found, _ = diagnosed(DiagnosedDecoder(tiny_llama, heads, tree=tree, budget=budget, ngrams="off"), batch)
    reference = expected(tiny_llama, heads, tree, budget)
    assert (found["row_steps"], found["undrafted"]) == (reference["row_steps"], 0)
    # Verified trees are cut where a row has no room, grown ones are not: only there may the grown tree hold more.
    assert reference["selected"] <= found["selected"]["mean"] <= reference["oracle"] + 1e-4
    for name in ("known", "oracle", "accepted"):
        assert found[name]["mean"] == pytest.approx(reference[name], abs=1e-4), name
        assert sum(found[name]["shares"]) == pytest.approx(found[name]["mean"], abs=1e-3)
    assert found["error"]["all"] == pytest.approx(reference["error"], abs=1e-4)
    assert found["accepted"]["mean"] > 0.05


@pytest.mark.parametrize(
    ("options", "law"),
    [
        ({"budget": 12}, {}),
        ({"budget": 12}, {"do_sample": True, "temperature": 1.0, "seed": 3}),
        ({"budget": 12, "prune": "1:4"}, {}),
        ({"budget": "auto", "deterministic": True}, {}),
        ({"budget": 1}, {}),
    ],
)
def test_each_stage_passes_at_most_what_the_one_before_did(
    tiny_llama: PreTrainedModel,
    heads: Heads,
    options: dict[str, Any],
    law: dict[str, Any],
) -> None:
    decoder = DiagnosedDecoder(tiny_llama, heads, ngrams="off", **options)
    found, texts = diagnosed(decoder, 2, **law)
    plain, plain_texts = diagnosed(DiagnosedDecoder(tiny_llama, heads, tree="off"), 2, **law)
    assert texts == plain_texts and plain["row_steps"] == 0 < plain["undrafted"]
    assert found["row_steps"] + found["undrafted"] < plain["undrafted"] or options["budget"] == 1
    if options["budget"] == 1:
        assert found["row_steps"] == 0 and found["known"]["mean"] is None
        return
    shares = [found[name]["shares"] for name in PREFIXES]
    for more, less in pairwise(shares):
        assert all(above >= below for above, below in zip(more, less, strict=True))
    assert all(above >= below for above, below in zip(found["oracle"]["shares"], found["top"]["shares"], strict=True))
    assert found["error"]["positions"][0] == pytest.approx(found["row_steps"] * found["known"]["shares"][0], abs=0.5)


def test_any_lattice_will_do(tiny_llama: PreTrainedModel) -> None:
    """Heads with a Markov correction: a row for each token before."""
    heads = new_heads(tiny_llama, 3, markov_rank=8).eval()
    assert heads.correction is not None
    for parameter in heads.correction.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    found, texts = diagnosed(DiagnosedDecoder(tiny_llama, heads, budget=12, ngrams="off"), 3)
    _, plain = diagnosed(DiagnosedDecoder(tiny_llama, heads, tree="off"), 3)
    assert texts == plain
    means = [found[name]["mean"] for name in PREFIXES]
    assert means == sorted(means, reverse=True) and means[1] > 0
    assert len(found["leaf_mass"]) == 2 and all(0 < mass < 1 for mass in found["leaf_mass"])


def test_n_grams_that_draft_alone_have_no_lattice(tiny_llama: PreTrainedModel) -> None:
    found, _ = diagnosed(DiagnosedDecoder(tiny_llama, budget=8), 2)
    assert found["row_steps"] == 0 and found["error"] == {"positions": [], "top": [], "all": []}
