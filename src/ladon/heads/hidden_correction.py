"""The hidden correction: what the token before a guess says about it, in the space of hidden states.

Each head guesses from a state h_k of its own. Here the token u before the guess moves that state, before the projection
to the vocabulary that all heads share: h_k + Down(SiLU(g) * v) with [g, v] = In [norm(E[u]); h_k], E the target's input
embedding (TreeFlash, arXiv 2606.03819; its idea, not its code). One network serves all depths; each adds a bias of its
own inside. It says more than products of a low rank can, and costs a row of the projection for each token before.

Shapes: K depths, H hidden width, F inner width.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from ladon.config import HIDDEN
from ladon.errors import HeadsError

HIDDEN_CORRECTION = "hidden_correction"  # the option of all families that share a projection


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
            weight.copy_(
                torch.randn(weight.shape, generator=generator, dtype=torch.float32, device="cpu")
                * (2 * weight.shape[1]) ** -0.5
            )
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
