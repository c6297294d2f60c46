"""n-grams for the rows in flight: drafted on the host when a step's tokens have come, and merged into the heads' trees.

Heads draft on the device before the host knows the new tokens; n-grams can only then be looked up. So the heads' trees
come to the host in the same transfer as the tokens. If no row has anything to add, they stay as they are on the device.
Else the trees are merged on the host, where their sizes are chosen anyway, and go back in one copy.

Shapes: B rows, N node slots of the heads' trees, M of the n-grams'.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from ladon.config import MOST_NGRAM_NODES
from ladon.drafting.ngram_index import Draft, Rates, TokenIndex, draft
from ladon.trees.merge import merge
from ladon.trees.token_tree import TokenTree
from ladon.trees.transfer import to_host

if TYPE_CHECKING:
    from ladon.trees.fixed_tree import FixedTree


class NgramLookup:
    """What the rows of one engine have read and written, in the order of their trees."""

    def __init__(self, *, is_chain: bool = False) -> None:
        """No rows yet; `is_chain`: each row's best path alone is drafted."""
        self._is_chain = is_chain
        self._rates = Rates()
        self._rows: list[TokenIndex] = []
        self._drafts: list[Draft | None] = []

    def follow(self, table: Sequence[Sequence[int]], prompts: Sequence[Tensor]) -> None:
        """Tokens have come: rows of `table` hold their number, then these; the last ones are of rows that join.

        Prompts [T] of the joining rows are read from the device here, where it has nothing to do.
        """
        emitted = [tokens[:count] for count, *tokens in table]
        for index, guesses, tokens in zip(self._rows, self._drafts, emitted, strict=False):
            index.extend(tokens)
            if guesses is not None:
                guesses.teach(self._rates, tokens)
        first = len(self._rows)
        for prompt, tokens in zip(prompts, emitted[first:], strict=True):
            self._rows.append(TokenIndex([*to_host(prompt[None])[0], *tokens]))

    def extended(self, trees: TokenTree | None, room: Callable[[int], int]) -> TokenTree | None:
        """The heads' trees [B, N] with what n-grams add, all on the host; None if that is nothing.

        Args:
            trees: what heads have drafted; None: nothing.
            room: slots to give trees of so many nodes, which may be fewer.
        """
        most = min(MOST_NGRAM_NODES, room(MOST_NGRAM_NODES))
        self._drafts = [draft(index, self._rates, most, is_chain=self._is_chain) for index in self._rows]
        if all(found is None or len(found) == 1 for found in self._drafts):
            return None
        tree, shares = _tree_of(self._drafts, [index.tokens[-1] for index in self._rows])
        if trees is None or trees.num_nodes == 1:
            return _with_slots(tree, room(tree.num_nodes))
        return merge(trees, tree, shares, room(trees.num_nodes + tree.num_nodes - 1))

    def keep(self, rows: Sequence[int]) -> None:
        """Only the rows at these places stay, in this order."""
        self._rows = [self._rows[row] for row in rows]
        self._drafts = [self._drafts[row] for row in rows]


def looks_up(tree: str | FixedTree, drafter: object | None, budget: int | str) -> bool:
    """Whether n-grams have a place in such trees: in those that grow, and in chains that nobody else drafts."""
    return budget != 1 and (tree == "dynamic" or (tree == "chain" and drafter is None))


def _tree_of(drafts: Sequence[Draft | None], roots: Sequence[int]) -> tuple[TokenTree, Tensor]:
    """The drafts as trees [B, M] and the shares of heads below their nodes [B, M]; rows without one have the root."""
    width = max(len(found) for found in drafts if found is not None)
    numbers: list[list[list[int]]] = [[], [], []]
    values: list[list[list[float]]] = [[], []]
    for found, root in zip(drafts, roots, strict=True):
        shown = found or Draft.of_root(root)
        missing = width - len(shown)
        for rows, entries in zip(numbers, (shown.tokens, shown.parents, shown.depths), strict=True):
            rows.append(entries + [0] * missing)
        values[0].append(shown.log_probs + [-torch.inf] * missing)
        values[1].append(shown.heads_shares + [0.0] * missing)
    tokens, parents, depths = torch.tensor(numbers, device="cpu").unbind()
    log_probs, shares = torch.tensor(values, dtype=torch.float32, device="cpu").unbind()
    max_depth = max(max(found.depths) for found in drafts if found is not None)
    return TokenTree(tokens=tokens, parents=parents, log_probs=log_probs, max_depth=max_depth, depths=depths), shares


def _with_slots(tree: TokenTree, num_slots: int) -> TokenTree:
    """The tree cut to so many slots, or filled up with padding."""
    if num_slots <= tree.num_nodes:
        return tree.prefix(num_slots)
    assert tree.depths is not None  # made above
    missing = (0, num_slots - tree.num_nodes)
    return TokenTree(
        tokens=pad(tree.tokens, missing),
        parents=pad(tree.parents, missing),
        log_probs=pad(tree.log_probs, missing, value=-torch.inf),
        max_depth=tree.max_depth,
        depths=pad(tree.depths, missing),
    )
