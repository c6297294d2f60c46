"""Proposers for tests: an oracle that drafts the truth, an adversary that never does, random drafts; and runs of them.

They fill a lattice and leave the tree to the builder under test, so each goes with every kind of tree.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ladon.decoder.decoder import Decoder
from ladon.drafting.head_chaining import product
from ladon.drafting.proposer import HeadsProposer, Proposer, RootProposer, tree_builder
from ladon.engine.engine import Engine
from ladon.engine.recorder import Recorder
from ladon.engine.sequence import Row
from ladon.engine.stats import DecodeStats
from ladon.sampling.sampling_params import GREEDY, SamplingParams
from ladon.target.pruning.pruner import Pruning
from ladon.target.target import Target
from ladon.tree_size.acceptance_model import Sums
from ladon.tree_size.policy import EDGES, Size, Sizing, StepRecord
from ladon.tree_size.tree_sizes import TreeSizes
from ladon.trees.fixed_tree import FixedTree
from ladon.trees.lattice import Lattice
from ladon.trees.token_tree import TokenTree, ancestor_mask, node_depths

DEPTH, CANDIDATES = 3, 4
NUM_NODES = 12
FIXED = FixedTree(((0,), (1,), (0, 0), (0, 1), (2,), (0, 0, 0), (0, 0, 2), (1, 1), (3,), (1, 1, 0), (2, 0)))
TREES: dict[str, str | FixedTree] = {"chain": "chain", "fixed": FIXED, "dynamic": "dynamic"}
SIZES = [("dynamic", 1), ("dynamic", 2), ("dynamic", 12), ("chain", 4), ("fixed", 12)]  # for `oracle_decoder`
Truth = Sequence[Sequence[int]] | Mapping[tuple[int, ...], Sequence[int]]
PROPOSERS = ("root", "oracle", "adversary", "random", "heads")


class DraftedLattice(Proposer):
    """Fills each depth with candidates that hold the true next token (oracle), never do (adversary), or may.

    The truth is what the reference decoding emitted: after each prompt, or of each row in the order in which the rows
    join. Where a row stands is counted on the device, as any proposer has to.
    """

    def __init__(self, kind: str, truth: Truth, vocab_size: int, tree: str | FixedTree) -> None:
        rows = list(truth.values()) if isinstance(truth, Mapping) else truth
        longest = max(len(row) for row in rows) + DEPTH + 2
        self._all = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
        self._prompts = list(truth) if isinstance(truth, Mapping) else None
        self._joined, self._truth = 0, self._all[:0]
        self._kind, self._vocab_size = kind, vocab_size
        self._build = tree_builder(tree)
        self._place = torch.zeros(0, dtype=torch.long)
        self._generator = torch.Generator().manual_seed(1)

    def join(self, prompts, hidden, states=()):
        """The prefill's token is the first of the truth: the next one to draft is the second."""
        which = list(range(self._joined, self._joined + len(prompts)))
        if self._prompts is not None:
            which = [self._prompts.index(tuple(prompt.tolist())) for prompt in prompts]
        self._joined += len(prompts)
        self._truth = torch.cat([self._truth, self._all[which]])
        self._place = torch.cat([self._place, torch.ones(len(prompts), dtype=torch.long)])

    def observe(self, accepted, hidden):
        self._place += accepted.count

    def keep(self, rows):
        self._place, self._truth = self._place[list(rows)], self._truth[list(rows)]

    def propose(self, hidden: Tensor, root: Tensor, max_nodes: int):
        batch_size = len(root)
        columns = (self._place[:, None] + torch.arange(DEPTH)).clamp(max=self._truth.shape[1] - 1)
        truth = self._truth.gather(1, columns)[:, :, None]
        scores = torch.rand(batch_size, DEPTH, self._vocab_size, generator=self._generator)
        if self._kind == "oracle":
            scores.scatter_(2, truth, 2.0)
        elif self._kind == "adversary":
            scores.scatter_(2, truth, -1.0)
        top, tokens = scores.topk(CANDIDATES, dim=-1)
        log_probs = (top / (self._vocab_size + 2)).log()
        return self._build(Lattice(tokens=tokens[:, :, None], log_probs=log_probs[:, :, None]), root, max_nodes)


class TableProposer(Proposer):
    """Drafts the same tree after the same root: tokens by root, [V, N] (the first is the root's own), and one shape.

    Small vocabularies only. What a tree holds then follows from the text alone, and laws can be enumerated.
    """

    def __init__(self, tokens: Tensor, parents: Sequence[int]) -> None:
        self.tokens, self.parents = tokens, torch.tensor(parents)
        self.depths = node_depths(ancestor_mask(self.parents[None], len(parents)))[0]

    @classmethod
    def random(cls, vocab_size: int, parents: Sequence[int], seed: int) -> TableProposer:
        """Siblings are distinct, otherwise anything is drafted."""
        dice = random.Random(seed)
        table = []
        for root in range(vocab_size):
            tokens = [root]
            for node, parent in enumerate(parents[1:], start=1):
                taken = {tokens[other] for other in range(1, node) if parents[other] == parent}
                tokens.append(dice.choice([token for token in range(vocab_size) if token not in taken]))
            table.append(tokens)
        return cls(torch.tensor(table), parents)

    def propose(self, hidden: Tensor, root: Tensor, max_nodes: int) -> TokenTree:
        return TokenTree(
            tokens=self.tokens[root],
            parents=self.parents.expand(len(root), -1),
            log_probs=-0.1 * self.depths.expand(len(root), -1).float(),
            max_depth=int(self.depths.max()),
        )


class RandomSizing:
    """Any size at any time, drafting and pruning or not; keeps what it is told."""

    def __init__(self, seed: int) -> None:
        self.edges: Sequence[int] = EDGES
        self.probes = 0
        self.records: list[StepRecord] = []
        self.sums: list[Sums | None] = []
        self.of_heads: list[Sums | None] = []
        self._dice = random.Random(seed)

    def for_run(self) -> RandomSizing:
        return self

    def reach(self, batch: int, context: float) -> int:
        return self._dice.choice((1, 1, *EDGES))

    def choose(self, sums: Sums | None, batch: int, context: float, of_heads: Sums | None = None) -> Size:
        self.sums.append(sums)
        self.of_heads.append(of_heads)
        return Size(self._dice.choice(EDGES), self._dice.random() < 0.5)

    def observe(self, record: StepRecord) -> float:
        self.records.append(record)
        return 0.5


def make_proposer(
    kind: str, tree: str | FixedTree, truth: Truth, vocab_size: int, heads: torch.nn.Module | None
) -> Proposer:
    if kind == "root":
        return RootProposer()
    if kind == "heads":
        assert heads is not None
        return HeadsProposer(product(heads, CANDIDATES), tree_builder(tree))
    return DraftedLattice(kind, truth, vocab_size, tree)


def oracle_decoder(model: PreTrainedModel, truth: Sequence[int], tree: str, budget: int) -> Decoder:
    """A decoder for one prompt whose drafts hold what is said after it, so that most steps emit several tokens."""
    decoder = Decoder(model, budget=budget)
    decoder._proposer = lambda observer: make_proposer("oracle", TREES[tree], [truth], 97, None)
    return decoder


def decode(
    target: Target,
    proposer: Proposer,
    prompts: Sequence[Tensor],
    max_new_tokens: int,
    eos_token_ids: frozenset[int] = frozenset(),
    budget: int | Sizing = NUM_NODES,
    pruning: Pruning | None = None,
    sampling_params: SamplingParams = GREEDY,
) -> tuple[list[list[int]], DecodeStats]:
    """Run the engine; the emitted tokens of each prompt, and the statistics."""
    never = eos_token_ids.__contains__
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "is_stop": never, "sampling_params": sampling_params}
    rows = [Row(prompt=prompt, **options) for prompt in prompts]
    stats = DecodeStats()
    for _ in make_engine(target, proposer, budget=budget, stats=stats, pruning=pruning).run(rows):
        pass
    return [row.tokens for row in rows], stats


def make_engine(
    target: Target,
    proposer: Proposer,
    *,
    budget: int | Sizing = NUM_NODES,
    stats: DecodeStats | None = None,
    pruning: Pruning | None = None,
    **options: Any,
) -> Engine:
    """An engine that counts, as a decoder makes it."""
    sizes = TreeSizes(budget, target.device, pruning)
    recorder = Recorder(stats or DecodeStats(), sizes, target.model, target.device)
    return Engine(target, proposer, sizes, observer=recorder, **options)
