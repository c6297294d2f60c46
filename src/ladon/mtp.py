"""Drafting with MTP modules: the paths that they guess, and the proposer.

Shapes: B rows, n entries, H hidden width, M modules, K depths, R partial paths, C candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from ladon.accept import Accepted
from ladon.config import MOST_NODES
from ladon.fixed_tree import FixedTree
from ladon.heads.mtp import MtpHeads
from ladon.lattice import Lattice, from_logits
from ladon.mtp_text import MtpText, Waiting
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
    ) -> None:
        """Draft with modules that are bound to `model`.

        Args:
            heads: the modules.
            model: the target.
            tree: "dynamic", "chain", which needs one path, or a fixed tree.
            num_candidates: the most that are kept per path and depth.
            budget: nodes of the trees, or "auto".
            clock: times the parts.
        """
        self._heads, self._model, self._build, self._clock = heads, model, tree_builder(tree), clock
        most = budget if isinstance(budget, int) else MOST_NODES
        self._num_candidates = candidates_needed(tree, num_candidates, most)
        self._num_paths = 1 if tree == "chain" else heads.num_paths
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
        if max_nodes == 1 and self._waiting.tokens.shape[1] < _MOST_WAITING:
            return root_tree(root)
        with self._clock.stage("heads"):
            waiting = self._waiting.ending_in(root)
            self._text.read(waiting.hidden, waiting.tokens, waiting.count)
            self._waiting = Waiting.none(len(root), hidden)
            if max_nodes == 1:
                return root_tree(root)
            depth = max(self._least_depth, min(self._heads.num_heads, max_nodes - 1))
            candidates = guesses(self._heads, self._text, depth, self._num_paths, self._num_candidates)
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


def guesses(heads: MtpHeads, text: MtpText, depth: int, num_paths: int, num_candidates: int) -> Lattice:
    """The lattice of MTP modules: at each depth the best partial paths are rows, and their candidates follow them.

    Depth k is guessed by module k after the path's k - 1 tokens, or by the last module again, which then reads its own
    output at the token before. A module's entries of guessed tokens depend on the path: all k - 1 of them are made for
    each path anew, in one pass. With R paths the tree is the best over these tables, but not over all paths: candidates
    of no row stay leaves.

    Args:
        heads: the modules.
        text: what they have read of each row, the root included.
        depth: K.
        num_paths: R.
        num_candidates: C.
    """
    ends = text.ends  # [B, M, H]
    tip = ends[:, :1]  # what guesses the next token of each path, [B, R, H]
    outputs = inputs = ends[:, None, :0]  # entries of guessed tokens: what is made of them, and of what, [B, R, n, H]
    scores, paths = ends.new_zeros(len(ends), 1, dtype=torch.float32), _no_tokens(ends)
    levels: list[tuple[Tensor, Tensor, Tensor]] = []
    for level in range(1, depth + 1):
        found = from_logits(heads.project(tip), num_candidates)
        tokens, log_probs = found.tokens[:, :, 0], found.log_probs[:, :, 0]  # [B, R, C]
        next_row = torch.full_like(tokens, -1)
        if level < depth:
            values, order = (scores[:, :, None] + log_probs).flatten(1).sort(dim=1, descending=True, stable=True)
            scores, best = values[:, :num_paths], order[:, :num_paths]
            numbers = torch.arange(best.shape[1], device=best.device).expand_as(best)
            next_row = next_row.flatten(1).scatter(1, best, numbers).view_as(tokens)
            parents = best // tokens.shape[2]
            paths = torch.cat([_of(paths, parents), tokens.flatten(1).gather(1, best)[:, :, None]], dim=2)
            if level < heads.num_layers:
                start = ends[:, level - 1, None, None].expand(-1, best.shape[1], -1, -1)
                inputs = torch.cat([start, _of(outputs, parents)], dim=2)
            else:
                inputs = torch.cat([_of(inputs, parents), _of(tip, parents)[:, :, None]], dim=2)
            outputs = text.guess(min(level, heads.num_layers - 1), inputs, paths)
            tip = outputs[:, :, -1]
        levels.append((tokens, log_probs, next_row))
    return _stacked(levels)


def _no_tokens(ends: Tensor) -> Tensor:
    return torch.zeros(len(ends), 1, 0, dtype=torch.long, device=ends.device)


def _of(rows: Tensor, places: Tensor) -> Tensor:
    """The rows [B, R, ...] at these places, [B, r, ...]."""
    return rows[torch.arange(len(rows), device=rows.device)[:, None], places]


def _stacked(levels: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Lattice:
    """The tables of single depths, [B, R, C] each, as one lattice; the first depth has fewer rows."""
    most = max(tokens.shape[1] for tokens, _, _ in levels)
    tokens, log_probs, next_row = (
        torch.stack([pad(table, (0, 0, 0, most - table.shape[1]), value=filler) for table in tables], dim=1)
        for tables, filler in zip(zip(*levels, strict=True), (0, -torch.inf, -1), strict=True)
    )
    return Lattice(tokens=tokens, log_probs=log_probs, next_row=next_row)
