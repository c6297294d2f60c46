"""How much of what would be accepted survives early pruning: by layer, criterion and kept size, on the model's answers.

The model answers prompts with whole trees. At every step each way of pruning says which nodes it would have kept, and
what it would have cost is counted at the same roots: accepted nodes that are not among them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ladon.calibrate.drafting import default_proposer
from ladon.calibrate.recording import row_of
from ladon.engine.engine import Engine
from ladon.errors import InputError
from ladon.heads import Heads
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

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
