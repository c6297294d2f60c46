"""Train the base language model: a small decoder on the standard library.

The last part of the training runs at the full context length.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from training import Optimizers, Schedule, Stage, Text, even_windows
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class BaseConfig(Schedule):
    """Shape of the model and length of its training."""

    arch: str = "llama"
    vocab_size: int = 4096
    hidden_size: int = 256
    num_layers: int = 8
    num_heads: int = 4
    intermediate_size: int = 768
    max_positions: int = 2048
    steps: int = 2600
    short_length: int = 256
    long_share: float = 0.12  # share of the steps, at the end, that run at max_positions
    decay_share: float = 0.45
    matrix_lr: float = 0.02
    vector_lr: float = 3e-3


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


def base_optimizers(model: nn.Module, matrix_lr: float, vector_lr: float) -> Optimizers:
    """Muon for the matrices inside the layers, AdamW for embeddings, norms and biases."""
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    matrices = [p for p in model.parameters() if p.ndim == 2 and id(p) not in embeddings]
    matrix_ids = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in matrix_ids]
    return Optimizers(
        (torch.optim.Muon(matrices, lr=matrix_lr, weight_decay=0.05), matrix_lr),
        (torch.optim.AdamW(others, lr=vector_lr, betas=(0.9, 0.95), weight_decay=0.01), vector_lr),
    )


def next_token_loss(model: PreTrainedModel, batch: Tensor) -> Tensor:
    """Mean cross-entropy in nats of batch [B, T + 1]; the matrix products run in bfloat16."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: PreTrainedModel, tokens: np.ndarray, length: int = 512, rows: int = 64) -> float:
    """Mean loss in nats per token over evenly spaced windows of held-out text."""
    losses = [next_token_loss(model, part).item() for part in even_windows(tokens, rows, length + 1).split(8)]
    return float(np.mean(losses))


def train_base(
    config: BaseConfig, text: Text, eos_token_id: int, checkpoint: Path
) -> tuple[PreTrainedModel, dict[str, object]]:
    """Train (or resume) and return the model with its training record."""
    model = new_model(config, eos_token_id)
    loss_of: Callable[[PreTrainedModel, Tensor], Tensor] = next_token_loss
    if config.compile:
        loss_of = torch.compile(loss_of)

    def backward(step: int) -> Tensor:
        is_long = step >= config.steps * (1 - config.long_share)
        length = config.max_positions if is_long else config.short_length
        rng = np.random.default_rng((config.seed, step))
        loss = loss_of(model, text.windows(config.batch_tokens // length, length + 1, rng))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        return loss[None]

    stage = Stage(
        name=checkpoint.stem,
        schedule=config,
        module=model,
        optimizers=[base_optimizers(model, config.matrix_lr, config.vector_lr)],
        backward=backward,
        evaluate=lambda losses: {"train_loss": losses[0], "held_out_loss": held_out_loss(model, text.held_out)},
    )
    return model, {"settings": asdict(config), "history": stage.train(checkpoint.parent)}
