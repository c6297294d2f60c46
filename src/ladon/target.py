"""The target: a transformers model, unmodified, that verifies a whole token tree in one forward.

The tree goes into the model's ordinary forward as a 4-D attention mask, position ids and our own cache object. The
hidden state after the final norm, which the heads eat, is what the output projection receives: a hook that exists only
during the call reads it there, and lets prefill project one position per row instead of all of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ladon.cache import TreeCache
from ladon.masks import causal_mask, localities, model_masks, tree_key_positions, tree_mask
from ladon.tree import TokenTree, ancestor_mask, node_depths, position_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PREFILL_CHUNK = 512  # tokens of each row per prefill forward: bounds the mask and the activations, not the result


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyOutput:
    """What the target says about a tree.

    Attributes:
        tree: the tree that was verified, M = N nodes.
        logits: the target's logits after each node, [B, M, V], in the model's dtype.
        hidden: hidden state after the final norm, [B, M, H].
        ancestors: who sees whom inside the tree, [B, M, M] bool, so that no one builds it twice.
        depths: depth of each node, [B, M].
    """

    tree: TokenTree
    logits: Tensor
    hidden: Tensor
    ancestors: Tensor
    depths: Tensor


class Target:
    """A model made ready for tree verification.

    Attributes:
        model: the transformers model, never changed.
        device: where its inputs live.
        dtype: of its parameters.
        hidden_size: H, the width the output projection receives.
        vocab_size: V, the width it returns.
        context_limit: the most positions the model has, or None without a bound.
        supports_trees: False when only a chain of nodes can be verified exactly.
    """

    def __init__(self, model: PreTrainedModel, *, self_test: bool = True) -> None:
        self.model = model
        self._config = model.config.get_text_config(decoder=True)
        self._projection: nn.Module = model.get_output_embeddings()
        self.vocab_size, self.hidden_size = self._projection.weight.shape
        self.device, self.dtype = model.device, model.dtype
        self.context_limit: int | None = getattr(self._config, "max_position_embeddings", None)
        self.supports_trees = True
        self._localities = localities(self._config)
        self._mask_dtype = None if self._config._attn_implementation == "sdpa" else self.dtype
        self._takes_positions = "position_ids" in inspect.signature(model.forward).parameters

    def new_cache(self, batch_size: int) -> TreeCache:
        """An empty cache for this many rows."""
        return TreeCache(self._config.num_hidden_layers, batch_size, self.device)

    def depth_cap(self, length: int) -> int | None:
        """The greatest depth a node may have in a row of `length` cached tokens; None for no bound, 0 for plain."""
        return None

    @torch.no_grad()
    def verify(self, tree: TokenTree, cache: TreeCache) -> VerifyOutput:
        """Run the model once over a token tree; the cache's lengths do not change until `commit`.

        Args:
            tree: the tree of each row, [B, N]; its root at position `cache.lengths`.
            cache: the rows' committed tokens.
        """
        ancestors = ancestor_mask(tree.parents, tree.max_depth)
        depths = node_depths(ancestors)
        positions = position_ids(depths, cache.lengths)
        start, num_nodes = max(cache.host_lengths), tree.num_nodes
        ragged = min(cache.host_lengths) < start
        slots = None
        if ragged:
            slots = cache.lengths[:, None] + torch.arange(num_nodes, device=self.device)
        cache.route.aim(start, num_nodes, slots=slots)
        reach = start + num_nodes
        visible = tree_mask(ancestors, cache.lengths, None if ragged else start, reach)
        local = any(locality.binds(reach) for locality in self._localities.values())
        keys = tree_key_positions(depths, cache.lengths, reach) if local else None
        mask = model_masks(visible, self._localities, positions, keys, self._mask_dtype)
        logits, hidden = self._forward(tree.tokens, positions, mask, cache)
        return VerifyOutput(tree=tree, logits=logits, hidden=hidden, ancestors=ancestors, depths=depths)

    @torch.no_grad()
    def prefill(self, rows: Sequence[Tensor], cache: TreeCache) -> tuple[Tensor, Tensor]:
        """Put prompts into an empty cache.

        Args:
            rows: the prompt of each row, 1-D token ids without padding, at least one each.
            cache: a new cache of as many rows.

        Returns:
            Hidden state after the final norm [B, H] and logits [B, V] of each row's last token.
        """
        lengths = [len(row) for row in rows]
        tokens = nn.utils.rnn.pad_sequence([row.to(self.device) for row in rows], batch_first=True)
        ends: list[tuple[Tensor, Tensor] | None] = [None] * len(rows)
        for start in range(0, max(lengths), _PREFILL_CHUNK):
            active = [row for row, length in enumerate(lengths) if length > start]
            stop = min(start + _PREFILL_CHUNK, max(lengths))
            last = [min(lengths[row], stop) - 1 - start for row in active]
            logits, hidden = self._prefill_chunk(tokens, start, stop, active, last, cache)
            for index, row in enumerate(active):
                if lengths[row] <= stop:
                    ends[row] = (hidden[index, 0], logits[index, 0])
        cache.set_lengths(lengths)
        done = [end for end in ends if end is not None]
        return torch.stack([hidden for hidden, _ in done]), torch.stack([logits for _, logits in done])

    def _prefill_chunk(
        self, tokens: Tensor, start: int, stop: int, rows: list[int], last: list[int], cache: TreeCache
    ) -> tuple[Tensor, Tensor]:
        """Run positions `start` to `stop` of some rows; logits and hidden state of position `last` of each."""
        chosen = torch.tensor(rows, device=self.device) if len(rows) < cache.num_rows else None
        chunk = tokens[:, start:stop] if chosen is None else tokens[chosen, start:stop]
        positions = torch.arange(start, stop, device=self.device)[None]
        cache.route.aim(start, stop - start, rows=chosen)
        keys = torch.arange(stop, device=self.device)[None]
        visible = causal_mask(positions, stop).expand(len(rows), -1, -1)
        mask = model_masks(visible, self._localities, positions, keys, self._mask_dtype)
        return self._forward(
            chunk, positions.expand(len(rows), -1), mask, cache, torch.tensor(last, device=self.device)
        )

    def _forward(
        self, tokens: Tensor, positions: Tensor, mask: Tensor | dict[str, Tensor], cache: TreeCache,
        only: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The model's own forward; with `only` [b], just that position of each row is projected to logits."""
        given: dict[str, Any] = {"position_ids": positions} if self._takes_positions else {}
        with _projected_hidden(self._projection, only) as seen:
            output = self.model(
                input_ids=tokens, attention_mask=mask, past_key_values=cache, use_cache=True, return_dict=True, **given
            )
        return output.logits, seen[0]


@contextmanager
def _projected_hidden(projection: nn.Module, only: Tensor | None) -> Iterator[list[Tensor]]:
    """While this lasts, note what the output projection receives, and with `only` let it see one position per row."""
    seen: list[Tensor] = []

    def note(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = inputs[0]
        if only is not None:
            hidden = hidden[torch.arange(hidden.shape[0], device=hidden.device), only.to(hidden.device)][:, None]
        seen.append(hidden)
        return (hidden, *inputs[1:])

    handle = projection.register_forward_pre_hook(note)
    try:
        yield seen
    finally:
        handle.remove()
