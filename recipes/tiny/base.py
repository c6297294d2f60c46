"""Train the base language model: a small decoder on the corpus, resumable at any step.

Every batch is a function of (seed, step) alone, so a run that was killed and resumed sees what an uninterrupted one
would have seen. The schedule is warm-up, constant, linear decay; the last part runs at the full context length.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

LOG_EVERY = 10


@dataclass(frozen=True, kw_only=True)
class BaseConfig:
    """Shape of the model and length of its training."""

    arch: str = "llama"
    vocab_size: int = 4096
    hidden_size: int = 256
    num_layers: int = 8
    num_heads: int = 4
    intermediate_size: int = 768
    max_positions: int = 2048
    steps: int = 2600
    batch_tokens: int = 8192
    short_length: int = 256
    long_share: float = 0.12  # share of the steps, at the end, that run at max_positions
    decay_share: float = 0.45
    warmup_steps: int = 60
    matrix_lr: float = 0.02
    vector_lr: float = 3e-3
    seed: int = 0
    compile: bool = False
    save_every: int = 100


def new_model(config: BaseConfig, eos_token_id: int) -> PreTrainedModel:
    """An untrained model of the asked architecture (any decoder that takes these config names)."""
    torch.manual_seed(config.seed)
    model_config = AutoConfig.for_model(
        config.arch,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_heads,
        head_dim=config.hidden_size // config.num_heads,
        intermediate_size=config.intermediate_size,
        max_position_embeddings=config.max_positions,
        tie_word_embeddings=True,
        bos_token_id=eos_token_id,
        eos_token_id=eos_token_id,
        pad_token_id=eos_token_id,
    )
    return AutoModelForCausalLM.from_config(model_config)


def learning_rate_scale(step: int, config: BaseConfig) -> float:
    """Warm-up, constant, then linear to zero over the last `decay_share` of the steps."""
    decay_steps = config.decay_share * config.steps
    return min(1.0, (step + 1) / config.warmup_steps, (config.steps - step) / decay_steps)


def sample_batch(tokens: np.ndarray, step: int, config: BaseConfig) -> Tensor:
    """Random windows [rows, length + 1] for this step; rows x length is `batch_tokens`."""
    is_long = step >= config.steps * (1 - config.long_share)
    length = config.max_positions if is_long else config.short_length
    rng = np.random.default_rng((config.seed, step))
    starts = rng.integers(0, len(tokens) - length - 1, size=config.batch_tokens // length)
    return torch.from_numpy(np.stack([tokens[s : s + length + 1] for s in starts]).astype(np.int64))


def make_optimizers(model: nn.Module, matrix_lr: float, vector_lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embeddings, norms and biases."""
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    matrices = [p for p in model.parameters() if p.ndim == 2 and id(p) not in embeddings]
    matrix_ids = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in matrix_ids]
    return [
        torch.optim.Muon(matrices, lr=matrix_lr, weight_decay=0.05),
        torch.optim.AdamW(others, lr=vector_lr, betas=(0.9, 0.95), weight_decay=0.01),
    ]


def next_token_loss(model: PreTrainedModel, batch: Tensor) -> Tensor:
    """Mean cross-entropy in nats of batch [B, T + 1]; the matrix products run in bfloat16."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: PreTrainedModel, tokens: np.ndarray, length: int = 512, rows: int = 64) -> float:
    """Mean loss in nats per token over evenly spaced windows of held-out text."""
    starts = np.linspace(0, len(tokens) - length - 1, rows).astype(int)
    windows = torch.from_numpy(np.stack([tokens[s : s + length + 1] for s in starts]).astype(np.int64))
    model.eval()
    losses = [next_token_loss(model, part).item() for part in windows.split(8)]
    model.train()
    return float(np.mean(losses))


def train_base(
    config: BaseConfig, tokens: np.ndarray, held_out: np.ndarray, eos_token_id: int, folder: Path
) -> tuple[PreTrainedModel, dict[str, object]]:
    """Train (or resume) and return the model with its training record."""
    model = new_model(config, eos_token_id)
    optimizers = make_optimizers(model, config.matrix_lr, config.vector_lr)
    base_rates = [config.matrix_lr, config.vector_lr]
    checkpoint, step, history = folder / "base.pt", 0, []
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step, history = state["step"], state["history"]
        print(f"resumed at step {step}")
    loss_fn = torch.compile(next_token_loss) if config.compile else next_token_loss
    model.train()
    started, first_step, running = time.time(), step, math.nan
    while step < config.steps:
        loss = loss_fn(model, sample_batch(tokens, step, config))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, rate in zip(optimizers, base_rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * learning_rate_scale(step, config)
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        running = loss.item() if math.isnan(running) else 0.95 * running + 0.05 * loss.item()
        if step % LOG_EVERY == 0:
            pace = (time.time() - started) / (step - first_step)
            left = pace * (config.steps - step) / 60
            print(
                f"base step {step}/{config.steps} loss {running:.3f} {pace:.2f} s/step, {left:.0f} min left", flush=True
            )
        if step % config.save_every == 0 or step == config.steps:
            history.append({"step": step, "train_loss": running, "held_out_loss": held_out_loss(model, held_out)})
            print(f"  held-out loss {history[-1]['held_out_loss']:.4f}", flush=True)
            save_checkpoint(checkpoint, model, optimizers, step, history)
    return model.eval(), {"config": asdict(config), "history": history}


def save_checkpoint(path: Path, model: nn.Module, optimizers: list, step: int, history: list) -> None:
    """Write beside, then rename: a kill in the middle leaves the previous checkpoint whole."""
    state = {
        "model": model.state_dict(),
        "optimizers": [o.state_dict() for o in optimizers],
        "step": step,
        "history": history,
    }
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)
