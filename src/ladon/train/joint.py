"""Model and heads trained together: MEDUSA-2 (arXiv 2401.10774, section 2.2.2).

The heads first learn alone; then the model joins, at a smaller learning rate, with the loss L = L_model + w L_heads:
its hidden states learn to hold what comes after the next token. The result is another model.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ladon.errors import InputError
from ladon.heads import Heads
from ladon.heads.early_exit import EarlyExit
from ladon.heads.model_parts import output_projection
from ladon.train.config import TrainOptions
from ladon.train.losses import Labels, SoftLabels, TokenLabels
from ladon.train.modules import Batch, HeadsModule, LossOptions, group, hidden_states, learned_counts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class JointModule(HeadsModule):
    """Heads and the model, or LoRA adapters in it.

    Args:
        model: the target; it is trained in place, with weights in `master`. The checkpoint it came from stays as it is.
        heads: bound to it, in their training dtype.
        loss_options: how the heads' losses are made.
        options: how both are trained together.
        early_exit: as for `HeadsModule`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        heads: Heads,
        loss_options: LossOptions,
        options: TrainOptions,
        early_exit: EarlyExit | None = None,
    ) -> None:
        check_trainable(model)
        super().__init__(model, heads, loss_options, early_exit)
        self._options, self._stored = options, model.dtype
        self._teacher: tuple[PreTrainedModel, ...] = ()
        self._adapted: tuple[Any, ...] = ()
        if options.joint == "lora":
            self._adapted = (with_adapters(model, options),)
        else:
            if options.base_loss == "distill":
                self._teacher = (copy.deepcopy(model).eval(),)
            model.to(next(heads.parameters()).dtype).requires_grad_(True)
        self.base = model

    def groups(self, *, heads: float, base: float) -> list[dict[str, Any]]:
        """See `HeadsModule`."""
        return [*super().groups(heads=heads, base=base), group("base", self.base.named_parameters(), base)]

    def train(self, mode: bool = True) -> JointModule:
        """The model's own dropout, and that of adapters, is for when it is trained."""
        super().train(mode)
        self.base.train(mode and self.has_joined)
        return self

    @property
    def has_joined(self) -> bool:
        """Whether the model is trained yet."""
        return self._step >= self._options.heads_warmup_steps

    def forward(self, counts: Tensor | None = None, **batch: Tensor) -> Tensor:
        """See `HeadsModule`."""
        self.base.train(self.training and self.has_joined)
        if not self.has_joined:
            frozen: Tensor = super().forward(counts, **batch)
            return frozen
        counts = learned_counts([batch]) if counts is None else counts
        hidden, early = self.read(batch)
        batch, counts = self.beside_heads(batch), counts.to(hidden.device)
        loss = self.base_loss(hidden, batch, counts)
        loss = loss + self.heads_weight() * self.heads_loss(hidden, batch, counts)
        return loss if early is None else loss + self.exit_loss(early.detach(), hidden.detach(), batch, counts)

    def projection_parameters(self) -> list[nn.Parameter]:
        """See `HeadsModule`; nothing of the model is trained before it joins."""
        return super().projection_parameters() if self.has_joined else []

    def heads_weight(self) -> float:
        """What the heads' loss counts beside the model's, at this update."""
        options = self._options
        if options.heads_ramp == "none":
            return options.heads_weight
        start = options.heads_warmup_steps
        done = (self._step - start + 1) / max(1, self.total_steps - start)
        return options.heads_weight * math.sin(0.5 * math.pi * min(1.0, done))

    def base_loss(self, hidden: Tensor, batch: Batch, counts: Tensor) -> Tensor:
        """The model's mean loss: cross-entropy, or its divergence from the original model."""
        rows = batch["next_rows"]
        labels: Labels = TokenLabels(batch["next_labels"][:, None])
        if self._options.base_loss == "distill":
            labels = self._original(batch, rows)
        return self.next_token_loss(
            "model", self.heads.project, hidden[rows], labels, counts, self.projection_parameters()
        )

    @torch.no_grad()
    def _original(self, batch: Batch, rows: Tensor) -> SoftLabels:
        """What the original model says at some rows."""
        packed = self.loss_options.packed
        with self.autocast(), self._as_it_was() as teacher:
            hidden = hidden_states(teacher, batch, packed).flatten(0, 1)[rows]
        places = torch.arange(len(rows), device=rows.device)[:, None]
        return SoftLabels(output_projection(teacher).module, hidden, places)

    @contextmanager
    def _as_it_was(self) -> Iterator[PreTrainedModel]:
        """The original model: a copy of it, or this one without its adapters and dropout."""
        if self._teacher:
            yield self._teacher[0]
            return
        was_training = self.base.training
        self.base.eval()
        try:
            with self._adapted[0].disable_adapter():
                yield self.model
        finally:
            self.base.train(was_training)

    def finish(self, out: Path, tokenizer: PreTrainedTokenizerBase, record: dict[str, Any]) -> None:
        """Save the tuned model in `out`/model, adapters in `out`/adapter, and the heads, now the tuned model's."""
        model = self.base.eval()
        if self._adapted:
            self._adapted[0].save_pretrained(out / "adapter")
            model = self._adapted[0].merge_and_unload()
        model.to(self._stored)
        model.save_pretrained(out / "model")
        tokenizer.save_pretrained(out / "model")
        self.heads.remember_base(model)
        self.heads.base_name = str(out / "model")
        super().finish(out / "heads", tokenizer, record)


def check_trainable(model: PreTrainedModel) -> None:
    """Raise `InputError` if the model is quantised: it would neither be trained nor be saved whole."""
    if getattr(model, "is_quantized", False) or any(p.dtype.itemsize < 2 for p in model.parameters()):
        raise InputError("the model is quantised and cannot be trained itself; load it whole, or leave --joint off")


def with_adapters(model: PreTrainedModel, options: TrainOptions) -> Any:
    """Put LoRA adapters into all linear layers of the model but its output projection; peft's own handle on it."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise InputError("--joint lora needs peft; install it with pip install 'ladon-llm[train]'") from error
    config = LoraConfig(
        r=options.lora_rank,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about names of checkpoints that are not on a hub
        return get_peft_model(model, config)
