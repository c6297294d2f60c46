"""The loop: propose, verify, pick, accept, commit, for rows that join and leave at any step.

Everything is batched and nothing on the way reads the device but `to_host`, once a step. Plain decoding is the same
loop with a tree of one node.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence

import torch
from torch import Tensor

from ladon.drafting.constrained import count_illegal
from ladon.drafting.merge_on_host import Reviser
from ladon.drafting.ngram_proposer import Lookup
from ladon.drafting.proposer import Proposer
from ladon.engine.scheduler import Batch
from ladon.engine.sequence import Row, raise_error_of
from ladon.engine.stats import DecodeStats, StageClock
from ladon.engine.step import Outcome, Step
from ladon.sampling.acceptance import longest_admitted, longest_match
from ladon.sampling.lossy import Rule
from ladon.sampling.sampler import Picking
from ladon.target.pruning.pruner import Pruning
from ladon.target.target import Target
from ladon.tree_size.observer import StepSizes
from ladon.tree_size.policy import Sizing
from ladon.trees.token_tree import TokenTree
from ladon.trees.transfer import to_device


class Engine:
    """Decodes rows with one target and one proposer: they are submitted, join, decode together, and leave.

    One thread steps; any thread may submit and cancel. While no row is in flight the engine holds no cache: the model
    may be changed then, and is looked at anew before the next row joins.
    """

    def __init__(
        self,
        target: Target,
        proposer: Proposer,
        *,
        budget: int | Sizing,
        stats: DecodeStats,
        clock: StageClock,
        max_rows: int | None = None,
        pruning: Pruning | None = None,
        rule: Rule | None = None,
        lookup: Lookup | None = None,
    ) -> None:
        """Make an engine without rows.

        Args:
            target: the model.
            proposer: drafts the trees; no other engine may use it.
            budget: the greatest number of nodes per row, root included; or what chooses it.
            stats: added to.
            clock: times the stages.
            max_rows: rows in flight at most, others wait in the order they came; None for no bound.
            pruning: how trees are pruned while they are verified; None for not at all.
            rule: a lossy rule of acceptance; None for exact acceptance.
            lookup: adds n-grams to the trees; no other engine may use it. None: nothing is added.

        Raises:
            InputError: `max_rows` is below 1.
        """
        self._target, self._proposer = target, proposer
        self._stats, self._clock = stats, clock
        self._pruning, self._rule = pruning, rule
        self._sizes = StepSizes(budget, stats, target.device)
        self._reviser = Reviser(self._sizes, lookup, clock)
        self._batch = Batch(target, max_rows, resumes=not proposer.reads_prompts)
        self._tree: TokenTree | None = None

    @property
    def cache_bytes(self) -> int:
        """What keys and values take now; 0 when no row is in flight."""
        return self._batch.nbytes

    def submit(self, row: Row) -> None:
        """Let a row wait for its turn; it joins in the next step that has room. From any thread.

        Raises:
            InputError: it was submitted before, its prompt is empty, or it may get no token.
        """
        self._batch.submit(row)

    def cancel(self, row: Row) -> None:
        """End a row, wherever it is, from any thread: `Row.cancel`. The next step gives its place to another."""
        row.cancel()

    def run(self, rows: Sequence[Row]) -> Generator[Step, None, None]:
        """Submit rows and step until nothing is left to do. Closing the iterator cancels those that have not ended.

        Raises:
            InputError: a row cannot be submitted.
            LogitsError: nothing can be said after a row; the others are cancelled, and all keep what they have.
            Exception: what a row's stop rule has raised, likewise.
        """
        submitted: list[Row] = []
        try:
            for row in rows:
                self.submit(row)
                submitted.append(row)
            while (step := self.step()) is not None:
                yield step
                raise_error_of(rows)
        finally:
            for row in submitted:
                row.cancel()
            self._settle()

    @torch.no_grad()
    def step(self) -> Step | None:
        """Rows leave and join, prompts are read on by a chunk, and all rows that have read theirs take a decode step.

        A step that raises takes the rows in flight with it: they are cancelled. Waiting rows go on waiting.

        Returns:
            What was done; None if there is no row.
        """
        try:
            self._settle()
            self._stats.reused_tokens += sum(row.stats.reused_tokens for row in self._batch.admit())
            return self._step() if self._batch.rows else None
        except BaseException:  # an interrupt, too, leaves rows half done
            self._batch.drop()
            self._keep([])
            raise

    @torch.no_grad()
    def _settle(self) -> None:
        """Rows that have ended leave; those that have read their prompts are among the others now."""
        trees = self._batch.settle()
        if self._tree is not None and trees is not None:
            self._keep(trees)

    def _keep(self, trees: list[int]) -> None:
        """Only these trees stay, and what was drafted from."""
        self._tree = self._tree.rows(trees) if self._tree is not None and trees else None
        self._proposer.keep(trees)
        self._reviser.keep(trees)

    def _step(self) -> Step:
        """Read prompts on, verify the trees, keep what the target would have said, and grow the next trees."""
        started = time.perf_counter()
        read = self._read()
        if self._tree is not None and self._batch.joining:
            self._clock.wait()  # or the prefill would be timed as decoding
        prefilled = time.perf_counter()
        decoded = None if self._tree is None else self._decode(self._tree)
        outcomes = [outcome for outcome in (decoded, read) if outcome is not None]
        if not outcomes:
            self._stats.prefill_seconds += prefilled - started
            return Step(rows=[], emitted=[])
        joined = [] if read is None else [self._batch.rows[place] for place in read.places]
        prompts = [row.prompt for row in joined]
        if read is not None:
            self._proposer.join(prompts, read.hidden, [row.take_states() for row in joined if row.states])
        hidden, root = _cat([outcome.hidden for outcome in outcomes]), _cat([outcome.root for outcome in outcomes])
        root = root.clamp(min=0)  # the host has yet to see who ends here for want of a token
        self._batch.drafted = [place for outcome in outcomes for place in outcome.places]
        with self._clock.paused(decoded is None):
            lengths = [self._batch.cache.host_lengths[place] for place in self._batch.drafted]
            width = self._reviser.width(self._sizes.reach(lengths), self._batch.decoding)
            self._tree = self._proposer.propose(hidden, root, width)
            table = self._reviser.transfer(_stacked([outcome.table for outcome in outcomes]), self._tree)
        grown, received = self._tree.num_nodes, time.perf_counter()
        counts = [] if decoded is None else [count for count, *_ in table[: len(decoded.places)]]
        self._proposer.mirror(counts)
        step = self._deliver(table, decoded, outcomes)
        delivered = time.perf_counter()
        with self._clock.paused(decoded is None):
            revised = self._reviser.revised(table, prompts, self._batch.decoding)
            self._tree = self._tree if revised is None else to_device(revised, self._target.device)
        if decoded is not None:
            seconds = received - prefilled + time.perf_counter() - delivered  # callers' stop rules are left out
            self._sizes.observe(counts, pruned=decoded.num_pruned, grown=grown, seconds=seconds)
        ended = time.perf_counter()
        self._stats.prefill_seconds += (ended if decoded is None else prefilled) - started
        self._stats.decode_seconds += 0.0 if decoded is None else ended - prefilled
        return step

    def _read(self) -> Outcome | None:
        """Read joining rows' prompts on by a chunk; what is said after those that have come to their end, if any."""
        batch, first = self._batch, len(self._batch.drafted)
        if not batch.joining:
            return None
        before = batch.cache.host_lengths[first:]
        joining = batch.joining
        keep = (lambda place, states: joining[place].states.append(states)) if self._proposer.reads_prompts else None
        done, hidden, logits = self._target.read([row.prompt for row in joining], batch.cache, keep)
        for row, old, new in zip(batch.joining, before, batch.cache.host_lengths[first:], strict=True):
            row.stats.prefill_tokens += new - old
            self._stats.prefill_tokens += new - old
        if hidden is None or logits is None:
            return None
        said = self._picking([batch.joining[index] for index in done]).after_prompts(logits)
        root = said.picks[:, 0]
        table = torch.stack([torch.ones_like(root), root], dim=1)
        places, kept = [first + index for index in done], said.along(torch.zeros_like(said.picks))
        return Outcome(places=places, hidden=hidden, root=root, table=table, kept=kept)

    def _decode(self, tree: TokenTree) -> Outcome:
        """Verify the trees of the rows that decode, and keep what the target would have said."""
        cache, clock = self._batch.cache, self._clock
        size = self._sizes.choose(cache.host_lengths[: tree.batch_size])
        caps = self._depth_caps(tree.batch_size)
        tree = tree.prefix(size.nodes).within(caps)
        self._sizes.begin(tree.num_nodes, depth=min(caps))
        count_illegal(self._batch.decoding, size.nodes, self._stats)
        picking = self._picking(self._batch.decoding, tree.num_nodes)
        with clock.stage("verify"), clock.forward_of(self._target.model, "forward"):
            out = self._target.verify(tree, cache, self._pruning if size.pruned else None)
        with clock.stage("pick"):
            said = picking.after(out.logits, out.tree, out.ancestors, out.nodes)
        with clock.stage("accept"):
            if said.admitted is None:
                accepted = longest_match(out.tree, said.picks, out.ancestors)
            else:
                accepted = longest_admitted(out.tree, said.picks, said.admitted, out.ancestors)
        with clock.stage("commit"):
            cache.commit(out.given(accepted.path), accepted.count)
            self._proposer.observe(accepted, out.hidden)
            batch_index = torch.arange(out.tree.batch_size, device=said.picks.device)
            hidden, root = out.hidden[batch_index, accepted.last], accepted.bonus
        table = torch.cat([accepted.count[:, None], accepted.tokens], dim=1)
        return Outcome(
            places=self._batch.drafted,
            hidden=hidden,
            root=root,
            table=table,
            verified=out,
            accepted=accepted,
            kept=said.along(accepted.path),
        )

    def _depth_caps(self, num_rows: int) -> list[int]:
        """How deep nodes may be that a row may still emit, and that the target can verify exactly at its length."""
        caps = []
        for row, length in zip(self._batch.rows[:num_rows], self._batch.cache.host_lengths, strict=False):
            target_cap = 0 if row.picker.is_plain else self._target.depth_cap(length)
            caps.append(row.num_left - 1 if target_cap is None else min(row.num_left - 1, target_cap))
        return caps

    def _deliver(self, table: list[list[int]], decoded: Outcome | None, outcomes: list[Outcome]) -> Step:
        """Hand each row its new tokens and count them; rows decide where they end."""
        rows, emitted = self._batch.decoding, []
        kept = [(outcome.kept, place) for outcome in outcomes for place in range(len(outcome.places))]
        tree, accepted, num_decoded, pruned = None, None, 0, 0
        if decoded is not None and decoded.verified is not None:
            tree, pruned = decoded.verified.tree, decoded.num_pruned
            accepted, num_decoded = decoded.accepted, len(decoded.places)
            self._batch.cache.mirror([count for count, *_ in table[:num_decoded]])
            self._stats.forwards += 1
        for index, (row, (count, *tokens)) in enumerate(zip(rows, table, strict=True)):
            taken = row.take(tokens[:count])
            emitted.append(taken)
            if row.keeps:
                found, place = kept[index]
                row.keep({name: values[place] for name, values in found.items()}, len(taken))
            if tree is not None and index < num_decoded:
                for stats in (row.stats, self._stats):
                    stats.add_step(emitted=len(taken), nodes=tree.num_nodes + pruned, accepted=count - 1, pruned=pruned)
            elif taken:
                row.stats.first_token = time.perf_counter()
        return Step(rows=rows, emitted=emitted, tree=tree, accepted=accepted)

    def _picking(self, rows: Sequence[Row], num_nodes: int = 1) -> Picking:
        return Picking(rows, self._target.device, num_nodes, self._rule)


def _cat(parts: list[Tensor]) -> Tensor:
    """The parts one after the other; most steps have a single one."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _stacked(tables: list[Tensor]) -> Tensor:
    """Tables of different widths, one below the other."""
    width = max(table.shape[1] for table in tables)
    return _cat([torch.nn.functional.pad(table, (0, width - table.shape[1])) for table in tables])
