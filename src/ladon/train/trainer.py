"""`transformers.Trainer` for heads: what is counted, saved, resumed and reported.

Checkpoints are whole or absent, and gone on from only with the settings that they were made with.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from ladon.errors import InputError, UnsupportedModelError
from ladon.train.config import REPORT_SHARES, TrainOptions
from ladon.train.data.batches import Collator, RowOrder
from ladon.train.evaluate import HeldOutReport, evaluate, lines, measure_cost, projected_speedup
from ladon.train.modules import HeadsModule, learned_counts
from ladon.train.optimizer import make_optimizer

_COST_CONTEXT = 256  # tokens before the decode step that is timed
SETTINGS_FILE = "settings.json"
STATE_FILE = "trained.safetensors"
PARTIAL = ".partial"
_BUFFERS = ("skipped_rows", "skipped_steps")


class HeadsTrainer(Trainer):
    """Trains a `HeadsModule`.

    Means are taken over all learned positions that share an update: the Trainer hands over every micro-batch of it at
    once, and the counts of all processes are added up before the first forward. Data-parallel gradients are averages
    over processes, hence the factor in `compute_loss`.

    Args:
        module: what is trained, with the options that say how.
        arguments: the Trainer's own.
        settings: what a resumed run must share; kept with every checkpoint.
        rows: the rows of the whole run.
        collator: makes batches of them.
        callbacks: the Trainer's, beside its own.
    """

    optimizer: torch.optim.Optimizer | None
    lr_scheduler: LambdaLR | None

    def __init__(
        self,
        module: HeadsModule,
        arguments: TrainingArguments,
        settings: dict[str, Any],
        rows: RowOrder,
        collator: Collator,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        super().__init__(
            model=module,
            args=arguments,
            train_dataset=rows,
            data_collator=collator,
            callbacks=[SkipWildSteps(), *callbacks],
        )
        self.remove_callback(PrinterCallback)  # it prints on standard output
        self.options, self.settings = module.options, settings
        self.model_accepts_loss_kwargs = True  # the loss is a share of the update's: not to be divided once more
        self._saving_below: Path | None = None

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
        self.model.set_step(self.state.global_step)
        loss = model(counts=num_items_in_batch, **inputs).to(self.args.device) * self.accelerator.num_processes
        return (loss, None) if return_outputs else loss

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """One group for the heads, and one for the model where it is trained."""
        if self.optimizer is None:
            groups = self.model.groups(heads=self.options.heads_rate, base=self.options.base_rate)
            self.optimizer = make_optimizer(
                groups, self.options.optimizer, self.options.weight_decay, vocab_size=self.model.heads.vocab_size
            )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LambdaLR:
        """The schedule of each group; the model's begins when the model joins."""
        if self.lr_scheduler is None:
            optimizer = optimizer or self.optimizer
            starts = {"base": self.options.heads_warmup_steps}
            self.lr_scheduler = LambdaLR(
                optimizer,
                [
                    schedule(self.options, num_training_steps, starts.get(group["name"], 0))
                    for group in optimizer.param_groups
                ],
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _get_output_dir(self, trial: Any = None) -> str:
        return str(self._saving_below or self.args.output_dir)

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        """A checkpoint appears under its name when all of it is written."""
        with whole(
            Path(self.args.output_dir), f"checkpoint-{self.state.global_step}", self.args.should_save
        ) as self._saving_below:
            super()._save_checkpoint(model, trial)
        self._saving_below = None

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        write_state(Path(output_dir or self.args.output_dir), self.model, self.settings)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        read_state(Path(resume_from_checkpoint), self.model)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the single losses to the line about the loss."""
        if "loss" in logs:
            logs |= self.model.take_losses()
        super().log(logs, start_time)


class SkipWildSteps(TrainerCallback):
    """Leaves out an update whose gradient is not finite, and counts it."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Drop the gradients, so that no optimizer moves anything."""
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        if not gradients:
            return
        norms = torch.stack([norm.float().to(args.device) for norm in torch._foreach_norm(gradients)])
        if not torch.isfinite(norms).all():
            model.skipped_steps += 1
            for parameter in model.parameters():
                parameter.grad = None


class LossLines(TrainerCallback):
    """Lines about the loss."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        """Say what has been logged."""
        if logs and "loss" in logs and state.is_world_process_zero:
            single = [f"{name.removeprefix('loss_')} {value:.3f}" for name, value in logs.items() if "loss_" in name]
            self._say(
                f"step {state.global_step}/{state.max_steps}: loss {logs['loss']:.4f} ({', '.join(single)}), "
                f"learning rate {logs['learning_rate']:.2e}"
            )


def training_arguments(options: TrainOptions, out: Path, num_rows: int, device: torch.device) -> TrainingArguments:
    """The Trainer's arguments.

    Args:
        options: how to train.
        out: where checkpoints go.
        num_rows: rows of an epoch.
        device: the model's.

    Raises:
        InputError: what the losses are to be reported to is not installed; a GPU that is not the Trainer's.
    """
    if device.type == "cuda" and device.index and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        raise InputError(
            f"the model is on {device}, but a single process trains on the first GPU; set CUDA_VISIBLE_DEVICES="
            f"{device.index} and leave --device out"
        )
    if options.report_to != "none" and find_spec(options.report_to) is None:
        raise InputError(f"report_to is {options.report_to}, which is not installed; pip install {options.report_to}")
    arguments = TrainingArguments(
        output_dir=str(out),
        max_steps=options.steps or 1,
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.accumulation,
        max_grad_norm=options.clip,
        save_strategy="steps",
        save_steps=options.save_every,
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
        arguments.max_steps = max(1, math.ceil(options.epochs * num_rows / rows_per_update(arguments)))
    return arguments


def rows_per_update(arguments: TrainingArguments) -> int:
    """Rows that all processes see together in one update."""
    per_process = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    return int(per_process * arguments.world_size)


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
        done = min(1.0, (step - warmup) / max(1, steps - start - warmup))
        if options.schedule == "constant":
            return 1.0
        return 1.0 - done if options.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))

    return share


class Reports(TrainerCallback):
    """Looks at held-out rows at some updates; what it finds is in the trainer's log and thereby in its checkpoints.

    Args:
        batches: held-out rows, on the CPU.
        every: updates between further reports, 0 for none.
        with_cost: whether to measure what a decode step costs, for the projected speed-up.
        say: takes a line.
    """

    def __init__(
        self, batches: Sequence[dict[str, Tensor]], every: int, with_cost: bool, say: Callable[[str], None]
    ) -> None:
        self._batches, self._every, self._with_cost, self._say = batches, every, with_cost, say
        self._reports: dict[str, HeldOutReport] = {}
        self._cost: float | None = None
        self.trainer: HeadsTrainer | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Remember what a resumed run had found."""
        for entry in history(state.log_history):
            self._cost = entry.get("step_cost")
            self._reports[entry["after"]] = HeldOutReport(
                **{f.name: _as_report(entry[f.name]) for f in fields(HeldOutReport)}
            )

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Report if it is time."""
        marks = {max(1, math.ceil(share * state.max_steps)): f"{share:.0%}" for share in REPORT_SHARES}
        step = state.global_step
        name = marks.get(step) or (f"step {step}" if self._every and step % self._every == 0 else None)
        if name is None or not self._batches or not state.is_world_process_zero or self.trainer is None:
            return
        report = self._look(model)
        self._reports[name] = report
        entry: dict[str, Any] = {"after": name, "rows_seen": step * rows_per_update(args), **report.as_dict()}
        if self._cost is not None:
            entry |= {"step_cost": round(self._cost, 3), "speedup": round(projected_speedup(report, self._cost), 3)}
        should_log = control.should_log
        self.trainer.log(_scalars(entry))
        control.should_log = should_log  # which a log clears, and the loss of this update is not yet logged
        state.log_history.append({"held_out": entry, "step": step})
        for line in lines(self._reports, self._cost):
            self._say(line)

    def _look(self, module: HeadsModule) -> HeldOutReport:
        if self._with_cost and self._cost is None:
            self._cost = self._measured_cost(module)
        left_out = () if module.packed else ("position_ids",)
        told = ({name: table for name, table in batch.items() if name not in left_out} for batch in self._batches)
        with module.autocast():
            return evaluate(module.model, module.heads, (module.beside_heads(batch) for batch in told))

    def _measured_cost(self, module: HeadsModule) -> float | None:
        self._with_cost = False
        context = self._batches[0]["input_ids"][0, :_COST_CONTEXT]
        try:
            return measure_cost(module.model, module.heads, context.to(next(module.heads.parameters()).device))
        except UnsupportedModelError as error:
            self._say(f"no projected speed-up: {error}")
            return None


def history(log_history: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The reports in a trainer's log."""
    return [{"step": entry["step"], **entry["held_out"]} for entry in log_history if "held_out" in entry]


def _as_report(value: Any) -> Any:
    """A JSON value as a report holds it."""
    if isinstance(value, list):
        return tuple(_as_report(part) for part in value)
    return math.nan if value is None else value


def _scalars(entry: dict[str, Any]) -> dict[str, float]:
    """What TensorBoard and others draw."""
    found = {f"held_out_{name}": entry[name] for name in ("chain_length", "tree_length", "speedup") if entry.get(name)}
    for head, (loss, accuracy) in enumerate(zip(entry["loss"], entry["accuracy"], strict=True), start=1):
        found |= {f"held_out_loss_head_{head}": loss, f"held_out_top1_head_{head}": accuracy[0]}
        found |= {f"held_out_top5_head_{head}": accuracy[-1]}
    return {name: value for name, value in found.items() if value is not None}


def trained_state(module: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint keeps of a module: each parameter that is trained, and the counts of what was skipped."""
    state = {name: parameter.detach() for name, parameter in module.named_parameters() if parameter.requires_grad}
    return state | {name: buffer for name, buffer in module.named_buffers() if name.rpartition(".")[2] in _BUFFERS}


def write_state(folder: Path, module: nn.Module, settings: dict[str, Any]) -> None:
    """Write the state and the settings that it was made with."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.cpu().contiguous() for name, tensor in trained_state(module).items()}
    save_file(state, folder / STATE_FILE)
    (folder / SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


@torch.no_grad()
def read_state(folder: Path, module: nn.Module) -> None:
    """Put the state in `folder` into the module.

    Raises:
        InputError: the file is damaged, or of another module.
    """
    own = trained_state(module)
    try:
        with safe_open(folder / STATE_FILE, framework="pt") as file:
            names = set(file.keys())
            if names != set(own):
                raise InputError(
                    f"{folder} holds another module (differing: {', '.join(sorted(names ^ set(own))[:3])}); start over "
                    "with --no-resume"
                )
            for name, tensor in own.items():
                tensor.copy_(file.get_tensor(name))
    except (OSError, SafetensorError) as error:
        raise InputError(f"{folder / STATE_FILE} cannot be read ({error}); start over with --no-resume") from error


def latest(out: Path) -> Path | None:
    """The checkpoint with the most updates; None if there is none."""
    found = get_last_checkpoint(str(out))
    return None if found is None else Path(found)


def to_resume(out: Path, settings: dict[str, Any]) -> Path | None:
    """The checkpoint to go on from; None if there is none.

    Raises:
        InputError: its settings are others; the first that differs is named.
    """
    folder = latest(out)
    if folder is None:
        return None
    try:
        saved = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} has no settings that can be read ({error}); start over with --no-resume") from error
    for name in [*settings, *(saved.keys() - settings.keys())]:
        if saved.get(name) != settings.get(name):
            raise InputError(
                f"{out} holds a training with {name} {_brief(saved.get(name))}, this one has "
                f"{_brief(settings.get(name))}; give the same settings, another --out, or --no-resume to start over"
            )
    return folder


def remove_checkpoints(out: Path, but: Path | None = None) -> None:
    """Remove all checkpoints in `out` except one."""
    for path in out.glob("checkpoint-*"):
        if re.fullmatch(r"checkpoint-\d+", path.name) and path != but:
            shutil.rmtree(path)
    shutil.rmtree(out / PARTIAL, ignore_errors=True)


@contextmanager
def whole(out: Path, name: str, is_writer: bool) -> Iterator[Path]:
    """A folder to write a checkpoint below; at the end `name` in it takes the place of all older ones in `out`.

    Args:
        out: where checkpoints are.
        name: the checkpoint's.
        is_writer: whether this process moves it; the others only write below.

    Raises:
        InputError: it cannot be written, as on a full disk. The older checkpoint stays as it is.
    """
    partial = out / PARTIAL
    before = latest(out)
    try:
        if is_writer:
            shutil.rmtree(partial, ignore_errors=True)
        _meet()  # before anyone writes there
        yield partial
        _meet()
        if is_writer and not (out / name).exists():
            (partial / name).rename(out / name)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch.save raises RuntimeError on a full disk
        shutil.rmtree(partial, ignore_errors=True)
        kept = f"{before.name} is intact" if before else "nothing was saved yet"
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0][:200]
        raise InputError(
            f"cannot write a checkpoint to {out}: {reason}; {kept}. Make room and run the same command again"
        ) from error
    if is_writer:
        remove_checkpoints(out, but=out / name)


def _meet() -> None:
    """Wait for the other processes, if there are any."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:59] + "…"
