"""Where a forward writes in the cache's buffers, and what it reads there."""

from __future__ import annotations

import torch
from torch import Tensor

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
