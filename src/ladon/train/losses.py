"""The loss of all heads without the logits of all positions.

Logits [T, K, V] of a long text would take gigabytes (V = 128k, T = 2048, K = 5: 5.4 GB in float32, and as much for
their gradient). Here positions go through the heads in chunks, and each chunk's gradients are taken at once: what is
kept are gradients of the size of the parameters and of the hidden rows. To the outside it is one scalar with an
ordinary backward, so gradient accumulation, clipping and data parallelism know nothing of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Protocol

import torch
from torch import Tensor, nn

# Of one chunk's logits, all heads, in float32: what a CPU's caches bear, and what keeps a GPU busy.
CPU_CHUNK_BYTES, GPU_CHUNK_BYTES = 32 * 2**20, 256 * 2**20
_FEWEST_ROWS = 16
_BLOCK_BYTES = 2**19  # of one head's probabilities, in float32


Judge = Callable[[Tensor, Tensor, slice, int], Tensor]


class Labels(Protocol):
    """What is to be said at some rows."""

    def of(self, rows: Tensor) -> Judge:
        """The labels of a chunk of rows.

        Args:
            rows: [c], which of the rows.

        Returns:
            A function that takes logits and probabilities [b, D] of head k in full precision at some of these rows,
            which rows, and k, from 0. It returns the losses [b] in nats, and turns the probabilities, in place, into
            the losses' gradient by the logits.
        """
        ...


@dataclass(frozen=True)
class TokenLabels:
    """One token per row and head.

    Attributes:
        tokens: [R, K] int64, places in the heads' vocabulary.
    """

    tokens: Tensor

    def of(self, rows: Tensor) -> Judge:
        """See `Labels`."""
        tokens = self.tokens[rows]

        def judge(logits: Tensor, probs: Tensor, part: slice, head: int) -> Tensor:
            said = tokens[part, head, None]
            losses = _log_total(logits, probs) - logits.gather(1, said)[:, 0]
            probs.scatter_add_(1, said, probs.new_full(said.shape, -1.0))
            return losses

        return judge


@dataclass(frozen=True)
class SoftLabels:
    """The probabilities of another model, or of the target itself at the place that a head guesses.

    The losses are Kullback-Leibler divergences, or between these and total variations (half the sum of the absolute
    differences, the share of drafts that sampling would refuse): zero where nothing is left to learn.

    Attributes:
        logits_of: hidden rows [n, H] to logits [n, V].
        hidden: [P, H], what goes into it.
        places: [R, K] int64, the row of `hidden` for each row and head.
        token_ids: [D], the heads' own vocabulary, to which the probabilities are restricted; None: all of it.
        temperature: of the probabilities; below 1 they near the likeliest token alone.
        variation: share of the total variation in the losses, 0 to 1 (DSpark, arXiv 2607.05147, takes 0.9).
    """

    logits_of: Callable[[Tensor], Tensor]
    hidden: Tensor
    places: Tensor
    token_ids: Tensor | None = None
    temperature: float = 1.0
    variation: float = 0.0

    @torch.no_grad()
    def of(self, rows: Tensor) -> Judge:
        """See `Labels`."""
        # Each place once, however many heads guess it.
        places, which = torch.unique(self.places[rows], return_inverse=True)
        logits = self.logits_of(self.hidden[places])
        if self.token_ids is not None:
            logits = logits[:, self.token_ids]
        wide = logits.to(_wide(logits.dtype))
        if self.temperature != 1:
            wide = wide / self.temperature
        wanted = wide.softmax(-1)
        negative_entropy = _mean(wide, wanted) - _log_total(wide, wanted)
        del wide, logits

        def judge(logits: Tensor, probs: Tensor, part: slice, head: int) -> Tensor:
            places = which[part, head]
            own = wanted[places]
            losses = negative_entropy[places] + _log_total(logits, probs) - _mean(logits, own)
            if not self.variation:
                probs.sub_(own)
                return losses
            apart, slopes = _total_variation(probs, own)
            probs.sub_(own).lerp_(slopes, self.variation)
            return losses.lerp(apart, self.variation)

        return judge


@dataclass(frozen=True)
class Outcome:
    """What a loss came to.

    Attributes:
        loss: scalar, differentiable.
        sums: [K], each head's losses in nats, summed over its learned positions.
        skipped: scalar int64, rows left out because something in them was not finite.
    """

    loss: Tensor
    sums: Tensor
    skipped: Tensor


def chunked_loss(
    logits_of: Callable[[Tensor, Tensor], Tensor],
    hidden: Tensor,
    labels: Labels,
    weights: Tensor,
    parameters: Sequence[nn.Parameter],
    chunk_rows: int,
) -> Outcome:
    """The weighted sum of the losses of all rows and heads.

    Args:
        logits_of: hidden rows [c, H] and their places [c] to logits [c, K, D].
        hidden: [R, H]; gets a gradient if it wants one.
        labels: what is to be said.
        weights: [R, K] float, of each loss; 0 where nothing is learned.
        parameters: what `logits_of` uses and is trained.
        chunk_rows: rows that are in memory together.

    Rows whose loss is not finite are skipped and counted, as if their weight were 0.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    job = _Job(logits_of, labels, weights, trained, chunk_rows, torch.is_grad_enabled())
    loss, sums, skipped = _ChunkedLoss.apply(job, hidden, *trained)  # type: ignore[no-untyped-call]
    return Outcome(loss, sums, skipped)


def rows_per_chunk(num_heads: int, vocab_size: int, chunk_rows: int = 0, device: str = "cpu") -> int:
    """`chunk_rows`, or, if it is 0, as many rows as suit a device of that type."""
    size = CPU_CHUNK_BYTES if device == "cpu" else GPU_CHUNK_BYTES
    return chunk_rows or max(_FEWEST_ROWS, size // (4 * num_heads * vocab_size))


@dataclass(frozen=True)
class _Job:
    """The loss of some rows, and its gradients."""

    logits_of: Callable[[Tensor, Tensor], Tensor]
    labels: Labels
    weights: Tensor
    parameters: Sequence[nn.Parameter]
    chunk_rows: int
    with_gradients: bool

    def run(self, hidden: Tensor, with_hidden: bool) -> tuple[Tensor, Tensor, Tensor, _Gradients]:
        """Loss, sums, skipped rows, gradients of `hidden` [R, H] and of the parameters."""
        sums = torch.zeros(self.weights.shape[1], dtype=self.weights.dtype, device=hidden.device)
        loss, skipped = sums.new_zeros(()), torch.zeros((), dtype=torch.int64, device=hidden.device)
        gradients = _Gradients(
            torch.zeros_like(hidden) if with_hidden else None, [torch.zeros_like(p) for p in self.parameters]
        )
        for rows in torch.split(torch.arange(len(hidden), device=hidden.device), self.chunk_rows):
            if len(rows):
                losses, finite = self._chunk(hidden, rows, gradients)
                weights = self.weights[rows[finite]]
                loss += (losses * weights).sum()
                sums += (losses * (weights > 0)).sum(0)
                skipped += (~finite).sum()
        return loss, sums, skipped, gradients

    def _chunk(self, hidden: Tensor, rows: Tensor, gradients: _Gradients) -> tuple[Tensor, Tensor]:
        """Losses [f, K] of the rows that have finite ones, and which [c] these are; adds to the gradients."""
        with_hidden = gradients.hidden is not None
        losses, logits, slopes, inputs = self._forward(hidden, rows, with_hidden)
        finite = torch.isfinite(losses).all(-1)
        if not finite.all():
            del logits, slopes, inputs
            rows = rows[finite]
            if not len(rows):
                return losses[finite], finite
            losses, logits, slopes, inputs = self._forward(hidden, rows, with_hidden)
        if self.with_gradients:
            gradients.add(rows, logits, slopes, inputs, self.parameters)
        return losses, finite

    def _forward(self, hidden: Tensor, rows: Tensor, with_hidden: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Losses [c, K], logits [c, K, D] with their graph, the gradient by them, and the graph's input [c, H]."""
        inputs = hidden[rows].requires_grad_(with_hidden)
        with torch.set_grad_enabled(self.with_gradients):
            logits = self.logits_of(inputs, rows)
        weights, judge = self.weights[rows], self.labels.of(rows)
        losses, slopes = torch.empty_like(weights), torch.empty_like(logits, requires_grad=False)
        # In blocks, so that few have their probabilities in full precision, and those stay in a CPU's cache.
        size = len(rows) if logits.device.type != "cpu" else max(1, _BLOCK_BYTES // (4 * logits.shape[-1]))
        for start, head in product(range(0, len(rows), size), range(weights.shape[1])):
            part = slice(start, start + size)
            own, weight = logits.detach()[part, head].to(_wide(logits.dtype)), weights[part, head]
            probs = own.softmax(-1)
            losses[part, head] = judge(own, probs, part, head).masked_fill(weight == 0, 0.0)
            slopes[part, head] = probs.mul_(weight[:, None])
        return losses, logits, slopes, inputs


@dataclass
class _Gradients:
    hidden: Tensor | None
    parameters: list[Tensor]

    def add(
        self, rows: Tensor, logits: Tensor, slopes: Tensor, inputs: Tensor, parameters: Sequence[nn.Parameter]
    ) -> None:
        """Add a chunk's."""
        wanted = [*([inputs] if self.hidden is not None else []), *parameters]
        found = list(torch.autograd.grad(logits, wanted, slopes, allow_unused=True))
        if self.hidden is not None:
            self.hidden[rows] = found.pop(0)
        for total, part in zip(self.parameters, found, strict=True):
            if part is not None:
                total += part


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, job: _Job, hidden: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with_hidden = bool(ctx.needs_input_grad[1]) and job.with_gradients
        loss, sums, skipped, ctx.gradients = job.run(hidden.detach(), with_hidden)
        ctx.mark_non_differentiable(sums, skipped)
        return loss, sums, skipped

    @staticmethod
    def backward(ctx: Any, slope: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.gradients
        ctx.gradients = None  # scaled in place: they are good for one backward
        hidden = None if gradients.hidden is None else gradients.hidden.mul_(slope)
        return (None, hidden, *(total.mul_(slope) for total in gradients.parameters))


def _log_total(logits: Tensor, probs: Tensor) -> Tensor:
    """The logarithm of the sum of exp(`logits` [b, D]), from their softmax; -log p is this minus the token's logit."""
    return logits.amax(-1) - probs.amax(-1).log()


def _mean(logits: Tensor, probs: Tensor) -> Tensor:
    """The mean of `logits` [b, D] under `probs`; a logit of -inf, whose probability is 0, adds nothing."""
    mean: Tensor = torch.linalg.vecdot(probs, logits.clamp(min=torch.finfo(logits.dtype).min / 2))
    return mean


def _total_variation(probs: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Half the sum of the absolute differences [b] of two distributions [b, D], and its slope by the first's logits."""
    gap = probs - wanted
    side = gap.sign()
    slopes = 0.5 * probs * (side - torch.linalg.vecdot(probs, side)[:, None])
    return 0.5 * gap.abs().sum(-1), slopes


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
