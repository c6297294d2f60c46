"""`transformers.Trainer` for heads: what is counted, saved, resumed and reported."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from ladon.train.batches import Collator, RowOrder
from ladon.train.config import TrainOptions
from ladon.train.modules import HeadsModule, learned_counts

STATE_FILE = "trained.safetensors"


class HeadsTrainer(Trainer):
    """Trains a `HeadsModule`.

    Means are taken over all learned positions that share an update: the Trainer hands over every micro-batch of it at
    once, and the counts of all processes are added up before the first forward. Data-parallel gradients are averages
    over processes, hence the factor in `compute_loss`.
    """

    def __init__(
        self,
        module: HeadsModule,
        arguments: TrainingArguments,
        options: TrainOptions,
        rows: RowOrder,
        collator: Collator,
        say: Callable[[str], None],
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        super().__init__(
            model=module,
            args=arguments,
            train_dataset=rows,
            data_collator=collator,
            callbacks=[_LossLines(say), *callbacks],
        )
        self.remove_callback(PrinterCallback)  # it prints on standard output
        self.options = options
        self.model_accepts_loss_kwargs = True  # the loss is that of the whole update: not to be divided once more

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler[int]:
        return torch.utils.data.SequentialSampler(self.train_dataset)  # the rows' order is in RowOrder

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Tensor]], device: torch.device) -> Tensor | None:
        if not batch_samples:
            return None
        counts = learned_counts(batch_samples).to(device)
        if self.accelerator.num_processes > 1:
            counts = self.accelerator.reduce(counts, reduction="sum")
        return counts

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """The loss of one micro-batch, as its share of the update's."""
        loss = model(counts=num_items_in_batch, **inputs) * self.accelerator.num_processes
        return (loss, None) if return_outputs else loss

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """One group for the heads, and one for the model where it is trained."""
        if self.optimizer is None:
            self.optimizer = torch.optim.AdamW(
                [
                    {
                        "params": [p for p in self.model.heads.parameters() if p.requires_grad],
                        "lr": self.options.heads_rate,
                        "name": "heads",
                    }
                ],
                weight_decay=self.options.weight_decay,
            )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LambdaLR:
        """Warm-up, then the schedule."""
        if self.lr_scheduler is None:
            optimizer = optimizer or self.optimizer
            self.lr_scheduler = LambdaLR(optimizer, schedule(self.options, num_training_steps))
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Write what is trained, as it is in training."""
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({k: v.detach().cpu().contiguous() for k, v in self.model.state_dict().items()}, folder / STATE_FILE)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the heads' own losses to the line about the loss."""
        if "loss" in logs:
            losses = self.model.take_head_losses()
            logs |= {f"loss_head_{k}": loss for k, loss in enumerate(losses, start=1)}
        super().log(logs, start_time)


class _LossLines(TrainerCallback):
    """Lines about the loss."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        """Say what has been logged."""
        if logs and "loss" in logs and state.is_world_process_zero:
            heads = [f"{value:.3f}" for name, value in logs.items() if name.startswith("loss_head_")]
            self._say(
                f"step {state.global_step}/{state.max_steps}: loss {logs['loss']:.4f}, by head {', '.join(heads)}; "
                f"learning rate {logs['learning_rate']:.2e}"
            )


def training_arguments(options: TrainOptions, out: Path, num_rows: int, device: torch.device) -> TrainingArguments:
    """The Trainer's arguments.

    Args:
        options: how to train.
        out: where checkpoints go.
        num_rows: rows of an epoch.
        device: the model's.
    """
    arguments = TrainingArguments(
        output_dir=str(out),
        max_steps=options.steps or 1,
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.accumulation,
        max_grad_norm=options.clip,
        save_strategy="steps",
        save_steps=options.save_every,
        save_total_limit=1,
        logging_steps=options.log_every,
        logging_nan_inf_filter=False,
        report_to=options.report_to,
        seed=options.seed,
        use_cpu=device.type == "cpu",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=device.type != "cpu",
        ddp_broadcast_buffers=False,
        ddp_find_unused_parameters=options.joint != "off",
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # several GPUs in one process hold a model's parts, no copies of it
    if options.steps is None:
        per_update = options.batch_size * options.accumulation * arguments.world_size
        arguments.max_steps = max(1, math.ceil(options.epochs * num_rows / per_update))
    return arguments


def schedule(options: TrainOptions, steps: int, start: int = 0) -> Callable[[int], float]:
    """The learning rate of a step as a share of its peak: a linear rise, then the options' schedule down to 0.

    Args:
        options: name of the schedule and share of the warm-up.
        steps: of the whole training.
        start: the first step that counts; 0 before it.
    """
    warmup = math.ceil(options.warmup * (steps - start))

    def share(step: int) -> float:
        step -= start
        if step < warmup:
            return max(0, step + 1) / (warmup + 1)
        done = (step - warmup) / max(1, steps - start - warmup)
        if options.schedule == "constant":
            return 1.0
        return max(
            0.0, 1.0 - done if options.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))
        )

    return share
