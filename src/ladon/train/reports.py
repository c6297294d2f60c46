"""Reports on held-out rows at 1, 10 and 100 % of a training: would more data help?"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from ladon.errors import UnsupportedModelError
from ladon.train.batches import Collator
from ladon.train.config import REPORT_SHARES
from ladon.train.documents import Document
from ladon.train.evaluate import HeldOutReport, evaluate, lines, measure_cost, projected_speedup
from ladon.train.modules import HeadsModule
from ladon.train.packing import rows_of

if TYPE_CHECKING:
    from ladon.train.trainer import HeadsTrainer

_COST_CONTEXT = 256  # tokens before the decode step that is timed


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
        entry: dict[str, Any] = {"after": name, "rows_seen": step * self._rows_per_update(args), **report.as_dict()}
        if self._cost is not None:
            entry |= {"step_cost": round(self._cost, 3), "speedup": round(projected_speedup(report, self._cost), 3)}
        should_log = control.should_log
        self.trainer.log(_scalars(entry))
        control.should_log = should_log  # which a log clears, and the loss of this update is not yet logged
        state.log_history.append({"held_out": entry, "step": step})
        for line in lines(self._reports, self._cost):
            self._say(line)

    def _look(self, module: HeadsModule) -> HeldOutReport:
        device = next(module.heads.parameters()).device
        if self._with_cost and self._cost is None:
            self._cost = self._measured_cost(module)
        packed = module.loss_options.packed
        with module.autocast():
            return evaluate(module.model, module.heads, (_moved(batch, device, packed) for batch in self._batches))

    def _measured_cost(self, module: HeadsModule) -> float | None:
        self._with_cost = False
        context = self._batches[0]["input_ids"][0, :_COST_CONTEXT]
        try:
            return measure_cost(module.model, module.heads, context.to(next(module.heads.parameters()).device))
        except UnsupportedModelError as error:
            self._say(f"no projected speed-up: {error}")
            return None

    @staticmethod
    def _rows_per_update(args: Any) -> int:
        return int(args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size)


def history(log_history: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The reports in a trainer's log."""
    return [{"step": entry["step"], **entry["held_out"]} for entry in log_history if "held_out" in entry]


def batches_of(documents: Sequence[Document], length: int, collator: Collator, size: int) -> list[dict[str, Tensor]]:
    """Batches of `size` rows of documents, packed to `length` tokens, or not if it is 0."""
    rows = rows_of([len(document.tokens) for document in documents], length)
    groups = [rows[start : start + size] for start in range(0, len(rows), size)]
    return [collator([[documents[i] for i in row] for row in part]) for part in groups]


def _as_report(value: Any) -> Any:
    """A JSON value as a report holds it."""
    if isinstance(value, list):
        return tuple(_as_report(part) for part in value)
    return math.nan if value is None else value


def _moved(batch: dict[str, Tensor], device: torch.device, packed: bool) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in batch.items() if packed or name != "position_ids"}


def _scalars(entry: dict[str, Any]) -> dict[str, float]:
    """What TensorBoard and others draw."""
    found = {f"held_out_{name}": entry[name] for name in ("chain_length", "tree_length", "speedup") if entry.get(name)}
    for head, (loss, accuracy) in enumerate(zip(entry["loss"], entry["accuracy"], strict=True), start=1):
        found |= {f"held_out_loss_head_{head}": loss, f"held_out_top1_head_{head}": accuracy[0]}
        found |= {f"held_out_top5_head_{head}": accuracy[-1]}
    return {name: value for name, value in found.items() if value is not None}
