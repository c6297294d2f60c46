"""The loop: admit, verify, sample, accept, commit, draft, deliver, for sequences that join and leave at any step.

Everything is batched and nothing on the way reads the device but `to_host`, once a step. Plain decoding is the same
loop with a tree of one node.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence

import torch
from torch import Tensor

from ladon.drafting.merge_on_host import HostMerge
from ladon.drafting.ngram_lookup import NgramLookup
from ladon.drafting.proposer import Proposer
from ladon.engine.observer import EngineObserver, stage
from ladon.engine.scheduler import Scheduler
from ladon.engine.sequence import Row, raise_error_of
from ladon.engine.step import Admission, Outcome, Step
from ladon.sampling.acceptance import Accepted, accepted_path
from ladon.sampling.lossy import Rule
from ladon.sampling.sampler import Sampled, Sampler
from ladon.target.target import Target
from ladon.target.verify_output import VerifyOutput
from ladon.tree_size.tree_sizes import TreeSizes
from ladon.trees.token_tree import TokenTree
from ladon.trees.transfer import to_device


class Engine:
    """Decodes sequences with one target and one proposer: they are submitted, join, decode together, and leave.

    One thread steps; any thread may submit and cancel. While no sequence is in flight the engine holds no cache: the
    model may be changed then, and is looked at anew before the next sequence joins.

    Attributes:
        observer: is told what steps do.
    """

    def __init__(
        self,
        target: Target,
        proposer: Proposer,
        sizes: TreeSizes,
        *,
        observer: EngineObserver | None = None,
        max_rows: int | None = None,
        rule: Rule | None = None,
        lookup: NgramLookup | None = None,
    ) -> None:
        """Make an engine without sequences.

        Args:
            target: the model.
            proposer: drafts the trees; no other engine may use it.
            sizes: says how many nodes are drafted and verified; no other engine may use it.
            observer: is told what steps do; None: nobody is.
            max_rows: sequences in flight at most, others wait in the order they came; None for no bound.
            rule: a lossy rule of acceptance; None for exact acceptance.
            lookup: adds n-grams to the trees; no other engine may use it. None: nothing is added.

        Raises:
            InputError: `max_rows` is below 1.
        """
        self.observer = observer or EngineObserver()
        self._target, self._proposer, self._sizes, self._rule = target, proposer, sizes, rule
        self._host_merge = HostMerge(sizes, lookup, self.observer)
        self._scheduler = Scheduler(target, max_rows, reuses_prefixes=not proposer.reads_prompts)
        self._tree: TokenTree | None = None

    @property
    def cache_bytes(self) -> int:
        """What keys and values take now; 0 when no sequence is in flight."""
        return self._scheduler.nbytes

    def submit(self, row: Row) -> None:
        """Let a sequence wait for its turn; it joins in the next step that has room. From any thread.

        Raises:
            InputError: it was submitted before, its prompt is empty, or it may get no token.
        """
        self._scheduler.submit(row)

    def cancel(self, row: Row) -> None:
        """End a sequence, wherever it is, from any thread: `Row.cancel`. Its place is free from the next step on."""
        row.cancel()

    def run(self, rows: Sequence[Row]) -> Generator[Step, None, None]:
        """Submit sequences and step until nothing is left to do. Closing the iterator cancels those still in flight.

        Raises:
            InputError: a sequence cannot be submitted.
            LogitsError: nothing can be said after a sequence; the others are cancelled, and all keep what they have.
            Exception: what a sequence's stop rule has raised, likewise. That there was no memory to read a prompt is
                raised when the others have ended.
        """
        submitted: list[Row] = []
        try:
            for row in rows:
                self.submit(row)
                submitted.append(row)
            while (step := self.step()) is not None:
                yield step
                raise_error_of(rows)
            raise_error_of(rows, at_end=True)
        finally:
            for row in submitted:
                row.cancel()
            self._settle()

    @torch.no_grad()
    def step(self) -> Step | None:
        """Sequences leave and join, prompts are read on by a chunk, and all others take a decode step.

        A sequence for whose prompt there is no memory ends with that error, and the others go on. A step that raises
        takes the sequences in flight with it: they are cancelled. Waiting ones go on waiting.

        Returns:
            What was done; None if there is no sequence.
        """
        try:
            return self._step()
        except BaseException:  # an interrupt, too, leaves sequences half done
            self._scheduler.drop()
            self._keep([])
            raise

    def _step(self) -> Step | None:
        joined = self._admit()
        if not self._scheduler.rows:
            return None
        decoded = None
        if self._tree is not None:
            out, sampler = self._verify(self._tree)
            sampled = self._sample(out, sampler)
            accepted = self._accept(out, sampled)
            decoded = self._commit(out, sampled, accepted)
        outcomes = [outcome for outcome in (decoded, joined.outcome) if outcome is not None]
        if outcomes:
            self._draft(outcomes)
        step = self._deliver(outcomes, joined)
        self.observer.stepped(step)
        return step

    @stage
    def _admit(self) -> Admission:
        """Sequences leave and join, and prompts are read on by a chunk."""
        self._settle()
        admitted = self._scheduler.admit()
        joining, first = self._scheduler.joining, len(self._scheduler.drafted)
        if not joining:
            return Admission(admitted, [], None)
        cache, before = self._scheduler.cache, self._scheduler.cache.host_lengths[first:]
        keep = (lambda place, states: joining[place].states.append(states)) if self._proposer.reads_prompts else None
        with self.observer.stage("prefill"):
            done, hidden, logits, failed = self._target.read([row.prompt for row in joining], cache, keep)
            for place, error in failed.items():
                joining[place].fail(error)
            lengths = zip(joining, before, cache.host_lengths[first:], strict=True)
            read = [(row, new - old) for row, old, new in lengths]
            if hidden is None or logits is None:
                return Admission(admitted, read, None)
            sampled = self._sampler([joining[index] for index in done]).after_prompts(logits)
        root = sampled.tokens[:, 0]
        table = torch.stack([torch.ones_like(root), root], dim=1)
        places, kept = [first + index for index in done], sampled.along(torch.zeros_like(sampled.tokens))
        outcome = Outcome(places=places, hidden=hidden, root=root, table=table, kept=kept)
        return Admission(admitted, read, outcome)

    @stage
    def _verify(self, tree: TokenTree) -> tuple[VerifyOutput, Sampler]:
        """The target's one forward over the best nodes of the trees, as many as pay."""
        lengths = self._scheduler.cache.host_lengths[: tree.batch_size]
        caps = self._depth_caps(lengths)
        size = self._sizes.choose(lengths, depth=min(caps))
        self.observer.verifies(self._scheduler.decoding, size.nodes)
        tree = tree.prefix(size.nodes).within(caps)
        sampler = self._sampler(self._scheduler.decoding, tree.num_nodes)  # uploads now: after the forward they wait
        return self._target.verify(tree, self._scheduler.cache, size.pruning), sampler

    @stage
    def _sample(self, out: VerifyOutput, sampler: Sampler) -> Sampled:
        """The token that the target itself says after each node."""
        return sampler.after(out.logits, out.tree, out.ancestors, out.nodes)

    @stage
    def _accept(self, out: VerifyOutput, sampled: Sampled) -> Accepted:
        """The longest path that the target itself has said."""
        return accepted_path(out.tree, sampled.tokens, out.ancestors, sampled.admitted)

    @stage
    def _commit(self, out: VerifyOutput, sampled: Sampled, accepted: Accepted) -> Outcome:
        """The cache keeps the accepted nodes and drops the rest; sequences go on from the last of them."""
        self._scheduler.cache.commit(out.given(accepted.path), accepted.count)
        self._proposer.observe(accepted, out.hidden)
        index = torch.arange(out.tree.batch_size, device=accepted.last.device)
        return Outcome(
            places=self._scheduler.drafted,
            hidden=out.hidden[index, accepted.last],
            root=accepted.bonus,
            table=torch.cat([accepted.count[:, None], accepted.tokens], dim=1),
            kept=sampled.along(accepted.path),
            verified=out,
            accepted=accepted,
        )

    @stage
    def _draft(self, outcomes: list[Outcome]) -> None:
        """Grow the next trees, those of sequences that have just joined included."""
        scheduler = self._scheduler
        joined = [scheduler.rows[place] for outcome in outcomes if outcome.verified is None for place in outcome.places]
        if joined:
            states = [row.take_states() for row in joined if row.states]
            self._proposer.join([row.prompt for row in joined], outcomes[-1].hidden, states)
        scheduler.drafted = [place for outcome in outcomes for place in outcome.places]
        hidden, root = _cat([outcome.hidden for outcome in outcomes]), _cat([outcome.root for outcome in outcomes])
        lengths = [scheduler.cache.host_lengths[place] for place in scheduler.drafted]
        width = self._host_merge.width(self._sizes.reach(lengths), [row.grammar for row in scheduler.decoding])
        # the host has yet to see who ends here for want of a token
        self._tree = self._proposer.propose(hidden, root.clamp(min=0), width)

    @stage
    def _deliver(self, outcomes: list[Outcome], joined: Admission) -> Step:
        """The host sees the new tokens and hands them out; what it can add to the trees, it adds."""
        if not outcomes or self._tree is None:
            return Step(admitted=joined.admitted, read=joined.read)
        table = self._host_merge.transfer(_stacked([outcome.table for outcome in outcomes]), self._tree)
        rows, num_grown = self._scheduler.decoding, self._tree.num_nodes
        out, accepted = outcomes[0].verified, outcomes[0].accepted
        counts = [] if out is None else [count for count, *_ in table[: len(outcomes[0].places)]]
        self._scheduler.cache.mirror(counts)
        self._proposer.mirror(counts)
        with self.observer.stage("callers"):
            emitted = self._hand_out(table, outcomes)
        prompts = [row.prompt for row in rows[len(counts) :]]
        merged = self._host_merge.merged(table, prompts, [row.grammar for row in rows])
        if merged is not None:
            self._tree = to_device(merged, self._target.device)
        return Step(
            rows=rows,
            emitted=emitted,
            tree=None if out is None else out.tree,
            accepted=accepted,
            counts=counts,
            num_dropped=0 if out is None else out.num_pruned,
            num_grown=num_grown,
            admitted=joined.admitted,
            read=joined.read,
        )

    def _hand_out(self, table: list[list[int]], outcomes: list[Outcome]) -> list[list[int]]:
        """Each sequence takes its new tokens, and decides where it ends; the tokens taken."""
        emitted = []
        kept = [(outcome.kept, place) for outcome in outcomes for place in range(len(outcome.places))]
        for row, (count, *tokens), (found, place) in zip(self._scheduler.decoding, table, kept, strict=True):
            if row.keeps:  # first of all: stop rules may read it
                row.keep({name: values[place] for name, values in found.items()}, count)
            emitted.append(row.take(tokens[:count]))
        return emitted

    @torch.no_grad()
    def _settle(self) -> None:
        """Sequences that have ended leave; those that have read their prompts are among the others now."""
        trees = self._scheduler.settle()
        if self._tree is not None and trees is not None:
            self._keep(trees)

    def _keep(self, trees: list[int]) -> None:
        """Only these trees stay, and what was drafted from."""
        self._tree = self._tree.rows(trees) if self._tree is not None and trees else None
        self._proposer.keep(trees)
        self._host_merge.keep(trees)

    def _depth_caps(self, lengths: list[int]) -> list[int]:
        """How deep nodes may be that a sequence may still emit, and that the target verifies exactly at its length."""
        caps = []
        for row, length in zip(self._scheduler.decoding, lengths, strict=True):
            target_cap = 0 if row.sampling_params.is_plain else self._target.depth_cap(length)
            caps.append(row.num_left - 1 if target_cap is None else min(row.num_left - 1, target_cap))
        return caps

    def _sampler(self, rows: Sequence[Row], num_nodes: int = 1) -> Sampler:
        return Sampler(rows, self._target.device, num_nodes, self._rule)


def _cat(parts: list[Tensor]) -> Tensor:
    """The parts one after the other; most steps have a single one."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _stacked(tables: list[Tensor]) -> Tensor:
    """Tables of different widths, one below the other."""
    width = max(table.shape[1] for table in tables)
    return _cat([torch.nn.functional.pad(table, (0, width - table.shape[1])) for table in tables])
