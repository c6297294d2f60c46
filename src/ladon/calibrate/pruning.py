"""Whether early pruning pays: which layer, criterion and kept size give the most tokens per second, if any.

What pruning loses in acceptance is set against the time it saves net of the early score (`ladon.calibrate.timing`). It
has to beat not only the whole tree but every smaller one: a tree cut by the heads' own order costs less than one that
is grown, half verified and then dropped.

What it loses is counted while the model answers prompts with whole trees: at every step each way of pruning says which
nodes it would have kept, and accepted nodes that are not among them are what it would have cost at the same roots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ladon.calibrate.lattice_trace import row_of
from ladon.calibrate.timing import LayerTimes, Trials, default_proposer, measure_layer_times
from ladon.engine.engine import Engine
from ladon.errors import InputError, UnsupportedModelError
from ladon.heads import Heads
from ladon.heads.early_exit import EarlyExit, load_early_exit
from ladon.heads.model_parts import decoder_layers
from ladon.sampling import sampler
from ladon.sampling.acceptance import longest_match
from ladon.target.hooks import layer_output
from ladon.target.kv_cache import TreeCache
from ladon.target.pruning.node_scores import best_nodes
from ladon.target.pruning.pruner import Pruning
from ladon.target.target import Target
from ladon.target.verify_output import VerifyOutput
from ladon.tree_size.observer import TreeSizes
from ladon.trees.token_tree import TokenTree
from ladon.util.files import rounded

SIZES = (8, 16, 24, 32, 48, 64)
KEEPS = (1, 2, 4, 8, 12, 16, 24, 32, 48)
BATCHES = (1, 8)
WEIGHTS = (0.2, 0.35, 0.5, 0.8)
_TOP_K = (4, 16)
PAYS = 1.03  # the least gain that is no luck: the best of hundreds of noisy ones is above 1 where none is


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What one way of pruning gives on one batch size.

    Attributes:
        survival: the way, and what it keeps of the acceptance.
        ms: of a verification, the early score included.
        score_ms: the early score alone.
        gain: tokens per second over those of the best tree that is not pruned.
    """

    survival: Survival
    ms: float
    score_ms: float
    gain: float


def ways_to_prune(num_layers: int, early_exit: EarlyExit | None) -> list[Pruning]:
    """Layers in the first half, every criterion and its settings; without a trained early exit and with it."""
    layers = sorted({max(1, num_layers * eighth // 8) for eighth in range(1, 5)} & set(range(1, num_layers)))
    exits: list[tuple[int, EarlyExit | None]] = [(layer, None) for layer in layers]
    if early_exit is not None:
        exits.append((early_exit.layer, early_exit))
    found = []
    for layer, trained in exits:
        start = Pruning(layer=layer, keep=1, early_exit=trained)
        found += [replace(start, weight=weight) for weight in WEIGHTS]
        found.append(replace(start, criterion="siblings"))
        found += [replace(start, criterion="top-k", top_k=k) for k in _TOP_K]
    return found


def usable_ways(model: PreTrainedModel, heads: Heads) -> list[Pruning]:
    """Those of all ways to prune that the model can do, each layer tested. Takes a moment: ask before measuring.

    Args:
        model: the target.
        heads: its heads; a trained early exit is looked for beside them.

    Raises:
        UnsupportedModelError: there is none; the message has the reason.
        HeadsError: the early exit is damaged, or another model's.
    """
    num_layers = len(decoder_layers(model))
    if num_layers < 2:
        raise UnsupportedModelError(
            f"{type(model).__name__} has a single decoder layer, and trees are pruned between two. Use prune='off'"
        )
    early_exit = None if heads.folder is None else load_early_exit(heads.folder, model)
    target = Target(model)
    found: list[Pruning] = []
    reasons: dict[int, UnsupportedModelError] = {}
    for way in ways_to_prune(num_layers, early_exit):
        if way.layer in reasons:
            continue
        try:
            target.pruner(way)
        except UnsupportedModelError as error:  # the layer's fault, whatever the criterion
            reasons[way.layer] = error
        except InputError:  # the output projection is packed or elsewhere, and "top-k" may be left
            continue
        else:
            found.append(way)
    if not found:
        raise next(iter(reasons.values()))
    return found


def judge(survivals: Survivals, times: LayerTimes, score_ms: dict[Pruning, float], draft_ms: float) -> list[Verdict]:
    """Every way and size on one batch size, the most tokens per second first.

    Args:
        survivals: what is kept.
        times: of verifications, for all sizes in `survivals`.
        score_ms: of judging trees of the greatest size, by way (with `keep` 1); smaller ones are taken to cost as much.
        draft_ms: what a decode step takes besides verifying; it counts in every step alike.
    """
    base = max(length / (times.whole_ms(n) + draft_ms) for n, length in survivals.unpruned.items())
    found = []
    for survival in survivals.pruned:
        way = survival.pruning
        assert isinstance(way.keep, int)  # ways are judged by sizes
        cost = score_ms[replace(way, keep=1)]
        ms = times.pruned_ms(survival.nodes, way.layer, way.keep, cost)
        gain = survival.acceptance_length / (ms + draft_ms) / base
        found.append(Verdict(survival=survival, ms=ms, score_ms=cost, gain=gain))
    return sorted(found, key=lambda verdict: -verdict.gain)


def find_pruning(
    model: PreTrainedModel,
    heads: Heads,
    prompts: Sequence[Tensor],
    *,
    sizes: Sequence[int] = SIZES,
    context: int = 256,
    batches: Sequence[int] = BATCHES,
    max_new_tokens: int = 64,
    place: dict[str, Any] | None = None,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> dict[str, Any]:
    """Everything that `ladon calibrate --pruning` finds out, as JSON values; `Calibration.pruning`.

    Args:
        model: the target.
        heads: its heads; a trained early exit is looked for beside them.
        prompts: 1-D token ids each.
        sizes: nodes of the whole trees, root included.
        context: tokens in the cache when verifications are timed.
        batches: rows verified together when they are timed.
        max_new_tokens: tokens per answer at most.
        place: the machine, as `ladon.util.machine` describes it.
        progress: called with (what, done, total).

    Raises:
        InputError: a prompt is empty or too long, or too little was answered.
        UnsupportedModelError: the model's trees cannot be pruned; the message has the reason.
    """
    ways = usable_ways(model, heads)
    keeps, most = [keep for keep in KEEPS if keep < max(sizes)], max(sizes)
    survivals = record_survival(
        model, heads, prompts, ways, sizes=sizes, keeps=keeps, max_new_tokens=max_new_tokens, progress=progress
    )
    longest = max(prompts, key=len)
    text = longest.repeat(-(-context // len(longest)))[:context]
    measured, verdicts = [], []
    for done, batch in enumerate(batches):
        progress("timing verifications", done, len(batches))
        trials = Trials(model, text, batch)
        times = measure_layer_times(trials, sorted(survivals.unpruned))
        score_ms = {way: trials.score_ms(replace(way, keep=most // 4), most) for way in ways}
        draft_ms = trials.draft_ms(heads, most)
        found = judge(survivals, times, score_ms, draft_ms)
        verdicts.append(found)
        measured.append(_document(times, draft_ms, found) | _check(trials, found[0]))
    progress("timing verifications", len(batches), len(batches))
    document: dict[str, Any] = {
        "row_steps": survivals.row_steps,
        "unpruned": {str(n): length for n, length in survivals.unpruned.items()},
        "survival": [_survival(way, size, survivals) for way in ways for size in sizes],
        "measured": measured,
        "best": best_everywhere(verdicts),
    }
    return {"place": place or {}, **rounded(document)}


def best_everywhere(verdicts: Sequence[Sequence[Verdict]]) -> dict[str, Any] | None:
    """The pruning whose least gain over all batch sizes is the greatest; None if that is less than `PAYS`."""
    least: dict[tuple[int, Pruning], float] = {}
    for of_batch in verdicts:
        for verdict in of_batch:
            what = verdict.survival.nodes, verdict.survival.pruning
            least[what] = min(verdict.gain, least.get(what, verdict.gain))
    best = max(least, key=lambda what: least[what])
    return {"nodes": best[0], **_names(best[1]), "gain": rounded(least[best])} if least[best] >= PAYS else None


def _names(pruning: Pruning) -> dict[str, Any]:
    """A pruning as JSON values; of the early exit, whether it is a trained one."""
    names = ("layer", "keep", "criterion", "weight", "top_k")
    return {**{name: getattr(pruning, name) for name in names}, "trained": pruning.early_exit is not None}


def _survival(way: Pruning, size: int, survivals: Survivals) -> dict[str, Any]:
    """Tokens per row-step, and the share of accepted paths that survive whole, by kept size."""
    of_way = [survival for survival in survivals.pruned if replace(survival.pruning, keep=way.keep) == way]
    found = {str(survival.pruning.keep): survival for survival in of_way if survival.nodes == size}
    lengths = {keep: survival.acceptance_length for keep, survival in found.items()}
    whole = {keep: survival.whole for keep, survival in found.items()}
    return {**_names(way), "nodes": size, "keep": None, "acceptance_length": lengths, "whole": whole}


def _document(times: LayerTimes, draft_ms: float, verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """One batch size: its times, and each way of pruning with the size that suits it best."""
    best: dict[Pruning, Verdict] = {}
    for verdict in verdicts:  # the best come first
        best.setdefault(replace(verdict.survival.pruning, keep=1), verdict)
    tables = {name: {str(n): ms for n, ms in getattr(times, name).items()} for name in ("layer_ms", "rest_ms")}
    rows = [
        {
            "nodes": verdict.survival.nodes,
            **_names(verdict.survival.pruning),
            "acceptance_length": verdict.survival.acceptance_length,
            "score_ms": verdict.score_ms,
            "verify_ms": verdict.ms,
            "gain": verdict.gain,
        }
        for verdict in best.values()
    ]
    return {"batch": times.batch, "context": times.context, **tables, "draft_ms": draft_ms, "pruned": rows}


def _check(trials: Trials, best: Verdict) -> dict[str, Any]:
    """The best way in real: the milliseconds of its verifications, and of unpruned ones in turns with them."""
    whole, pruned = trials.compare(best.survival.nodes, best.survival.pruning)
    return {"check": {"whole_ms": whole, "pruned_ms": pruned, "predicted_ms": best.ms}}


@dataclass(frozen=True, kw_only=True, slots=True)
class Survival:
    """What one way of pruning would have kept.

    Attributes:
        nodes: N, nodes of the whole trees, root included.
        pruning: the way; its `keep` is the number of nodes that go on.
        acceptance_length: tokens per row-step, the bonus token included.
        whole: share of the row-steps whose accepted path survives to its end.
    """

    nodes: int
    pruning: Pruning
    acceptance_length: float
    whole: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Survivals:
    """What all of them would have kept, at the same roots.

    Attributes:
        row_steps: roots.
        unpruned: tokens per row-step of the best n nodes at each root, by n.
        pruned: every way with every size of tree and every kept size.
    """

    row_steps: int
    unpruned: dict[int, float]
    pruned: list[Survival]


def record_survival(
    model: PreTrainedModel,
    heads: Heads,
    prompts: Sequence[Tensor],
    ways: Sequence[Pruning],
    *,
    sizes: Sequence[int],
    keeps: Sequence[int],
    max_new_tokens: int,
    batch_size: int = 16,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Survivals:
    """Let `model` answer the prompts greedily with whole trees, and judge the trees in every way.

    Args:
        model: the target.
        heads: its heads.
        prompts: 1-D token ids each, without padding.
        ways: layers, criteria and their settings; their `keep` is of no effect.
        sizes: nodes N of the whole trees, root included; the largest is grown, and its best nodes are the others.
        keeps: sizes M to judge, root included.
        max_new_tokens: tokens per answer at most.
        batch_size: prompts decoded together.
        progress: called with (what, prompts answered, prompts in all).

    Raises:
        InputError: a prompt is empty or fills the model's context, or nothing was drafted.
        UnsupportedModelError: the model's trees cannot be pruned in one of these ways.
    """
    target = _WatchedTarget(model, ways, sizes, keeps)
    proposer = default_proposer(target, heads)
    rows = [row_of(index, prompt, max_new_tokens, target) for index, prompt in enumerate(prompts)]
    engine = Engine(target, proposer, TreeSizes(max(sizes), target.device), max_rows=batch_size)
    for _ in engine.run(rows):
        progress("judging trees", sum(row.finished for row in rows), len(rows))
    return target.found()


class _WatchedTarget(Target):
    """A target whose verified trees are judged on the way."""

    def __init__(
        self, model: PreTrainedModel, ways: Sequence[Pruning], sizes: Sequence[int], keeps: Sequence[int]
    ) -> None:
        super().__init__(model)
        self.check()
        self._ways, self._sizes, self._keeps = list(ways), sorted(set(sizes)), sorted(set(keeps))
        for way in self._ways:
            self.pruner(way)
        self._sums: dict[tuple[int, Pruning], Tensor] = {}  # by N and way: accepted nodes that survive, whole paths
        self._unpruned: dict[int, Tensor] = {}
        self._row_steps = 0

    def verify(self, tree: TokenTree, cache: TreeCache, pruning: Pruning | None = None) -> VerifyOutput:
        """The tree is verified whole; then it is judged."""
        layers = {way.layer for way in self._ways}
        with ExitStack() as stack:
            seen = {layer: stack.enter_context(layer_output(self.model, layer)) for layer in layers}
            out = super().verify(tree, cache)
        if tree.num_nodes > 1 and all(len(states) == 1 for states in seen.values()):  # rows have shared one forward
            self._judge(out, {layer: states[0] for layer, states in seen.items()})
        return out

    @torch.no_grad()
    def _judge(self, out: VerifyOutput, states: dict[int, Tensor]) -> None:
        path = longest_match(out.tree, sampler.greedy(out.logits), out.ancestors).path
        right = torch.zeros_like(out.tree.tokens, dtype=torch.bool).scatter_(1, path, True)
        for size in {*self._sizes, *self._keeps}:
            self._unpruned[size] = self._unpruned.get(size, right.new_zeros(())) + right[:, :size].sum()
        for size in self._sizes:
            tree, ancestors, accepted = out.tree.prefix(size), out.ancestors[:, :size, :size], right[:, :size]
            for way in self._ways:
                paths = self.pruner(way).score(states[way.layer][:, :size], tree, ancestors)
                survived = torch.stack([accepted.gather(1, best_nodes(paths, keep)).sum(1) for keep in self._keeps])
                whole = survived == accepted.sum(1)
                found = torch.stack([survived.sum(1), whole.sum(1)])
                self._sums[size, way] = self._sums.get((size, way), torch.zeros_like(found)) + found
        self._row_steps += out.tree.batch_size

    def found(self) -> Survivals:
        """Means over all row-steps."""
        if self._row_steps == 0:
            raise InputError("no tree was drafted, so there is nothing to prune; ask for more new tokens")
        pruned = []
        for (size, way), sums in self._sums.items():
            lengths, whole = (sums / self._row_steps).tolist()
            for keep, length, share in zip(self._keeps, lengths, whole, strict=True):
                if keep < size:
                    pruning = replace(way, keep=keep)
                    pruned.append(Survival(nodes=size, pruning=pruning, acceptance_length=length, whole=share))
        unpruned = {size: float(total) / self._row_steps for size, total in sorted(self._unpruned.items())}
        return Survivals(row_steps=self._row_steps, unpruned=unpruned, pruned=pruned)
