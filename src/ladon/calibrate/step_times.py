"""What a decode step costs on this machine, by the number of nodes it verifies."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ladon.calibrate.drafting import default_proposer
from ladon.errors import InputError
from ladon.heads import Heads
from ladon.sampling import sampler
from ladon.sampling.acceptance import longest_match
from ladon.target.target import Target
from ladon.tree_size.latency_model import StepTime
from ladon.tree_size.policy import EDGES
from ladon.trees.token_tree import TokenTree
from ladon.trees.transfer import to_host

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LEAST_ROUNDS, _MOST_ROUNDS = 3, 25
_SECONDS = 10.0  # no further round starts after so long


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
