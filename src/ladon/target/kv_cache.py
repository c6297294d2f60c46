"""The key/value cache of tree decoding: preallocated, ragged, rewritten in place; and the slots a forward writes to.

Every layer holds buffers [rows, heads, slots, D] for keys and for values (and for the keys of a sparse indexer, where
the model has one); where keys and values have one shape and dtype, they are the two parts of one allocation, so that
`commit` moves them in one operation. A buffer has the dtype of what is written first (under autocast those of keys and
values may differ), and a wider one once that comes, as in the caches of transformers.

Row b has `lengths[b]` committed tokens in slots 0 to `lengths[b]` - 1; a verified tree puts node i of that row into
slot `lengths[b]` + i, and `commit` moves the accepted nodes down to the committed part. Whatever lies beyond is stale:
it is masked until the next tree overwrites it. It must stay finite, because a masked NaN in the values still spoils the
softmax average.

The B rows in use are the first of the buffers, and a forward works on a stretch of them, so that it needs a view and
no copy. Rows come behind the others (`append`), with nothing committed: what the last owner of their place has left
is as stale as the rest. Rows that leave are overwritten by others (`keep`). Buffers only grow, by doubling, in rows
and in slots; who needs them no more drops the cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from ladon.errors import InputError
from ladon.target.prefix_cache import Stores
from ladon.util.devices import is_out_of_memory

_FIRST_CAPACITY = 64  # slots; buffers double from here
_FlatKey = tuple[int, int, torch.device]


class Route:
    """Where the next forward writes and what it reads; one per cache, set before each forward, read by every layer.

    Attributes:
        rows: the rows that take part: a range where they stand side by side, else their indices, [b] int64.
        slots: the slot of each new token, [b, N] int64; None when every row writes from slot `start`.
        start: the first slot written, when it is the same in all rows.
        num_tokens: N, the new tokens of each row.
        widest: the most tokens written to a row since the last commit.
        reach: the number of leading slots the forward can see (the widest row's length plus the new tokens).
        past: what the model is told when it asks how many tokens came before.
        capacity: slots a layer must have before the forward writes to it.
        row_capacity: rows it must have.
    """

    def __init__(self, batch_size: int) -> None:
        self.row_capacity = batch_size
        self.rows: range | Tensor = range(batch_size)
        self.slots: Tensor | None = None
        self.start = self.num_tokens = self.reach = self.past = self.widest = 0
        self.capacity = _FIRST_CAPACITY
        self._flat: dict[_FlatKey, Tensor] = {}

    def aim(
        self,
        start: int,
        num_tokens: int,
        rows: range | Tensor,
        *,
        past: int | None = None,
        slots: Tensor | None = None,
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

    def reserve_rows(self, rows: int) -> None:
        """Make sure that every layer has this many rows after its next write."""
        if rows > self.row_capacity:
            self.row_capacity = max(rows, 2 * self.row_capacity)

    def flat_slots(self, heads: int, capacity: int, device: torch.device) -> Tensor:
        """Where the new entries go in a buffer seen as [rows * heads * capacity, D]; made once per forward."""
        key = (heads, capacity, device)
        if key not in self._flat:
            rows, slots = self.rows, self.slots
            if isinstance(rows, range):
                rows = torch.arange(rows.start, rows.stop, device=device)
            if slots is None:
                slots = torch.arange(self.start, self.reach, device=device)[None]
            self._flat[key] = flat_index(rows.to(device), slots.to(device), heads, capacity)
        return self._flat[key]


def flat_index(rows: Tensor, slots: Tensor, heads: int, capacity: int) -> Tensor:
    """Positions [b * heads * N] of `slots` [b|1, N] of `rows` [b] in a buffer seen as [rows * heads * capacity, D]."""
    first = (rows[:, None] * heads + torch.arange(heads, device=rows.device)) * capacity
    return (first[:, :, None] + slots[:, None, :]).view(-1)


_MoveKey = tuple[int, int, int, int, torch.device]


class _TreeLayer(CacheLayerMixin):
    """One layer's buffers, behind the interface transformers calls."""

    is_sliding = False  # windows are cut by the mask: a tree needs the tokens a sliding cache would have dropped
    is_compileable = False
    is_croppable = True

    def __init__(self, route: Route) -> None:
        super().__init__()
        self.route = route
        self.stores: dict[str, Tensor] = {}  # each [parts, rows, heads, capacity, D]; empty for a layer never written
        self.indexer_keys: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate the key and value buffers for states of these shapes and dtypes."""
        if key_states.shape == value_states.shape and key_states.dtype == value_states.dtype:
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
        self._write("keys", key_states)
        self._write("values", value_states)
        return self._visible(self.keys), self._visible(self.values)

    def update_indexer(self, indexer_key_states: Tensor) -> Tensor:
        """Store a sparse indexer's new keys, [b, N, D], and return all that the forward can see."""
        states = indexer_key_states[:, None]
        if self.indexer_keys is None:
            self.stores["indexer"] = self._allocate(1, states)
            self._name_parts()
        self._grow()
        self._write("indexer_keys", states)
        assert self.indexer_keys is not None
        return self._visible(self.indexer_keys)[:, 0]

    def move_rows(self, source: Tensor, target: Tensor, used: int) -> None:
        """Copy the first `used` slots of the rows `source` [m] to the rows `target` [m], which may overlap."""
        for store in self.stores.values():
            slots = store.narrow(3, 0, used)
            slots.index_copy_(1, target.to(store.device), slots.index_select(1, source.to(store.device)))

    def read_row(self, row: int, length: int) -> dict[str, Tensor]:
        """Copies of the first `length` slots of a row, by store, [parts, heads, length, D]."""
        return {name: store[:, row, :, :length].clone() for name, store in self.stores.items()}

    def write_row(self, row: int, states: Mapping[str, Tensor]) -> None:
        """Put what `read_row` gave into the first slots of a row; a layer that was never written gets its stores."""
        for name, values in states.items():
            if name not in self.stores:
                self.stores[name] = self._allocate(len(values), values)
                if name != "indexer":
                    self.dtype, self.device, self.is_initialized = values.dtype, values.device, True
        self._name_parts()
        self._grow()
        for name, values in states.items():
            self.stores[name][:, row, :, : values.shape[2]] = values

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
        shape = (parts, self.route.row_capacity, states.shape[-3], self.route.capacity, states.shape[-1])
        return states.new_zeros(shape)

    def _grow(self) -> None:
        """Larger buffers with the same content, if needed: layers grow one by one, as the forward reaches them."""
        for name, store in self.stores.items():
            if store.shape[1] < self.route.row_capacity or store.shape[3] < self.route.capacity:
                grown = self._allocate(store.shape[0], store)
                grown[:, : store.shape[1], :, : store.shape[3]] = store
                self.stores[name] = grown
                self._name_parts()

    def shrink(self) -> None:
        """Let go of what the stores have beyond what they must."""
        for name, store in self.stores.items():
            if store.shape[1] > self.route.row_capacity or store.shape[3] > self.route.capacity:
                self.stores[name] = store[:, : self.route.row_capacity, :, : self.route.capacity].clone()
                self._name_parts()

    def _name_parts(self) -> None:
        """Let the names that transformers and this class read point into the stores."""
        if "both" in self.stores:
            self.keys, self.values = self.stores["both"].unbind()
        elif "keys" in self.stores:
            self.keys, self.values = self.stores["keys"][0], self.stores["values"][0]
        if "indexer" in self.stores:
            self.indexer_keys = self.stores["indexer"][0]

    def _write(self, part: str, states: Tensor) -> None:
        """Put the new states into the buffers of this name, which become wider ones if they cannot hold them."""
        store = "indexer" if part == "indexer_keys" else part if part in self.stores else "both"
        dtype = self.stores[store].dtype
        if states.dtype != dtype:
            self.stores[store] = self.stores[store].to(torch.promote_types(dtype, states.dtype))
            self._name_parts()
        route, buffer = self.route, getattr(self, part)
        if route.slots is None and isinstance(route.rows, range):
            rows = buffer[route.rows.start : route.rows.stop]
            rows.narrow(2, route.start, route.num_tokens).copy_(states)
            return
        _, heads, capacity, width = buffer.shape
        index = route.flat_slots(heads, capacity, buffer.device)
        buffer.view(-1, width).index_copy_(0, index, states.reshape(-1, width).to(buffer.dtype))

    def _visible(self, buffer: Tensor) -> Tensor:
        rows = self.route.rows
        seen = buffer.narrow(2, 0, self.route.reach)
        if isinstance(rows, range):
            return seen[rows.start : rows.stop]
        return seen.index_select(0, rows.to(buffer.device))


class TreeCache(Cache):
    """Keys and values of B rows of any lengths, for trees of any shape.

    Attributes:
        lengths: committed tokens of each row, [B] int64 on the model's device.
        host_lengths: the same numbers on the host, as of the last `mirror`.
    """

    def __init__(self, num_layers: int, batch_size: int, device: torch.device, *, keep_tokens: bool = False) -> None:
        self.route = Route(batch_size)
        super().__init__(layers=[_TreeLayer(self.route) for _ in range(num_layers)])
        self._tokens = _TreeLayer(self.route) if keep_tokens else None  # ids move like an indexer's keys
        self.lengths = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.host_lengths = [0] * batch_size

    @property
    def num_rows(self) -> int:
        """B, the number of rows in use."""
        return len(self.host_lengths)

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(store.nbytes for layer in self._all_layers() for store in layer.stores.values())

    def record(self, tokens: Tensor) -> None:
        """Remember the token ids [b, N] of this forward, if the cache was made to."""
        if self._tokens is not None:
            self._tokens.update_indexer(tokens[:, :, None])

    def tokens(self, length: int) -> Tensor:
        """The first `length` token ids of every row, [B, length]; those beyond a row's own length are stale."""
        if self._tokens is None or self._tokens.indexer_keys is None:
            raise InputError("this cache holds no token ids: make it with keep_tokens=True")
        return self._tokens.indexer_keys[: self.num_rows, 0, :length, 0]

    def _all_layers(self) -> list[_TreeLayer]:
        return [*self.layers, *([] if self._tokens is None else [self._tokens])]

    def update_indexer(self, indexer_key_states: Tensor, layer_idx: int) -> Tensor:
        """Store a sparse indexer's new keys, [b, N, D], of one layer (not every transformers 5 inherits this)."""
        seen: Tensor = self.layers[layer_idx].update_indexer(indexer_key_states)
        return seen

    def commit(self, path: Tensor, count: Tensor) -> None:
        """Keep the accepted nodes of the trees that were verified last, and drop the rest.

        The trees are those of the first b rows; any others stay as they are. Everything is gathered before anything is
        written, so moves may overlap. Slots beyond a row's new length hold what the padding of `path` points at; they
        are stale like all others there.

        Args:
            path: accepted nodes of each row, root first, padded by repeating the last one, [b, A] int64.
            count: how many of them are real, [b] int64, at least 1.
        """
        # The root is where it belongs already, and no row can have accepted more nodes than were written.
        path = path[:, 1 : self.route.widest]
        others = self.num_rows - len(count)
        if path.shape[1] > 0:
            self._move(path, self.lengths[: len(count), None])
        self.lengths = self.lengths + (torch.nn.functional.pad(count, (0, others)) if others else count)
        self.route.widest = 0

    def _move(self, path: Tensor, lengths: Tensor) -> None:
        """Copy the nodes `path` [b, A] of the trees at slots `lengths` [b, 1] to the A slots after the root's."""
        batch_size, num_slots = path.shape
        after_root = torch.arange(1, num_slots + 1, device=path.device)
        both = torch.cat((lengths + path, lengths + after_root), 1)
        moves: dict[_MoveKey, tuple[Tensor, Tensor]] = {}
        for layer in self._all_layers():
            for store in layer.stores.values():
                parts, row_capacity, heads, capacity, width = store.shape
                key = (parts, row_capacity, heads, capacity, store.device)
                if key not in moves:
                    rows = torch.arange(parts * row_capacity, device=both.device).view(parts, -1)[:, :batch_size]
                    index = flat_index(rows.reshape(-1), both.repeat(parts, 1), heads, capacity)
                    index = index.to(store.device).view(-1, 2, num_slots)
                    moves[key] = index[:, 0].reshape(-1), index[:, 1].reshape(-1)
                read, write = moves[key]
                flat = store.view(-1, width)
                flat.index_copy_(0, write, flat.index_select(0, read))

    def mirror(self, counts: Sequence[int]) -> None:
        """Tell the host what `commit` kept in each of the first rows, after the step's one transfer."""
        for row, count in enumerate(counts):
            self.host_lengths[row] += count

    def append(self, count: int) -> None:
        """Put new rows of length 0 behind the others."""
        self.host_lengths = [*self.host_lengths, *[0] * count]
        self.lengths = torch.nn.functional.pad(self.lengths, (0, count))
        self.route.widest = 0
        self.route.reserve_rows(self.num_rows)

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but these, in this order; only those that change their place are copied, as far as in use.

        The host must know the lengths: call `mirror` first.
        """
        moved = [(old, new) for new, old in enumerate(rows) if old != new and self.host_lengths[old] > 0]
        if moved:
            source, target = torch.tensor(moved, device=self.lengths.device).unbind(1)
            used = max(self.host_lengths[old] for old, _ in moved)
            for layer in self._all_layers():
                layer.move_rows(source, target, used)
        self.set_lengths([self.host_lengths[row] for row in rows])

    def read_row(self, row: int, length: int) -> Stores:
        """Copies of a row's first `length` slots, layer by layer."""
        return [layer.read_row(row, length) for layer in self._all_layers()]

    def fits(self, stores: Stores) -> bool:
        """Whether what `read_row` gave can be written: layers that hold something hold it in the same parts."""
        layers = zip(self._all_layers(), stores, strict=True)
        return all(not layer.stores or layer.stores.keys() == states.keys() for layer, states in layers)

    def write_row(self, row: int, stores: Stores, length: int) -> None:
        """Make what `read_row` gave of some row the committed part of this one, `length` slots."""
        self.route.reserve_rows(row + 1)
        self.route.reserve(length)
        for layer, states in zip(self._all_layers(), stores, strict=True):
            layer.write_row(row, states)
        self.host_lengths[row] = length
        self.lengths[row] = length

    @contextmanager
    def undone(self) -> Iterator[None]:
        """Where the body runs out of memory, buffers are as large as before, and the next write asks for no more.

        What rows behind the written ones had reserved, they must reserve again.
        """
        stores = [store.shape for layer in self._all_layers() for store in layer.stores.values()]
        rows, slots = (min((shape[axis] for shape in stores), default=0) for axis in (1, 3))
        try:
            yield
        except Exception as error:
            if is_out_of_memory(error):
                self.route.row_capacity, self.route.capacity = rows, max(slots, _FIRST_CAPACITY)
                for layer in self._all_layers():
                    layer.shrink()
            raise

    def set_lengths(self, lengths: Sequence[int]) -> None:
        """Declare how many leading slots of each row are committed, on the host and on the device."""
        self.host_lengths = list(lengths)
        self.lengths = torch.tensor(self.host_lengths, dtype=torch.int64, device=self.lengths.device)
        self.route.widest = 0
