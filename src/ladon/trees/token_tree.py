"""The token tree: a parent array in topological order, batched, and everything that follows from it.

Shapes: B rows, N node slots, D the greatest depth. Node 0 of every row is the root: the token picked last, not yet in
the cache. Parents precede their children; in trees made by `growth` the nodes are in best-first order, so the first n
nodes are themselves the best tree of n nodes. A slot whose log-probability is -inf is padding: it belongs to no path,
whatever its token says, and is never accepted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ladon.errors import TreeError

DraftedPath = Sequence[tuple[int, float]]  # token ids, each with its probability given those before it


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

    @classmethod
    def from_paths(cls, root: Tensor, paths: Sequence[Sequence[DraftedPath]], max_nodes: int) -> TokenTree:
        """Trees of paths that the host knows, their likeliest nodes first.

        Example: `[[(5, 0.8), (7, 0.5)], [(5, 0.8), (9, 0.3)]]` of one sequence has 5 below the root, 7 and 9 below 5.

        Args:
            root: token id of each root, [B] int64. The trees go to its device; it is not read.
            paths: of each sequence, any number of paths; of each path, its (token id, probability given the tokens
                before it), 0 < probability <= 1. What paths of a sequence have in common at their beginning is one
                node, as probable as the first of them says.
            max_nodes: nodes kept of each tree, root included.

        Raises:
            TreeError: not as many lists of paths as roots, or a probability that is none.
        """
        if len(paths) != len(root):
            raise TreeError(f"there are paths for {len(paths)} sequences and {len(root)} roots; give a list for each")
        rows = [_merged(own, max_nodes, place) for place, own in enumerate(paths)]
        width = max((len(row.tokens) for row in rows), default=1)
        padding = [width - len(row.tokens) for row in rows]
        numbers = [
            [row.tokens + [0] * missing for row, missing in zip(rows, padding, strict=True)],
            [row.parents + [0] * missing for row, missing in zip(rows, padding, strict=True)],
        ]
        log_probs = [row.log_probs + [-math.inf] * missing for row, missing in zip(rows, padding, strict=True)]
        tokens, parents = torch.tensor(numbers, dtype=torch.long, device=root.device).reshape(2, len(root), width)
        return cls(
            tokens=torch.cat([root[:, None], tokens[:, 1:]], dim=1),
            parents=parents,
            log_probs=torch.tensor(log_probs, device=root.device).reshape(len(root), width),
            max_depth=max((row.depth for row in rows), default=0),
        )

    @classmethod
    def chain(cls, root: Tensor, tokens: Tensor, log_probs: Tensor | None = None) -> TokenTree:
        """Trees that do not branch, from tensors on the device; nothing is read.

        Args:
            root: token id of each root, [B] int64.
            tokens: the tokens after it, [B, D] int64.
            log_probs: of each token given those before it, [B, D], 0 at most; -inf ends a sequence's chain before that
                token. None: log 0.5 for each, if you know nothing better.

        Raises:
            TreeError: shapes that do not match.
        """
        if tokens.ndim != 2 or len(tokens) != len(root) or (log_probs is not None and log_probs.shape != tokens.shape):
            shapes = f"{list(tokens.shape)}, log_probs {None if log_probs is None else list(log_probs.shape)}"
            raise TreeError(f"tokens have shape {shapes}, there are {len(root)} roots; give [B, D] for both")
        depth = tokens.shape[1]
        if depth == 0:
            return root_tree(root)
        if log_probs is None:
            log_probs = torch.full(tokens.shape, math.log(0.5), device=root.device)
        sums = log_probs.float().cumsum(1).cummin(1).values  # a sum that is made in parts may rise by its rounding
        return cls(
            tokens=torch.cat([root[:, None], tokens], dim=1),
            parents=torch.arange(-1, depth, device=root.device).expand(len(root), -1),
            log_probs=torch.cat([torch.zeros_like(sums[:, :1]), sums], dim=1),
            max_depth=depth,
        )

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
            depths=None if self.depths is None else self.depths.masked_fill(too_deep, 1),
        )


class _Nodes(NamedTuple):
    """A tree on the host, slot by slot, and its depth."""

    tokens: list[int]
    parents: list[int]
    log_probs: list[float]
    depth: int


def _merged(paths: Sequence[DraftedPath], max_nodes: int, place: int) -> _Nodes:
    """The likeliest nodes of a sequence's paths; the root's own token is left 0."""
    found: dict[tuple[int, int], int] = {}  # a node by its parent and its token
    tokens, parents, log_probs, depths = [0], [-1], [0.0], [0]
    for path in paths:
        node = 0
        for token, probability in path:
            if not 0.0 < probability <= 1.0:
                raise TreeError(
                    f"sequence {place}: token {token} has probability {probability}; give more than 0 and 1 at most"
                )
            above, node = node, found.setdefault((node, token), len(tokens))
            if node == len(tokens):
                tokens.append(token)
                parents.append(above)
                log_probs.append(log_probs[above] + math.log(probability))
                depths.append(depths[above] + 1)
    order = sorted(range(len(tokens)), key=lambda node: -log_probs[node])[:max_nodes]  # parents stay before children
    slots = {-1: -1, **{node: slot for slot, node in enumerate(order)}}
    return _Nodes(
        tokens=[tokens[node] for node in order],
        parents=[slots[parents[node]] for node in order],
        log_probs=[log_probs[node] for node in order],
        depth=max(depths[node] for node in order),
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
