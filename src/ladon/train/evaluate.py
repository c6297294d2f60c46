"""How good heads are on rows that they did not learn from, and what that promises for decoding."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from ladon.calibrate.timing import measure_step_times
from ladon.config import AUTO_BUDGET, HIDDEN_ROWS, MARKOV_ROWS, PATH_ROWS, DecoderOptions
from ladon.drafting.head_chaining import hidden_rows, paths
from ladon.heads import ConditionedHeads, Heads
from ladon.heads.correction import HiddenCorrection, MarkovCorrection
from ladon.heads.model_parts import input_embedding_module, output_projection
from ladon.sampling.acceptance import longest_match
from ladon.train.losses import rows_per_chunk
from ladon.train.modules import evaluating, hidden_states
from ladon.trees import lattice
from ladon.trees.grow import grow_chain, grow_dynamic
from ladon.trees.lattice import best_rows
from ladon.trees.token_tree import ancestor_mask, node_depths
from ladon.util.devices import widest_float
from ladon.util.files import rounded

TOP = 5  # accuracies are given for the best 1 to 5 candidates
# Vicuna-7B with MEDUSA-1, from the authors' files: the training log of five heads on ShareGPT, and tokens per step over
# all of MT-Bench (v1.3 weights, greedy, their fixed tree of 64 nodes); the speed-up is that of the paper, on an A100.
REFERENCE_NAME = "Vicuna-7B"
REFERENCE_TOP1 = (0.560, 0.316, 0.201, 0.147, 0.118)
REFERENCE_TOP5 = (0.780, 0.563, 0.417, 0.340, 0.300)
REFERENCE_LENGTH, REFERENCE_SPEEDUP = 2.57, 2.18
_OF_POSITIONS = ("rows", "labels", "mask", "following")  # what a batch holds per position


@dataclass(frozen=True, kw_only=True)
class HeldOutReport:
    """Heads on held-out rows. Numbers that nothing was counted for are NaN.

    Attributes:
        positions: places at which each head's goal is learned, [K].
        loss: mean cross-entropy of each head in nats, [K].
        accuracy: how often the goal is among the best 1 to 5 candidates of each head, [K][5].
        steps: places at which all heads' goals are known: those that the acceptance lengths are means over.
        chain_length: tokens per step of the chain of every head's best candidate, bonus token included.
        tree_length: the same of the dynamic tree, of partial paths where heads read the path so far.
        budget: nodes of that tree, root included.
    """

    positions: tuple[int, ...]
    loss: tuple[float, ...]
    accuracy: tuple[tuple[float, ...], ...]
    steps: int
    chain_length: float
    tree_length: float
    budget: int

    def as_dict(self) -> dict[str, Any]:
        """As JSON values: rounded to 4 places, None for NaN."""
        found: dict[str, Any] = rounded(asdict(self))
        return found


class _Sums:
    """What is added up over positions, on the device in the widest floating point that it has."""

    def __init__(self, num_heads: int, device: torch.device) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=widest_float(device), device=device)

        self.loss, self.positions = zeros(num_heads), zeros(num_heads)
        self.hits = zeros(num_heads, TOP)
        self.steps, self.chain, self.tree = zeros(1), zeros(1), zeros(1)

    def report(self, budget: int) -> HeldOutReport:
        """The means."""
        return HeldOutReport(
            positions=tuple(int(count) for count in self.positions.tolist()),
            loss=tuple((self.loss / self.positions).tolist()),
            accuracy=tuple(tuple(row) for row in (self.hits / self.positions[:, None]).tolist()),
            steps=int(self.steps),
            chain_length=float(self.chain / self.steps),
            tree_length=float(self.tree / self.steps),
            budget=budget,
        )


@torch.no_grad()
def evaluate(
    model: PreTrainedModel, heads: Heads, batches: Iterable[Mapping[str, Tensor]], *, budget: int = AUTO_BUDGET
) -> HeldOutReport:
    """Look at heads on held-out rows.

    The acceptance lengths are those of steps that begin at each position alike. Decoding takes fewer steps where the
    heads are right, so it stays a little below them; `ladon calibrate` simulates that too. Positions go through the
    heads in chunks, as in training.

    Args:
        model: the target. It is in evaluation mode meanwhile.
        heads: bound to it; they may be of another dtype, as in training.
        batches: as a `Collator` makes them. Without "position_ids" the model is not told any. Where heads have a
            vocabulary of their own, an unknown goal counts as missed in the acceptance lengths: it may lie outside.
        budget: nodes of the dynamic tree, root included.
    """
    sums = _Sums(heads.num_heads, next(heads.parameters()).device)
    rows_per_head = HIDDEN_ROWS if isinstance(heads.correction, HiddenCorrection) else 1
    chunk = rows_per_chunk(heads.num_heads * rows_per_head, heads.vocab_size)
    with evaluating(model, heads), _common_dtype(model, heads):
        for batch in batches:
            hidden = hidden_states(model, dict(batch), "position_ids" in batch).flatten(0, 1)
            for start in range(0, len(batch["rows"]), chunk):
                part = {name: batch[name][start : start + chunk] for name in _OF_POSITIONS}
                _add(sums, heads, hidden[part["rows"]], part, budget)
    return sums.report(budget)


def _add(sums: _Sums, heads: Heads, hidden: Tensor, rows: Mapping[str, Tensor], budget: int) -> None:
    """Count some positions: hidden states [c, H], and `labels`, `mask`, `following` [c, K] of their goals."""
    following, mask, labels = rows["following"], rows["mask"], rows["labels"]
    logits = heads.corrected(hidden, following)
    weights = mask.to(sums.loss.dtype)
    losses = functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none")
    sums.loss += (losses.view(labels.shape).to(weights.dtype) * weights).nan_to_num().sum(0)
    sums.positions += weights.sum(0)
    best = logits.topk(min(TOP, logits.shape[-1]), dim=-1).indices  # [c, K, 5]
    hits = functional.pad((best == labels[..., None]).cumsum(-1), (0, TOP - best.shape[-1]), mode="replicate")
    sums.hits += (hits * weights[..., None]).sum(0)

    known = mask.all(-1) if heads.token_ids is None else mask.any(-1)
    found = _drafted(heads, hidden[known], following[known, 0], logits[known])
    truth = labels.masked_fill(~mask, -1)[known]
    chain = grow_chain(found, truth.new_zeros(len(truth)), heads.num_heads + 1).tokens[:, 1:]
    if isinstance(heads, ConditionedHeads):  # of whose best paths the chain need not be one
        guess = paths(heads, best_rows(PATH_ROWS), heads.num_heads, DecoderOptions().num_candidates)
        found = guess(hidden[known], following[known, 0])
    tree = grow_dynamic(found, truth.new_zeros(len(truth)), budget)
    ancestors = ancestor_mask(tree.parents, tree.max_depth)
    picks = functional.pad(truth, (0, 1), value=-1).gather(1, node_depths(ancestors))
    sums.steps += len(truth)
    sums.chain += len(truth) + (chain == truth).cumprod(1).sum()
    sums.tree += longest_match(tree, picks, ancestors).count.sum()


def _drafted(heads: Heads, hidden: Tensor, root: Tensor, logits: Tensor) -> lattice.Lattice:
    """What decoding would draft from, in the heads' own vocabulary, where the roots have no name and need none.

    Args:
        heads: the heads.
        hidden: [n, H].
        root: [n], tokens of the target.
        logits: [n, K, D], after the true tokens: those of decoding too if the heads do not read these.
    """
    num_candidates, correction = DecoderOptions().num_candidates, heads.correction
    if isinstance(correction, HiddenCorrection):
        return hidden_rows(heads, correction, num_candidates)(hidden, root)
    found = lattice.from_logits(heads.draft(hidden, root) if heads.reads_following else logits, num_candidates)
    if isinstance(correction, MarkovCorrection):
        gates = correction.gates(hidden)
        return lattice.conditioned(found, root, correction.among, num_rows=MARKOV_ROWS, gates=gates)
    return found


def _common_dtype(model: PreTrainedModel, heads: Heads) -> AbstractContextManager[Any]:
    """Heads are trained in float32 beside a model in half precision: their products are then the model's."""
    parameter = next(heads.parameters())
    kind = parameter.device.type
    if parameter.dtype == model.dtype or torch.is_autocast_enabled(kind):
        return nullcontext()
    return torch.autocast(kind, model.dtype)


def measure_cost(model: PreTrainedModel, heads: Heads, context: Tensor, budget: int = AUTO_BUDGET) -> float:
    """Time of a decode step of `budget` nodes, drafting included, over that of plain decoding; takes some seconds.

    Args:
        model: the target.
        heads: bound to it; a copy is measured, in the model's dtype. Their quality does not matter.
        context: token ids in the cache meanwhile, [T].
        budget: nodes, root included.

    Raises:
        UnsupportedModelError: the model cannot decode with Ladon.
    """
    ends = (output_projection(model).module, input_embedding_module(model))
    draft = copy.deepcopy(heads, {id(module): module for module in ends})  # the model's own modules stay as they are
    return measure_step_times(model, draft, context, nodes=[budget]).relative[-1]


def projected_speedup(report: HeldOutReport, cost: float) -> float:
    """Tokens per second over plain decoding, if `cost` (see `measure_cost`) is all that a step takes longer."""
    return report.tree_length / cost


def lines(reports: Mapping[str, HeldOutReport], cost: float | None = None) -> list[str]:
    """Reports side by side, with what others reached beside them.

    Args:
        reports: by what they are after, such as "1 %"; of the same heads and rows.
        cost: of `measure_cost`, for the projected speed-up.
    """
    if not reports:
        return []
    found = list(reports.values())
    rows: list[tuple[str, list[str], str]] = [("held-out rows, after", list(reports), REFERENCE_NAME)]
    for place in range(len(found[0].loss)):
        head = place + 1
        top1, top5 = (_reference(values, place) for values in (REFERENCE_TOP1, REFERENCE_TOP5))
        rows.append((f"head {head}: loss (nats)", [_shown(report.loss[place]) for report in found], ""))
        rows.append((f"head {head}: top-1", [_shown(report.accuracy[place][0]) for report in found], top1))
        rows.append((f"head {head}: top-5", [_shown(report.accuracy[place][-1]) for report in found], top5))
    chain, tree = ([_shown(getattr(r, name)) for r in found] for name in ("chain_length", "tree_length"))
    rows.append(("tokens per step, chain", chain, ""))
    rows.append((f"tokens per step, tree of {found[0].budget}", tree, f"{REFERENCE_LENGTH:.2f} *"))
    if cost is not None:
        speedups = [_shown(projected_speedup(report, cost)) for report in found]
        rows.append((f"speed-up if a step takes {cost:.2f} x", speedups, f"{REFERENCE_SPEEDUP:.2f} *"))
    first = max(len(name) for name, _, _ in rows)
    return [
        *(f"{name:<{first}}{''.join(f'{v:>9}' for v in values)}{last:>12}".rstrip() for name, values, last in rows),
        f"{REFERENCE_NAME}: MEDUSA-1 as its authors trained it; * on MT-Bench, fixed tree of 64",
    ]


def _reference(values: tuple[float, ...], place: int) -> str:
    return f"{values[place]:.3f}" if place < len(values) else ""


def _shown(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "-"
