"""The Markov correction: what the token before a guess says about it, in products of a low rank.

Independent heads do not know which token their guess would follow, and head 1 does not even see the token just picked.
Here head k's logit of token v after token u becomes U_k(v) + a_k <W1[u], W2[v]>, one W1 and W2 for all depths (DSpark,
arXiv 2607.05147, there for chains). Decoding needs the products of a few candidates only (`ladon.lattice.conditioned`).

Shapes: K depths, V vocabulary, r rank.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from ladon.config import MARKOV
from ladon.errors import HeadsError


class MarkovCorrection(nn.Module):
    """Added to the logits of heads, for training at all tokens, for decoding at their candidates.

    `after` starts at zero, so that an untrained correction changes nothing.

    Attributes:
        before: W1, a row for each token that may stand before the guess, [V, r].
        after: W2, a row for each token that may be guessed, [V, r].
        strength: a, one per depth, [K].
    """

    joint: ClassVar[str] = MARKOV
    option: ClassVar[str] = "markov_rank"
    title: ClassVar[str] = "Markov correction"

    def __init__(self, *, num_heads: int, vocab_size: int, rank: int) -> None:
        super().__init__()
        if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= vocab_size:
            raise HeadsError(f"{self.option} is {rank!r}; give 1 to {vocab_size}, the size of the vocabulary")
        self.before = nn.Parameter(torch.empty(vocab_size, rank))
        self.after = nn.Parameter(torch.empty(vocab_size, rank))
        self.strength = nn.Parameter(torch.empty(num_heads))

    @property
    def rank(self) -> int:
        """R, numbers per token."""
        return self.before.shape[1]

    @property
    def options(self) -> dict[str, int | str]:
        """What makes one of the same size, as `new_heads` takes it."""
        return {self.option: self.rank}

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Random `before`, zero `after`, strength 1."""
        generator = torch.Generator().manual_seed(seed)
        self.before.copy_(torch.randn(self.before.shape, generator=generator) * self.rank**-0.5)
        self.after.zero_()
        self.strength.fill_(1.0)

    def forward(self, before: Tensor) -> Tensor:
        """What is added to the logits of all heads, given the token before each guess: [..., K] to [..., K, V]."""
        rows = self.before[before] * self.strength[:, None]
        added: Tensor = nn.functional.linear(rows, self.after)
        return added

    @torch.no_grad()
    def among(self, before: Tensor, guesses: Tensor) -> Tensor:
        """The same for some guesses: tokens before [B, K, R] and guesses [B, K, C] to [B, K, R, C] float32."""
        rows = self.before[before] * self.strength[:, None, None]
        return (rows @ self.after[guesses].transpose(-1, -2)).float()
