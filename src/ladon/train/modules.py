"""What the Trainer trains: the heads (and, for MEDUSA-2, the model), as one module whose output is a loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ladon.forwards import lock_of, projection_inputs
from ladon.heads import Heads
from ladon.heads.ends import output_projection
from ladon.train.losses import Labels, SoftLabels, TokenLabels, chunked_loss, rows_per_chunk

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class LossOptions:
    """How the losses are made.

    Attributes:
        soft: whether heads learn the model's own probabilities instead of the text.
        decay: head k counts decay ** k.
        autocast: dtype of the products, or None for that of the parameters.
        chunk_rows: see `rows_per_chunk`.
        packed: whether the model is told where documents begin.
    """

    soft: bool = False
    decay: float = 0.8
    autocast: torch.dtype | None = None
    chunk_rows: int = 0
    packed: bool = True


class HeadsModule(nn.Module):
    """Heads on a frozen model (MEDUSA-1). The model is no submodule: it is neither saved, moved nor trained.

    Attributes:
        heads: the heads, in their training dtype.
        loss_options: how the losses are made.
        skipped_rows: scalar int64, rows left out so far because something in them was not finite; saved.
        skipped_steps: scalar int64, updates left out because the gradient was not finite; saved.
    """

    skipped_rows: Tensor
    skipped_steps: Tensor

    def __init__(self, model: PreTrainedModel, heads: Heads, loss_options: LossOptions) -> None:
        super().__init__()
        self._model = (model,)
        self.heads = heads
        self.loss_options = loss_options
        device = next(heads.parameters()).device
        self.register_buffer("skipped_rows", torch.zeros((), dtype=torch.int64, device=device))
        self.register_buffer("skipped_steps", torch.zeros((), dtype=torch.int64, device=device))
        depths = torch.arange(1, heads.num_heads + 1, device=device)
        self.register_buffer("_depth_weights", loss_options.decay**depths, persistent=False)
        self._head_sums = torch.zeros(heads.num_heads, device=device)  # losses and positions since the last log
        self._head_counts = torch.zeros(heads.num_heads, device=device)

    @property
    def model(self) -> PreTrainedModel:
        """The target."""
        return self._model[0]

    def forward(self, counts: Tensor | None = None, **batch: Tensor) -> Tensor:
        """The loss of a batch.

        Args:
            counts: [K + 1], learned positions of each head, and of the next token, over all that shares one update:
                losses are divided by them. None: those of this batch.
            **batch: what a `Collator` makes.
        """
        if counts is None:
            counts = learned_counts([batch])
        with self.autocast(), torch.no_grad():
            hidden = self.hidden_states(batch).flatten(0, 1)
        return self.heads_loss(hidden, batch, counts)

    def autocast(self) -> torch.autocast:
        """The context of all products. Casts are not cached: one made without gradients would be used with them."""
        dtype = self.loss_options.autocast
        kind = next(self.heads.parameters()).device.type
        return torch.autocast(kind, dtype or torch.bfloat16, enabled=dtype is not None, cache_enabled=False)

    def hidden_states(self, batch: dict[str, Tensor]) -> Tensor:
        """What the output projection receives at each token, [B, T, H]."""
        inputs = {"input_ids": batch["input_ids"]}
        if self.loss_options.packed:
            inputs["position_ids"] = batch["position_ids"]
        return hidden_states(self.model, **inputs)

    def heads_loss(self, hidden: Tensor, batch: dict[str, Tensor], counts: Tensor) -> Tensor:
        """The sum over heads of decay ** k times the mean loss of head k, from hidden states [B T, H]."""
        heads, options = self.heads, self.loss_options
        scale = self._depth_weights / counts[: heads.num_heads].clamp(min=1)
        following = batch["following"] if heads.is_conditioned else None
        labels: Labels = TokenLabels(batch["labels"])
        if options.soft:
            depths = torch.arange(1, heads.num_heads + 1, device=hidden.device)
            places = (batch["rows"][:, None] + depths).clamp(max=len(hidden) - 1)  # beyond the end nothing is learned
            labels = SoftLabels(heads.project, hidden.detach(), places, heads.token_ids)
        with self.autocast():
            outcome = chunked_loss(
                lambda rows, which: heads(rows, None if following is None else following[which]),
                hidden[batch["rows"]],
                labels,
                batch["mask"] * scale,
                [*heads.parameters(), *self.projection_parameters()],
                rows_per_chunk(heads.num_heads, heads.vocab_size, options.chunk_rows),
            )
        self.skipped_rows += outcome.skipped
        self._head_sums += outcome.sums
        self._head_counts += batch["mask"].sum(0)
        return outcome.loss

    def projection_parameters(self) -> list[nn.Parameter]:
        """The output projection's, where they are trained."""
        return [p for p in output_projection(self.model).module.parameters() if p.requires_grad]

    def take_head_losses(self) -> list[float]:
        """Mean loss in nats of each head since the last call."""
        losses = (self._head_sums / self._head_counts.clamp(min=1)).tolist()
        self._head_sums.zero_()
        self._head_counts.zero_()
        return [float(loss) for loss in losses]


def hidden_states(model: PreTrainedModel, **inputs: Any) -> Tensor:
    """What the model's output projection receives at each token, [B, T, H]; it maps only the first of each row."""
    first = torch.zeros(len(inputs["input_ids"]), dtype=torch.int64, device=inputs["input_ids"].device)
    with lock_of(model), projection_inputs(output_projection(model).module, first) as seen:
        model(**inputs, use_cache=False)
    return seen[0]


def learned_counts(batches: Sequence[dict[str, Tensor]]) -> Tensor:
    """Learned positions of each head, and of the next token, in some batches: [K + 1] float32."""
    heads = sum(batch["mask"].sum(0) for batch in batches)
    following = sum(len(batch["next_rows"]) for batch in batches)
    return torch.cat([torch.as_tensor(heads), torch.tensor([following], device=batches[0]["mask"].device)]).float()
