"""Traces made from logits, and heads of two tokens' numbers."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ladon.calibrate.lattice_trace import LatticeTrace, candidate_tables
from ladon.heads import ConditionedHeads


class NearHeads(ConditionedHeads):
    """Heads with a vocabulary of their own that say the token before their guess and its neighbours."""

    family, option_names = "near", ()

    def initialise(self, model: PreTrainedModel, seed: int) -> None:
        pass

    def forward(self, hidden: Tensor, following: Tensor | None = None) -> Tensor:
        assert following is not None
        return -(self.token_ids - following[..., None]).abs().float()

    def after(self, hidden: Tensor, paths: Tensor) -> Tensor:
        return -(self.token_ids - paths[:, :, -1:]).abs().float()

    @property
    def token_ids(self) -> Tensor:
        return torch.arange(96, 46, -1)


def trace_of(logits: Tensor, num_candidates: int) -> LatticeTrace:
    """Positions whose heads gave these logits, [P, K, V], in one row; the truth is token 0."""

    class Given(NearHeads):
        token_ids = None

        def forward(self, hidden: Tensor, following: Tensor | None = None) -> Tensor:
            return logits

    heads = Given(num_heads=logits.shape[1], hidden_size=1, vocab_size=logits.shape[2])
    tokens, top, normalizers = candidate_tables(heads, logits, logits, num_candidates)
    return LatticeTrace(
        tokens=tokens,
        logits=top,
        log_normalizers=normalizers,
        roots=torch.zeros(len(logits), dtype=torch.int32),
        truth=torch.zeros(logits.shape[:2], dtype=torch.int32),
        row_starts=torch.tensor([0, len(logits)]),
    )
