"""Prompts go into the cache in chunks, so that rows which join do not keep the others from decoding for long.

A prompt's chunks are exact wherever its neighbours stand: prompts share a forward only if they have been read equally
far and their calls must have the same in common (`ladon.target.rope_regimes`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ladon.target.attention_masks import Sight, causal_mask
from ladon.target.hooks import at
from ladon.target.kv_cache import TreeCache
from ladon.target.rope_regimes import PrefillGroup, RopeRegimes
from ladon.util.devices import is_out_of_memory

# The model's forward: tokens, positions, sight, cache, the index in each row to project -> its logits, hidden states.
Forward = Callable[[Tensor, Tensor, Sight, TreeCache, Tensor], tuple[Tensor, Tensor]]
# What takes the hidden states [n, H] of a chunk of a prompt, by the prompt's place.
Keep = Callable[[int, Tensor], None]
Ends = dict[int, tuple[Tensor, Tensor]]  # of each prompt read to its end: hidden state [H] and logits [V]
Failed = dict[int, Exception]  # of each prompt for which there was no memory: the error


class PromptReader:
    """Reads prompts into the last rows of a cache."""

    def __init__(
        self, forward: Forward, regimes: RopeRegimes, chunk: int, device: torch.device, keep: Keep | None = None
    ) -> None:
        """`chunk`: tokens of each row per forward at most, unless they must not be cut; `keep` gets hidden states."""
        self._forward, self._regimes, self._chunk, self._device, self._keep = forward, regimes, chunk, device, keep

    def read(self, prompts: Sequence[Tensor], cache: TreeCache) -> tuple[Ends, Failed]:
        """Read one chunk more of each prompt; how far it has been read is the length of its row.

        Where memory does not suffice for prompts together, they are read one by one.

        Args:
            prompts: 1-D token ids without padding, at least one each, of the cache's last rows.
            cache: its lengths go up by what is read.

        Returns:
            For each prompt that has now been read to its end, by its place in `prompts`, what its last token gives; and
            those for which memory did not suffice alone, which are as far as they were.
        """
        first = cache.num_rows - len(prompts)
        groups = self._regimes.prefill_groups([len(prompt) for prompt in prompts], cache.host_lengths[first:])
        lengths = list(cache.host_lengths)
        for group in groups:
            stop = self._stop(prompts, group)
            for row in group.rows:
                lengths[first + row] = min(stop, len(prompts[row]))
        cache.set_lengths(lengths)  # before the forwards: an upload waits for what the device has been given
        ends: Ends = {}
        failed: Failed = {}
        while groups:
            group = groups.pop(0)
            found = self._attempt(prompts, group, first, cache)
            if not isinstance(found, Exception):
                ends |= found
            elif len(group.rows) > 1:
                groups = [*(replace(group, rows=[row]) for row in group.rows), *groups]
            else:
                failed[group.rows[0]], lengths[first + group.rows[0]] = found, group.start
                cache.set_lengths(lengths)
        return ends, failed

    def _attempt(
        self, prompts: Sequence[Tensor], group: PrefillGroup, first: int, cache: TreeCache
    ) -> Ends | Exception:
        """What `_read_group` gives; or that there was no memory, and nothing is held of what there was."""
        try:
            with cache.undone():
                return self._read_group(prompts, group, first, cache)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            error.__context__ = error.__cause__ = None
            return error.with_traceback(None)  # its frames hold the tensors of the forward

    def read_again(self, switch: int, rows: list[int], cache: TreeCache) -> None:
        """Fill the `switch` slots of these rows anew, as a prompt that goes on beyond the switch would fill them."""
        tokens = list(cache.tokens(switch).clone())  # the anchors of the chunks overwrite the next chunk's first
        for start in range(0, switch, self._chunk):
            self._read_group(tokens, PrefillGroup(rows=rows, start=start, anchor=switch, whole=False), 0, cache)

    def _stop(self, prompts: Sequence[Tensor], group: PrefillGroup) -> int:
        """Where the next chunk of a group ends."""
        longest = max(len(prompts[row]) for row in group.rows)
        return longest if group.whole else min(group.start + self._chunk, longest)

    def _read_group(self, prompts: Sequence[Tensor], group: PrefillGroup, first: int, cache: TreeCache) -> Ends:
        """One forward; prompt i is row `first` + i of the cache.

        With an `anchor` beyond the chunk, one more token claims that position, so that the rotary embedding sees it.
        Its slot is the next one, which is stale, and what it may see goes by that slot: a window before the anchor
        itself could hold no token at all.
        """
        start, stop = group.start, self._stop(prompts, group)
        chunk = nn.utils.rnn.pad_sequence([prompts[row][start:stop] for row in group.rows], batch_first=True)
        last = torch.tensor([min(len(prompts[row]), stop) - 1 - start for row in group.rows], device=self._device)
        chunk = chunk.to(self._device)
        positions = torch.arange(start, stop, device=self._device)[None]
        if group.anchor is not None and group.anchor >= stop:
            chunk = nn.functional.pad(chunk, (0, 1))
            positions = nn.functional.pad(positions, (0, 1), value=group.anchor)
        cache.route.reserve_rows(first + max(group.rows) + 1)
        cache.route.aim(start, chunk.shape[1], self._places([first + row for row in group.rows]))
        slots = torch.arange(start, cache.route.reach, device=self._device)[None]
        visible = causal_mask(slots, cache.route.reach).expand(len(group.rows), -1, -1)
        logits, hidden = self._forward(chunk, positions, Sight(visible=visible, queries=slots), cache, last)
        cache.route.widest = 0  # what a commit may move is a tree, not a prompt
        if self._keep is not None:
            for index, row in enumerate(group.rows):
                self._keep(row, hidden[index, : len(prompts[row][start:stop])].clone())  # not the others' with it
        ends = at(hidden, last)
        return {
            row: (ends[index, 0], logits[index, 0]) for index, row in enumerate(group.rows) if len(prompts[row]) <= stop
        }

    def _places(self, rows: list[int]) -> range | Tensor:
        """Rows of the cache as a range, if they stand side by side."""
        stretch = range(rows[0], rows[-1] + 1)
        return stretch if len(stretch) == len(rows) else torch.tensor(rows, device=self._device)
