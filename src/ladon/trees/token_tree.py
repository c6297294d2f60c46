"""The token tree: a parent array in topological order, batched, and everything that follows from it.

Shapes: B rows, N node slots, D the greatest depth. Node 0 of every row is the root: the token picked last, not yet in
the cache. Parents precede their children; in trees made by `growth` the nodes are in best-first order, so the first n
nodes are themselves the best tree of n nodes. A slot whose log-probability is -inf is padding: it belongs to no path,
whatever its token says, and is never accepted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ladon.errors import TreeError


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenTree:
    """A batch of token trees.

    Attributes:
        tokens: token id of each node, [B, N] int64.
        parents: index of each node's parent, [B, N] int64; -1 for the root, smaller than i for node i; a padding slot
            points at some earlier slot.
        log_probs: log-probability of the path from the root to each node, [B, N] float32; 0 for the root, never above
            the parent's, -inf for padding.
        max_depth: a bound on the depth of any node, known without reading the device.
        depths: depth of each node, [B, N] int64, from a builder that has it at hand; else None.
    """

    tokens: Tensor
    parents: Tensor
    log_probs: Tensor
    max_depth: int
    depths: Tensor | None = None

    @property
    def batch_size(self) -> int:
        """B, the number of rows."""
        return self.tokens.shape[0]

    @property
    def num_nodes(self) -> int:
        """N, the number of node slots, root included."""
        return self.tokens.shape[1]

    def prefix(self, num_nodes: int) -> TokenTree:
        """The first `num_nodes` slots of every row; with best-first order, the best tree of that size."""
        if num_nodes >= self.num_nodes:
            return self
        return TokenTree(
            tokens=self.tokens[:, :num_nodes],
            parents=self.parents[:, :num_nodes],
            log_probs=self.log_probs[:, :num_nodes],
            max_depth=min(self.max_depth, num_nodes - 1),
            depths=None if self.depths is None else self.depths[:, :num_nodes],
        )

    def rows(self, places: Sequence[int]) -> TokenTree:
        """The trees of the rows at these places."""
        index = torch.tensor(places, dtype=torch.long, device=self.tokens.device)
        return replace(
            self,
            tokens=self.tokens[index],
            parents=self.parents[index],
            log_probs=self.log_probs[index],
            depths=None if self.depths is None else self.depths[index],
        )

    def to(self, device: torch.device) -> TokenTree:
        """The tree on another device."""
        return replace(
            self,
            tokens=self.tokens.to(device),
            parents=self.parents.to(device),
            log_probs=self.log_probs.to(device),
            depths=None if self.depths is None else self.depths.to(device),
        )

    def within(self, caps: Sequence[int]) -> TokenTree:
        """The tree without what lies deeper than its row's cap: padding, or no slots where all caps are 0."""
        if max(caps) == 0:
            return self.prefix(1)
        if min(caps) >= self.max_depth:
            return self
        depths = node_depths(ancestor_mask(self.parents, self.max_depth))
        return self.capped(depths, torch.tensor(caps, device=depths.device))

    def capped(self, depths: Tensor, max_depths: Tensor) -> TokenTree:
        """Turn every node deeper than its row's bound into padding.

        Args:
            depths: depth of each node, [B, N], as `node_depths` gives it.
            max_depths: the greatest depth allowed in each row, [B] int64.
        """
        too_deep = depths > max_depths[:, None]
        return replace(
            self,
            parents=self.parents.masked_fill(too_deep, 0),
            log_probs=self.log_probs.masked_fill(too_deep, -torch.inf),
        )


def root_tree(root: Tensor) -> TokenTree:
    """The tree of plain decoding: the root alone. `root` is [B] int64."""
    return TokenTree(
        tokens=root[:, None],
        parents=torch.full_like(root[:, None], -1),
        log_probs=torch.zeros(root.shape[0], 1, dtype=torch.float32, device=root.device),
        max_depth=0,
    )


def ancestor_mask(parents: Tensor, max_depth: int) -> Tensor:
    """Who may attend to whom inside a token tree.

    Node i sees node j exactly when j is i itself or lies on i's path to the root. The committed prefix is not part of
    this mask: every node sees all of it, and the target adds those columns.

    Example: parents [-1, 0, 0, 1] (root, two children, one grandchild under node 1) give rows 1000, 1100, 1010, 1101.

    Args:
        parents: [B, N] int64; -1 for the root.
        max_depth: a bound on the depth of any node.

    Returns:
        [B, N, N] bool. Row i has depth(i) + 1 ones.

    Cost: ceil(log2(max_depth)) batched products of [N, N], no loop over nodes, no host transfer.
    """
    num_nodes = parents.shape[1]
    if num_nodes == 1:  # plain decoding, whose steps are short
        return torch.ones_like(parents, dtype=torch.bool)[:, :, None]
    nodes = torch.arange(num_nodes, device=parents.device)
    steps = (parents[:, :, None] == nodes) | (nodes[:, None] == nodes)  # at most one step up
    reach, span = steps, 1
    while span < max_depth:
        counts = reach.float()
        reach, span = torch.bmm(counts, counts) > 0, 2 * span
    return reach


def node_depths(mask: Tensor) -> Tensor:
    """Depth of each node, [B, N] int64, from the ancestor mask [B, N, N]; the root has depth 0."""
    return mask.sum(-1) - 1


def position_ids(depths: Tensor, lengths: Tensor) -> Tensor:
    """Position of each node, [B, N]: rows with `lengths` [B] cached tokens put the root at position `lengths`."""
    return lengths[:, None] + depths


def check_tree(tree: TokenTree) -> None:
    """Raise `TreeError` at the first slot that breaks the definition. Reads the device: for tests and builders."""
    parents, log_probs = tree.parents.cpu(), tree.log_probs.cpu()
    for row, (row_parents, row_log_probs) in enumerate(zip(parents.tolist(), log_probs.tolist(), strict=True)):
        if row_parents[0] != -1:
            raise TreeError(f"row {row}: node 0 has parent {row_parents[0]}, but the root's parent must be -1")
        for node, parent in enumerate(row_parents[1:], start=1):
            if not 0 <= parent < node:
                raise TreeError(
                    f"row {row}: node {node} has parent {parent}, but a parent must come before its child (0 to "
                    f"{node - 1}). Sort the nodes by depth"
                )
            if row_log_probs[node] > row_log_probs[parent]:
                raise TreeError(
                    f"row {row}: node {node} has log-probability {row_log_probs[node]:g}, above its parent's "
                    f"{row_log_probs[parent]:g}; a longer path can only be less likely"
                )
