"""The loop: propose, verify, pick, accept, commit.

Everything is batched and nothing on the way reads the device but `to_host`, once a step. Plain decoding is the same
loop with a tree of one node.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ladon import sampling
from ladon.accept import Accepted, longest_match
from ladon.host import to_host
from ladon.proposers import Proposer
from ladon.pruning import Pruning
from ladon.sampling import Sampler
from ladon.stats import DecodeStats, StageClock
from ladon.target import Target
from ladon.tree import TokenTree, ancestor_mask, node_depths
from ladon.verified import VerifyOutput


@dataclass(kw_only=True)
class Row:
    """One sequence being decoded.

    Attributes:
        prompt: its token ids, [T] int64, no padding.
        max_new_tokens: how many tokens it may get, at least 1.
        is_stop: called with each new token, in order; True ends the row with that token.
        tokens: what has been emitted so far.
        finished: whether it has ended.
    """

    prompt: Tensor
    max_new_tokens: int
    is_stop: Callable[[int], bool]
    tokens: list[int] = field(default_factory=list)
    finished: bool = False

    @property
    def num_left(self) -> int:
        """Tokens it may still get."""
        return self.max_new_tokens - len(self.tokens)

    def take(self, tokens: Sequence[int]) -> list[int]:
        """Append tokens one by one, as if they came alone, up to the first stop or the limit; return those taken."""
        taken: list[int] = []
        for token in tokens:
            taken.append(token)
            self.tokens.append(token)
            if self.is_stop(token) or self.num_left == 0:
                self.finished = True
                break
        return taken


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """What one decode step did.

    Attributes:
        rows: the rows it served, B of them.
        emitted: the tokens each row took, in order: accepted drafts, then the bonus token unless the row ended before.
        tree: the verified tree, on the device; None for the step that emits the prefill's token.
        accepted: the accepted paths, on the device; None likewise.
    """

    rows: list[Row]
    emitted: list[list[int]]
    tree: TokenTree | None = None
    accepted: Accepted | None = None


class Engine:
    """Decodes one batch of rows with one target and one proposer."""

    def __init__(
        self,
        target: Target,
        proposer: Proposer,
        *,
        budget: int,
        stats: DecodeStats,
        clock: StageClock,
        pruning: Pruning | None = None,
    ) -> None:
        """`budget` is the greatest number of nodes per row, root included; `stats` is added to."""
        self._target = target
        self._proposer = proposer
        self._budget = budget
        self._pruning = pruning
        self._stats = stats
        self._clock = clock

    def run(self, rows: Sequence[Row], sampler: Sampler | None = None) -> Iterator[Step]:
        """Decode until every row has ended; the first step carries the prefill's tokens. Greedy without a sampler."""
        self._rows, self._sampler = list(rows), sampler
        tree, step = self._start()
        yield step
        while self._rows:
            tree, step = self._step(tree)
            yield step

    @torch.no_grad()
    def _start(self) -> tuple[TokenTree, Step]:
        """Read the prompts, emit the first token of each row and grow the first trees."""
        prompts = [row.prompt for row in self._rows]
        self._cache = self._target.new_cache(len(prompts))  # tests the model, which is no part of the prefill
        started = time.perf_counter()
        hidden, logits = self._target.prefill(prompts, self._cache)
        root = self._picks(logits[:, None], self._cache.lengths)[:, 0]
        self._proposer.join(prompts, hidden)
        with self._clock.paused():
            tree = self._proposer.propose(hidden, root, self._budget)
        step = self._deliver(to_host(root[:, None]))
        self._stats.prefill_tokens += sum(len(prompt) for prompt in prompts)
        self._stats.prefill_seconds += time.perf_counter() - started
        return self._without_finished(tree), step

    @torch.no_grad()
    def _step(self, tree: TokenTree) -> tuple[TokenTree, Step]:
        """One decode step: verify this tree, keep what the target would have said, grow the next tree."""
        started = time.perf_counter()
        clock = self._clock
        tree = self._within_limits(tree)
        with clock.stage("verify"), clock.forward_of(self._target.model, "forward"):
            out = self._target.verify(tree, self._cache, self._pruning)
        with clock.stage("pick"):
            picks = self._picks(out.logits, self._cache.lengths, out)
        with clock.stage("accept"):
            accepted = longest_match(out.tree, picks, out.ancestors)
        with clock.stage("commit"):
            self._cache.commit(out.given(accepted.path), accepted.count)
            self._proposer.observe(accepted, out.hidden)
            batch_index = torch.arange(out.tree.batch_size, device=picks.device)
            hidden, root = out.hidden[batch_index, accepted.last], accepted.bonus
        next_tree = self._proposer.propose(hidden, root, self._budget)
        with clock.stage("transfer"):
            table = to_host(torch.cat([accepted.count[:, None], accepted.tokens], dim=1))
        counts = [row[0] for row in table]
        self._cache.mirror(counts)
        step = self._deliver([row[1 : 1 + row[0]] for row in table], tree=out.tree, accepted=accepted)
        self._stats.count_pruned(out.tree.batch_size * out.num_pruned)
        self._count(step, counts)
        next_tree = self._without_finished(next_tree)
        self._stats.decode_seconds += time.perf_counter() - started
        return next_tree, step

    def _picks(self, logits: Tensor, lengths: Tensor, out: VerifyOutput | None = None) -> Tensor:
        """What the target says after each node of `out`, [B, N], or after the prompts; rows have `lengths` [B]."""
        if self._sampler is None:
            return sampling.pick(logits)
        if out is None:
            return self._sampler.pick(logits, lengths, torch.zeros_like(lengths)[:, None], 0)
        return self._sampler.pick(logits, lengths + 1, node_depths(out.ancestors), out.tree.max_depth)

    def _within_limits(self, tree: TokenTree) -> TokenTree:
        """Drop nodes that no row may emit any more, or that the target could not verify exactly at this length."""
        caps = []
        for row, length in zip(self._rows, self._cache.host_lengths, strict=True):
            target_cap = self._target.depth_cap(length)
            caps.append(row.num_left - 1 if target_cap is None else min(row.num_left - 1, target_cap))
        if max(caps) == 0:
            return tree.prefix(1)
        if min(caps) >= tree.max_depth:
            return tree
        depths = node_depths(ancestor_mask(tree.parents, tree.max_depth))
        return tree.capped(depths, torch.tensor(caps, device=depths.device))

    def _deliver(
        self, tokens: list[list[int]], tree: TokenTree | None = None, accepted: Accepted | None = None
    ) -> Step:
        """Hand each row its new tokens; rows decide where they end."""
        emitted = [row.take(row_tokens) for row, row_tokens in zip(self._rows, tokens, strict=True)]
        return Step(rows=list(self._rows), emitted=emitted, tree=tree, accepted=accepted)

    def _count(self, step: Step, counts: list[int]) -> None:
        stats = self._stats
        stats.forwards += 1
        stats.row_steps += len(step.rows)
        stats.tokens += sum(len(tokens) for tokens in step.emitted)
        stats.accepted_nodes += sum(counts) - len(counts)
        if step.tree is not None:
            stats.nodes_verified += step.tree.batch_size * step.tree.num_nodes

    def _without_finished(self, tree: TokenTree) -> TokenTree:
        """Let the rows that have ended leave the batch, the cache and the proposer."""
        kept = [place for place, row in enumerate(self._rows) if not row.finished]
        if len(kept) == len(self._rows):
            return tree
        self._rows = [self._rows[place] for place in kept]
        if kept:
            self._cache.keep_rows(kept)
            self._proposer.keep(kept)
            self._sampler = None if self._sampler is None else self._sampler.rows(kept)
        return tree.rows(kept)
