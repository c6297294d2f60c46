"""Train heads on the frozen base: head k, reading the hidden state of token t, learns token t + k + 1.

The base runs once per batch, without gradients, for all heads. The loss is the sum over heads of 0.8^k times the
cross-entropy (MEDUSA-1, arXiv 2401.10774, section 2.2.1). Every batch is a function of (seed, step) alone, so a run
that was killed and resumed sees what an uninterrupted one would have seen.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from base import save_checkpoint
from torch import Tensor, nn
from transformers import PreTrainedModel

from ladon.heads import Heads, new_heads

LOG_EVERY = 10
TOP = 5  # accuracies are given for the best 1 to 5 candidates


@dataclass(frozen=True, kw_only=True)
class HeadsTraining:
    """Number of heads and length of their training."""

    num_heads: int = 4
    steps: int = 1000
    batch_tokens: int = 8192
    length: int = 512
    chunk_rows: int = 2048  # hidden rows whose logits [rows, K, V] are in memory at once
    depth_decay: float = 0.8
    matrix_lr: float = 0.015
    vector_lr: float = 3e-3
    warmup_steps: int = 20
    decay_share: float = 0.6
    seed: int = 0
    compile: bool = False
    save_every: int = 100


class StackedMuon:
    """Muon for the matrices of stacked parameters [..., rows, columns], AdamW for the rest.

    Each matrix of a stack is its own parameter to the optimizer, sharing memory with the stack.
    """

    def __init__(self, heads: Heads, matrix_lr: float, vector_lr: float) -> None:
        stacks = [p for p in heads.parameters() if p.ndim >= 3]
        self.stacks = [(p, [nn.Parameter(m) for m in p.detach().flatten(0, -3)]) for p in stacks]
        matrices = [m for _, parts in self.stacks for m in parts]
        others = [p for p in heads.parameters() if p.ndim < 3]
        self.optimizers = [
            torch.optim.Muon(matrices, lr=matrix_lr, weight_decay=0.01),
            torch.optim.AdamW(others, lr=vector_lr, betas=(0.9, 0.95), weight_decay=0.0),
        ]
        self.rates = [matrix_lr, vector_lr]

    def step(self, scale: float) -> None:
        """One update at `scale` times the learning rates; gradients are cleared."""
        for stack, parts in self.stacks:
            for part, gradient in zip(parts, stack.grad.flatten(0, -3), strict=True):
                part.grad = gradient
        for optimizer, rate in zip(self.optimizers, self.rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * scale
            optimizer.step()
            optimizer.zero_grad()
        for stack, _ in self.stacks:
            stack.grad = None


def windows(tokens: np.ndarray, starts: np.ndarray, length: int) -> Tensor:
    """Token windows [len(starts), length] int64."""
    return torch.from_numpy(np.stack([tokens[s : s + length] for s in starts]).astype(np.int64))


def sample_windows(tokens: np.ndarray, step: int, config: HeadsTraining) -> Tensor:
    """Random windows [rows, length + K + 1] for this step; rows x length is `batch_tokens`."""
    span = config.length + config.num_heads + 1
    rng = np.random.default_rng((config.seed, step, 1))
    starts = rng.integers(0, len(tokens) - span, size=config.batch_tokens // config.length)
    return windows(tokens, starts, span)


@torch.no_grad()
def hidden_and_targets(model: PreTrainedModel, batch: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    """What the heads read and what they should say.

    Args:
        model: the frozen base.
        batch: [B, T + K + 1] token ids.
        num_heads: K.

    Returns:
        hidden [B T, H] after the final norm and targets [B T, K]; targets[:, k - 1] is the token k + 1 places on.
    """
    length = batch.shape[1] - num_heads - 1
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.base_model(input_ids=batch[:, :length], use_cache=False).last_hidden_state
    targets = torch.stack([batch[:, k + 1 : k + 1 + length] for k in range(1, num_heads + 1)], dim=-1)
    return hidden.float().flatten(0, 1), targets.flatten(0, 1)


def heads_losses(heads: Heads, hidden: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats of each head, [K], over hidden [T, H] and targets [T, K]."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = heads(hidden)  # [T, K, V]
    losses = nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
    return losses.view(targets.shape).mean(0)


@torch.no_grad()
def evaluate(model: PreTrainedModel, heads: Heads, tokens: np.ndarray, length: int = 512, rows: int = 64) -> dict:
    """Loss and top-1 to top-5 accuracy of each head over evenly spaced windows of held-out text."""
    span = length + heads.num_heads + 1
    batch = windows(tokens, np.linspace(0, len(tokens) - span, rows).astype(int), span)
    losses, hits, count = torch.zeros(heads.num_heads), torch.zeros(heads.num_heads, TOP), 0
    for part in batch.split(4):
        hidden, targets = hidden_and_targets(model, part, heads.num_heads)
        losses += heads_losses(heads, hidden, targets) * len(targets)
        found = heads(hidden).topk(TOP, dim=-1).indices == targets[:, :, None]  # [T, K, TOP]
        hits += found.cumsum(-1).sum(0)
        count += len(targets)
    return {
        "loss": [round(x, 4) for x in (losses / count).tolist()],
        "accuracy": [[round(x, 4) for x in row] for row in (hits / count).tolist()],
    }


def learning_rate_scale(step: int, config: HeadsTraining) -> float:
    """Warm-up, constant, then linear to zero over the last `decay_share` of the steps."""
    return min(1.0, (step + 1) / config.warmup_steps, (config.steps - step) / (config.decay_share * config.steps))


def train_heads(
    config: HeadsTraining, model: PreTrainedModel, tokens: np.ndarray, held_out: np.ndarray, folder: Path
) -> Heads:
    """Train (or resume) heads on the frozen `model`; their training record holds the settings and the history."""
    heads = new_heads(model.requires_grad_(False), config.num_heads, seed=config.seed)
    optimizer = StackedMuon(heads, config.matrix_lr, config.vector_lr)
    checkpoint, step, history = folder / "heads.pt", 0, []
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        heads.load_state_dict(state["model"])
        for part, saved in zip(optimizer.optimizers, state["optimizers"], strict=True):
            part.load_state_dict(saved)
        step, history = state["step"], state["history"]
        print(f"heads resumed at step {step}", flush=True)
    weights = config.depth_decay ** torch.arange(1, config.num_heads + 1)
    read, losses_of = hidden_and_targets, heads_losses
    if config.compile:
        read, losses_of = torch.compile(read), torch.compile(losses_of)
    started, first_step = time.time(), step
    while step < config.steps:
        hidden, targets = read(model, sample_windows(tokens, step, config), config.num_heads)
        chunks = list(zip(hidden.split(config.chunk_rows), targets.split(config.chunk_rows), strict=True))
        total = torch.zeros(config.num_heads)
        for chunk_hidden, chunk_targets in chunks:
            losses = losses_of(heads, chunk_hidden, chunk_targets) * (len(chunk_hidden) / len(hidden))
            (losses * weights).sum().backward()
            total += losses.detach()
        optimizer.step(learning_rate_scale(step, config))
        step += 1
        if step % LOG_EVERY == 0:
            pace = (time.time() - started) / (step - first_step)
            shown = " ".join(f"{x:.3f}" for x in total.tolist())
            left = pace * (config.steps - step) / 60
            print(f"heads step {step}/{config.steps} losses {shown} {pace:.2f} s/step, {left:.0f} min left", flush=True)
        if step % config.save_every == 0 or step == config.steps:
            history.append({"step": step, **evaluate(model, heads, held_out)})
            print(f"  held-out loss {history[-1]['loss']} top-1 {[a[0] for a in history[-1]['accuracy']]}", flush=True)
            save_checkpoint(checkpoint, heads, optimizer.optimizers, step, history)
    heads.training_record = {"settings": asdict(config), "history": history}
    return heads.eval()
