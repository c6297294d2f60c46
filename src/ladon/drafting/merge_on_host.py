"""What the host does to drafts, once it knows a step's tokens: it adds n-grams and drops what constraints forbid.

Heads draft on the device before the host knows anything, so their trees come to the host together with the tokens, in
the step's one transfer, if there is anything to do to them. Revised ones go back in one copy.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ladon.constraints.state import GrammarState
from ladon.drafting.constrained import WIDER, constrained_trees
from ladon.drafting.ngram_lookup import NgramLookup
from ladon.tree_size.tree_sizes import TreeSizes
from ladon.trees.token_tree import TokenTree
from ladon.trees.transfer import flat, flat_size, on_host, to_host
from ladon.util.observer import SILENT, Observer


class HostMerge:
    """Merges and constrains the trees of one engine."""

    def __init__(self, sizes: TreeSizes, lookup: NgramLookup | None, observer: Observer = SILENT) -> None:
        """`lookup` has the rows' n-grams; None: nothing is added."""
        self._sizes, self._lookup, self._observer = sizes, lookup, observer
        self._most, self._is_constrained = 1, False
        self._drafted: TokenTree | None = None

    def width(self, most: int, grammars: Sequence[GrammarState | None]) -> int:
        """Nodes to grow, where trees of `most` nodes are wanted for rows of these grammars: more if some may go."""
        self._most, self._is_constrained = most, any(grammar is not None for grammar in grammars)
        return WIDER * most if self._is_constrained and most > 1 else most

    def transfer(self, table: Tensor, tree: TokenTree) -> list[list[int]]:
        """A table [b, n] on the host, in the one transfer that a step has; drafts go with it if they are needed."""
        packed, size = self._sizes.pack(table, None if self._is_constrained else tree), 0
        if self._is_constrained or (self._lookup is not None and tree.num_nodes > 1):
            packed, size = torch.cat([packed, flat(tree)[None]], dim=1), flat_size(tree)
        with self._observer.stage("transfer"):
            values = to_host(packed)[0]
        self._drafted = on_host(values[len(values) - size :], tree) if size else None
        return self._sizes.unpack(values[: len(values) - size], len(table))

    def merged(
        self, table: list[list[int]], prompts: Sequence[Tensor], grammars: Sequence[GrammarState | None]
    ) -> TokenTree | None:
        """The drafts on the host as they are to be; None if nothing is changed.

        Args:
            table: as `transfer` gave it: of each row the number of its new tokens, then these.
            prompts: of the rows that have joined, [T] each.
            grammars: of all rows, which have taken their tokens.
        """
        found = None
        if self._lookup is not None:
            with self._observer.stage("ngrams"):
                self._lookup.follow(table, prompts)
                found = self._lookup.extended(self._drafted, self._sizes.room)
        if self._is_constrained:
            assert self._drafted is not None  # they were sent
            with self._observer.stage("constraints"):
                is_merged = found is not None
                most = self._most if found is None else found.num_nodes
                found = constrained_trees(self._drafted if found is None else found, grammars, most)
            of_heads = self._drafted.prefix(self._most) if is_merged else found
            self._sizes.credit(of_heads if self._drafted.num_nodes > 1 else None)
        if found is not None:
            self._sizes.see(found)
        return found

    def keep(self, trees: Sequence[int]) -> None:
        """Only the rows that had these trees stay, in this order."""
        if self._lookup is not None:
            self._lookup.keep(trees)
