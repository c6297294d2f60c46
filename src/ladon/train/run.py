"""A training run from examples to saved heads."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ladon.heads import Heads, load_heads, new_heads
from ladon.heads.ends import output_projection
from ladon.train.batches import Collator, Document, RowOrder, documents_from, packed
from ladon.train.config import TrainOptions
from ladon.train.modules import HeadsModule, LossOptions
from ladon.train.rows import Example
from ladon.train.trainer import HeadsTrainer, training_arguments

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    options: TrainOptions,
    out: Path,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Train heads for `model` and save them in `out`.

    Args:
        model: the target, on its device.
        tokenizer: its tokenizer, for the example that is shown.
        examples: what is learned.
        options: how.
        out: a folder, made if needed, for checkpoints and heads.
        say: takes a line about the progress.

    Returns:
        The report, as JSON values.
    """
    length = min(options.length, _longest(model))
    documents, notes = documents_from(examples, output_projection(model).vocab_size, length)
    for reason, count in notes.items():
        say(f"{count} of {len(examples)} rows {reason}")
    learning, held_out = split(documents, options.held_out)
    say(shown(learning[0], tokenizer))
    model.requires_grad_(False)
    heads = start_heads(model, options)
    module = HeadsModule(model, heads, loss_options(options, model))
    rows = packed([len(document.tokens) for document in learning], length)
    arguments = training_arguments(options, out, len(rows), model.device)
    order = RowOrder(learning, rows, _rows_of_run(arguments), options.seed)
    say(
        f"{len(learning)} documents in {len(rows)} rows of {length} tokens, {len(held_out)} held out; "
        f"{arguments.max_steps} updates of {sum(p.numel() for p in heads.parameters()):,} parameters"
    )
    trainer = HeadsTrainer(
        module, arguments, options, order, Collator(heads.num_heads, heads.vocab_size, heads.token_ids), say
    )
    trainer.train()
    heads.training_record = {"settings": options.binding(), "rows": len(learning), **notes}
    heads.save(out)
    return {"out": str(out), "steps": trainer.state.global_step, "settings": options.binding()}


def split(documents: Sequence[Document], held_out: str) -> tuple[list[Document], list[Document]]:
    """Documents to learn from, and a share of them, 1 at least, chosen by the hash of their ids, to look at."""
    share = float(held_out)
    count = min(len(documents) - 1, max(1, round(share * len(documents)))) if share > 0 else 0
    ranked = sorted(documents, key=lambda document: hashlib.sha256(document.id.encode()).digest())
    chosen = {id(document) for document in ranked[:count]}
    return [d for d in documents if id(d) not in chosen], [d for d in documents if id(d) in chosen]


def shown(document: Document, tokenizer: PreTrainedTokenizerBase, most: int = 400) -> str:
    """The beginning of a document as text, what is learned between double angle brackets."""
    parts, start = [], 0
    edges = (document.learned[1:] != document.learned[:-1]).nonzero()[0] + 1
    for stop in [*edges.tolist(), len(document.tokens)]:
        text = tokenizer.decode(document.tokens[start:stop].tolist())
        parts.append(f"«{text}»" if document.learned[start] else text)
        start = stop
    text = "".join(parts)
    return f"row {document.id}, learned between « and »: {text if len(text) <= most else text[:most] + '…'}"


def start_heads(model: PreTrainedModel, options: TrainOptions) -> Heads:
    """New heads, or those to go on from, in their training dtype: float32, or the model's if that is wider."""
    if options.init_heads is not None:
        heads = load_heads(options.init_heads, model)
    else:
        heads = new_heads(model, options.num_heads, options.family, seed=options.seed, **dict(options.family_options))
    return heads.to(torch.float64 if model.dtype == torch.float64 else torch.float32).train()


def loss_options(options: TrainOptions, model: PreTrainedModel) -> LossOptions:
    """The losses' part of the options."""
    half = options.precision == "bf16" or (options.precision == "auto" and model.dtype == torch.bfloat16)
    return LossOptions(
        soft=options.labels == "target",
        decay=options.decay,
        autocast=torch.bfloat16 if half else None,
        chunk_rows=options.chunk_rows,
        packed=True,
    )


def _longest(model: PreTrainedModel) -> int:
    """The most tokens that the model reads."""
    return getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or 2**20


def _rows_of_run(arguments: Any) -> int:
    """Rows that all processes see together in the whole run."""
    per_update = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    return int(arguments.max_steps * per_update)
