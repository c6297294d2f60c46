"""One seed, one text: every family, law, tree and batch against plain decoding of the row alone, in float64."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch

import families
import ladon
from drafts import FIXED
from ladon.engine.sequence import Row

LAWS: dict[str, dict[str, Any]] = {
    "temperature": {"do_sample": True, "temperature": 0.9, "top_k": 0},
    "top-k, top-p": {"do_sample": True, "temperature": 1.2, "top_k": 30, "top_p": 0.9},
    "min-p, penalty": {"do_sample": True, "top_k": 0, "min_p": 0.02, "repetition_penalty": 1.3},
    "typical, n-grams": {"do_sample": True, "top_k": 0, "typical_p": 0.95, "no_repeat_ngram_size": 2},
    "greedy, bias": {"sequence_bias": [[[12], 2.0], [[30, 31], 4.0]], "bad_words_ids": [[40]]},
}
TREES: dict[str, dict[str, Any]] = {
    "chain": {"tree": "chain"},
    "fixed": {"tree": FIXED, "budget": FIXED.num_nodes},
    "dynamic 8": {"budget": 8},
    "dynamic 24": {"budget": 24},
    "auto": {},
}
BATCHES = (1, 3)
NEW_TOKENS = 14
FEW = ("llama", "gemma3_text", "bloom", "mistral")
COUNTED = {"fast": 0, "slow": 0}


class Case:
    """A model of a family with heads that are right now and then, and prompts of several lengths."""

    def __init__(self, name: str) -> None:
        self.model = families.build(name)
        self.model.generation_config.eos_token_id = None
        self.model.generation_config.pad_token_id = 0
        self.heads = ladon.new_heads(self.model, num_heads=3)
        for parameter in self.heads.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        generator = torch.Generator().manual_seed(6)
        self.prompts = [torch.randint(3, families.VOCAB_SIZE, (n,), generator=generator) for n in (5, 13, 2)]
        self.plain = ladon.Decoder(self.model)
        self.decoders = {
            tree: ladon.Decoder(self.model, self.heads, **options)
            for tree, options in TREES.items()
            if tree != "fixed" or self.plain._target.supports_trees
        }

    def rows(self, law: str, seed: int, batch: int) -> list[Row]:
        options = {"max_new_tokens": NEW_TOKENS, **LAWS[law]}
        return self.plain.rows(self.prompts[:batch], **options, **({"seed": seed} if "do_sample" in options else {}))

    def check(self, law: str, seed: int, batch: int) -> int:
        """All trees; how many combinations that were."""
        expected = []
        for row in self.rows(law, seed, batch):
            for _ in self.plain.decode([row]):
                pass
            expected.append(row.tokens)
        assert all(len(tokens) == NEW_TOKENS for tokens in expected)
        for tree, decoder in self.decoders.items():
            rows = self.rows(law, seed, batch)
            for _ in decoder.decode(rows):
                pass
            assert [row.tokens for row in rows] == expected, f"{law}, {tree}, batch {batch}, seed {seed}"
        return len(self.decoders)


@pytest.mark.parametrize("name", FEW)
def test_a_few_families(name: str) -> None:
    case = Case(name)
    COUNTED["fast"] += sum(case.check(law, 7, batch) for law, batch in product(LAWS, BATCHES))


def test_how_many_were_compared() -> None:
    """Last of the fast ones in this file."""
    if COUNTED["fast"] == 0:
        pytest.skip("nothing was compared in this process")
    assert COUNTED["fast"] >= 200


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in families.WORKABLE if families.FAMILIES[name].float64])
def test_all_families(name: str) -> None:
    case = Case(name)
    COUNTED["slow"] += sum(case.check(law, seed, batch) for law, seed, batch in product(LAWS, (1, 2), BATCHES))


@pytest.mark.slow
def test_how_many_were_compared_in_all() -> None:
    if COUNTED["slow"] == 0:
        pytest.skip("nothing was compared in this process")
    assert COUNTED["slow"] >= 2000
