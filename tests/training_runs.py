"""What the tests of training share: a few rows, a run with small settings, and a run that dies."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, TrainerCallback

from ladon.train.config import TrainOptions
from ladon.train.data.rows import Example
from ladon.train.run import train
from ladon.train.trainer import HeadsTrainer
from user_side import make_tokenizer

OPTIONS: dict[str, Any] = {
    "num_heads": 2,
    "steps": 6,
    "batch_size": 2,
    "length": 24,
    "log_every": 2,
    "save_every": 2,
    "held_out": "0.2",
    "speedup": False,
}


class Stop(Exception):
    """Raised where a training is killed."""


class Kill(TrainerCallback):
    """Ends the process, as far as the Trainer is concerned, after an update."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self._step:
            raise Stop


def examples(count: int = 11) -> list[Example]:
    generator = torch.Generator().manual_seed(1)
    found = []
    for i in range(count):
        ids = torch.randint(3, 97, (7 + i % 9,), generator=generator).tolist()
        found.append(Example(f"row {i}", ids, [False] * 2 + [True] * (len(ids) - 2)))
    return found


def run(model: PreTrainedModel, out: Path, said: list[str] | None = None, **options: Any) -> dict[str, Any]:
    lines = [] if said is None else said
    return train(model, make_tokenizer(), examples(), TrainOptions(**OPTIONS | options), out, lines.append)


def run_until(step: int, monkeypatch: pytest.MonkeyPatch, training: Callable[[], Any]) -> None:
    """Have a training die after an update."""
    plain = HeadsTrainer.__init__

    def with_kill(self: HeadsTrainer, *arguments: Any) -> None:
        plain(self, *arguments)
        self.add_callback(Kill(step))

    with monkeypatch.context() as patch:
        patch.setattr(HeadsTrainer, "__init__", with_kill)
        with pytest.raises(Stop):
            training()
