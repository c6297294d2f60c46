"""MEDUSA's own heads: residual blocks and an output projection for each head (arXiv 2401.10774, section 2.1.1)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from ladon.errors import HeadsError
from ladon.heads.base import Heads, check_count
from ladon.heads.ends import output_projection

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class MedusaHeads(Heads):
    """Head k: x = h, then x = x + SiLU(W_lk x + b_lk) for each block l, then logits U_k x.

    Parameters are block_weight [L, K, H, H], block_bias [L, K, H] and projection [K, V, H]; the blocks of a head are
    distinct (MEDUSA's code repeats one). Blocks start at zero and the projections as copies of the target's, so an
    untrained head equals the target's own projection, its bias aside: these heads have none. K projections of their own
    cost K times the target's output projection, in memory and in time: `SharedHeads` is the cheaper family.

    Attributes:
        num_blocks: L, residual blocks per head.
    """

    family = "medusa"
    option_names = ("num_blocks",)

    def __init__(self, *, num_heads: int, hidden_size: int, vocab_size: int, num_blocks: int = 1) -> None:
        super().__init__(num_heads=num_heads, hidden_size=hidden_size, vocab_size=vocab_size)
        check_count("num_blocks", num_blocks)
        self.num_blocks = num_blocks
        self.block_weight = nn.Parameter(torch.empty(num_blocks, num_heads, hidden_size, hidden_size))
        self.block_bias = nn.Parameter(torch.empty(num_blocks, num_heads, hidden_size))
        self.projection = nn.Parameter(torch.empty(num_heads, vocab_size, hidden_size))

    @torch.no_grad()
    def initialise(self, model: PreTrainedModel, seed: int) -> None:
        """Zero blocks and copies of the target's projection; nothing random, `seed` is not used."""
        weight = output_projection(model).weight
        if weight.shape != self.projection.shape[1:]:
            raise HeadsError(
                f"medusa heads start as copies of the output projection, but this model's is packed to "
                f"{list(weight.shape)} {weight.dtype} (quantised). Use family='shared'"
            )
        self.block_weight.zero_()
        self.block_bias.zero_()
        self.projection.copy_(weight)

    def forward(self, hidden: Tensor, following: Tensor | None = None) -> Tensor:
        """Logits of every head, [..., H] to [..., K, V]; see `Heads.forward`."""
        rows = hidden.reshape(1, -1, self.hidden_size).expand(self.num_heads, -1, -1)  # [K, T, H]
        for weight, bias in zip(self.block_weight, self.block_bias, strict=True):
            rows = rows + functional.silu(torch.baddbmm(bias[:, None], rows, weight.mT))
        logits = torch.bmm(rows, self.projection.mT).transpose(0, 1)  # [T, K, V]
        return logits.reshape(*hidden.shape[:-1], self.num_heads, self.vocab_size)
