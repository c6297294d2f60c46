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

MARKOV_RANK, MARKOV_SUCCESSORS = "markov_rank", "markov_successors"  # options that all families share
_ROWS = 1024  # tokens whose products with all others are in memory together


class MarkovCorrection(nn.Module):
    """Added to the logits of heads, for training at all tokens, for decoding at their candidates.

    `after` starts at zero, so that an untrained correction changes nothing.

    Attributes:
        before: W1, a row for each token that may stand before the guess, [V, r].
        after: W2, a row for each token that may be guessed, [V, r].
        strength: a, one per depth, [K].
        successors: the m tokens that each token speaks for most, [V, m] int64, guesses though no head offers them; None
            for none.
    """

    joint: ClassVar[str] = MARKOV
    title: ClassVar[str] = "Markov correction"
    successors: Tensor | None

    def __init__(self, *, num_heads: int, vocab_size: int, rank: int, num_successors: int = 0) -> None:
        super().__init__()
        for name, value, least in ((MARKOV_RANK, rank, 1), (MARKOV_SUCCESSORS, num_successors, 0)):
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= vocab_size:
                raise HeadsError(f"{name} is {value!r}; give {least} to {vocab_size}, the size of the vocabulary")
        self.before = nn.Parameter(torch.empty(vocab_size, rank))
        self.after = nn.Parameter(torch.empty(vocab_size, rank))
        self.strength = nn.Parameter(torch.empty(num_heads))
        successors = torch.zeros(vocab_size, num_successors, dtype=torch.int64) if num_successors else None
        self.register_buffer("successors", successors)

    @property
    def rank(self) -> int:
        """R, numbers per token."""
        return self.before.shape[1]

    @property
    def num_successors(self) -> int:
        """M, further guesses after each token."""
        return 0 if self.successors is None else self.successors.shape[1]

    @property
    def options(self) -> dict[str, int | str]:
        """What makes one of the same size, as `new_heads` takes it."""
        own: dict[str, int | str] = {MARKOV_RANK: self.rank}
        return own | {MARKOV_SUCCESSORS: self.num_successors} if self.num_successors else own

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

    @torch.no_grad()
    def find_successors(self) -> None:
        """Set `successors`, if there are to be any, to what the numbers say now; training does so at its end."""
        if self.successors is None:
            return
        for start in range(0, len(self.before), _ROWS):
            part = slice(start, start + _ROWS)
            products = nn.functional.linear(self.before[part], self.after)
            self.successors[part] = products.topk(self.num_successors, dim=-1).indices

    @torch.no_grad()
    def following(self, before: Tensor) -> tuple[Tensor, Tensor]:
        """The successors of tokens [B, K, R], and what is added to their logits, float32: [B, K, R, m] both."""
        assert self.successors is not None  # whoever has none does not ask
        guesses = self.successors[before]
        rows = self.before[before] * self.strength[:, None, None]
        return guesses, (self.after[guesses] @ rows[..., None])[..., 0].float()
