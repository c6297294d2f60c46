"""Train heads on the frozen base: head k, reading the hidden state of token t, learns token t + k + 1.

The base runs once per batch, without gradients, for all heads. The loss is the sum over heads of 0.8^k times the
cross-entropy (MEDUSA-1, arXiv 2401.10774, section 2.2.1), against the text's own token or against what the base says
there, all its probabilities: that is what the heads are to foretell.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from training import Optimizers, Schedule, Stage, Text, even_windows
from transformers import PreTrainedModel

from ladon.heads import Heads, new_heads

TOP = 5  # accuracies are given for the best 1 to 5 candidates


@dataclass(frozen=True, kw_only=True)
class HeadsTraining(Schedule):
    """How heads are trained."""

    steps: int = 1000
    warmup_steps: int = 20
    decay_share: float = 0.6
    length: int = 512
    chunk_rows: int = 2048  # hidden rows whose logits [rows, K, V] are in memory at once
    depth_decay: float = 0.8
    matrix_lr: float = 0.015
    vector_lr: float = 3e-3
    from_base: bool = False  # learn what the base says, not what the text says


class StackedMuon(Optimizers):
    """Muon for the matrices of stacked parameters [..., rows, columns], AdamW for the rest.

    Each matrix of a stack is its own parameter to the optimizer, sharing memory with the stack.
    """

    def __init__(self, heads: Heads, matrix_lr: float, vector_lr: float) -> None:
        stacks = [p for p in heads.parameters() if p.ndim >= 3]
        self._stacks = [(p, [nn.Parameter(m) for m in p.detach().flatten(0, -3)]) for p in stacks]
        matrices = [m for _, parts in self._stacks for m in parts]
        others = [p for p in heads.parameters() if p.ndim < 3]
        super().__init__(
            (torch.optim.Muon(matrices, lr=matrix_lr, weight_decay=0.01), matrix_lr),
            (torch.optim.AdamW(others, lr=vector_lr, betas=(0.9, 0.95), weight_decay=0.0), vector_lr),
        )

    def step(self, scale: float) -> None:
        """One update at `scale` times the learning rates; gradients are cleared."""
        for stack, parts in self._stacks:
            for part, gradient in zip(parts, stack.grad.flatten(0, -3), strict=True):
                part.grad = gradient
        super().step(scale)
        for stack, _ in self._stacks:
            stack.grad = None


@torch.no_grad()
def narrowed(heads: Heads, model: PreTrainedModel, expansion: int) -> Heads:
    """Heads of the shared family with fewer inner units: in each head those with the largest weights, in and out."""
    narrow = new_heads(model, heads.num_heads, expansion=expansion)
    strength = heads.up_weight.norm(dim=-1) * heads.down_weight.norm(dim=-1)  # [K, F]
    kept = strength.topk(expansion * heads.hidden_size, dim=-1).indices  # [K, F']
    rows = kept[..., None].expand(-1, -1, heads.hidden_size)
    narrow.up_weight.copy_(heads.up_weight.gather(1, rows))
    narrow.up_bias.copy_(heads.up_bias.gather(1, kept))
    narrow.down_weight.copy_(heads.down_weight.gather(1, rows))
    return narrow


@torch.no_grad()
def hidden_states(model: PreTrainedModel, batch: Tensor) -> Tensor:
    """What the heads read at each token of batch [B, T]: the hidden state after the final norm, [B, T, H]."""
    with torch.autocast("cpu", torch.bfloat16):
        return model.base_model(input_ids=batch, use_cache=False).last_hidden_state.float()


def later(values: Tensor, length: int, num_heads: int, first: int) -> Tensor:
    """For each of `length` places t of values [B, T, ...], those at t + `first` to t + `first` + K - 1, side by side.

    Returns:
        [B length, K, ...].
    """
    shifted = [values[:, first + k : first + k + length] for k in range(num_heads)]
    return torch.stack(shifted, dim=2).flatten(0, 1)


def heads_losses(heads: Heads, hidden: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats of each head, [K].

    Args:
        heads: K heads.
        hidden: [T, H].
        targets: token ids [T, K], or probabilities [T, K, V].
    """
    with torch.autocast("cpu", torch.bfloat16):
        logits = heads(hidden)  # [T, K, V]
    losses = nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten(0, 1), reduction="none")
    return losses.view(targets.shape[:2]).mean(0)


def losses_from_base(model: PreTrainedModel, heads: Heads, hidden: Tensor, hidden_later: Tensor) -> Tensor:
    """The same against what the base says after the hidden states `hidden_later` [T, K, H]."""
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        said = model.lm_head(hidden_later).float().softmax(-1)
    return heads_losses(heads, hidden, said)


@torch.no_grad()
def evaluate(model: PreTrainedModel, heads: Heads, tokens: np.ndarray, length: int = 512, rows: int = 64) -> dict:
    """Loss and top-1 to top-5 accuracy of each head over evenly spaced windows of held-out text."""
    count = heads.num_heads
    losses, hits, places = torch.zeros(count), torch.zeros(count, TOP), 0
    for part in even_windows(tokens, rows, length + count + 1).split(4):
        hidden = hidden_states(model, part[:, :length]).flatten(0, 1)
        targets = later(part, length, count, first=2)
        losses += heads_losses(heads, hidden, targets) * len(targets)
        found = heads(hidden).topk(TOP, dim=-1).indices == targets[:, :, None]  # [T, K, TOP]
        hits += found.cumsum(-1).sum(0)
        places += len(targets)
    return {
        "loss": [round(x, 4) for x in (losses / places).tolist()],
        "accuracy": [[round(x, 4) for x in row] for row in (hits / places).tolist()],
    }


def train_heads(config: HeadsTraining, model: PreTrainedModel, heads: Heads, text: Text, checkpoint: Path) -> None:
    """Train `heads` in place on the frozen `model` (or resume); their training record holds settings and history.

    Args:
        config: how.
        model: the base; its parameters are frozen.
        heads: bound to `model`.
        text: what they learn from.
        checkpoint: where the state is kept.
    """
    model.requires_grad_(False)
    count, length = heads.num_heads, config.length
    weights = config.depth_decay ** torch.arange(1, count + 1)
    read: Callable[..., Tensor] = hidden_states
    losses_of: Callable[..., Tensor] = losses_from_base if config.from_base else _losses_from_text
    if config.compile:
        read, losses_of = torch.compile(read), torch.compile(losses_of)

    def backward(step: int) -> Tensor:
        rng = np.random.default_rng((config.seed, step, 1))
        batch = text.windows(config.batch_tokens // length, length + count + 1, rng)
        hidden = read(model, batch[:, : length + count])
        goals = later(hidden, length, count, first=1) if config.from_base else later(batch, length, count, first=2)
        rows = hidden[:, :length].flatten(0, 1)
        total = torch.zeros(count)
        for part, goal in zip(rows.split(config.chunk_rows), goals.split(config.chunk_rows), strict=True):
            losses = losses_of(model, heads, part, goal) * (len(part) / len(rows))
            (losses * weights).sum().backward()
            total += losses.detach()
        return total

    stage = Stage(
        name=checkpoint.stem,
        schedule=config,
        module=heads,
        optimizers=[StackedMuon(heads, config.matrix_lr, config.vector_lr)],
        backward=backward,
        evaluate=lambda _: evaluate(model, heads, text.held_out),
    )
    heads.training_record = {"settings": asdict(config), "history": stage.train(checkpoint.parent)}


def _losses_from_text(_: PreTrainedModel, heads: Heads, hidden: Tensor, targets: Tensor) -> Tensor:
    return heads_losses(heads, hidden, targets)
