"""Corrections: what the token before a guess says about it.

Independent heads do not know which token their guess would follow, and head 1 does not even see the token just picked.

The Markov correction works in products of a low rank: head k's logit of token v after token u becomes
U_k(v) + a_k <W1[u], W2[v]>, one W1 and W2 for all depths (DSpark, arXiv 2607.05147, there for chains). Decoding needs
the products of a few candidates only (`ladon.trees.lattice.conditioned`). With a gate, a_k is multiplied by
2 sigmoid(<G_k, h>), h the hidden row that the heads read: how strongly the token before speaks then depends on the
place.

The hidden correction works in the space of hidden states. Each head guesses from a state h_k of its own; the token u
before the guess moves that state, before the projection to the vocabulary that all heads share: h_k +
Down(SiLU(g) * v) with [g, v] = In [norm(E[u]); h_k], E the target's input embedding (TreeFlash, arXiv 2606.03819; its
idea, not its code). One network serves all depths; each adds a bias of its own inside. It says more than products of a
low rank can, and costs a row of the projection for each token before.

Shapes: K depths, H hidden width, F inner width, V vocabulary, r rank.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from ladon.config import HIDDEN, MARKOV
from ladon.errors import HeadsError

# Options that all families share.
MARKOV_RANK, MARKOV_SUCCESSORS, MARKOV_GATE = "markov_rank", "markov_successors", "markov_gate"
_ROWS = 1024  # tokens whose products with all others are in memory together
HIDDEN_CORRECTION = "hidden_correction"  # the option of all families that share a projection


class MarkovCorrection(nn.Module):
    """Added to the logits of heads, for training at all tokens, for decoding at their candidates.

    `after` starts at zero, so that an untrained correction changes nothing; `gate` too, which is a factor of 1.

    Args:
        num_heads: K.
        vocab_size: V.
        rank: r, 1 to V.
        num_successors: m, 0 to V.
        gate_size: H, for a gate; 0: none.

    Attributes:
        before: W1, a row for each token that may stand before the guess, [V, r].
        after: W2, a row for each token that may be guessed, [V, r].
        strength: a, one per depth, [K].
        successors: the m tokens that each token speaks for most, [V, m] int64, guesses though no head offers them; None
            for none.
        gate: G, what the hidden row is multiplied by, [K, H]; None for none.
    """

    joint: ClassVar[str] = MARKOV
    title: ClassVar[str] = "Markov correction"
    successors: Tensor | None
    gate: nn.Parameter | None

    def __init__(
        self, *, num_heads: int, vocab_size: int, rank: int, num_successors: int = 0, gate_size: int = 0
    ) -> None:
        super().__init__()
        for name, value, least in ((MARKOV_RANK, rank, 1), (MARKOV_SUCCESSORS, num_successors, 0)):
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= vocab_size:
                raise HeadsError(f"{name} is {value!r}; give {least} to {vocab_size}, the size of the vocabulary")
        self.before = nn.Parameter(torch.empty(vocab_size, rank))
        self.after = nn.Parameter(torch.empty(vocab_size, rank))
        self.strength = nn.Parameter(torch.empty(num_heads))
        successors = torch.zeros(vocab_size, num_successors, dtype=torch.int64) if num_successors else None
        self.register_buffer("successors", successors)
        self.gate = nn.Parameter(torch.empty(num_heads, gate_size)) if gate_size else None

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
        found: dict[str, int | str] = {MARKOV_RANK: self.rank}
        if self.successors is not None:
            found[MARKOV_SUCCESSORS] = self.num_successors
        if self.gate is not None:
            found[MARKOV_GATE] = 1
        return found

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Random `before`, zero `after` and `gate`, strength 1."""
        generator = torch.Generator("cpu").manual_seed(seed)
        self.before.copy_(
            torch.randn(self.before.shape, generator=generator, dtype=torch.float32, device="cpu") * self.rank**-0.5
        )
        self.after.zero_()
        self.strength.fill_(1.0)
        if self.gate is not None:
            self.gate.zero_()

    def gates(self, hidden: Tensor) -> Tensor | None:
        """What the strengths are multiplied by at hidden rows, [..., H] to [..., K], 0 to 2; None without a gate."""
        return None if self.gate is None else 2 * functional.linear(hidden, self.gate).sigmoid()

    def forward(self, before: Tensor, gates: Tensor | None = None) -> Tensor:
        """What is added to the logits of all heads.

        Args:
            before: the token before each guess, [..., K] int64.
            gates: what `gates` gives at the same places, [..., K].

        Returns:
            [..., K, V].
        """
        strength = self.strength if gates is None else self.strength * gates
        return functional.linear(self.before[before] * strength[..., None], self.after)

    @torch.no_grad()
    def among(self, before: Tensor, guesses: Tensor) -> Tensor:
        """The same for some guesses, ungated: tokens before [B, K, R] and guesses [B, K, C] to [B, K, R, C] float32."""
        rows = self.before[before] * self.strength[:, None, None]
        return (rows @ self.after[guesses].transpose(-1, -2)).float()

    @torch.no_grad()
    def find_successors(self) -> None:
        """Set `successors`, if there are to be any, to what the numbers say now; training does so at its end."""
        if self.successors is None:
            return
        for start in range(0, len(self.before), _ROWS):
            part = slice(start, start + _ROWS)
            products = functional.linear(self.before[part], self.after)
            self.successors[part] = products.topk(self.num_successors, dim=-1).indices

    @torch.no_grad()
    def following(self, before: Tensor) -> tuple[Tensor, Tensor]:
        """The successors of tokens [B, K, R], and what is added to their logits, ungated: [B, K, R, m], float32."""
        assert self.successors is not None  # whoever has none does not ask
        guesses = self.successors[before]
        rows = self.before[before] * self.strength[:, None, None]
        return guesses, (self.after[guesses] @ rows[..., None])[..., 0].float()


class HiddenCorrection(nn.Module):
    """Moves the states of heads, given the tokens before their guesses.

    `down_weight` starts at zero, so that an untrained correction changes nothing.

    Attributes:
        token_weight: In, for the embedding of the token before, scaled to mean square 1, [2 F, H].
        state_weight: In, for the head's own state, [2 F, H].
        depth_bias: added inside, one per depth, [K, 2 F].
        down_weight: Down, [H, F].
    """

    joint: ClassVar[str] = HIDDEN
    title: ClassVar[str] = "hidden correction"

    def __init__(self, *, num_heads: int, hidden_size: int, width: int) -> None:
        super().__init__()
        if not isinstance(width, int) or isinstance(width, bool) or width < 1:
            raise HeadsError(f"{HIDDEN_CORRECTION} is {width!r}; give its inner width, 1 or more")
        self.token_weight = nn.Parameter(torch.empty(2 * width, hidden_size))
        self.state_weight = nn.Parameter(torch.empty(2 * width, hidden_size))
        self.depth_bias = nn.Parameter(torch.empty(num_heads, 2 * width))
        self.down_weight = nn.Parameter(torch.empty(hidden_size, width))

    @property
    def width(self) -> int:
        """F."""
        return self.down_weight.shape[1]

    @property
    def options(self) -> dict[str, int | str]:
        """What makes one of the same size, as `new_heads` takes it."""
        return {HIDDEN_CORRECTION: self.width}

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Random inside, zero `depth_bias` and `down_weight`."""
        generator = torch.Generator("cpu").manual_seed(seed)
        for weight in (self.token_weight, self.state_weight):
            drawn = torch.randn(weight.shape, generator=generator, dtype=torch.float32, device="cpu")
            weight.copy_(drawn * (2 * weight.shape[1]) ** -0.5)
        self.depth_bias.zero_()
        self.down_weight.zero_()

    def forward(self, states: Tensor, embedded: Tensor, depths: slice = slice(None)) -> Tensor:
        """States of heads as the tokens before their guesses move them.

        Args:
            states: [..., n, H], of the n heads that `depths` names, from 0.
            embedded: the target's input embedding of the token before each guess, [..., n, H]; takes no gradient.
            depths: all heads by default.

        Returns:
            [..., n, H]; what stands before n is broadcast.
        """
        token = functional.rms_norm(embedded.detach().to(states.dtype), embedded.shape[-1:])
        inner = functional.linear(token, self.token_weight) + functional.linear(states, self.state_weight)
        gate, value = (inner + self.depth_bias[depths]).chunk(2, dim=-1)
        return states + functional.linear(functional.silu(gate) * value, self.down_weight)
