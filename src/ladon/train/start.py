"""What a training starts from: new heads or given ones, their start values, and what is trained beside them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import set_seed

from ladon.errors import InputError
from ladon.heads import Heads, load_heads, new_heads
from ladon.heads.correction import MarkovCorrection
from ladon.heads.early_exit import new_early_exit
from ladon.heads.factory import CORRECTION_OPTIONS
from ladon.train.config import TrainOptions
from ladon.train.data.documents import Document
from ladon.train.joint import JointModule
from ladon.train.modules import HeadsModule, LossOptions, keeps_apart

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_POWER_ITERATIONS = 4


def make_module(model: PreTrainedModel, options: TrainOptions, documents: Sequence[Document] = ()) -> HeadsModule:
    """Heads, and what else is trained, ready for the Trainer; start values may come from what is learned."""
    share_rows = options.packing != "off" and keeps_apart(model)
    if options.packing == "on" and not share_rows:
        raise InputError(
            f"packing is on, but in {type(model).__name__} documents that share a row see each other; use --packing off"
        )
    losses = LossOptions(
        soft=options.labels == "target",
        label_temperature=options.label_temperature,
        variation=options.variation,
        decay=options.decay,
        autocast=_autocast(options, model),
        chunk_rows=options.chunk_rows,
        packed=share_rows,
    )
    set_seed(options.seed)
    model.requires_grad_(False).eval()
    heads, early_exit = start_heads(model, options, documents), None
    if options.early_exit is not None:
        early_exit = new_early_exit(model, options.early_exit, seed=options.seed).to(_master(model))
    if options.joint == "off":
        return HeadsModule(model, heads, losses, early_exit)
    return JointModule(model, heads, losses, options, early_exit)


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


def _autocast(options: TrainOptions, model: PreTrainedModel) -> torch.dtype | None:
    """The dtype of the products where it is not that of the weights."""
    if options.precision == "fp32":
        if model.dtype not in (torch.float32, torch.float64):
            raise InputError(f"precision is fp32, but the model is in {model.dtype}; load it in float32, or use bf16")
        return None
    has_bf16 = model.dtype == torch.bfloat16 or (model.device.type == "cuda" and torch.cuda.is_bf16_supported())
    if options.precision == "auto" and (not has_bf16 or model.dtype == torch.float64):
        return None
    return torch.bfloat16


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
