"""Start values from counted pairs."""

from __future__ import annotations

import numpy as np
import torch

from ladon.heads.correction import MarkovCorrection
from ladon.train.data.rows import Document
from ladon.train.run import start_from_bigrams


def document(*tokens: int) -> Document:
    return Document("x", np.asarray(tokens, dtype=np.int32), np.ones(len(tokens), dtype=np.bool_))


def started(rank: int, *documents: Document) -> MarkovCorrection:
    correction = MarkovCorrection(num_heads=2, vocab_size=6, rank=rank)
    start_from_bigrams(correction, documents, seed=0)
    return correction


def test_full_rank_is_the_mutual_information_of_pairs() -> None:
    documents = [document(0, 1, 2, 0, 1, 3), document(4, 0, 1)]
    pairs = [(0, 1), (1, 2), (2, 0), (0, 1), (1, 3), (4, 0), (0, 1)]
    before, after = zip(*pairs, strict=True)
    expected = torch.zeros(6, 6)
    for u, v in set(pairs):
        expected[u, v] = np.log(pairs.count((u, v)) * len(pairs) / (before.count(u) * after.count(v)))
    correction = started(6, *documents)
    torch.testing.assert_close(correction.before @ correction.after.T, expected.clamp(min=0), atol=1e-5, rtol=1e-5)
    assert torch.equal(correction.strength, torch.ones(2))


def test_a_low_rank_keeps_what_counts_most() -> None:
    documents = [document(*([0, 1, 2, 3, 4] * 5))]
    exact = started(6, *documents)
    wanted = exact.before @ exact.after.T
    near = started(3, *documents)
    error = (near.before @ near.after.T - wanted).norm()
    assert error <= 1.05 * torch.linalg.svdvals(wanted)[3:].norm() and error > 0


def test_the_same_seed_gives_the_same_values_and_leaves_other_random_numbers_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    one, other = (started(3, document(0, 1, 2, 3, 4, 5, 0, 2)) for _ in range(2))
    assert torch.equal(one.before, other.before) and torch.equal(torch.rand(2), expected)
