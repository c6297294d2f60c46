"""Constraints at the nodes of a step's trees: which tokens each may be followed by, on the device.

Shapes: B rows, b of them constrained, N node slots, M of them after pruning, U different masks, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ladon.constraints.state import GrammarState

_BITS = 8


class TokenBitmask:
    """The masks of one step's nodes: each that occurs goes up once, one bit for each token.

    Made before the forward, as uploads wait until the device has done all it was given.
    """

    def __init__(self, grammars: Sequence[GrammarState | None], num_nodes: int, device: torch.device) -> None:
        """For the first `num_nodes` slots of rows of which at least one is constrained; others have no grammar."""
        numbers: dict[bytes, int] = {}
        places, which = [], []
        for place, grammar in enumerate(grammars):
            if grammar is not None:
                # padding, or a node after which nothing can come, is masked by nothing: its pick is never taken
                own = [
                    -1 if node.allows_nothing else numbers.setdefault(node.allowed, len(numbers))
                    for node in grammar.nodes[:num_nodes]
                ]
                which.append(own + [-1] * (num_nodes - len(own)))
                places.append(place)
        width = max(map(len, numbers), default=0)
        table = bytearray(b"".join(mask.ljust(width, b"\0") for mask in numbers))
        packed = (
            torch.frombuffer(table, dtype=torch.uint8) if table else torch.zeros(0, dtype=torch.uint8, device="cpu")
        )
        self._packed = packed.view(len(numbers), width).to(device)  # [U, V / 8]
        self._which = torch.tensor(which, device=device)  # [b, N]
        self._rows = None if len(places) == len(grammars) else torch.tensor(places, device=device)

    def on(self, logits: Tensor, nodes: Tensor | None) -> Tensor:
        """Logits [B, M, V] with -inf for what may not follow; `nodes` [B, M] are those of the slots that are left."""
        if len(self._packed) == 0:
            return logits
        own = logits if self._rows is None else logits[self._rows]
        which = self._which
        if nodes is not None:
            which = which.gather(1, nodes if self._rows is None else nodes[self._rows])
        allowed = self._unpacked(logits.shape[-1])[which.clamp(min=0)] | (which < 0)[..., None]
        masked = own.masked_fill(~allowed, -torch.inf)
        return masked if self._rows is None else logits.index_copy(0, self._rows, masked)

    def _unpacked(self, vocab_size: int) -> Tensor:
        """The masks, [U, V] bool."""
        bits = torch.arange(_BITS, device=self._packed.device, dtype=torch.uint8)
        found = (self._packed[..., None] >> bits & 1).bool().flatten(1)
        return torch.nn.functional.pad(found, (0, max(vocab_size - found.shape[1], 0)))[:, :vocab_size]
