"""A training run from examples to saved heads."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from ladon.errors import HeadsError, InputError
from ladon.heads import Heads, load_heads, new_heads
from ladon.heads.correction import MarkovCorrection
from ladon.heads.early_exit import new_early_exit
from ladon.heads.factory import CORRECTION_OPTIONS
from ladon.heads.model_parts import output_projection
from ladon.train.config import TrainOptions
from ladon.train.data.batches import Collator, RowOrder, batches_of, rows_of
from ladon.train.data.rows import Document, Example, data_hash, documents_from, read_rows, shown, split
from ladon.train.modules import HeadsModule, JointModule, keeps_apart
from ladon.train.trainer import (
    HeadsTrainer,
    LossLines,
    Reports,
    history,
    remove_checkpoints,
    rows_per_update,
    to_resume,
    training_arguments,
)
from ladon.util.files import explained

_POWER_ITERATIONS = 4


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
    heads, share_rows = module.heads, module.packed
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
    trainer = HeadsTrainer(module, arguments, settings, order, collator, [LossLines(say), reports])
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
        "model": heads.base_fingerprint and heads.base_fingerprint.as_dict(),
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
    with explained(f"cannot write to {out}", InputError, "give another --out"):
        out.mkdir(parents=True, exist_ok=True)
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


def make_module(model: PreTrainedModel, options: TrainOptions, documents: Sequence[Document] = ()) -> HeadsModule:
    """Heads, and what else is trained, ready for the Trainer; start values may come from what is learned."""
    share_rows = options.packing != "off" and keeps_apart(model)
    if options.packing == "on" and not share_rows:
        raise InputError(
            f"packing is on, but in {type(model).__name__} documents that share a row see each other; use --packing off"
        )
    set_seed(options.seed)
    model.requires_grad_(False).eval()
    heads, early_exit = start_heads(model, options, documents), None
    if options.early_exit is not None:
        early_exit = new_early_exit(model, options.early_exit, seed=options.seed).to(_master(model))
    kind = HeadsModule if options.joint == "off" else JointModule
    return kind(model, heads, options, share_rows, early_exit)


def start_heads(model: PreTrainedModel, options: TrainOptions, documents: Sequence[Document] = ()) -> Heads:
    """New heads, or those to go on from, in their training dtype: float32, or the model's if that is wider."""
    if options.init_heads is not None:
        heads = load_heads(options.init_heads, model)
        _check_same_kind(options, heads)
        heads.calibration = None  # of what they were
    else:
        heads = new_heads(model, options.num_heads, options.family, seed=options.seed, **dict(options.family_options))
    if heads.correction is None and options.markov_rank:
        correction = heads.add_correction(options.markov_rank, options.markov_successors, options.markov_gate)
        correction.initialise(options.seed)
        if options.markov_start == "bigrams":
            start_from_bigrams(correction, documents, options.seed)
    if heads.correction is None and options.hidden_correction:
        heads.add_hidden_correction(options.hidden_correction).initialise(options.seed)
    if options.freeze_heads:
        if heads.correction is None or options.init_heads is None:
            raise InputError(
                "--freeze-heads trains a correction on given heads: add --init-heads, and --markov-rank or "
                "--hidden-correction"
            )
        heads.requires_grad_(False)
        heads.correction.requires_grad_(True)
    return heads.to(_master(model))


def _check_same_kind(options: TrainOptions, heads: Heads) -> None:
    """Raise `InputError` if settings ask for other heads than those to go on from."""
    usual = TrainOptions()
    own: dict[str, Any] = {"num_heads": heads.num_heads, "family": heads.family}
    if heads.correction is not None:
        own |= {name: heads.options.get(name, 0) for name in CORRECTION_OPTIONS}
        own["markov_start"] = usual.markov_start  # it has started
    wrong = [name for name, value in own.items() if getattr(options, name) not in (value, getattr(usual, name))]
    wrong += [name for name, value in options.family_options if heads.options.get(name) != value]
    if wrong:
        raise InputError(
            f"{options.init_heads} holds {heads.num_heads} {heads.family} heads {heads.options}; training goes on with "
            f"these, so leave out {', '.join(name.replace('_', '-') for name in wrong)}, or --init-heads"
        )


def _master(model: PreTrainedModel) -> torch.dtype:
    return torch.float64 if model.dtype == torch.float64 else torch.float32


@torch.no_grad()
def start_from_bigrams(correction: MarkovCorrection, documents: Sequence[Document], seed: int) -> None:
    """Set a correction to what its documents' pairs of neighbouring tokens say.

    The products <W1[u], W2[v]> come as near as their rank allows to the pointwise mutual information of u and v,
    log(count(u, v) total / (count(u) count(v))), taken as 0 where it is negative or the pair never occurs.

    Args:
        correction: its numbers are set, strengths to 1.
        documents: whose pairs are counted.
        seed: of the search for the best approximation.
    """
    vocab_size = correction.before.shape[0]
    pairs, shares = _information(documents, vocab_size)
    matrix = torch.sparse_coo_tensor(pairs, shares, (vocab_size, vocab_size), check_invariants=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        left, sizes, right = torch.svd_lowrank(matrix, q=correction.rank, niter=_POWER_ITERATIONS)
    correction.before.copy_(left * sizes.sqrt())
    correction.after.copy_(right * sizes.sqrt())
    correction.strength.fill_(1.0)


def _information(documents: Sequence[Document], vocab_size: int) -> tuple[Tensor, Tensor]:
    """The pairs [2, P] int64 that occur oftener than by chance, and their mutual information [P] float32."""
    before = np.concatenate([document.tokens[:-1] for document in documents]).astype(np.int64)
    after = np.concatenate([document.tokens[1:] for document in documents]).astype(np.int64)
    pairs, counts = np.unique(before * vocab_size + after, return_counts=True)
    first, second = np.divmod(pairs, vocab_size)
    before_counts, after_counts = (np.bincount(tokens, minlength=vocab_size) for tokens in (before, after))
    by_chance = before_counts[first] / len(before) * after_counts[second]
    information = np.log(counts / by_chance)
    kept = information > 0
    return torch.from_numpy(np.stack([first, second])[:, kept]), torch.from_numpy(information[kept]).float()
