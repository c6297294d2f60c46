"""Drafted trees without what a constraint forbids, made on the host before they are verified.

A constraint that leaves one token after a node drafts that token itself, which is sure to be said.

Shapes: B rows, N node slots.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ladon.constraints.state import GrammarState, Place
from ladon.trees.token_tree import TokenTree
from ladon.trees.transfer import host_values

# Trees are grown this many times larger where a row is constrained, so that what is dropped can be made up for.
WIDER = 2


class Draft(NamedTuple):
    """A row's tree on the host, slot by slot; see `TokenTree`."""

    tokens: list[int]
    parents: list[int]
    log_probs: list[float]

    def prefix(self, num_nodes: int) -> Draft:
        """The first so many slots."""
        return Draft(self.tokens[:num_nodes], self.parents[:num_nodes], self.log_probs[:num_nodes])


def drafts_of(trees: TokenTree) -> list[Draft]:
    """The rows' trees, which are on the host."""
    columns = [host_values(table) for table in (trees.tokens, trees.parents, trees.log_probs)]
    return [Draft(*row) for row in zip(*columns, strict=True)]


class _Candidate(NamedTuple):
    """A node that could be next. The smallest one is the best: the likeliest, and of these the first in the draft.

    Attributes:
        cost: minus its log-probability.
        order: its slot in the draft; a forced token that was not drafted goes with its parent's.
        token: its token.
        parent: its parent's number in the new tree; -1 for the root.
        slot: its slot in the draft; -1 if it is not there.
        gain: by how much its log-probability exceeds the drafted one.
    """

    cost: float
    order: int
    token: int
    parent: int
    slot: int
    gain: float


def constrained_tree(draft: Draft, grammar: GrammarState, most: int) -> Draft:
    """The best `most` nodes that the constraint allows, best first, and the tokens that it leaves no choice about.

    A forced token is as probable as what it follows. Other nodes stay as probable, given their parents, as they were
    drafted: sharing out what forbidden siblings had was tried, and changed one forward in 194. `grammar` gets the
    places of the nodes and what was illegal.

    Args:
        draft: a row's tree, its root the row's last token.
        grammar: the row's, as far as the row is written.
        most: nodes at most, root included.
    """
    children: dict[int, list[int]] = {}
    real = [slot for slot, log_prob in enumerate(draft.log_probs) if log_prob > -math.inf]  # no padding, no NaN
    for slot in real[1:]:
        children.setdefault(draft.parents[slot], []).append(slot)
    found, illegal = Draft([], [], []), set[int]()
    places: list[Place] = []
    queue = [_Candidate(0.0, 0, draft.tokens[0], -1, 0, 0.0)]
    while queue and len(places) < most:
        best = heapq.heappop(queue)
        place = grammar.here if best.parent < 0 else places[best.parent].after(best.token)
        found.tokens.append(best.token)
        found.parents.append(best.parent)
        found.log_probs.append(-best.cost)
        drafted = children.get(best.slot, [])
        legal = [slot for slot in drafted if place.allows(draft.tokens[slot])]
        illegal.update(set(drafted).difference(legal))
        for candidate in _children(draft, best, len(places), place, legal):
            heapq.heappush(queue, candidate)
        places.append(place)
    for slot in real[1:]:  # a parent comes before its children
        if draft.parents[slot] in illegal:
            illegal.add(slot)
    grammar.nodes, grammar.illegal, grammar.drafted = places, sorted(illegal), len(real)
    return found


def _children(draft: Draft, node: _Candidate, number: int, place: Place, legal: list[int]) -> Iterator[_Candidate]:
    """What may follow a node that has this number in the new tree: its legal drafts, or the token that must follow."""
    if place.only is None:
        for slot in legal:
            cost = max(-draft.log_probs[slot] - node.gain, node.cost)  # rounding must not lift it above its parent
            yield _Candidate(cost, slot, draft.tokens[slot], number, slot, node.gain)
    elif legal:
        (slot,) = legal
        yield _Candidate(node.cost, slot, place.only, number, slot, -node.cost - draft.log_probs[slot])
    else:
        yield _Candidate(node.cost, node.order, place.only, number, -1, 0.0)


def constrained_trees(drafted: TokenTree, grammars: Sequence[GrammarState | None], most: int) -> TokenTree:
    """The trees of rows, on the host: legal ones of those that are constrained, the first `most` slots of others."""
    trees = [
        draft.prefix(most) if grammar is None else constrained_tree(draft, grammar, most)
        for draft, grammar in zip(drafts_of(drafted), grammars, strict=True)
    ]
    width = max(len(tree.tokens) for tree in trees)

    def table(column: int, padding: float, dtype: torch.dtype) -> Tensor:
        return torch.tensor(
            [[*tree[column], *[padding] * (width - len(tree[column]))] for tree in trees], dtype=dtype, device="cpu"
        )

    return TokenTree(
        tokens=table(0, 0, torch.int64),
        parents=table(1, 0, torch.int64),
        log_probs=table(2, -math.inf, torch.float32),
        max_depth=max(_depth(tree) for tree in trees),
    )


def _depth(tree: Draft) -> int:
    """The greatest depth of a node that is no padding."""
    depths = [0]
    for parent in tree.parents[1:]:
        depths.append(depths[parent] + 1)
    return max(depths)
