"""What verifying a tree costs by the number of nodes, layer by layer, and what that makes of pruning."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ladon.calibrate.drafting import default_proposer
from ladon.heads import Heads
from ladon.heads.early_exit import decoder_layers
from ladon.heads.ends import output_projection
from ladon.target.pruning.pruner import Pruning
from ladon.target.target import Target
from ladon.trees.token_tree import TokenTree, ancestor_mask

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ROUNDS = 7


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerTimes:
    """Times of verifying trees of one batch size at one context length; medians, in milliseconds.

    Attributes:
        batch: rows verified together.
        context: tokens in the cache of each row.
        num_layers: L.
        layer_ms: one decoder layer, on average, by the number of nodes per row.
        rest_ms: everything else: masks, embedding, final norm, output projection.
    """

    batch: int
    context: int
    num_layers: int
    layer_ms: dict[int, float]
    rest_ms: dict[int, float]

    def whole_ms(self, nodes: int) -> float:
        """Verifying trees of so many nodes, unpruned."""
        return self.num_layers * self.layer_ms[nodes] + self.rest_ms[nodes]

    def pruned_ms(self, nodes: int, layer: int, keep: int, score_ms: float) -> float:
        """Verifying trees of so many nodes of which `keep` go on after a layer.

        Masks and embedding are those of the whole tree, the output projection is that of the survivors: the rest is
        taken as the survivors', since the projection is most of it.
        """
        later = (self.num_layers - layer) * self.layer_ms[keep]
        return layer * self.layer_ms[nodes] + later + self.rest_ms[keep] + score_ms


def measure_layer_times(trials: Trials, sizes: Sequence[int], *, rounds: int = _ROUNDS) -> LayerTimes:
    """Time the verification of trees of each size, nodes per row, all sizes in turns."""
    layers = list(decoder_layers(trials.model))
    whole: dict[int, list[float]] = {size: [] for size in sizes}
    inside: dict[int, list[float]] = {size: [] for size in sizes}
    for size in sizes:
        trials.verify(size)  # the first of a size grows buffers and warms caches
    for _ in range(rounds):
        for size in sizes:
            with _span(layers[0], layers[-1], trials.now) as spent:
                whole[size].append(trials.verify(size))
            inside[size].append(sum(spent))
    layer_ms = {size: 1e3 * median(inside[size]) / len(layers) for size in sizes}
    rest = {size: 1e3 * median(w - i for w, i in zip(whole[size], inside[size], strict=True)) for size in sizes}
    return LayerTimes(
        batch=trials.batch, context=trials.context, num_layers=len(layers), layer_ms=layer_ms, rest_ms=rest
    )


class Trials:
    """Verifications of trees in `batch` rows, which all start from one context.

    Attributes:
        model: the target's.
        target: the target.
        batch: rows.
        context: tokens in the cache of each row.
    """

    def __init__(self, model: PreTrainedModel, context: Tensor, batch: int) -> None:
        """`context` [T] are the token ids in the cache of each row."""
        self.model, self.target = model, Target(model)
        self.batch, self.context, self._tokens = batch, len(context), context.to(self.target.device)
        self._cache = self.target.new_cache(batch)
        self.target.prefill([context] * batch, self._cache)

    def now(self) -> float:
        """Seconds, when the device has done all that it was given."""
        if self.target.device.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter()

    def tree(self, nodes: int) -> TokenTree:
        """A tree of so many nodes, three children to a node, of tokens from the context."""
        places = torch.arange(nodes, device=self.target.device)
        tokens = self._tokens[places % self.context]
        parents = torch.div(places - 1, 3, rounding_mode="floor").clamp(min=0)
        parents[0] = -1
        depth, width = 0, 1
        while width < nodes:
            depth, width = depth + 1, 3 * width + 1
        log_probs = -parents.clamp(min=-1).add(1).float().log1p()
        log_probs[0] = 0.0
        tables = [table.expand(self.batch, -1) for table in (tokens, parents, log_probs)]
        return TokenTree(tokens=tables[0], parents=tables[1], log_probs=tables[2], max_depth=max(depth, 0))

    def verify(self, nodes: int, pruning: Pruning | None = None) -> float:
        """Seconds of verifying a tree of so many nodes in every row."""
        tree = self.tree(nodes)
        started = self.now()
        self.target.verify(tree, self._cache, pruning)
        seconds = self.now() - started
        self._cache.set_lengths([self.context] * self.batch)
        return seconds

    def compare(self, nodes: int, pruning: Pruning, rounds: int = _ROUNDS) -> tuple[float, float]:
        """Milliseconds of verifying a tree of so many nodes in every row, unpruned and pruned, in turns; medians."""
        times: tuple[list[float], list[float]] = [], []
        for _ in range(rounds + 1):
            for place, way in enumerate((None, pruning)):
                times[place].append(self.verify(nodes, way))
        return 1e3 * median(times[0][1:]), 1e3 * median(times[1][1:])

    def score_ms(self, pruning: Pruning, nodes: int) -> float:
        """Milliseconds of judging a tree of so many nodes in every row, and of choosing the survivors; a median."""
        tree, pruner = self.tree(nodes), self.target.pruner(pruning)
        ancestors = ancestor_mask(tree.parents, tree.max_depth)
        hidden = self._hidden(self.batch, nodes)
        return self._median_ms(lambda: pruner.choose(hidden, tree, ancestors))

    def draft_ms(self, heads: Heads, nodes: int) -> float:
        """Milliseconds of drafting a tree of so many nodes in every row; a median."""
        proposer = default_proposer(self.target, heads)
        hidden, root = self._hidden(self.batch), self._tokens[:1].expand(self.batch)
        return self._median_ms(lambda: proposer.propose(hidden, root, nodes))

    def _hidden(self, *shape: int) -> Tensor:
        width = output_projection(self.model).hidden_size
        return torch.randn(*shape, width, dtype=self.target.dtype, device=self.target.device)

    @torch.no_grad()
    def _median_ms(self, work: Callable[[], object]) -> float:
        times = []
        for _ in range(_ROUNDS + 1):
            started = self.now()
            work()
            times.append(self.now() - started)
        return 1e3 * median(times[1:])


@contextmanager
def _span(first: nn.Module, last: nn.Module, now: Callable[[], float]) -> Iterator[list[float]]:
    """While this lasts, note the seconds from the start of one module to the end of another."""
    spent: list[float] = []

    def start(*_: object) -> None:
        spent.append(-now())

    def end(*_: object) -> None:
        spent[-1] += now()

    handles = [first.register_forward_pre_hook(start), last.register_forward_hook(end)]
    try:
        yield spent
    finally:
        for handle in handles:
            handle.remove()
