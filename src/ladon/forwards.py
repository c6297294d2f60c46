"""One forward of a model at a time, and what its output projection receives in it.

Hooks sit on modules that every thread shares, so whoever hooks into a forward holds the model's lock while it runs.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

_locks: WeakKeyDictionary[nn.Module, threading.Lock] = WeakKeyDictionary()
_making = threading.Lock()


def lock_of(model: nn.Module) -> threading.Lock:
    """The lock to hold during a forward of `model`, the same for everyone."""
    with _making:
        return _locks.setdefault(model, threading.Lock())


def at(hidden: Tensor, only: Tensor) -> Tensor:
    """The position `only` [b] of each row of `hidden` [b, T, H], [b, 1, H]."""
    return hidden[torch.arange(len(only), device=hidden.device), only][:, None]


@contextmanager
def projection_inputs(projection: nn.Module, only: Tensor | None = None) -> Iterator[list[Tensor]]:
    """While this lasts, note what an output projection receives: hidden states after the final norm, [b, T, H].

    Args:
        projection: the module that maps hidden states to logits. Heads may call it from another thread meanwhile;
            such calls pass untouched.
        only: the index of one position per row, [b]; the projection then maps no other, [b, 1, H] to [b, 1, V].

    Yields:
        A list that gets the whole hidden states of each call.
    """
    seen: list[Tensor] = []
    owner = threading.get_ident()

    def note(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if threading.get_ident() != owner:
            return None
        seen.append(inputs[0])
        return None if only is None else (at(inputs[0], only), *inputs[1:])

    handle = projection.register_forward_pre_hook(note)
    try:
        yield seen
    finally:
        handle.remove()
