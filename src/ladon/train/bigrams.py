"""What pairs of tokens alone say: start values for a Markov correction, from counts instead of from training."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ladon.heads.correction import MarkovCorrection
from ladon.train.documents import Document

_POWER_ITERATIONS = 4


@torch.no_grad()
def start_from_bigrams(correction: MarkovCorrection, documents: Sequence[Document], seed: int) -> None:
    """Set a correction to what its documents' pairs of neighbouring tokens say.

    The products <W1[u], W2[v]> come as near as their rank allows to the pointwise mutual information of u and v,
    log(count(u, v) total / (count(u) count(v))), taken as 0 where it is negative or the pair never occurs.

    Args:
        correction: its numbers are set, strengths to 1.
        documents: whose pairs are counted.
        seed: of the search for the best approximation.
    """
    vocab_size = correction.before.shape[0]
    pairs, shares = _information(documents, vocab_size)
    matrix = torch.sparse_coo_tensor(pairs, shares, (vocab_size, vocab_size), check_invariants=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        left, sizes, right = torch.svd_lowrank(matrix, q=correction.rank, niter=_POWER_ITERATIONS)
    correction.before.copy_(left * sizes.sqrt())
    correction.after.copy_(right * sizes.sqrt())
    correction.strength.fill_(1.0)


def _information(documents: Sequence[Document], vocab_size: int) -> tuple[Tensor, Tensor]:
    """The pairs [2, P] int64 that occur oftener than by chance, and their mutual information [P] float32."""
    before = np.concatenate([document.tokens[:-1] for document in documents]).astype(np.int64)
    after = np.concatenate([document.tokens[1:] for document in documents]).astype(np.int64)
    pairs, counts = np.unique(before * vocab_size + after, return_counts=True)
    first, second = np.divmod(pairs, vocab_size)
    before_counts, after_counts = (np.bincount(tokens, minlength=vocab_size) for tokens in (before, after))
    by_chance = before_counts[first] / len(before) * after_counts[second]
    information = np.log(counts / by_chance)
    kept = information > 0
    return torch.from_numpy(np.stack([first, second])[:, kept]), torch.from_numpy(information[kept]).float()
