"""The lattice: per depth, the candidates a proposer offers, with their log-probabilities.

Shapes: B rows, K depths (one per head), R conditioning rows, C candidates, V vocabulary.

A path through the lattice starts in row 0 of depth 1; taking candidate c of row r at depth k leads to row
`next_row[k, r, c]` of depth k + 1. With R = 1 every path sees the same candidates at a depth: MEDUSA's independent
heads, whose joint distribution is the product of their marginals. With R > 1 a depth's candidates depend on the token
before.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Lattice:
    """Candidate tables. In each row of a table tokens are distinct and log-probabilities sorted, greatest first.

    Attributes:
        tokens: candidate token ids, [B, K, R, C] int64.
        log_probs: log-probability given the conditioning row, [B, K, R, C] float32, <= 0; -inf is padding.
        next_row: row of the next depth that a candidate leads to, [B, K, R, C] int64; -1 keeps the candidate a leaf.
            None when R = 1, where it is 0 everywhere.
    """

    tokens: Tensor
    log_probs: Tensor
    next_row: Tensor | None = None

    @property
    def depth(self) -> int:
        """K, the number of depths."""
        return self.tokens.shape[1]

    @property
    def num_rows(self) -> int:
        """R, the number of conditioning rows."""
        return self.tokens.shape[2]

    @property
    def num_candidates(self) -> int:
        """C, the number of candidates per row."""
        return self.tokens.shape[3]


def from_logits(
    logits: Tensor, num_candidates: int, *, temperatures: Tensor | None = None, token_ids: Tensor | None = None
) -> Lattice:
    """The lattice of independent heads: each depth's best candidates under the *full* softmax.

    Normalising over the vocabulary and not over the candidates keeps a flat head from looking sure of itself, which
    would draw nodes to its children.

    Args:
        logits: head outputs, [B, K, D]; row k predicts the token k + 1 places after the root.
        num_candidates: C; more than D is cut to D.
        temperatures: [K], by which each depth's logits are divided first; None leaves them.
        token_ids: the token of each of the D entries, [D] int64; None: entry i is token i.

    Returns:
        A lattice with R = 1. NaN logits (a broken head) become padding, so that nothing is drafted from them.
    """
    logits = logits.float()
    if temperatures is not None:
        logits = logits / temperatures[:, None]
    normalizer = logits.logsumexp(-1, keepdim=True)
    top, tokens = logits.topk(min(num_candidates, logits.shape[-1]), dim=-1)
    log_probs = (top - normalizer).clamp(max=0.0).nan_to_num(nan=-torch.inf, neginf=-torch.inf)
    if token_ids is not None:
        tokens = token_ids[tokens]
    return Lattice(tokens=tokens[:, :, None], log_probs=log_probs[:, :, None])
