"""What comes out of verifying a tree."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ladon.target.pruning.node_scores import cut_tree
from ladon.trees.token_tree import TokenTree


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyOutput:
    """What the target says about a tree.

    Attributes:
        tree: the tree that was verified, M nodes: those of the given tree that pruning let through, or all of them.
        logits: the target's logits after each node, [B, M, V], in the model's dtype.
        hidden: hidden state after the final norm, [B, M, H].
        ancestors: who sees whom inside the tree, [B, M, M] bool, so that no one builds it twice.
        nodes: index of each node in the tree that was given, [B, M]; None if that is its own.
        num_pruned: node slots per row that later layers did not see.
    """

    tree: TokenTree
    logits: Tensor
    hidden: Tensor
    ancestors: Tensor
    nodes: Tensor | None = None
    num_pruned: int = 0

    @classmethod
    def of(
        cls, tree: TokenTree, ancestors: Tensor, logits: Tensor, hidden: Tensor, nodes: Tensor | None
    ) -> VerifyOutput:
        """Outputs of the given tree [B, N], or of its `nodes` [B, M] alone."""
        if nodes is None:
            return cls(tree=tree, logits=logits, hidden=hidden, ancestors=ancestors)
        survivors, mask = cut_tree(tree, ancestors, nodes)
        dropped = tree.num_nodes - nodes.shape[1]
        return cls(tree=survivors, logits=logits, hidden=hidden, ancestors=mask, nodes=nodes, num_pruned=dropped)

    def given(self, path: Tensor) -> Tensor:
        """Nodes of `tree`, [B, A], in the numbers of the tree that was given, by which the cache has them."""
        return path if self.nodes is None else self.nodes.gather(1, path)
