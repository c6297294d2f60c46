"""The key/value cache of tree decoding: preallocated, ragged, rewritten in place.

Every layer holds buffers [B, heads, capacity, D] for keys and for values (and for the keys of a sparse indexer, where
the model has one); where keys and values have one shape, they are the two parts of one allocation, so that `commit`
moves them in one operation. Row b has `lengths[b]` committed tokens in slots 0 to `lengths[b]` - 1; a verified
tree puts node i of that row into slot `lengths[b]` + i, and `commit` moves the accepted nodes down to the committed
part. Whatever lies beyond is stale: it is masked until the next tree overwrites it. It must stay finite, because a
masked NaN in the values still spoils the softmax average.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from ladon.errors import InputError

_FIRST_CAPACITY = 64  # slots; buffers double from here
_FlatKey = tuple[int, int, torch.device]
_MoveKey = tuple[int, int, int, torch.device]


class _Route:
    """Where the next forward writes and what it reads; one per cache, set before each forward, read by every layer.

    Attributes:
        rows: the rows of the cache that take part, [b] int64; None for all of them.
        slots: the slot of each new token, [b, N] int64; None when every row writes from slot `start`.
        start: the first slot written, when it is the same in all rows.
        num_tokens: N, the new tokens of each row.
        widest: the most tokens written to a row since the last commit.
        reach: the number of leading slots the forward can see (the widest row's length plus the new tokens).
        past: what the model is told when it asks how many tokens came before.
        capacity: slots a layer must have before the forward writes to it.
    """

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self.rows: Tensor | None = None
        self.slots: Tensor | None = None
        self.start = self.num_tokens = self.reach = self.past = self.widest = 0
        self.capacity = _FIRST_CAPACITY
        self._flat: dict[_FlatKey, Tensor] = {}

    def aim(
        self,
        start: int,
        num_tokens: int,
        *,
        past: int | None = None,
        slots: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> None:
        """Describe the next forward; `start` is the widest row's length, `past` the same unless said."""
        self.start, self.num_tokens, self.reach = start, num_tokens, start + num_tokens
        self.past, self.slots, self.rows = start if past is None else past, slots, rows
        self.widest = max(self.widest, num_tokens)
        self._flat.clear()
        self.reserve(self.reach)

    def keep_only(self, tokens: Tensor) -> None:
        """Let the layers that follow write only these of the new tokens, [b, M]; they keep their slots."""
        slots = self.slots
        if slots is None:
            slots = torch.arange(self.start, self.reach, device=tokens.device)[None]
        self.slots = slots.expand(len(tokens), -1).gather(1, tokens)
        self._flat.clear()

    def reserve(self, slots: int) -> None:
        """Make sure that every layer has this many slots after its next write."""
        if slots > self.capacity:
            self.capacity = max(slots, 2 * self.capacity)

    def flat_slots(self, heads: int, capacity: int, device: torch.device) -> Tensor:
        """Where the new entries go in a buffer seen as [B * heads * capacity, D]; made once per forward."""
        key = (heads, capacity, device)
        if key not in self._flat:
            rows = torch.arange(self.batch_size, device=device) if self.rows is None else self.rows
            slots = torch.arange(self.start, self.reach, device=device)[None] if self.slots is None else self.slots
            self._flat[key] = _flat_index(rows.to(device), slots.to(device), heads, capacity)
        return self._flat[key]


def _flat_index(rows: Tensor, slots: Tensor, heads: int, capacity: int) -> Tensor:
    """Positions [b * heads * N] of `slots` [b|1, N] of `rows` [b] in a buffer seen as [B * heads * capacity, D]."""
    first = (rows[:, None] * heads + torch.arange(heads, device=rows.device)) * capacity
    return (first[:, :, None] + slots[:, None, :]).view(-1)


class _TreeLayer(CacheLayerMixin):
    """One layer's buffers, behind the interface transformers calls."""

    is_sliding = False  # windows are cut by the mask: a tree needs the tokens a sliding cache would have dropped
    is_compileable = False
    is_croppable = True

    def __init__(self, route: _Route) -> None:
        super().__init__()
        self.route = route
        self.stores: dict[str, Tensor] = {}  # each [parts, B, heads, capacity, D]; empty for a layer never written
        self.indexer_keys: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate the key and value buffers for states of these shapes."""
        if key_states.shape == value_states.shape:
            self.stores["both"] = self._allocate(2, key_states)
        else:
            self.stores |= {"keys": self._allocate(1, key_states), "values": self._allocate(1, value_states)}
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True
        self._name_parts()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store the new states, [b, heads, N, D], and return all that the forward can see."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._grow()
        self._write(self.keys, key_states)
        self._write(self.values, value_states)
        return self._visible(self.keys), self._visible(self.values)

    def update_indexer(self, indexer_key_states: Tensor) -> Tensor:
        """Store a sparse indexer's new keys, [b, N, D], and return all that the forward can see."""
        states = indexer_key_states[:, None]
        if self.indexer_keys is None:
            self.stores["indexer"] = self._allocate(1, states)
            self._name_parts()
        self._grow()
        assert self.indexer_keys is not None
        self._write(self.indexer_keys, states)
        return self._visible(self.indexer_keys)[:, 0]

    def keep_rows(self, index: Tensor) -> None:
        """Drop all rows but these, in this order."""
        for name, store in self.stores.items():
            self.stores[name] = store.index_select(1, index.to(store.device))
        self._name_parts()

    def get_seq_length(self) -> int:
        """The tokens before this forward, for the models that ask instead of reading position ids."""
        return self.route.past

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Visible slots and the first of them."""
        return self.route.reach, 0

    def get_max_length(self) -> int:
        """Slots that exist now."""
        return self.route.capacity

    get_max_cache_shape = get_max_length  # its name before transformers 5.17

    def _allocate(self, parts: int, states: Tensor) -> Tensor:
        shape = (parts, self.route.batch_size, states.shape[-3], self.route.capacity, states.shape[-1])
        return states.new_zeros(shape)

    def _grow(self) -> None:
        """Larger buffers with the same content, if needed: layers grow one by one, as the forward reaches them."""
        for name, store in self.stores.items():
            if store.shape[3] < self.route.capacity:
                grown = self._allocate(store.shape[0], store)
                grown[:, :, :, : store.shape[3]] = store
                self.stores[name] = grown
                self._name_parts()

    def _name_parts(self) -> None:
        """Let the names that transformers and this class read point into the stores."""
        if "both" in self.stores:
            self.keys, self.values = self.stores["both"].unbind()
        elif "keys" in self.stores:
            self.keys, self.values = self.stores["keys"][0], self.stores["values"][0]
        if "indexer" in self.stores:
            self.indexer_keys = self.stores["indexer"][0]

    def _write(self, buffer: Tensor, states: Tensor) -> None:
        route = self.route
        if route.slots is None and route.rows is None:
            buffer.narrow(2, route.start, route.num_tokens).copy_(states)
            return
        _, heads, capacity, width = buffer.shape
        index = route.flat_slots(heads, capacity, buffer.device)
        buffer.view(-1, width).index_copy_(0, index, states.reshape(-1, width))

    def _visible(self, buffer: Tensor) -> Tensor:
        seen = buffer.narrow(2, 0, self.route.reach)
        return seen if self.route.rows is None else seen.index_select(0, self.route.rows.to(buffer.device))


class TreeCache(Cache):
    """Keys and values of B rows of any lengths, for trees of any shape.

    Attributes:
        lengths: committed tokens of each row, [B] int64 on the model's device.
        host_lengths: the same numbers on the host, as of the last `mirror`.
    """

    def __init__(self, num_layers: int, batch_size: int, device: torch.device, *, keep_tokens: bool = False) -> None:
        self.route = _Route(batch_size)
        super().__init__(layers=[_TreeLayer(self.route) for _ in range(num_layers)])
        self._tokens = _TreeLayer(self.route) if keep_tokens else None  # ids move like an indexer's keys
        self.lengths = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.host_lengths = [0] * batch_size

    @property
    def num_rows(self) -> int:
        """B, the number of rows."""
        return self.route.batch_size

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(store.nbytes for layer in self._all_layers() for store in layer.stores.values())

    def record(self, tokens: Tensor) -> None:
        """Remember the token ids [b, N] of this forward, if the cache was made to."""
        if self._tokens is not None:
            self._tokens.update_indexer(tokens[:, :, None])

    def tokens(self, length: int) -> Tensor:
        """The first `length` token ids of every row, [B, length]."""
        if self._tokens is None or self._tokens.indexer_keys is None:
            raise InputError("this cache holds no token ids: make it with keep_tokens=True")
        return self._tokens.indexer_keys[:, 0, :length, 0]

    def _all_layers(self) -> list[_TreeLayer]:
        return [*self.layers, *([] if self._tokens is None else [self._tokens])]

    def update_indexer(self, indexer_key_states: Tensor, layer_idx: int) -> Tensor:
        """Store a sparse indexer's new keys, [b, N, D], of one layer (not every transformers 5 inherits this)."""
        seen: Tensor = self.layers[layer_idx].update_indexer(indexer_key_states)
        return seen

    def commit(self, path: Tensor, count: Tensor) -> None:
        """Keep the accepted nodes of the tree that was verified last, and drop the rest.

        Everything is gathered before anything is written, so moves may overlap. Slots beyond a row's new length hold
        what the padding of `path` points at; they are stale like all others there.

        Args:
            path: accepted nodes of each row, root first, padded by repeating the last one, [B, A] int64.
            count: how many of them are real, [B] int64, at least 1.
        """
        # The root is where it belongs already, and no row can have accepted more nodes than were written.
        path = path[:, 1 : self.route.widest]
        if path.shape[1] > 0:
            self._move(self.lengths[:, None] + path, path.shape[1])
        self.lengths = self.lengths + count
        self.route.widest = 0

    def _move(self, source: Tensor, num_slots: int) -> None:
        """Copy the slots `source` [B, A] of every buffer to the A slots after the root's."""
        after_root = torch.arange(1, num_slots + 1, device=source.device)
        both = torch.cat((source, self.lengths[:, None] + after_root), 1)
        moves: dict[_MoveKey, tuple[Tensor, Tensor]] = {}
        for layer in self._all_layers():
            for store in layer.stores.values():
                parts, batch_size, heads, capacity, width = store.shape
                key = (parts, heads, capacity, store.device)
                if key not in moves:
                    rows = torch.arange(parts * batch_size, device=both.device)
                    index = _flat_index(rows, both.repeat(parts, 1), heads, capacity)
                    index = index.to(store.device).view(-1, 2, num_slots)
                    moves[key] = index[:, 0].reshape(-1), index[:, 1].reshape(-1)
                read, write = moves[key]
                flat = store.view(-1, width)
                flat.index_copy_(0, write, flat.index_select(0, read))

    def mirror(self, counts: Sequence[int]) -> None:
        """Tell the host what `commit` kept in each row, after the step's one transfer."""
        self.host_lengths = [length + count for length, count in zip(self.host_lengths, counts, strict=True)]

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Drop all rows but these, in this order."""
        index = torch.tensor(list(rows), dtype=torch.int64, device=self.lengths.device)
        for layer in self._all_layers():
            layer.keep_rows(index)
        self.lengths = self.lengths[index]
        self.host_lengths = [self.host_lengths[row] for row in rows]
        self.route.batch_size = len(self.host_lengths)

    def set_lengths(self, lengths: Sequence[int]) -> None:
        """Declare how many leading slots of each row are committed, on the host and on the device."""
        self.host_lengths = list(lengths)
        self.lengths = torch.tensor(self.host_lengths, dtype=torch.int64, device=self.lengths.device)
        self.route.widest = 0
