"""MEDUSA's own heads: residual blocks and an output projection for each head (arXiv 2401.10774, section 2.1.1)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from ladon.errors import HeadsError
from ladon.heads.base import Heads, check_count

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PROJECTIONS = ("own", "shared")


class MedusaHeads(Heads):
    """Head k: x = h, then x = x + SiLU(W_lk x + b_lk) for each block l, then logits U_k x.

    Parameters are block_weight [L, K, H, H], block_bias [L, K, H] and projection [K, D, H]; the blocks of a head are
    distinct (MEDUSA's code repeats one). Blocks start at zero and the projections as copies of the target's, so an
    untrained head equals the target's own projection, its bias aside: these heads have none unless `projection_bias`
    says so. K projections of their own cost K times the target's output projection, in memory and in time:
    `SharedHeads` is the cheaper family. With the projection "shared" U_k is the target's own, bias included, and there
    is no parameter for it (MEDUSA's files of version 2).

    With a draft vocabulary the logits are those of D tokens only, which the buffer token_map [D] int64 names. It
    starts as the first D ids, which in a byte-pair vocabulary are the commonest; to choose others, set
    `heads.token_map` and call `initialise` again.

    Attributes:
        num_blocks: L, residual blocks per head.
        draft_vocab_size: D; 0 for the whole vocabulary.
        projection_bias: 1 if the projections have biases [K, D] of their own, else 0.
    """

    family = "medusa"
    option_names = ("num_blocks", "projection", "draft_vocab_size", "projection_bias")
    projection: nn.Parameter | None
    own_bias: nn.Parameter | None
    token_map: Tensor | None

    def __init__(
        self,
        *,
        num_heads: int,
        hidden_size: int,
        vocab_size: int,
        num_blocks: int = 1,
        projection: str = "own",
        draft_vocab_size: int = 0,
        projection_bias: int = 0,
    ) -> None:
        super().__init__(num_heads=num_heads, hidden_size=hidden_size, vocab_size=vocab_size)
        check_count("num_blocks", num_blocks)
        if projection not in _PROJECTIONS:
            raise HeadsError(f"projection is {projection!r}; medusa heads know {', '.join(_PROJECTIONS)}")
        if draft_vocab_size != 0:
            check_count("draft_vocab_size", draft_vocab_size)
        if draft_vocab_size > vocab_size:
            raise HeadsError(f"draft_vocab_size is {draft_vocab_size}, more than the vocabulary of {vocab_size} tokens")
        if projection_bias not in (0, 1) or (projection_bias and projection == "shared"):
            raise HeadsError(
                f"projection_bias is {projection_bias!r} with the projection {projection!r}; give 0, or 1 with 'own'"
            )
        self.num_blocks = num_blocks
        self.draft_vocab_size = draft_vocab_size
        self.projection_bias = projection_bias
        entries = draft_vocab_size or vocab_size
        self.block_weight = nn.Parameter(torch.empty(num_blocks, num_heads, hidden_size, hidden_size))
        self.block_bias = nn.Parameter(torch.empty(num_blocks, num_heads, hidden_size))
        is_own = projection == "own"
        self.register_parameter(
            "projection", nn.Parameter(torch.empty(num_heads, entries, hidden_size)) if is_own else None
        )
        self.register_parameter("own_bias", nn.Parameter(torch.empty(num_heads, entries)) if projection_bias else None)
        self.register_buffer("token_map", torch.arange(draft_vocab_size) if draft_vocab_size else None)

    @property
    def own_options(self) -> dict[str, int | str]:
        """The family's own settings, as its constructor takes them."""
        return super().own_options | {"projection": "shared" if self.projection is None else "own"}

    @property
    def token_ids(self) -> Tensor | None:
        """The token of each entry of the logits, [D] int64; None: D = V."""
        return self.token_map

    @torch.no_grad()
    def initialise(self, model: PreTrainedModel, seed: int) -> None:
        """Zero blocks and copies of the target's projection; nothing random, `seed` is not used."""
        self.block_weight.zero_()
        self.block_bias.zero_()
        if self.projection is None:
            return
        target = self.start_projection(model)
        rows = slice(None) if self.token_map is None else self.token_map.to(target.weight.device)
        self.projection.copy_(target.weight[rows])
        if self.own_bias is not None:
            bias = getattr(target.module, "bias", None)
            self.own_bias.copy_(bias[rows]) if bias is not None else self.own_bias.zero_()

    def forward(self, hidden: Tensor, following: Tensor | None = None) -> Tensor:
        """Logits of every head, [..., H] to [..., K, D]; see `Heads.forward`."""
        if self.projection is None:
            logits = self.project(self.states(hidden))
            return logits if self.token_map is None else logits[..., self.token_map]
        rows = self._blocks(hidden)
        if self.own_bias is None:
            logits = torch.bmm(rows, self.projection.mT).transpose(0, 1)  # [T, K, D]
        else:
            logits = torch.baddbmm(self.own_bias[:, None], rows, self.projection.mT).transpose(0, 1)
        return logits.reshape(*hidden.shape[:-1], self.num_heads, self.draft_vocab_size or self.vocab_size)

    @property
    def shares_projection(self) -> bool:
        """See `Heads`; it depends on the option `projection`."""
        return self.projection is None

    def states(self, hidden: Tensor) -> Tensor:
        """What the shared projection gets, [..., H] to [..., K, H]; see `Heads.states`."""
        if not self.shares_projection:
            return super().states(hidden)
        states = self._blocks(hidden).transpose(0, 1)
        return states.reshape(*hidden.shape[:-1], self.num_heads, self.hidden_size)

    def _blocks(self, hidden: Tensor) -> Tensor:
        """What comes out of the blocks of each head, [..., H] to [K, T, H]."""
        rows = hidden.reshape(1, -1, self.hidden_size).expand(self.num_heads, -1, -1)
        for weight, bias in zip(self.block_weight, self.block_bias, strict=True):
            rows = rows + functional.silu(torch.baddbmm(bias[:, None], rows, weight.mT))
        return rows
