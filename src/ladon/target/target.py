"""The target: a transformers model, unmodified, that verifies a whole token tree in one forward.

The tree goes into the model's ordinary forward as a 4-D attention mask, position ids and our own cache object. The
hidden state after the final norm, which the heads eat, is what the output projection receives: a hook that exists only
during the call reads it there, and lets prefill project one position per row instead of all of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ladon.errors import UnsupportedModelError
from ladon.heads.model_parts import output_projection
from ladon.target.attention_masks import Sight, localities, model_masks, tree_mask
from ladon.target.hooks import lock_of, projection_inputs
from ladon.target.kv_cache import TreeCache
from ladon.target.position_bias import layer_inputs_of
from ladon.target.prefill import Ends, Failed, Keep, PromptReader
from ladon.target.prefix_cache import KeptPrefix, Maker
from ladon.target.pruning.dropping import Dropping
from ladon.target.pruning.pruner import Pruner, Pruning
from ladon.target.pruning.self_test import check_pruning
from ladon.target.rope_regimes import Part, RopeRegimes
from ladon.target.self_test import Verdict, tested
from ladon.target.support import check_model, context_limit
from ladon.target.verify_output import VerifyOutput
from ladon.trees.token_tree import TokenTree, ancestor_mask, node_depths, position_ids
from ladon.util.devices import arithmetic, input_device, is_out_of_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ROUNDING = {torch.float64: 1e-10, torch.float32: 1e-4}  # of logits, relative, where another mask does the same


class Target:
    """A model made ready for tree verification.

    Runs on one model may be interleaved, in threads too: its forwards take turns.

    Attributes:
        model: the transformers model, never changed.
        device: where its inputs go.
        dtype: of its parameters.
        vocab_size: V, the width its output projection returns.
        context_limit: the most positions the model has, or None without a bound.
        prefill_chunk: tokens of each row per prefill forward.
    """

    def __init__(self, model: PreTrainedModel, *, self_test: bool = True, prefill_chunk: int = 512) -> None:
        """Check what can be told from the outside.

        Args:
            model: a decoder-only transformers model in evaluation mode.
            self_test: compare a small tree with plain forwards before the first use.
            prefill_chunk: bounds the mask and the activations of prefill, not its result.

        Raises:
            UnsupportedModelError: if the model cannot verify token trees; the message has the reason.
        """
        self.model, self.prefill_chunk = model, prefill_chunk
        self._self_test, self._lock = self_test, lock_of(model)
        self._made_for: tuple[object, ...] = ()
        self._follow_model()

    def _follow_model(self) -> None:
        """Derive everything from the model, unless it is as it was when this was done last."""
        model = self.model
        config = model.config.get_text_config(decoder=True)
        device = input_device(model)
        numbers = (model.dtype, device, arithmetic(device))
        state = (config._attn_implementation, numbers, model.training, model.get_output_embeddings())
        if state == self._made_for:
            return
        arguments = set(inspect.signature(model.forward).parameters)
        check_model(model, arguments)
        projection = output_projection(model)
        self._projection, self.vocab_size = projection.module, projection.vocab_size
        self.device, self.dtype, self._config = device, model.dtype, config
        self.context_limit = context_limit(config)
        self._localities = localities(config)
        self._mask_dtype = None if config._attn_implementation == "sdpa" else self.dtype
        self._takes_positions = "position_ids" in arguments
        self._regimes, self._layer_inputs = RopeRegimes(model), layer_inputs_of(model)
        self._verdict = None if self._self_test else Verdict(trees=True)
        self._pruners: dict[Pruning, Pruner] = {}
        self._zeros: dict[str, bool] = {}
        self._made_for = state

    def check(self) -> Verdict:
        """Make ready for a run: follow a change of the model, and run the self-test if it has not run since.

        What may change between runs: attention implementation, dtype, device, training mode, output projection, and
        how the device computes (autocast, precision of float32 products).

        Raises:
            UnsupportedModelError: if not even a chain gives what plain decoding gives, or the model now is one that
                cannot be verified.
        """
        self._follow_model()
        if self._verdict is None:
            self._verdict = tested(Target(self.model, self_test=False))
        return self._verdict

    @property
    def supports_trees(self) -> bool:
        """Whether any tree can be verified; False when only chains can. Checks the model first, as `check` does."""
        return self.check().trees

    @torch.no_grad()
    def ignores_zeros(self, name: str) -> bool:
        """Whether an input of this name, all zeros, changes nothing in what the model says of a few tokens, asked once.

        Token types are such an input in some models; others add an embedding, or see further with them.
        """
        self._follow_model()
        if name not in self._zeros:
            ids = torch.arange(4, device=self.device).remainder(self.vocab_size)[None]
            with self._lock:
                without = self.model(input_ids=ids, use_cache=False).logits
                try:
                    given = self.model(input_ids=ids, use_cache=False, **{name: torch.zeros_like(ids)}).logits
                except Exception:  # whatever it lacks: that is no call of text alone
                    given = torch.full_like(without, torch.nan)
            least = _ROUNDING.get(without.dtype, 5e-2) * without.abs().max()
            self._zeros[name] = bool((given - without).abs().max() <= least)
        return self._zeros[name]

    def pruner(self, pruning: Pruning) -> Pruner:
        """`pruning` made ready for the model, each layer tested once. Raises what `Pruner` and `check_pruning` do."""
        if pruning not in self._pruners:
            made, layers = Pruner(self.model, pruning), {known.layer for known in self._pruners}
            if self._self_test and pruning.layer not in layers:
                check_pruning(Target(self.model, self_test=False), pruning.layer)
            self._pruners[pruning] = made
        return self._pruners[pruning]

    def new_cache(self, batch_size: int) -> TreeCache:
        """An empty cache for this many rows: the start of a run, so the model is checked first, as `check` does."""
        self.check()
        keep_tokens = bool(self._regimes.recomputed_at)
        return TreeCache(self._config.num_hidden_layers, batch_size, self.device, keep_tokens=keep_tokens)

    def depth_cap(self, length: int) -> int | None:
        """The greatest depth a node may have in a row of `length` cached tokens; None for no bound, 0 for plain."""
        return self._regimes.depth_cap(length)

    def keep(self, prompt: Sequence[int], new: Sequence[int], cache: TreeCache, place: int) -> KeptPrefix | None:
        """What a sequence of these tokens that has ended leaves behind; None if no other prompt could go on from it.

        An accepted path may reach beyond the token that ended the sequence: what lies there is not kept.
        """
        ids = [*prompt, *new]
        length = min(cache.host_lengths[place], len(ids))
        regime = self._regimes.kept_number(len(prompt), length)
        if regime is None or length == 0:
            return None
        stores = cache.read_row(place, length)
        return KeptPrefix(token_ids=ids[:length], stores=stores, regime=regime, maker=Maker.of(self.model))

    def resume(self, past: KeptPrefix | None, prompt_length: int, cache: TreeCache, place: int) -> int:
        """Let a new row of the cache start from `past`, if its prompt can go on from it; how many tokens that is."""
        if past is None or past.regime != self._regimes.number_at(prompt_length) or past.maker != Maker.of(self.model):
            return 0
        if not cache.fits(past.stores):
            return 0
        try:
            with cache.undone():
                cache.write_row(place, past.stores, len(past))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return 0  # what the prompt's own reading comes to counts
        return len(past)

    @torch.no_grad()
    def verify(self, tree: TokenTree, cache: TreeCache, pruning: Pruning | None = None) -> VerifyOutput:
        """Run the model once over a token tree; the cache's lengths do not change until `commit`.

        Rows in different regimes (`ladon.target.rope_regimes`) take one forward per regime. No node may be deeper than
        `depth_cap`.

        Args:
            tree: the trees of the cache's first B rows, [B, N]; the root of each at position `cache.lengths`.
            cache: the rows' committed tokens. Rows after these (`read`) do not matter.
            pruning: which nodes later layers see; rows in several regimes, or in a plain one, see all.
        """
        self._recompute(cache, tree.batch_size)
        lengths = cache.host_lengths[: tree.batch_size]
        ancestors = ancestor_mask(tree.parents, tree.max_depth)
        depths = node_depths(ancestors)
        cache.route.reserve(max(lengths) + tree.num_nodes)
        parts, drop = self._regimes.parts(lengths), None
        if len(parts) == 1 and not parts[0].regime.plain:
            drop = None if pruning is None else self.pruner(pruning).during(tree, ancestors, cache.route)
            logits, hidden = self._verify_rows(tree.tokens, ancestors, depths, cache, parts[0], None, drop)
        else:
            logits, hidden = self._verify_parts(tree.tokens, ancestors, depths, cache, parts)
        return VerifyOutput.of(tree, ancestors, logits, hidden, None if drop is None else drop.kept)

    def _verify_parts(
        self, tokens: Tensor, ancestors: Tensor, depths: Tensor, cache: TreeCache, parts: list[Part]
    ) -> tuple[Tensor, Tensor]:
        """Verify rows that must not share a forward; in plain regimes the root stands for all of a row's slots."""
        # Before the first forward: an upload waits until the device has done all that it was given.
        indices = [torch.tensor(part.rows, device=self.device) for part in parts]
        order = torch.cat(indices).argsort()
        found = []
        for part, rows in zip(parts, indices, strict=True):
            nodes = 1 if part.regime.plain else tokens.shape[1]
            outputs = self._verify_rows(
                tokens[rows, :nodes], ancestors[rows, :nodes, :nodes], depths[rows, :nodes], cache, part, rows
            )
            found.append([output.expand(-1, tokens.shape[1], -1) for output in outputs])
        logits, hidden = (torch.cat(outputs)[order] for outputs in zip(*found, strict=True))
        return logits, hidden

    def _verify_rows(
        self,
        tokens: Tensor,
        ancestors: Tensor,
        depths: Tensor,
        cache: TreeCache,
        part: Part,
        rows: Tensor | None,
        drop: Dropping | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One forward over the trees of the rows of `part`; `rows` is None if that is every row with a tree."""
        host_lengths = [cache.host_lengths[row] for row in part.rows]
        lengths = cache.lengths[: len(part.rows)] if rows is None else cache.lengths[rows]
        start, num_nodes = max(host_lengths), tokens.shape[1]
        ragged = min(host_lengths) < start
        slots = lengths[:, None] + torch.arange(num_nodes, device=self.device) if ragged else None
        past = None if part.regime.stop is None else part.regime.start
        places = range(len(part.rows)) if rows is None else rows
        cache.route.aim(start, num_nodes, places, past=past, slots=slots)
        positions = position_ids(depths, lengths)
        stop = part.regime.stop or self.context_limit
        if stop is not None and cache.route.reach > stop:
            positions.clamp_(max=stop - 1)  # padding nodes may lie deeper than the row's cap
        visible = tree_mask(ancestors, lengths, None if ragged else start, cache.route.reach)
        sight = Sight(visible=visible, queries=positions, tree=(depths, lengths))
        return self._forward(tokens, positions, sight, cache, drop=drop)

    @torch.no_grad()
    def read(
        self, prompts: Sequence[Tensor], cache: TreeCache, keep: Keep | None = None
    ) -> tuple[list[int], Tensor | None, Tensor | None, Failed]:
        """Read one chunk more of prompts that are on their way into the last rows of a cache.

        Args:
            prompts: 1-D token ids without padding, at least one each; as far as `cache.lengths` says they are read.
            cache: has the prompts' rows behind all others.
            keep: gets the hidden states of what is read.

        Returns:
            The places in `prompts` of those that are read to their end now; hidden state after the final norm [b, H]
            and logits [b, V] of their last tokens, one position per row. None where no prompt has come to its end. And
            the error of each prompt, by its place, for which memory did not suffice, even alone.
        """
        ends, failed = self._reader(keep).read(prompts, cache)
        if not ends:
            return [], None, None, failed
        hidden, logits = (torch.stack(parts) for parts in zip(*ends.values(), strict=True))
        return list(ends), hidden, logits, failed

    @torch.no_grad()
    def prefill(self, rows: Sequence[Tensor], cache: TreeCache) -> tuple[Tensor, Tensor]:
        """Put prompts into an empty cache, in chunks that project one position per row to logits.

        Args:
            rows: the prompt of each row, 1-D token ids without padding, at least one each.
            cache: a new cache of as many rows.

        Returns:
            Hidden state after the final norm [B, H] and logits [B, V] of each row's last token.
        """
        ends: Ends = {}
        while len(ends) < len(rows):
            found, failed = self._reader().read(rows, cache)
            for error in failed.values():
                raise error
            ends |= found
        hidden, logits = (torch.stack([ends[row][part] for row in range(len(rows))]) for part in (0, 1))
        return hidden, logits

    def _reader(self, keep: Keep | None = None) -> PromptReader:
        return PromptReader(self._forward, self._regimes, self.prefill_chunk, self.device, keep)

    def _recompute(self, cache: TreeCache, num_rows: int) -> None:
        """Fill rows that have just reached a switch again, with the frequencies of the other side, as generate does."""
        for switch in self._regimes.recomputed_at:
            rows = [row for row, length in enumerate(cache.host_lengths[:num_rows]) if length == switch]
            if rows:
                self._reader().read_again(switch, rows, cache)

    def _forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        sight: Sight,
        cache: TreeCache,
        only: Tensor | None = None,
        drop: Dropping | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The model's own forward; with `only` [b], just that index of each row is projected to logits."""
        given: dict[str, Any] = {}
        if self._takes_positions:
            # a copy where rows share memory: xglm of transformers 5.0 adds to its position ids in place
            given["position_ids"] = positions.expand(tokens.shape[0], -1).contiguous()
        with ExitStack() as stack:
            stack.enter_context(self._lock)
            if self._layer_inputs is None:
                given["attention_mask"] = model_masks(sight, self._localities, self._mask_dtype)
            else:
                stack.enter_context(self._layer_inputs.given(sight))
            stack.enter_context(self._regimes.fresh())
            if drop is not None:
                stack.enter_context(drop.on())
            seen = stack.enter_context(projection_inputs(self._projection, only))
            cache.record(tokens)
            output = self.model(input_ids=tokens, past_key_values=cache, use_cache=True, return_dict=True, **given)
        if not seen:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} cannot verify token trees: its output projection is not called as a "
                "module, so what it receives cannot be seen. Use plain decoding of transformers for it"
            )
        return output.logits, seen[0]
