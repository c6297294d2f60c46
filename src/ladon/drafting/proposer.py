"""Proposers: whatever drafts a tree. What one must be able to do, the decoding heads, and none (plain decoding)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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


class Proposer:
    """What drafts for one engine: derive your own from this class, and write `propose`; all else may stay as it is.

    A step of the engine admits sequences, verifies the trees drafted before, samples, accepts, commits, drafts and
    delivers. These methods are called in it:

    | stage   | method    | when |
    |---------|-----------|------|
    | admit   | `keep`    | sequences have left |
    | commit  | `observe` | trees were verified |
    | draft   | `join`    | prompts have been read to their end |
    | draft   | `propose` | always, unless nothing is to be drafted |
    | deliver | `mirror`  | after each draft |

    A sequence goes by its place: those in flight are numbered 0 to B - 1, and row i of every tensor is that of place i.
    Those that `join` get the next places; `keep` numbers anew those that stay.

    Tensors are on the device of the model. Whoever reads one on the host (`tolist`, `item`, an `if`) waits until the
    device has done all it was given. On a CPU that costs nothing; on a GPU it idles meanwhile, and the steps take
    longer. All methods run without gradients. Tensors that you are given, and trees that you have returned, must not
    be written to.

    Shapes: B sequences in flight, b of them new, N nodes verified, H the model's hidden width.

    Attributes:
        reads_prompts: whether `join` is to get the hidden states of whole prompts. They are kept for no other, and
            prompts are then read whole, even where a kept prefix has part of them.
        is_checked: whether the trees of a drafter that was given as `proposer=` are looked at before they are verified,
            which reads the device once a step. False is for a drafter that is known to be right: a tree that is none
            may then change the output. Shapes, types and sizes are looked at in any case, and branches where only
            chains can be verified.
    """

    reads_prompts: bool = False
    is_checked: bool = True

    def join(self, prompts: Sequence[Tensor], hidden: Tensor, states: Sequence[Tensor] = ()) -> None:
        """Sequences join behind those there are. Does nothing unless overridden.

        The first new token of each is not among its prompt; it is the root that the next `propose` gets, or, if none
        comes, the `root` of the next `observe`.

        Args:
            prompts: their token ids, [T] int64 each, read to the end; on whatever device the caller had them.
            hidden: the model's hidden state after the final norm at the last token of each prompt, [b, H] in its dtype.
            states: the same at all tokens of each prompt, [T, H] each, if the class has `reads_prompts = True`.
        """

    def propose(self, hidden: Tensor, root: Tensor, max_nodes: int) -> TokenTree:
        """Draft a tree for every sequence in flight.

        `TokenTree.from_paths` and `TokenTree.chain` make trees of lists and of tensors. Nodes should come with the
        likeliest first: a step may verify the first few alone. Log-probabilities are of the path from the root; with
        budget="auto" they decide, corrected by what was accepted, how many nodes are verified. Who knows none gives
        each token the same, such as log 0.5, so that a node at depth d has d x log 0.5.

        Args:
            hidden: the model's hidden state after the final norm at the last token before each root, [B, H] in its
                dtype.
            root: the newest token of each sequence, [B] int64. The target has not read it yet.
            max_nodes: nodes that a tree may have at most, root included. A drafter given as `proposer=` is not asked
                for the root alone: this is 2 or more.

        Returns:
            The trees, on the device of `root`, each with its root as node 0.
        """
        raise NotImplementedError(f"{type(self).__name__} has no propose")

    def observe(self, accepted: Accepted, hidden: Tensor) -> None:
        """The trees of all sequences in flight were verified. Does nothing unless overridden.

        What was verified may be less than what was proposed, or more, if n-grams were merged in or a constraint has
        changed it: go by `accepted.tokens`. A sequence may end within them; it is gone with the next `keep`. A drafter
        given as `proposer=` gets 0 for a token that there is none of, where the sequence ends for want of it.

        Args:
            accepted: the accepted paths and what was said after them. Sequence i has gone on from `root[i]` with
                `tokens[i, : count[i]]`, the last of which is the next root. All int64, on the device.
            hidden: the model's hidden state after the final norm at each verified node, [B, N, H];
                `hidden[i, accepted.last[i]]` is what the next `propose` gets for sequence i.
        """

    def mirror(self, counts: Sequence[int]) -> None:
        """The host has got the tokens of the step. Does nothing unless overridden.

        Args:
            counts: how many tokens each sequence that was observed has got in it, `accepted.count` on the host; those
                that have joined in it are not among them.
        """

    def keep(self, rows: Sequence[int]) -> None:
        """Sequences have left: only those at these places stay, in this order. Does nothing unless overridden.

        Args:
            rows: their old places; `rows[i]` is at place i from now on. None at all means that the last one has left,
                or that a step has failed: forget everything. A drafter given as `proposer=` is told so before its first
                sequence joins, too.
        """


class RootProposer(Proposer):
    """Drafts nothing: the tree is the root alone, and decoding is plain."""

    def propose(self, hidden: Tensor, root: Tensor, max_nodes: int) -> TokenTree:
        """The root alone."""
        return root_tree(root)


class HeadsProposer(Proposer):
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
