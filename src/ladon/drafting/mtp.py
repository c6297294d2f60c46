"""Drafting with MTP modules: what they have read of each sequence, the paths that they guess, and the proposer.

A module's entry of token t_p reads the embedding of t_p and what the module before made of t_(p-1), and guesses
t_(p+1). Entries are kept in a cache like the target's, one layer per module, the entry of t_p in slot p - 1; module l
(from 0) has none in the first l slots, since nothing stands before the first token. A sequence of L committed tokens
whose next one, t_L, is known has L entries. Entries of guessed tokens stand behind them, and the next ones overwrite
them.

Shapes: B sequences, n entries, H hidden width, M modules, K depths, R partial paths, C candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ladon.config import MOST_NODES, PATHS
from ladon.drafting.head_chaining import rows_and_depth
from ladon.drafting.proposer import Proposer, candidates_needed, tree_builder
from ladon.heads.mtp import MtpHeads
from ladon.sampling.acceptance import Accepted
from ladon.target.attention_masks import Locality, Sight, localities, model_masks, tree_mask
from ladon.target.hooks import at, lock_of
from ladon.target.kv_cache import TreeCache
from ladon.target.rope_regimes import RopeRegimes
from ladon.trees.fixed_tree import FixedTree
from ladon.trees.lattice import along_paths
from ladon.trees.token_tree import TokenTree, root_tree
from ladon.util.observer import SILENT, Observer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_CHUNK = 512  # tokens of each prompt per pass of the modules


class MtpText:
    """What the modules have read of each row: keys and values, and the last outputs.

    Attributes:
        ends: what each module has made of the last token read, [B, M, H]; zeros where it has read none.
    """

    def __init__(self, heads: MtpHeads, model: PreTrainedModel, like: Tensor) -> None:
        """No rows; `like` is a tensor of the dtype and on the device of hidden states."""
        config: Any = heads.mtp.config
        self._heads, self._model, self._regimes = heads, model, RopeRegimes(model)
        self._localities = [_locality(config, layer) for layer in range(heads.num_layers)]
        self._mask_dtype = None if config._attn_implementation == "sdpa" else like.dtype
        self._cache = TreeCache(heads.num_layers, 0, like.device)
        self._ahead = 0  # entries that a row may have beyond what the host knows of
        self.ends = like.new_zeros(0, heads.num_layers, heads.hidden_size)

    @property
    def num_rows(self) -> int:
        """B."""
        return self._cache.num_rows

    def join(self, prompts: Sequence[Tensor], states: Sequence[Tensor]) -> None:
        """Rows come behind the others: their prompts [T], and the target's hidden states of these [T, H].

        All but the last hidden state are read: what it is read with is the next token.
        """
        rows = range(self.num_rows, self.num_rows + len(prompts))
        self._cache.append(len(prompts))
        self.ends = pad(self.ends, (0, 0, 0, 0, 0, len(prompts)))
        hidden = nn.utils.rnn.pad_sequence(list(states), batch_first=True)
        tokens = nn.utils.rnn.pad_sequence([prompt[1:] for prompt in prompts], batch_first=True).to(hidden.device)
        for start in range(0, tokens.shape[1], _CHUNK):
            stop = min(start + _CHUNK, tokens.shape[1])
            counts = [min(max(len(prompt) - 1 - start, 0), stop - start) for prompt in prompts]
            # filled there and not sent: an upload waits for what the device has been given
            count = torch.stack([torch.full((), number, device=hidden.device) for number in counts])
            self.read(hidden[:, start:stop], tokens[:, start:stop], count, rows)
            for row, number in zip(rows, counts, strict=True):
                self._cache.host_lengths[row] += number
            self._ahead = 0

    def read(self, hidden: Tensor, tokens: Tensor, count: Tensor, rows: range | None = None) -> None:
        """Read known tokens.

        Args:
            hidden: the target's hidden states of the tokens before them, [b, n, H].
            tokens: [b, n] int64.
            count: how many of them are real, the first ones, [b] int64.
            rows: which rows, side by side; None: all.
        """
        rows = range(self.num_rows) if rows is None else rows
        stretch = slice(rows.start, rows.stop)
        sight = self._sight(1, tokens.shape[1], rows)
        ends, last = self.ends[stretch], (count - 1).clamp(min=0)
        for layer in range(len(self._localities)):
            outputs = self._run(layer, hidden, tokens, sight)
            hidden = torch.cat([ends[:, layer, None], outputs[:, :-1]], dim=1)
            ends[:, layer] = torch.where(count[:, None] > 0, at(outputs, last)[:, 0], ends[:, layer])
        self._cache.lengths[stretch] += count
        self._ahead = tokens.shape[1]

    def guess(self, layer: int, hidden: Tensor, tokens: Tensor) -> Tensor:
        """What a module makes of guessed tokens on R paths of n tokens: [B, R, n, H]; nothing of it is kept.

        `hidden` [B, R, n, H] is what stands before each of the `tokens` [B, R, n].
        """
        sight = self._sight(tokens.shape[1], tokens.shape[2], range(self.num_rows))
        return self._run(layer, hidden.flatten(1, 2), tokens.flatten(1), sight).view(hidden.shape)

    def mirror(self, counts: Sequence[int]) -> None:
        """The host learns how many entries each row has got by `read`."""
        self._cache.mirror(counts)
        self._ahead = 0

    def keep(self, rows: Sequence[int]) -> None:
        """Only the rows at these places stay, in this order."""
        self._cache.keep(rows)
        self.ends = self.ends[list(rows)]

    def _sight(self, num_paths: int, length: int, rows: range) -> Sight:
        """Make room for `length` entries on each of `num_paths` paths behind what rows have, and say who sees whom."""
        cache, num_entries = self._cache, num_paths * length
        lengths = cache.lengths[rows.start : rows.stop]
        index = torch.arange(num_entries, device=lengths.device)
        path, step = index // length, index % length
        before = (path[:, None] == path) & (step[:, None] >= step)
        most = max(cache.host_lengths[row] for row in rows) + self._ahead
        cache.route.aim(most, num_entries, rows, slots=lengths[:, None] + index)
        visible = tree_mask(before.expand(len(rows), -1, -1), lengths, None, cache.route.reach)
        depths = step.expand(len(rows), -1)
        return Sight(visible=visible, queries=lengths[:, None] + step, tree=(depths, lengths))

    def _run(self, layer: int, hidden: Tensor, tokens: Tensor, sight: Sight) -> Tensor:
        positions = sight.queries + 1
        if layer > 0:  # not what lies in its first slots, which are empty; an entry there sees itself, for want of more
            first = sight.queries.clamp(max=layer)
            sight = replace(sight, visible=sight.visible & (sight.keys[:, None] >= first[:, :, None]))
        mask = model_masks(sight, {"": self._localities[layer]}, self._mask_dtype)
        assert isinstance(mask, Tensor)  # one layer type, one mask
        with lock_of(self._model), self._regimes.fresh():  # the rotary embedding is the target's
            return self._heads.run(layer, hidden, tokens, positions, mask, self._cache)


def _locality(config: Any, layer: int) -> Locality:
    """What a module may see besides causality, from the modules' config; without layer types it sees all."""
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return Locality()
    own = config.per_layer_config[layer] if getattr(config, "is_heterogeneous", False) else config
    return localities(own)[kinds[layer]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Waiting:
    """Known tokens that the modules have not read yet: while nothing is drafted they need not run.

    Attributes:
        hidden: the target's hidden states of the tokens before them, [B, n, H].
        tokens: [B, n] int64.
        count: how many of them are real, the first ones, [B] int64.
    """

    hidden: Tensor
    tokens: Tensor
    count: Tensor

    @classmethod
    def none(cls, num_rows: int, like: Tensor) -> Waiting:
        """Nothing waits in so many rows; `like` [..., H] is a hidden state."""
        tokens = torch.zeros(num_rows, 0, dtype=torch.long, device=like.device)
        return cls(hidden=like.new_zeros(num_rows, 0, like.shape[-1]), tokens=tokens, count=tokens.sum(1))

    def and_then(self, hidden: Tensor, tokens: Tensor, count: Tensor) -> Waiting:
        """The same with more behind the real ones of each row; arguments as the attributes."""
        width = tokens.shape[1]
        places = self.count[:, None] + torch.arange(width, device=tokens.device)
        return Waiting(
            hidden=pad(self.hidden, (0, 0, 0, width)).scatter(1, places[:, :, None].expand_as(hidden), hidden),
            tokens=pad(self.tokens, (0, width)).scatter(1, places, tokens),
            count=self.count + count,
        )

    def join(self, hidden: Tensor) -> Waiting:
        """The same with rows behind the others where one token waits, after `hidden` [b, H]; `ending_in` names it."""
        width = max(self.tokens.shape[1], 1)
        missing, rows = (0, width - self.tokens.shape[1]), (0, len(hidden))
        new = pad(hidden[:, None], (0, 0, 0, width - 1))
        return Waiting(
            hidden=torch.cat([pad(self.hidden, (0, 0, *missing)), new]),
            tokens=pad(self.tokens, (*missing, *rows)),
            count=pad(self.count, rows, value=1),
        )

    def ending_in(self, root: Tensor) -> Waiting:
        """The same with `root` [B] as the last token of each row."""
        return replace(self, tokens=self.tokens.scatter(1, self.count[:, None] - 1, root[:, None]))

    def rows(self, places: Sequence[int]) -> Waiting:
        """The rows at these places."""
        index = list(places)
        return Waiting(hidden=self.hidden[index], tokens=self.tokens[index], count=self.count[index])


_MOST_WAITING = 64  # tokens of each row that may wait to be read while nothing is drafted


class MtpProposer(Proposer):
    """Drafts with MTP modules. At each depth the likeliest partial paths get candidates, given all their tokens."""

    reads_prompts = True

    def __init__(
        self,
        heads: MtpHeads,
        model: PreTrainedModel,
        tree: str | FixedTree,
        num_candidates: int,
        budget: int | str,
        observer: Observer = SILENT,
        joint: str = PATHS,
    ) -> None:
        """Draft with modules that are bound to `model`.

        Args:
            heads: the modules.
            model: the target.
            tree: "dynamic", "chain" or a fixed tree.
            num_candidates: the most that are kept per path and depth.
            budget: nodes of the trees, or "auto".
            observer: is told of the parts.
            joint: "paths" with how many paths get candidates at each depth of a dynamic tree, if that was named.
        """
        self._heads, self._model, self._build, self._observer = heads, model, tree_builder(tree), observer
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
        with self._observer.stage("heads"):
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
        with self._observer.stage("heads"):
            self._text.read(waiting.hidden, waiting.tokens, waiting.count)
            self._waiting = Waiting.none(len(root), hidden)
            if max_nodes == 1:
                return root_tree(root)
            depth = max(self._least_depth, min(self._depth, max_nodes - 1))
            after = _Guesses(self._heads, self._text).after
            candidates = along_paths(after, root, self._rows, depth=depth, num_candidates=self._num_candidates)
        with self._observer.stage("growth"):
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
        """Logits [B, R, V] after partial paths; see `ladon.trees.lattice.After`."""
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
