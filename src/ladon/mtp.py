"""Drafting with MTP modules: the paths that they guess, and the proposer.

Shapes: B rows, n entries, H hidden width, M modules, K depths, R partial paths, C candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ladon.accept import Accepted
from ladon.config import MOST_NODES, PATHS
from ladon.fixed_tree import FixedTree
from ladon.heads.mtp import MtpHeads
from ladon.joints import rows_and_depth
from ladon.mtp_text import MtpText, Waiting
from ladon.partial_paths import along_paths
from ladon.proposers import candidates_needed, tree_builder
from ladon.stats import StageClock
from ladon.tree import TokenTree, root_tree

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MOST_WAITING = 64  # tokens of each row that may wait to be read while nothing is drafted


class MtpProposer:
    """Drafts with MTP modules. At each depth the likeliest partial paths get candidates, given all their tokens."""

    reads_prompts = True

    def __init__(
        self,
        heads: MtpHeads,
        model: PreTrainedModel,
        tree: str | FixedTree,
        num_candidates: int,
        budget: int | str,
        clock: StageClock,
        joint: str = PATHS,
    ) -> None:
        """Draft with modules that are bound to `model`.

        Args:
            heads: the modules.
            model: the target.
            tree: "dynamic", "chain" or a fixed tree.
            num_candidates: the most that are kept per path and depth.
            budget: nodes of the trees, or "auto".
            clock: times the parts.
            joint: "paths" with how many paths get candidates at each depth of a dynamic tree, if that was named.
        """
        self._heads, self._model, self._build, self._clock = heads, model, tree_builder(tree), clock
        most = budget if isinstance(budget, int) else MOST_NODES
        self._num_candidates = candidates_needed(tree, num_candidates, most)
        self._rows, self._depth = rows_and_depth(joint, tree, heads.num_heads, most)
        self._least_depth = tree.max_depth if isinstance(tree, FixedTree) else 1
        self._text: MtpText | None = None
        self._waiting: Waiting | None = None
        self._owed: list[int] = []  # tokens of each row that wait, as far as the host knows

    def join(self, prompts: Sequence[Tensor], hidden: Tensor, states: Sequence[Tensor] = ()) -> None:
        """Read the prompts."""
        if self._text is None or self._waiting is None:
            self._text = MtpText(self._heads, self._model, hidden)
            self._waiting, self._owed = Waiting.none(0, hidden), []
        with self._clock.stage("heads"):
            self._text.join(prompts, states)
        self._waiting = self._waiting.join(hidden)
        self._owed += [1] * len(prompts)

    def observe(self, accepted: Accepted, hidden: Tensor) -> None:
        """The accepted tokens wait to be read, each with the hidden state of the node before it."""
        assert self._waiting is not None
        before = hidden.gather(1, accepted.path[:, :, None].expand(-1, -1, hidden.shape[2]))
        # the host has yet to see which of the tokens are none
        self._waiting = self._waiting.and_then(before, accepted.tokens.clamp(min=0), accepted.count)

    def propose(self, hidden: Tensor, root: Tensor, max_nodes: int) -> TokenTree:
        """The tree over the modules' candidates; they run only if one is wanted, or much waits to be read."""
        assert self._text is not None and self._waiting is not None
        waiting = self._waiting = self._waiting.ending_in(root)
        if max_nodes == 1 and waiting.tokens.shape[1] < _MOST_WAITING:
            return root_tree(root)
        with self._clock.stage("heads"):
            self._text.read(waiting.hidden, waiting.tokens, waiting.count)
            self._waiting = Waiting.none(len(root), hidden)
            if max_nodes == 1:
                return root_tree(root)
            depth = max(self._least_depth, min(self._depth, max_nodes - 1))
            after = _Guesses(self._heads, self._text).after
            candidates = along_paths(after, root, self._rows, depth=depth, num_candidates=self._num_candidates)
        with self._clock.stage("growth"):
            return self._build(candidates, root, max_nodes)

    def mirror(self, counts: Sequence[int]) -> None:
        """Count what waits on the host too; if it has been read meanwhile, so much has come to be known."""
        if self._text is None or self._waiting is None:
            return
        for row, count in enumerate(counts):
            self._owed[row] += count
        if self._waiting.tokens.shape[1] == 0:
            self._text.mirror(self._owed)
            self._owed = [0] * len(self._owed)

    def keep(self, rows: Sequence[int]) -> None:
        """The rows that have left are forgotten; with the last one, everything."""
        if not rows or self._text is None or self._waiting is None:
            self._text = self._waiting = None
            return
        self._text.keep(rows)
        self._waiting = self._waiting.rows(rows)
        self._owed = [self._owed[row] for row in rows]


class _Guesses:
    """What the modules make of guessed tokens, on all paths of one draft.

    Depth k is guessed by module k after the path's k - 1 tokens, or by the last module again, which then reads its own
    output at the token before. A module's entries of guessed tokens depend on the path: all k - 1 of them are made for
    each path anew, in one pass.
    """

    def __init__(self, heads: MtpHeads, text: MtpText) -> None:
        """`text` is what they have read of each row, the root included."""
        self._heads, self._text = heads, text
        self._tip = text.ends[:, :1]  # what guesses the next token of each path, [B, R, H]
        # The last module asked at the guessed tokens of each path: what it read, and what it made of it, [B, R, n, H].
        self._inputs = self._outputs = text.ends[:, None, :0]

    def after(self, paths: Tensor, parents: Tensor) -> Tensor:
        """Logits [B, R, V] after partial paths; see `ladon.partial_paths.After`."""
        level = paths.shape[2] - 1
        if level > 0:
            if level < self._heads.num_layers:
                ends = self._text.ends[:, level - 1, None, None].expand(-1, parents.shape[1], -1, -1)
                self._inputs = torch.cat([ends, _of(self._outputs, parents)], dim=2)
            else:
                self._inputs = torch.cat([_of(self._inputs, parents), _of(self._tip, parents)[:, :, None]], dim=2)
            self._outputs = self._text.guess(min(level, self._heads.num_layers - 1), self._inputs, paths[:, :, 1:])
            self._tip = self._outputs[:, :, -1]
        return self._heads.project(self._tip)


def _of(rows: Tensor, places: Tensor) -> Tensor:
    """The rows [B, R, ...] at these places, [B, r, ...]."""
    return rows[torch.arange(len(rows), device=rows.device)[:, None], places]
