"""Train base and heads together, as MEDUSA-2 does (arXiv 2401.10774, section 2.2.2), resumable at any step.

The heads' loss, on a random part of the positions, also reaches the base: its hidden states learn to hold what comes
after the next token. The text is drawn by kind, so that the few library sources count as much as the many tests.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from base import held_out_loss, make_optimizers, save_checkpoint
from heads import StackedMuon, evaluate, heads_losses
from torch import Tensor, nn
from transformers import PreTrainedModel

from ladon.heads import Heads

LOG_EVERY = 10


@dataclass(frozen=True, kw_only=True)
class JointTraining:
    """Length of the joint training and what it is made of."""

    steps: int = 2500
    batch_tokens: int = 8192
    short_length: int = 256
    long_length: int = 2048
    long_share: float = 0.04  # share of the steps, at the end, that run at long_length
    text_shares: tuple[float, float, float] = (0.37, 0.33, 0.30)  # library, wheels, tests
    heads_positions: int = 2048  # positions per step that the heads learn on
    heads_weight: float = 0.2
    depth_decay: float = 0.8
    base_matrix_lr: float = 0.012
    base_vector_lr: float = 2e-3
    heads_matrix_lr: float = 0.01
    heads_vector_lr: float = 2e-3
    warmup_steps: int = 60
    decay_share: float = 0.7
    seed: int = 0
    compile: bool = False
    save_every: int = 100


def rate_scale(step: int, config: JointTraining) -> float:
    """Warm-up, constant, then linear to zero over the last `decay_share` of the steps."""
    return min(1.0, (step + 1) / config.warmup_steps, (config.steps - step) / (config.decay_share * config.steps))


def sample_batch(texts: list[np.ndarray], step: int, span: int, config: JointTraining) -> tuple[Tensor, Tensor]:
    """Windows for this step and the positions the heads learn on.

    Args:
        texts: token ids of each kind of text, in the order of `text_shares`.
        step: counts from 0; the draw is a function of (seed, step).
        span: tokens of a window beyond its inputs, K + 1.
        config: gives the rest.

    Returns:
        [rows, length + span] token ids and [heads_positions] indices into the rows x length inputs.
    """
    length = config.long_length if step >= config.steps * (1 - config.long_share) else config.short_length
    rng = np.random.default_rng((config.seed, step, 2))
    kinds = rng.choice(len(texts), size=config.batch_tokens // length, p=config.text_shares)
    rows = []
    for kind in kinds:
        start = rng.integers(0, len(texts[kind]) - length - span)
        rows.append(texts[kind][start : start + length + span])
    positions = rng.permutation(config.batch_tokens)[: config.heads_positions]
    return torch.from_numpy(np.stack(rows).astype(np.int64)), torch.from_numpy(positions)


def joint_losses(model: PreTrainedModel, heads: Heads, batch: Tensor, positions: Tensor) -> Tensor:
    """Mean cross-entropy in nats of the base and of each head, [K + 1]; see `sample_batch` for the arguments."""
    span = heads.num_heads + 1
    length = batch.shape[1] - span
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.base_model(input_ids=batch[:, :length], use_cache=False).last_hidden_state
        logits = model.lm_head(hidden)
    base_loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1 : length + 1].flatten())
    targets = torch.stack([batch[:, k + 1 : k + 1 + length] for k in range(1, span)], dim=-1).flatten(0, 1)
    losses = heads_losses(heads, hidden.flatten(0, 1)[positions], targets[positions])
    return torch.cat([base_loss[None], losses])


def train_jointly(
    config: JointTraining,
    model: PreTrainedModel,
    heads: Heads,
    texts: list[np.ndarray],
    held_out: np.ndarray,
    folder: Path,
) -> dict[str, object]:
    """Train (or resume) both in place; returns the training record."""
    both = nn.ModuleDict({"model": model.requires_grad_(True), "heads": heads})
    base_optimizers = make_optimizers(model, config.base_matrix_lr, config.base_vector_lr)
    base_rates = [config.base_matrix_lr, config.base_vector_lr]
    heads_optimizer = StackedMuon(heads, config.heads_matrix_lr, config.heads_vector_lr)
    optimizers = [*base_optimizers, *heads_optimizer.optimizers]
    checkpoint, step, history = folder / "joint.pt", 0, []
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        both.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step, history = state["step"], state["history"]
        print(f"joint training resumed at step {step}", flush=True)
    weights = config.heads_weight * config.depth_decay ** torch.arange(heads.num_heads + 1)
    weights[0] = 1.0
    losses_of = torch.compile(joint_losses) if config.compile else joint_losses
    both.train()
    started, first_step, running = time.time(), step, torch.full((len(weights),), math.nan)
    while step < config.steps:
        losses = losses_of(model, heads, *sample_batch(texts, step, heads.num_heads + 1, config))
        (losses * weights).sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scale = rate_scale(step, config)
        for optimizer, rate in zip(base_optimizers, base_rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * scale
            optimizer.step()
            optimizer.zero_grad()
        heads_optimizer.step(scale)
        step += 1
        running = torch.where(running.isnan(), losses.detach(), 0.95 * running + 0.05 * losses.detach())
        if step % LOG_EVERY == 0:
            pace = (time.time() - started) / (step - first_step)
            shown = " ".join(f"{x:.3f}" for x in running.tolist())
            left = pace * (config.steps - step) / 60
            print(f"joint step {step}/{config.steps} losses {shown} {pace:.2f} s/step, {left:.0f} min left", flush=True)
        if step % config.save_every == 0 or step == config.steps:
            loss, report = held_out_loss(model, held_out), evaluate(model, heads, held_out)
            history.append({"step": step, "train_loss": running[0].item(), "held_out_loss": loss, "heads": report})
            print(f"  held-out loss {loss:.4f} heads {report['loss']} {[a[0] for a in report['accuracy']]}", flush=True)
            both.train()
            save_checkpoint(checkpoint, both, optimizers, step, history)
    both.eval()
    return {"config": asdict(config), "history": history}
