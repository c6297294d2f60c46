"""A training run from examples to saved heads."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from ladon.errors import HeadsError, InputError
from ladon.heads import Heads
from ladon.heads.model_parts import output_projection
from ladon.train.checkpoints import remove_checkpoints, to_resume
from ladon.train.config import TrainOptions
from ladon.train.data.batches import Collator, RowOrder, batches_of, rows_of
from ladon.train.data.documents import Document, data_hash, documents_from, shown, split
from ladon.train.data.rows import Example, read_rows
from ladon.train.modules import HeadsModule
from ladon.train.start import make_module
from ladon.train.trainer import HeadsTrainer, LossLines, Reports, history, rows_per_update, training_arguments

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    options: TrainOptions,
    out: Path,
    say: Callable[[str], None],
    source: str = "",
    field: str | None = None,
) -> dict[str, Any]:
    """Train heads for `model` and save them in `out`.

    Started by `torchrun` or `accelerate launch`, several processes share the rows; the first alone speaks and saves.

    Args:
        model: the target, on its device.
        tokenizer: its tokenizer, for the example that is shown.
        examples: what is learned.
        options: how.
        out: a folder, made if needed, for checkpoints and heads.
        say: takes a line about the progress.
        source: where the examples come from, for the record.
        field: of a file of held-out rows, as `read_rows` takes it.

    Returns:
        The report, as JSON values.
    """
    if os.environ.get("RANK", "0") != "0":
        say = _silent
    length = min(options.length, _longest(model))
    learning, held_out, notes = _documents(model, tokenizer, examples, options, field, length)
    for reason, count in notes.items():
        say(f"{count} of {len(examples)} rows {reason}")
    say(shown(learning[0], tokenizer))
    dtype = model.dtype
    module = make_module(model, options, learning)
    heads, share_rows = module.heads, module.loss_options.packed
    rows = rows_of([len(document.tokens) for document in learning], length if share_rows else 0)
    arguments = training_arguments(options, out, len(rows), model.device)
    module.total_steps = arguments.max_steps
    settings = _settings(options, arguments, dtype, heads, [*learning, *held_out])
    checkpoint = _checkpoint(options, out, settings)
    if checkpoint is not None:
        say(f"going on from {checkpoint}")
    num_trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    say(
        f"{len(learning)} documents in {len(rows)} rows of at most {length} tokens, {len(held_out)} held out; "
        f"{arguments.max_steps} updates of {num_trained:,} numbers"
    )
    collator = Collator(heads.num_heads, heads.vocab_size, heads.token_ids)
    looked_at = batches_of(held_out, length if share_rows else 0, collator, options.batch_size)
    reports = Reports(looked_at, options.eval_every, options.speedup, say)
    order = RowOrder(learning, rows, arguments.max_steps * rows_per_update(arguments), options.seed)
    trainer = HeadsTrainer(module, arguments, options, settings, order, collator, [LossLines(say), reports])
    reports.trainer = trainer
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    record = {"settings": settings, "source": source, "rows": len(learning), "notes": notes, **_skipped(module, say)}
    record["history"] = history(trainer.state.log_history)
    if arguments.should_save:
        _finish(module, out, tokenizer, record)
    return {"out": str(out), "steps": trainer.state.global_step, **record}


def _settings(
    options: TrainOptions, arguments: Any, dtype: torch.dtype, heads: Heads, documents: Sequence[Document]
) -> dict[str, Any]:
    """All that decides the result, which a resumed run must share, as JSON values."""
    return {
        **options.binding(),
        "num_heads": heads.num_heads,
        "family": heads.family,
        "family_options": heads.options,
        "updates": arguments.max_steps,
        "processes": arguments.world_size,
        "dtype": str(dtype).removeprefix("torch."),
        "model": heads.base_fingerprint and asdict(heads.base_fingerprint),
        "heads": heads.weights_hash,
        "data": data_hash(documents),
    }


def _documents(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    options: TrainOptions,
    field: str | None,
    length: int,
) -> tuple[list[Document], list[Document], dict[str, int]]:
    """Documents to learn from and for the reports, and what became of the other rows."""
    vocab_size = output_projection(model).vocab_size
    documents, notes = documents_from(examples, vocab_size, length)
    try:
        share = float(options.held_out)
    except ValueError:
        rows = read_rows(options.held_out, tokenizer, field=field)
        held_out, _ = documents_from(rows, vocab_size, length)
    else:
        if not 0 <= share < 1:
            raise InputError(f"held_out is {options.held_out}; give a share of the rows, below 1, or a file")
        documents, held_out = split(documents, share)
    if options.learn == "all":  # the reports stay about answers
        documents = [document.all_learned() for document in documents]
    return documents, held_out, notes


def _checkpoint(options: TrainOptions, out: Path, settings: dict[str, Any]) -> Path | None:
    """The checkpoint to go on from. `out` is there afterwards."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to {out}: {error.strerror}; give another --out") from error
    if not options.resume:
        if os.environ.get("RANK", "0") == "0":
            remove_checkpoints(out)
        return None
    return to_resume(out, settings)


def _skipped(module: HeadsModule, say: Callable[[str], None]) -> dict[str, int]:
    """What was left out of the training because it was not finite."""
    found = {"skipped_rows": int(module.skipped_rows), "skipped_steps": int(module.skipped_steps)}
    for name, count in found.items():
        if count:
            say(f"{name.replace('_', ' ')}: {count}, because something in them was not finite")
    return found


def _finish(module: HeadsModule, out: Path, tokenizer: PreTrainedTokenizerBase, record: dict[str, Any]) -> None:
    """Save what was trained."""
    try:
        module.finish(out, tokenizer, record)
    except (OSError, SafetensorError, HeadsError) as error:
        raise InputError(
            f"cannot write to {out}: {error}; the checkpoint is intact. Make room and run the same command again"
        ) from error


def _longest(model: PreTrainedModel) -> int:
    """The most tokens that the model reads."""
    return getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or 2**20


def _silent(_: str) -> None:
    """Take a line of a process that does not speak."""
