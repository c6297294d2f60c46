"""Heads with output projections of their own that are cheap because their rank is low."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from ladon.errors import HeadsError
from ladon.heads.base import Heads, check_count, seeded_normal
from ladon.heads.ends import output_projection
from ladon.util.devices import widest_float

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class LowRankHeads(Heads):
    """Head k is out_k(in_k(h + down_k(SiLU(up_k(h) + b_k)))), a wide residual MLP and two thin products.

    With inner width F = expansion * H and rank r the parameters are up_weight [K, F, H], up_bias [K, F], down_weight
    [K, F, H], in_weight [K, r, H] and out_weight [K, V, r]. The thin products start as the best approximation of rank
    r of the target's own projection; its bias is left out. A head then costs r (H + V) for its logits, where a shared
    projection costs H V.

    Attributes:
        expansion: F / H.
        rank: r, at most H.
    """

    family = "lowrank"
    option_names = ("expansion", "rank")

    def __init__(
        self, *, num_heads: int, hidden_size: int, vocab_size: int, expansion: int = 2, rank: int = 64
    ) -> None:
        super().__init__(num_heads=num_heads, hidden_size=hidden_size, vocab_size=vocab_size)
        check_count("expansion", expansion)
        check_count("rank", rank)
        if rank > hidden_size:
            raise HeadsError(f"rank is {rank}, but the hidden size is {hidden_size}; give a rank of at most that")
        self.expansion = expansion
        self.rank = rank
        inner_size = expansion * hidden_size
        self.up_weight = nn.Parameter(torch.empty(num_heads, inner_size, hidden_size))
        self.up_bias = nn.Parameter(torch.empty(num_heads, inner_size))
        self.down_weight = nn.Parameter(torch.empty(num_heads, inner_size, hidden_size))
        self.in_weight = nn.Parameter(torch.empty(num_heads, rank, hidden_size))
        self.out_weight = nn.Parameter(torch.empty(num_heads, vocab_size, rank))

    @torch.no_grad()
    def initialise(self, model: PreTrainedModel, seed: int) -> None:
        """Random up_weight, a zero MLP, and the target's projection cut to rank r."""
        weight = output_projection(model).weight
        if weight.shape != (self.vocab_size, self.hidden_size):
            raise HeadsError(
                f"lowrank heads start from the output projection, but this model's is packed to {list(weight.shape)} "
                f"{weight.dtype} (quantised). Use family='shared'"
            )
        # The right singular vectors come from the small [H, H] product: V may be 256 thousand.
        wide = weight.detach().to(widest_float(weight.device))
        directions = torch.linalg.eigh(wide.T @ wide).eigenvectors[:, -self.rank :]  # [H, r]
        self.up_weight.copy_(seeded_normal(tuple(self.up_weight.shape), self.hidden_size**-0.5, seed))
        self.up_bias.zero_()
        self.down_weight.zero_()
        self.in_weight.copy_(directions.T)
        self.out_weight.copy_(wide @ directions)

    def forward(self, hidden: Tensor, following: Tensor | None = None) -> Tensor:
        """Logits of every head, [..., H] to [..., K, V]; see `Heads.forward`."""
        rows = hidden.reshape(-1, self.hidden_size)  # [T, H]
        inner = functional.linear(rows, self.up_weight.flatten(0, 1), self.up_bias.flatten())  # [T, K F]
        inner = functional.silu(inner).view(-1, *self.up_bias.shape).transpose(0, 1)  # [K, T, F]
        moved = torch.baddbmm(rows, inner, self.down_weight)  # [K, T, H]
        logits = moved @ self.in_weight.mT @ self.out_weight.mT  # [K, T, V]
        return logits.transpose(0, 1).reshape(*hidden.shape[:-1], self.num_heads, self.vocab_size)
