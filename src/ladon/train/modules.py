"""What the Trainer trains: the heads, or model and heads together, as one module whose output is a loss.

Together is MEDUSA-2 (arXiv 2401.10774, section 2.2.2). The heads first learn alone; then the model joins, at a smaller
learning rate, with the loss L = L_model + w L_heads: its hidden states learn to hold what comes after the next token.
The result is another model.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ladon.errors import InputError
from ladon.heads import Heads
from ladon.heads.card import write_card
from ladon.heads.checkpoint import EARLY_EXIT_FILES
from ladon.heads.correction import MarkovCorrection
from ladon.heads.early_exit import EarlyExit
from ladon.heads.model_parts import output_projection
from ladon.target.hooks import layer_output, lock_of, projection_inputs
from ladon.train.config import TrainOptions
from ladon.train.losses import Labels, Outcome, SoftLabels, TokenLabels, chunked_loss, rows_per_chunk
from ladon.util.devices import input_device

Batch = dict[str, Tensor]
_PROBE = 6  # tokens of each of the probe's documents
_SAME = (
    1e-3  # relative change that a document may show when its neighbour changes; experts that share a batch show some
)
_ALIKE = 0.05  # relative difference to the document alone; half precision shows 0.01


class HeadsModule(nn.Module):
    """Heads on a frozen model (MEDUSA-1). The model is no submodule: it is neither saved, moved nor trained.

    Args:
        model: the target, in evaluation mode.
        heads: bound to it, in their training dtype.
        options: how they are trained.
        packed: whether the model is told where documents begin.
        early_exit: a head in the middle of the model, trained beside them on what the model says at the end.

    Attributes:
        heads: the heads.
        options: how they are trained.
        packed: whether the model is told where documents begin.
        early_exit: the early-exit head, or None.
        total_steps: updates of the whole training; set before it begins.
        skipped_rows: scalar int64, rows left out so far because something in them was not finite; saved.
        skipped_steps: scalar int64, updates left out because the gradient was not finite; saved.
    """

    skipped_rows: Tensor
    skipped_steps: Tensor
    _depth_weights: Tensor

    def __init__(
        self, model: PreTrainedModel, heads: Heads, options: TrainOptions, packed: bool, early_exit: EarlyExit | None
    ) -> None:
        super().__init__()
        self._model = (model,)
        self.heads, self.options, self.packed = heads, options, packed
        self._products = products_dtype(options, model)
        device, dtype = next(heads.parameters()).device, next(heads.parameters()).dtype
        self.early_exit = None if early_exit is None else early_exit.to(device)
        if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
            # Two names on one device tell Trainer and accelerate to leave this module where it is.
            self.hf_device_map = {"heads": device, "early_exit": device}
        for name in ("skipped_rows", "skipped_steps"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64, device=device))
        depths = torch.arange(1, heads.num_heads + 1, device=device)
        self.register_buffer("_depth_weights", options.decay ** depths.to(dtype), persistent=False)
        self.total_steps = 1
        self._step = 0
        self._tallies: dict[str, tuple[Tensor, Tensor]] = {}  # losses and positions since the last log

    @property
    def model(self) -> PreTrainedModel:
        """The target."""
        return self._model[0]

    def set_step(self, step: int) -> None:
        """Say how many updates were made."""
        self._step = step

    def groups(self, *, heads: float, base: float) -> list[dict[str, Any]]:
        """What is trained, at which learning rate, for `make_optimizer`."""
        own = [(name, p) for name, p in self.named_parameters() if name.startswith(("heads.", "early_exit."))]
        return [group("heads", own, heads)]

    def forward(self, counts: Tensor | None = None, **batch: Tensor) -> Tensor:
        """The loss of a batch.

        Args:
            counts: [K + 1], learned positions of each head, and of the next token, over all that shares one update:
                losses are divided by them. None: those of this batch.
            **batch: what a `Collator` makes.
        """
        counts = learned_counts([batch]) if counts is None else counts
        with torch.no_grad():
            hidden, early = self.read(batch)
        batch, counts = self.beside_heads(batch), counts.to(hidden.device)
        loss = self.heads_loss(hidden, batch, counts)
        return loss if early is None else loss + self.exit_loss(early, hidden, batch, counts)

    def finish(self, out: Path, tokenizer: PreTrainedTokenizerBase, record: dict[str, Any]) -> None:
        """Save what was trained in `out`, the heads in float32, with a record of how."""
        self.heads.training_record = record
        if isinstance(self.heads.correction, MarkovCorrection):
            self.heads.correction.find_successors()
        self.heads.save(out)
        if self.early_exit is None:
            for name in EARLY_EXIT_FILES:  # of an earlier training: it would be taken for these heads'
                (out / name).unlink(missing_ok=True)
        else:
            self.early_exit.training_record = {"settings": record["settings"]}
            self.early_exit.save(out)
        write_card(out, self.heads, early_exit=self.early_exit, data=record["source"])

    def autocast(self) -> torch.autocast:
        """The context of all products. Casts are not cached: one made without gradients would be used with them."""
        dtype, kind = self._products, next(self.heads.parameters()).device.type
        return torch.autocast(kind, dtype or torch.bfloat16, enabled=dtype is not None, cache_enabled=False)

    def read(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """At each token what the output projection receives, and what the early exit reads, [B T, H] both."""
        noted = (
            nullcontext(list[Tensor]()) if self.early_exit is None else layer_output(self.model, self.early_exit.layer)
        )
        with self.autocast(), noted as seen:
            hidden = hidden_states(self.model, batch, self.packed)
        device = self._depth_weights.device
        early = seen[0].flatten(0, 1).to(device) if seen else None
        return hidden.flatten(0, 1).to(device), early

    def beside_heads(self, batch: Batch) -> Batch:
        """The batch on the heads' device, which is that of the last layer where several hold the model."""
        return {name: tensor.to(self._depth_weights.device) for name, tensor in batch.items()}

    def heads_loss(self, hidden: Tensor, batch: Batch, counts: Tensor) -> Tensor:
        """The sum over heads of decay ** k times the mean loss of head k, from hidden states [B T, H]."""
        heads = self.heads
        following = batch["following"] if heads.reads_following else None
        labels: Labels = TokenLabels(batch["labels"])
        if self.options.labels == "target":
            depths = torch.arange(1, heads.num_heads + 1, device=hidden.device)
            places = (batch["rows"][:, None] + depths).clamp(max=len(hidden) - 1)  # beyond the end nothing is learned
            how = (self.options.label_temperature, self.options.variation)
            labels = SoftLabels(heads.project, hidden.detach(), places, heads.token_ids, *how)
        with self.autocast():
            outcome = chunked_loss(
                lambda rows, which: heads(rows) if following is None else heads.corrected(rows, following[which]),
                hidden[batch["rows"]],
                labels,
                batch["mask"] * (self._depth_weights / counts[:-1].clamp(min=1)),
                [*heads.parameters(), *self.projection_parameters()],
                self.chunk_rows(heads.num_heads),
            )
        self.count("head", outcome, batch["mask"].sum(0))
        return outcome.loss

    def exit_loss(self, early: Tensor, hidden: Tensor, batch: Batch, counts: Tensor) -> Tensor:
        """The mean divergence of the early exit from what the model says at the same place, from [B T, H] of both."""
        assert self.early_exit is not None
        rows, head, project = batch["next_rows"], self.early_exit, self.heads.project
        labels = SoftLabels(project, hidden, rows[:, None])
        return self.next_token_loss(
            "exit", lambda part: project(head(part)), early[rows], labels, counts, [*head.parameters()]
        )

    def next_token_loss(
        self,
        name: str,
        logits_of: Callable[[Tensor], Tensor],
        hidden: Tensor,
        labels: Labels,
        counts: Tensor,
        parameters: Sequence[nn.Parameter],
    ) -> Tensor:
        """The mean loss, logged as `name`, of what guesses the next token from hidden rows [N, H], as heads do not."""
        with self.autocast():
            outcome = chunked_loss(
                lambda part, _: logits_of(part)[:, None],
                hidden,
                labels,
                self._depth_weights.new_ones(len(hidden), 1) / counts[-1].clamp(min=1),
                parameters,
                self.chunk_rows(1),
            )
        self.count(name, outcome, torch.tensor([len(hidden)], device=hidden.device))
        return outcome.loss

    def chunk_rows(self, num_heads: int) -> int:
        """Positions that go together through so many heads."""
        device = self._depth_weights.device.type
        return rows_per_chunk(num_heads, self.heads.vocab_size, self.options.chunk_rows, device)

    def projection_parameters(self) -> list[nn.Parameter]:
        """The output projection's, where they are trained."""
        return [p for p in output_projection(self.model).module.parameters() if p.requires_grad]

    def count(self, name: str, outcome: Outcome, positions: Tensor) -> None:
        """Add to the losses since the last log; `positions` [K] belong to the outcome's sums."""
        self.skipped_rows += outcome.skipped
        losses, before = self._tallies.get(name, (0, 0))
        self._tallies[name] = (losses + outcome.sums, before + positions)

    def take_losses(self) -> dict[str, float]:
        """The mean losses in nats since the last call, by name, as this process saw them."""
        found: dict[str, float] = {}
        for name, (losses, positions) in self._tallies.items():
            means = (losses / positions.clamp(min=1)).tolist()
            numbered = len(means) > 1 or name == "head"
            found |= {f"loss_{name}_{k}" if numbered else f"loss_{name}": x for k, x in enumerate(means, start=1)}
        self._tallies.clear()
        return found


def products_dtype(options: TrainOptions, model: PreTrainedModel) -> torch.dtype | None:
    """The dtype of the products where it is not that of the weights."""
    if options.precision == "fp32":
        if model.dtype not in (torch.float32, torch.float64):
            raise InputError(f"precision is fp32, but the model is in {model.dtype}; load it in float32, or use bf16")
        return None
    has_bf16 = model.dtype == torch.bfloat16 or (model.device.type == "cuda" and torch.cuda.is_bf16_supported())
    if options.precision == "auto" and (not has_bf16 or model.dtype == torch.float64):
        return None
    return torch.bfloat16


def group(name: str, parameters: Any, rate: float) -> dict[str, Any]:
    """Those of named parameters that are trained, as `make_optimizer` takes them."""
    trained = [(key, parameter) for key, parameter in parameters if parameter.requires_grad]
    return {"name": name, "lr": rate, "names": [key for key, _ in trained], "params": [value for _, value in trained]}


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """While this lasts, modules are in evaluation mode."""
    were_training = [module.training for module in modules]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for module, was_training in zip(modules, were_training, strict=True):
            module.train(was_training)


def hidden_states(model: PreTrainedModel, batch: Batch, packed: bool) -> Tensor:
    """What the model's output projection receives at each token, [B, T, H]; it maps only the first of each row.

    Args:
        model: the target.
        batch: its `input_ids`, and `position_ids` if the model is told where documents begin.
        packed: whether it is.
    """
    ids = batch["input_ids"]
    inputs = {"position_ids": batch["position_ids"]} if packed else {}
    first = torch.zeros(len(ids), dtype=torch.int64, device=ids.device)
    with lock_of(model), projection_inputs(output_projection(model).module, first) as seen:
        model(input_ids=ids, use_cache=False, **inputs)
    return seen[0]


def learned_counts(batches: Sequence[Batch]) -> Tensor:
    """Learned positions of each head, and of the next token, in some batches: [K + 1] float32."""
    heads = torch.stack([batch["mask"].sum(0) for batch in batches]).sum(0)
    following = sum(len(batch["next_rows"]) for batch in batches)
    return torch.cat([heads, heads.new_tensor([following])]).float()


@torch.no_grad()
def keeps_apart(model: PreTrainedModel) -> bool:
    """Whether position ids that start anew keep two documents in one row from seeing each other.

    transformers masks packed documents by their position ids, but not for every architecture and attention; a
    recurrent layer cannot. So it is tried: the second document must not change with the first, and be as it is alone.
    """
    with evaluating(model):
        try:
            return _second_is_alone(model)
        except (TypeError, ValueError):  # a forward that takes no position ids
            return False


def _second_is_alone(model: PreTrainedModel) -> bool:
    vocab_size = output_projection(model).vocab_size
    generator = torch.Generator("cpu").manual_seed(0)
    ids = torch.randint(vocab_size, (3, _PROBE), generator=generator, device="cpu").to(input_device(model))
    apart = torch.arange(_PROBE, device=ids.device)[None]
    places = torch.cat([apart, apart], dim=1)

    def second(first: int) -> torch.Tensor:
        row = torch.cat([ids[first], ids[2]])[None]
        return hidden_states(model, {"input_ids": row, "position_ids": places}, packed=True)[0, _PROBE:].cpu().double()

    one, other = second(0), second(1)
    alone = hidden_states(model, {"input_ids": ids[2:], "position_ids": apart}, packed=True)[0].cpu().double()
    changed, differs = (one - other).norm() / one.norm(), (one - alone).norm() / alone.norm()
    return bool(changed < _SAME and differs < _ALIKE)


class JointModule(HeadsModule):
    """Heads and the model, or LoRA adapters in it.

    The model is trained in place, its weights in the heads' dtype; the checkpoint that it came from stays as it is.
    It takes what `HeadsModule` takes.
    """

    def __init__(
        self, model: PreTrainedModel, heads: Heads, options: TrainOptions, packed: bool, early_exit: EarlyExit | None
    ) -> None:
        check_trainable(model)
        super().__init__(model, heads, options, packed, early_exit)
        self._stored = model.dtype
        self._teacher: tuple[PreTrainedModel, ...] = ()
        self._adapted: tuple[Any, ...] = ()
        if options.joint == "lora":
            self._adapted = (with_adapters(model, options),)
        else:
            if options.base_loss == "distill":
                self._teacher = (copy.deepcopy(model).eval(),)
            model.to(next(heads.parameters()).dtype).requires_grad_(True)
        self.base = model

    def groups(self, *, heads: float, base: float) -> list[dict[str, Any]]:
        """See `HeadsModule`."""
        return [*super().groups(heads=heads, base=base), group("base", self.base.named_parameters(), base)]

    def train(self, mode: bool = True) -> JointModule:
        """The model's own dropout, and that of adapters, is for when it is trained."""
        super().train(mode)
        self.base.train(mode and self.has_joined)
        return self

    @property
    def has_joined(self) -> bool:
        """Whether the model is trained yet."""
        return self._step >= self.options.heads_warmup_steps

    def forward(self, counts: Tensor | None = None, **batch: Tensor) -> Tensor:
        """See `HeadsModule`."""
        self.base.train(self.training and self.has_joined)
        if not self.has_joined:
            frozen: Tensor = super().forward(counts, **batch)
            return frozen
        counts = learned_counts([batch]) if counts is None else counts
        hidden, early = self.read(batch)
        batch, counts = self.beside_heads(batch), counts.to(hidden.device)
        loss = self.base_loss(hidden, batch, counts)
        loss = loss + self.heads_weight() * self.heads_loss(hidden, batch, counts)
        return loss if early is None else loss + self.exit_loss(early.detach(), hidden.detach(), batch, counts)

    def projection_parameters(self) -> list[nn.Parameter]:
        """See `HeadsModule`; nothing of the model is trained before it joins."""
        return super().projection_parameters() if self.has_joined else []

    def heads_weight(self) -> float:
        """What the heads' loss counts beside the model's, at this update."""
        options = self.options
        if options.heads_ramp == "none":
            return options.heads_weight
        start = options.heads_warmup_steps
        done = (self._step - start + 1) / max(1, self.total_steps - start)
        return options.heads_weight * math.sin(0.5 * math.pi * min(1.0, done))

    def base_loss(self, hidden: Tensor, batch: Batch, counts: Tensor) -> Tensor:
        """The model's mean loss: cross-entropy, or its divergence from the original model."""
        rows = batch["next_rows"]
        labels: Labels = TokenLabels(batch["next_labels"][:, None])
        if self.options.base_loss == "distill":
            labels = self._original(batch, rows)
        return self.next_token_loss(
            "model", self.heads.project, hidden[rows], labels, counts, self.projection_parameters()
        )

    @torch.no_grad()
    def _original(self, batch: Batch, rows: Tensor) -> SoftLabels:
        """What the original model says at some rows."""
        with self.autocast(), self._as_it_was() as teacher:
            hidden = hidden_states(teacher, batch, self.packed).flatten(0, 1)[rows]
        places = torch.arange(len(rows), device=rows.device)[:, None]
        return SoftLabels(output_projection(teacher).module, hidden, places)

    @contextmanager
    def _as_it_was(self) -> Iterator[PreTrainedModel]:
        """The original model: a copy of it, or this one without its adapters and dropout."""
        if self._teacher:
            yield self._teacher[0]
            return
        with evaluating(self.base), self._adapted[0].disable_adapter():
            yield self.model

    def finish(self, out: Path, tokenizer: PreTrainedTokenizerBase, record: dict[str, Any]) -> None:
        """Save the tuned model in `out`/model, adapters in `out`/adapter, and the heads, now the tuned model's."""
        model = self.base.eval()
        if self._adapted:
            self._adapted[0].save_pretrained(out / "adapter")
            model = self._adapted[0].merge_and_unload()
        model.to(self._stored)
        model.save_pretrained(out / "model")
        tokenizer.save_pretrained(out / "model")
        self.heads.remember_base(model)
        self.heads.base_name = str(out / "model")
        super().finish(out / "heads", tokenizer, record)


def check_trainable(model: PreTrainedModel) -> None:
    """Raise `InputError` if the model is quantised: it would neither be trained nor be saved whole."""
    if getattr(model, "is_quantized", False) or any(p.dtype.itemsize < 2 for p in model.parameters()):
        raise InputError("the model is quantised and cannot be trained itself; load it whole, or leave --joint off")


def with_adapters(model: PreTrainedModel, options: TrainOptions) -> Any:
    """Put LoRA adapters into all linear layers of the model but its output projection; peft's own handle on it."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise InputError("--joint lora needs peft; install it with pip install 'ladon-llm[train]'") from error
    config = LoraConfig(
        r=options.lora_rank,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about names of checkpoints that are not on a hub
        return get_peft_model(model, config)
