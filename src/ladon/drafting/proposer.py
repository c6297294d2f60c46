"""Proposers: whatever drafts a tree. The decoding heads, and nothing at all (plain decoding).

A proposer serves one engine and holds per-row state only. Rows are named by their place: those that join come behind
the others, and `keep` says who is where when rows have left.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from ladon.config import MOST_NODES, TREES, DecoderOptions
from ladon.drafting.head_chaining import Chaining, joint_of, make_chaining
from ladon.errors import TreeError
from ladon.heads import Heads
from ladon.sampling.acceptance import Accepted
from ladon.trees import grow as growth
from ladon.trees.fixed_tree import FixedTree
from ladon.trees.lattice import Lattice
from ladon.trees.token_tree import TokenTree, root_tree
from ladon.util.observer import SILENT, Observer

TreeBuilder = Callable[[Lattice, Tensor, int], TokenTree]


class Proposer(Protocol):
    """What the engine asks of a proposer. None of these may read the device.

    Attributes:
        reads_prompts: whether `join` is to get the hidden states of whole prompts; they are kept for no other.
    """

    reads_prompts: bool

    def join(self, prompts: Sequence[Tensor], hidden: Tensor, states: Sequence[Tensor] = ()) -> None:
        """Rows come behind those there are.

        Args:
            prompts: their token ids, [T] each, read to the end.
            hidden: hidden state of the last token of each, [b, H].
            states: those of all its tokens, [T, H] each, for a proposer that `reads_prompts`.
        """

    def propose(self, hidden: Tensor, root: Tensor, max_nodes: int) -> TokenTree:
        """A tree of at most `max_nodes` nodes, best first, after the rows `hidden` [B, H] and the roots [B]."""

    def observe(self, accepted: Accepted, hidden: Tensor) -> None:
        """A step's outcome, before rows join: the accepted paths, and hidden rows of all verified nodes [B, N, H]."""

    def mirror(self, counts: Sequence[int]) -> None:
        """After the step's transfer: how many tokens each row that was observed has got."""

    def keep(self, rows: Sequence[int]) -> None:
        """Only the rows at these places stay, in this order; there may be none."""


class Stateless:
    """A proposer for which only `propose` matters, unless more is said."""

    reads_prompts = False

    def join(self, prompts: Sequence[Tensor], hidden: Tensor, states: Sequence[Tensor] = ()) -> None:
        """Nothing to remember."""

    def observe(self, accepted: Accepted, hidden: Tensor) -> None:
        """Nothing to learn."""

    def mirror(self, counts: Sequence[int]) -> None:
        """Nothing to count."""

    def keep(self, rows: Sequence[int]) -> None:
        """Nothing to drop."""


class RootProposer(Stateless):
    """Drafts nothing: the tree is the root alone, and decoding is plain."""

    def propose(self, hidden: Tensor, root: Tensor, max_nodes: int) -> TokenTree:
        """The root alone."""
        return root_tree(root)


class HeadsProposer(Stateless):
    """Drafts with decoding heads: one hidden row per sequence -> lattice -> tree.

    Attributes:
        build: turns the lattice into the tree.
    """

    def __init__(self, joint: Chaining, build: TreeBuilder, observer: Observer = SILENT) -> None:
        """Draft with heads.

        Args:
            joint: makes the lattice.
            build: turns it into a tree.
            observer: is told of the parts.
        """
        self._joint = joint
        self.build = build
        self._observer = observer

    def propose(self, hidden: Tensor, root: Tensor, max_nodes: int) -> TokenTree:
        """The tree over the heads' candidates."""
        if max_nodes == 1:
            return root_tree(root)
        with self._observer.stage("heads"):
            candidates = self._joint(hidden, root)
        with self._observer.stage("growth"):
            return self.build(candidates, root, max_nodes)


def drafting(
    heads: Heads,
    tree: str | FixedTree,
    num_candidates: int,
    budget: int | str,
    observer: Observer = SILENT,
    joint: str = "auto",
) -> HeadsProposer:
    """Heads that draft trees of a kind with at most `num_candidates` each, for a budget, which may be "auto"."""
    most = budget if isinstance(budget, int) else MOST_NODES
    needed = candidates_needed(tree, num_candidates, most)
    guess = make_chaining(heads, joint_of(heads, joint), needed, num_candidates, tree, most)
    return HeadsProposer(guess, tree_builder(tree), observer)


def tree_builder(tree: str | FixedTree) -> TreeBuilder:
    """The builder that a tree option names: "dynamic", "chain", or a fixed tree."""
    if isinstance(tree, FixedTree):
        return lambda candidates, root, max_nodes: growth.grow_fixed(candidates, root, tree).prefix(max_nodes)
    return {"dynamic": growth.grow_dynamic, "chain": growth.grow_chain}[tree]


def candidates_needed(tree: str | FixedTree, num_candidates: int, budget: int) -> int:
    """How many of a head's best candidates a tree can use: a fixed tree names its ranks, whatever the budget."""
    if isinstance(tree, FixedTree):
        return max(1, tree.max_rank + 1)
    return 1 if tree == "chain" else max(1, min(num_candidates, budget - 1))


def check_candidates(num_candidates: int, heads: Heads | None) -> None:
    """`TreeError` if a head is asked for more candidates than there are tokens; the default is cut to them."""
    if heads is not None and num_candidates > max(heads.vocab_size, DecoderOptions().num_candidates):
        raise TreeError(f"num_candidates is {num_candidates}; give 1 to {heads.vocab_size}, the size of the vocabulary")


def check_tree(tree: str | FixedTree, heads: Heads | None, num_candidates: int) -> str | FixedTree:
    """The tree option; `TreeError` if it is unknown, or a fixed tree that these heads cannot fill."""
    if isinstance(tree, FixedTree):
        if heads is not None:
            tree.check_fits(heads.num_heads, min(num_candidates, heads.vocab_size))
        return tree
    if tree not in TREES:
        names = ", ".join(f'"{name}"' for name in TREES)
        raise TreeError(f"tree is {tree!r}; give {names} or a ladon.FixedTree")
    return tree


def as_chain(tree: str | FixedTree) -> str | FixedTree:
    """The option for a model that verifies chains only; a fixed tree that branches would not be exact there."""
    if isinstance(tree, FixedTree) and tree.num_nodes > tree.max_depth + 1:
        raise TreeError('this model verifies chains only, and the fixed tree branches; give tree="chain"')
    return "chain" if tree == "dynamic" else tree
