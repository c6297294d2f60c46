"""What a decode step costs on this machine, by the number of nodes it verifies: as a whole, and layer by layer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ladon.config import DecoderOptions
from ladon.drafting.proposer import HeadsProposer, drafting
from ladon.errors import InputError
from ladon.heads import Heads
from ladon.heads.model_parts import decoder_layers, output_projection
from ladon.sampling import sampler
from ladon.sampling.acceptance import longest_match
from ladon.target.pruning.pruner import Pruning
from ladon.target.target import Target
from ladon.tree_size.latency_model import StepTime
from ladon.tree_size.policy import EDGES
from ladon.trees.token_tree import TokenTree, ancestor_mask
from ladon.trees.transfer import to_host

_LEAST_ROUNDS, _MOST_ROUNDS = 3, 25
_SECONDS = 10.0  # no further round starts after so long
_ROUNDS = 7


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTimes:
    """Times of decode steps of one batch size at one context length.

    Attributes:
        batch: rows decoded together.
        context: tokens in the cache of each row.
        nodes: node slots verified per row, root included, ascending from 1.
        ms: milliseconds of a step of so many nodes, medians.
        drafting_ms: milliseconds of a step of one node that drafts the largest tree for the next step, median.
        rounds: how often each was measured.
    """

    batch: int
    context: int
    nodes: tuple[int, ...]
    ms: tuple[float, ...]
    drafting_ms: float
    rounds: int

    @property
    def relative(self) -> tuple[float, ...]:
        """Times as multiples of plain decoding's."""
        return tuple(time / self.ms[0] for time in self.ms)


def measure_step_times(
    model: PreTrainedModel,
    heads: Heads,
    context: Tensor,
    *,
    batch: int = 1,
    nodes: Sequence[int] = EDGES,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> StepTimes:
    """Time whole decode steps: verify, pick, accept, commit, draft the next tree, and the transfer to the host.

    All sizes take turns, in rising and falling order alternately, because machines change speed while one measures.
    After each step the cache is set back, so that every step has the same context. A step of one node is plain
    decoding, without heads.

    Args:
        model: the target.
        heads: its heads.
        context: what is in the cache, [T] token ids; cut to leave room for the deepest tree.
        batch: rows decoded together.
        nodes: sizes to measure, root included; 1 is added, and sizes that the heads cannot fill are left out.
        progress: called with (what, rounds done, rounds in all at most).

    Raises:
        InputError: an empty context, or one that leaves no room in the model's context.
    """
    target = Target(model)
    if target.context_limit is not None:
        context = context[: target.context_limit - heads.num_heads - 1]
    if len(context) == 0:
        raise InputError("no context to time steps at; give a prompt of at least one token")
    steps = _Steps(target, heads, context, batch)
    trees = [tree for size in sorted({1, *nodes}) if (tree := steps.draft(size)).num_nodes == size]
    kinds = [(tree, tree.num_nodes) for tree in trees] + [(trees[0], trees[-1].num_nodes)]  # verified, then drafted
    for kind in kinds:
        steps.run(*kind)  # first steps of a size compile masks, grow buffers and warm caches
    seconds: list[list[float]] = [[] for _ in kinds]
    started, rounds = time.perf_counter(), 0
    while rounds < _LEAST_ROUNDS or (rounds < _MOST_ROUNDS and time.perf_counter() - started < _SECONDS):
        for place in range(len(kinds)) if rounds % 2 == 0 else reversed(range(len(kinds))):
            seconds[place].append(steps.run(*kinds[place]))
        rounds += 1
        progress(f"timing decode steps of {batch} at {len(context)} tokens", rounds, _MOST_ROUNDS)
    *ms, drafting_ms = (round(1e3 * median(times), 4) for times in seconds)
    return StepTimes(
        batch=batch,
        context=len(context),
        nodes=tuple(tree.num_nodes for tree in trees),
        ms=tuple(ms),
        drafting_ms=drafting_ms,
        rounds=rounds,
    )


def profile_of(measured: Sequence[StepTimes]) -> list[StepTime]:
    """Measured times as a profile holds them (`ladon.tree_size.profile_store`)."""
    times = []
    for found in measured:
        kinds = [(nodes, nodes > 1, ms) for nodes, ms in zip(found.nodes, found.ms, strict=True)]
        for nodes, drafts, ms in [*kinds, (1, True, found.drafting_ms)]:
            time = StepTime(
                batch=found.batch, nodes=nodes, context=float(found.context), drafts=drafts, seconds=1e-3 * ms
            )
            times.append(time)
    return times


class _Steps:
    """Decode steps that all start from one context."""

    @torch.no_grad()
    def __init__(self, target: Target, heads: Heads, context: Tensor, batch: int) -> None:
        self._target = target
        self._proposer = default_proposer(target, heads)
        self._cache, self._lengths = target.new_cache(batch), [len(context)] * batch
        hidden, logits = target.prefill([context] * batch, self._cache)
        self._hidden, self._root = hidden, sampler.greedy(logits)

    @torch.no_grad()
    def draft(self, num_nodes: int) -> TokenTree:
        """The tree of a size after the context."""
        return self._proposer.propose(self._hidden, self._root, num_nodes)

    @torch.no_grad()
    def run(self, tree: TokenTree, num_drafted: int) -> float:
        """Seconds of one step that drafts so many nodes, as `Engine` does it."""
        started = time.perf_counter()
        out = self._target.verify(tree, self._cache)
        accepted = longest_match(out.tree, sampler.greedy(out.logits), out.ancestors)
        self._cache.commit(accepted.path, accepted.count)
        hidden = out.hidden[torch.arange(len(self._lengths), device=accepted.last.device), accepted.last]
        self._proposer.propose(hidden, accepted.bonus, num_drafted)
        to_host(torch.cat([accepted.count[:, None], accepted.tokens], dim=1))
        seconds = time.perf_counter() - started
        self._cache.set_lengths(self._lengths)
        return seconds


def default_proposer(target: Target, heads: Heads) -> HeadsProposer:
    """Heads, bound to the model of `target`, that draft the kind of trees it can verify, untimed."""
    tree = "dynamic" if target.supports_trees else "chain"
    options = DecoderOptions()
    return drafting(heads.bound(target.model, force=True), tree, options.num_candidates, "auto")


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
