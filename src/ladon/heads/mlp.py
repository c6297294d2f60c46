"""Heads that are a wide residual MLP each, on the target's own output projection (the default) or on thin ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from ladon.errors import HeadsError
from ladon.heads.base import Heads, check_count, seeded_normal
from ladon.util.devices import widest_float

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_UP_ROWS = {"silu": 1, "swiglu": 2}  # rows of up_weight per inner unit


class MlpHeads(Heads):
    """Heads of which the k-th makes logits of h + down_k(act(up_k(h) + b_k)), a wide residual MLP.

    With inner width F = expansion * H the parameters are up_weight [K, F, H], up_bias [K, F] and down_weight
    [K, F, H]; `down_weight` starts at zero, so an untrained MLP changes nothing. With the activation "swiglu" up_weight
    and up_bias have 2 F rows per head: the SiLU of the first half multiplies the second.

    Attributes:
        expansion: F / H.
        activation: "silu" or "swiglu".
    """

    def __init__(
        self, *, num_heads: int, hidden_size: int, vocab_size: int, expansion: int = 2, activation: str = "silu"
    ) -> None:
        super().__init__(num_heads=num_heads, hidden_size=hidden_size, vocab_size=vocab_size)
        check_count("expansion", expansion)
        if activation not in _UP_ROWS:
            raise HeadsError(f"activation is {activation!r}; shared heads know {', '.join(_UP_ROWS)}")
        self.expansion = expansion
        self.activation = activation
        inner_size = expansion * hidden_size
        up_rows = _UP_ROWS[activation] * inner_size
        self.up_weight = nn.Parameter(torch.empty(num_heads, up_rows, hidden_size))
        self.up_bias = nn.Parameter(torch.empty(num_heads, up_rows))
        self.down_weight = nn.Parameter(torch.empty(num_heads, inner_size, hidden_size))

    @torch.no_grad()
    def initialise(self, model: PreTrainedModel, seed: int) -> None:
        """Random up_weight, zeros elsewhere. The heads must be bound to use the projection."""
        self.up_weight.copy_(seeded_normal(tuple(self.up_weight.shape), self.hidden_size**-0.5, seed))
        self.up_bias.zero_()
        self.down_weight.zero_()

    def _moved(self, hidden: Tensor) -> Tensor:
        """What comes out of each head's MLP, [..., H] to [K, T, H]."""
        rows = hidden.reshape(-1, self.hidden_size)  # [T, H]
        inner = functional.linear(rows, self.up_weight.flatten(0, 1), self.up_bias.flatten())  # [T, K F] or [T, K 2F]
        inner = inner.view(-1, *self.up_bias.shape)
        if self.activation == "swiglu":
            gate, value = inner.chunk(2, dim=-1)
            inner = functional.silu(gate) * value
        else:
            inner = functional.silu(inner)
        return torch.baddbmm(rows, inner.transpose(0, 1), self.down_weight)  # rows are added to every head


class SharedHeads(MlpHeads):
    """Heads that share the target's output projection: head k is project(h + down_k(act(up_k(h) + b_k))).

    All depths run in three products, the last being one [K, H] x [H, V] product per hidden row.

    A target that scales or caps its logits after the projection (Cohere, Granite, Gemma 2) loses nothing: the heads
    are trained through the bare projection, the MLP learns whatever scale makes their probabilities right, and the
    target's own picks never come from here.
    """

    family = "shared"
    option_names = ("expansion", "activation")

    @property
    def shares_projection(self) -> bool:
        """See `Heads`: they always do."""
        return True

    def forward(self, hidden: Tensor, following: Tensor | None = None) -> Tensor:
        """Logits of every head, [..., H] to [..., K, V]; see `Heads.forward`."""
        return self.project(self.states(hidden))

    def states(self, hidden: Tensor) -> Tensor:
        """What the projection gets, [..., H] to [..., K, H]; see `Heads.states`."""
        return self._moved(hidden).transpose(0, 1).reshape(*hidden.shape[:-1], self.num_heads, self.hidden_size)


class LowRankHeads(MlpHeads):
    """Heads with two thin products behind the MLP: head k is out_k(in_k(h + down_k(SiLU(up_k(h) + b_k)))).

    With rank r they are in_weight [K, r, H] and out_weight [K, V, r]. They start as the best approximation of rank r
    of the target's own projection; its bias is left out. A head then costs r (H + V) for its logits, where a shared
    projection costs H V.

    Attributes:
        rank: r, at most H.
    """

    family = "lowrank"
    option_names = ("expansion", "rank")

    def __init__(
        self, *, num_heads: int, hidden_size: int, vocab_size: int, expansion: int = 2, rank: int = 64
    ) -> None:
        super().__init__(num_heads=num_heads, hidden_size=hidden_size, vocab_size=vocab_size, expansion=expansion)
        check_count("rank", rank)
        if rank > hidden_size:
            raise HeadsError(f"rank is {rank}, but the hidden size is {hidden_size}; give a rank of at most that")
        self.rank = rank
        self.in_weight = nn.Parameter(torch.empty(num_heads, rank, hidden_size))
        self.out_weight = nn.Parameter(torch.empty(num_heads, vocab_size, rank))

    @torch.no_grad()
    def initialise(self, model: PreTrainedModel, seed: int) -> None:
        """Random up_weight, a zero MLP, and the target's projection cut to rank r."""
        # The right singular vectors come from the small [H, H] product: V may be 256 thousand.
        weight = self.start_projection(model, "from").weight.detach()
        wide = weight.to(widest_float(weight.device))
        directions = torch.linalg.eigh(wide.T @ wide).eigenvectors[:, -self.rank :]  # [H, r]
        super().initialise(model, seed)
        self.in_weight.copy_(directions.T)
        self.out_weight.copy_(wide @ directions)

    def forward(self, hidden: Tensor, following: Tensor | None = None) -> Tensor:
        """Logits of every head, [..., H] to [..., K, V]; see `Heads.forward`."""
        logits = self._moved(hidden) @ self.in_weight.mT @ self.out_weight.mT  # [K, T, V]
        return logits.transpose(0, 1).reshape(*hidden.shape[:-1], self.num_heads, self.vocab_size)
