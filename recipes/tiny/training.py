"""What the training of every stage shares: the schedule, the batches, the loop, the checkpoints.

Every batch is a function of (seed, step) alone, so a run that was killed and resumed sees what an uninterrupted one
would have seen.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

LOG_EVERY = 10
SMOOTHING = 0.95  # of the losses that are shown


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Length of a stage: warm-up, constant, then linear to zero over the last `decay_share` of the steps."""

    steps: int
    batch_tokens: int = 8192
    warmup_steps: int = 60
    decay_share: float = 0.5
    seed: int = 0
    compile: bool = False
    save_every: int = 100

    def rate_scale(self, step: int) -> float:
        """Factor of the learning rates at this step, counted from 0."""
        return min(1.0, (step + 1) / self.warmup_steps, (self.steps - step) / (self.decay_share * self.steps))


@dataclass(frozen=True, kw_only=True)
class Text:
    """What a stage learns from and is measured on.

    Attributes:
        kinds: token ids of each kind of training text.
        shares: how much of each, adding up to 1.
        held_out: token ids that are never trained on.
    """

    kinds: Sequence[np.ndarray]
    shares: Sequence[float]
    held_out: np.ndarray

    def windows(self, rows: int, span: int, rng: np.random.Generator) -> Tensor:
        """Random windows of the training text, [rows, span] int64."""
        chosen = rng.choice(len(self.kinds), size=rows, p=self.shares) if len(self.kinds) > 1 else [0] * rows
        windows = []
        for kind in chosen:
            start = rng.integers(0, len(self.kinds[kind]) - span)
            windows.append(self.kinds[kind][start : start + span])
        return torch.from_numpy(np.stack(windows).astype(np.int64))


def even_windows(tokens: np.ndarray, rows: int, span: int) -> Tensor:
    """Evenly spaced windows [rows, span] int64, for measuring."""
    starts = np.linspace(0, len(tokens) - span, rows).astype(int)
    return torch.from_numpy(np.stack([tokens[s : s + span] for s in starts]).astype(np.int64))


class Optimizers:
    """Optimizers with the learning rate that each has at full scale."""

    def __init__(self, *parts: tuple[torch.optim.Optimizer, float]) -> None:
        self.parts = parts

    def step(self, scale: float) -> None:
        """One update at `scale` times the learning rates; gradients are cleared."""
        for optimizer, rate in self.parts:
            for group in optimizer.param_groups:
                group["lr"] = rate * scale
            optimizer.step()
            optimizer.zero_grad()


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One training stage.

    Attributes:
        name: what the log and the checkpoint are called.
        schedule: its length.
        module: what is trained and saved.
        optimizers: what `step` is called on.
        backward: computes the gradients of a step, counted from 0, and returns the losses to show, [n].
        evaluate: measures, given the smoothed losses; the result goes into the history.
    """

    name: str
    schedule: Schedule
    module: nn.Module
    optimizers: Sequence[Optimizers]
    backward: Callable[[int], Tensor]
    evaluate: Callable[[list[float]], dict[str, object]]

    def train(self, folder: Path) -> list[dict[str, object]]:
        """Train in place, or go on where `folder` says; returns the history."""
        schedule, checkpoint = self.schedule, folder / f"{self.name}.pt"
        step, history, running = self._resume(checkpoint)
        started, first_step = time.time(), step
        self.module.train()
        while step < schedule.steps:
            losses = self.backward(step).detach()
            for optimizers in self.optimizers:
                optimizers.step(schedule.rate_scale(step))
            running = losses if running is None else SMOOTHING * running + (1 - SMOOTHING) * losses
            step += 1
            if step % LOG_EVERY == 0:
                pace = (time.time() - started) / (step - first_step)
                shown = " ".join(f"{x:.3f}" for x in running.tolist())
                left = pace * (schedule.steps - step) / 60
                paces = f"{pace:.2f} s/step, {left:.0f} min left"
                print(f"{self.name} step {step}/{schedule.steps} loss {shown} {paces}", flush=True)
            if step % schedule.save_every == 0 or step == schedule.steps:
                self.module.eval()
                history.append({"step": step, **self.evaluate(running.tolist())})
                self.module.train()
                print(f"  {history[-1]}", flush=True)
                self._save(checkpoint, step, history, running)
        self.module.eval()
        return history

    def _resume(self, checkpoint: Path) -> tuple[int, list[dict[str, object]], Tensor | None]:
        if not checkpoint.exists():
            return 0, [], None
        state = torch.load(checkpoint, weights_only=True)
        self.module.load_state_dict(state["model"])
        for optimizer, saved in zip(self._parts(), state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        print(f"{self.name} resumed at step {state['step']}", flush=True)
        return state["step"], state["history"], state["running"]

    def _save(self, checkpoint: Path, step: int, history: list[dict[str, object]], running: Tensor) -> None:
        """Write beside, then rename: a kill in the middle leaves the previous checkpoint whole."""
        state = {
            "model": self.module.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self._parts()],
            "step": step,
            "history": history,
            "running": running,
        }
        partial = checkpoint.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(checkpoint)

    def _parts(self) -> list[torch.optim.Optimizer]:
        return [optimizer for optimizers in self.optimizers for optimizer, _ in optimizers.parts]
