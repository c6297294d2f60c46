"""Hydra's heads: each reads the tokens before the one it guesses (arXiv 2402.05109, the grounded `mlp`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from ladon.errors import HeadsError
from ladon.heads.base import ConditionedHeads, check_count

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class HydraHeads(ConditionedHeads):
    """Head k (from 1) reads [h, e_1 .. e_k], the target's hidden state and the embeddings of the k tokens after it.

    With u = [h, e_1 .. e_k], of (k + 1) H numbers: x = R_k u + r_k + SiLU(A_k u + a_k), then for each further block l
    x = x + SiLU(W_lk x + b_lk), then logits U_k x + c_k. Parameters, per head: first_weight.k and residual_weight.k
    [H, (k + 2) H] (k from 0), and stacked: first_bias and residual_bias [K, H], block_weight [L - 1, K, H, H] and
    block_bias [L - 1, K, H] if L > 1, projection [K, V, H], projection_bias [K, V]. The embedding is the target's own
    and takes no gradient from here.

    The heads run one after the other, and a projection each costs as much as MEDUSA's own: K products of [B R, H] by
    [H, V], for R partial paths, where independent heads take one product of K times the rows.

    Attributes:
        num_blocks: L, blocks per head, the first included.
    """

    family = "hydra"
    option_names = ("num_blocks",)

    def __init__(self, *, num_heads: int, hidden_size: int, vocab_size: int, num_blocks: int = 1) -> None:
        super().__init__(num_heads=num_heads, hidden_size=hidden_size, vocab_size=vocab_size)
        check_count("num_blocks", num_blocks)
        self.num_blocks = num_blocks
        inputs = [(k + 2) * hidden_size for k in range(num_heads)]
        self.first_weight = nn.ParameterList(nn.Parameter(torch.empty(hidden_size, size)) for size in inputs)
        self.first_bias = nn.Parameter(torch.empty(num_heads, hidden_size))
        self.residual_weight = nn.ParameterList(nn.Parameter(torch.empty(hidden_size, size)) for size in inputs)
        self.residual_bias = nn.Parameter(torch.empty(num_heads, hidden_size))
        if num_blocks > 1:
            self.block_weight = nn.Parameter(torch.empty(num_blocks - 1, num_heads, hidden_size, hidden_size))
            self.block_bias = nn.Parameter(torch.empty(num_blocks - 1, num_heads, hidden_size))
        self.projection = nn.Parameter(torch.empty(num_heads, vocab_size, hidden_size))
        self.projection_bias = nn.Parameter(torch.empty(num_heads, vocab_size))

    @torch.no_grad()
    def initialise(self, model: PreTrainedModel, seed: int) -> None:
        """Blocks that pass the hidden state on, and copies of the target's projection; `seed` is not used."""
        target = self.start_projection(model)
        for parameter in self.parameters():
            parameter.zero_()
        for weight in self.residual_weight:
            weight[:, : self.hidden_size].fill_diagonal_(1.0)
        self.projection.copy_(target.weight)
        bias = getattr(target.module, "bias", None)
        if bias is not None:
            self.projection_bias.copy_(bias)

    def forward(self, hidden: Tensor, following: Tensor | None = None) -> Tensor:
        """Logits of every head, [..., K, V], each given the true tokens before it; see `Heads.forward`.

        Raises:
            HeadsError: `following` is missing, or has not K tokens per row.
        """
        expected = (*hidden.shape[:-1], self.num_heads)
        if following is None or following.shape != expected:
            found = None if following is None else list(following.shape)
            raise HeadsError(
                f"hydra heads read the tokens before the one they guess: following is {found}, expected "
                f"{list(expected)} token ids. In decoding, call heads.draft(hidden, root)"
            )
        embedded = self.embed(following).detach().to(hidden.dtype).flatten(-2)  # [..., K H]
        inputs = torch.cat([hidden, embedded], dim=-1)
        heads = range(self.num_heads)
        return torch.stack([self._logits(k, inputs[..., : (k + 2) * self.hidden_size]) for k in heads], dim=-2)

    def after(self, hidden: Tensor, paths: Tensor) -> Tensor:
        """Logits [B, R, V] of the head that reads the k tokens of `paths` [B, R, k]; see `ConditionedHeads.after`.

        Paths share [h, e_1], but its product is not made once for all: it is the projection that takes the time.
        """
        embedded = self.embed(paths).to(hidden.dtype).flatten(-2)  # [B, R, k H]
        inputs = torch.cat([hidden[:, None].expand(-1, paths.shape[1], -1), embedded], dim=-1)
        return self._logits(paths.shape[-1] - 1, inputs)

    def _logits(self, k: int, inputs: Tensor) -> Tensor:
        """Head k (from 0) on [..., (k + 2) H]: logits [..., V]."""
        rows = functional.linear(inputs, self.residual_weight[k], self.residual_bias[k])
        rows = rows + functional.silu(functional.linear(inputs, self.first_weight[k], self.first_bias[k]))
        for block in range(self.num_blocks - 1):
            rows = rows + functional.silu(
                functional.linear(rows, self.block_weight[block, k], self.block_bias[block, k])
            )
        return functional.linear(rows, self.projection[k], self.projection_bias[k])
