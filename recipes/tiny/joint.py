"""Train base and heads together, as MEDUSA-2 does (arXiv 2401.10774, section 2.2.2).

The heads' loss, on a random part of the positions, also reaches the base: its hidden states learn to hold what comes
after the next token. The last part of the training runs at the full context length.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from base import base_optimizers, held_out_loss
from heads import StackedMuon, evaluate, heads_losses, later
from torch import Tensor, nn
from training import Schedule, Stage, Text
from transformers import PreTrainedModel

from ladon.heads import Heads


@dataclass(frozen=True, kw_only=True)
class JointTraining(Schedule):
    """How both are trained together."""

    steps: int = 2200
    decay_share: float = 0.7
    short_length: int = 256
    long_length: int = 2048
    long_share: float = 0.04  # share of the steps, at the end, that run at long_length
    heads_positions: int = 2048  # positions per step that the heads learn on
    heads_weight: float = 0.2
    depth_decay: float = 0.8
    base_matrix_lr: float = 0.012
    base_vector_lr: float = 2e-3
    heads_matrix_lr: float = 0.01
    heads_vector_lr: float = 2e-3
    save_every: int = 200


def joint_losses(model: PreTrainedModel, heads: Heads, batch: Tensor, positions: Tensor) -> Tensor:
    """Mean cross-entropy in nats of the base and of each head, [K + 1].

    Args:
        model: the base.
        heads: K heads, bound to it.
        batch: token ids [B, T + K + 1].
        positions: which of the B x T places the heads learn on, as indices.
    """
    count = heads.num_heads
    length = batch.shape[1] - count - 1
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.base_model(input_ids=batch[:, :length], use_cache=False).last_hidden_state
        logits = model.lm_head(hidden)
    base_loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1 : length + 1].flatten())
    targets = later(batch, length, count, first=2)
    losses = heads_losses(heads, hidden.flatten(0, 1)[positions], targets[positions])
    return torch.cat([base_loss[None], losses])


def train_jointly(
    config: JointTraining, model: PreTrainedModel, heads: Heads, text: Text, checkpoint: Path
) -> dict[str, object]:
    """Train (or resume) both in place; returns the training record."""
    both = nn.ModuleDict({"model": model.requires_grad_(True), "heads": heads})
    weights = config.heads_weight * config.depth_decay ** torch.arange(heads.num_heads + 1)
    weights[0] = 1.0
    losses_of: Callable[..., Tensor] = torch.compile(joint_losses) if config.compile else joint_losses

    def backward(step: int) -> Tensor:
        length = config.long_length if step >= config.steps * (1 - config.long_share) else config.short_length
        rng = np.random.default_rng((config.seed, step, 2))
        batch = text.windows(config.batch_tokens // length, length + heads.num_heads + 1, rng)
        positions = torch.from_numpy(rng.permutation(config.batch_tokens)[: config.heads_positions])
        losses = losses_of(model, heads, batch, positions)
        (losses * weights).sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        return losses

    def measure(losses: list[float]) -> dict[str, object]:
        loss, report = held_out_loss(model, text.held_out), evaluate(model, heads, text.held_out)
        return {"train_loss": losses[0], "held_out_loss": loss, "heads": report}

    stage = Stage(
        name=checkpoint.stem,
        schedule=config,
        module=both,
        optimizers=[
            base_optimizers(model, config.base_matrix_lr, config.base_vector_lr),
            StackedMuon(heads, config.heads_matrix_lr, config.heads_vector_lr),
        ],
        backward=backward,
        evaluate=measure,
    )
    return {"settings": asdict(config), "history": stage.train(checkpoint.parent)}
