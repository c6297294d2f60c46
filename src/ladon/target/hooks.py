"""One forward of a model at a time, and what its output projection receives in it, or a layer gives.

Hooks sit on modules that every thread shares, so whoever hooks into a forward holds the model's lock while it runs.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ladon.errors import UnsupportedModelError
from ladon.heads.model_parts import decoder_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_locks: WeakKeyDictionary[nn.Module, threading.Lock] = WeakKeyDictionary()
_making = threading.Lock()


def lock_of(model: nn.Module) -> threading.Lock:
    """The lock to hold during a forward of `model`, the same for everyone."""
    with _making:
        return _locks.setdefault(model, threading.Lock())


def at(hidden: Tensor, only: Tensor) -> Tensor:
    """The position `only` [b] of each row of `hidden` [b, T, H], [b, 1, H]."""
    return hidden[torch.arange(len(only), device=hidden.device), only.to(hidden.device)][:, None]


def one_state(model: nn.Module, hidden: Tensor) -> Tensor:
    """The hidden states between two layers of `model`, which must be [b, T, H].

    Raises:
        UnsupportedModelError: the layers give more than one state per token.
    """
    if hidden.ndim != 3:
        raise UnsupportedModelError(
            f"the layers of {type(model).__name__} give states of shape {list(hidden.shape)}, several per token; "
            "an early exit needs one"
        )
    return hidden


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


@contextmanager
def layer_output(model: PreTrainedModel, layer: int) -> Iterator[list[Tensor]]:
    """While this lasts, note the hidden states after a decoder layer of `model`, [b, T, H].

    Args:
        model: whose forward it is. Calls from other threads are left out.
        layer: counted from 1.

    Yields:
        A list that gets the hidden states of each call.

    Raises:
        UnsupportedModelError: in the forward, if the layer gives more than one state per token.
    """
    seen: list[Tensor] = []
    owner = threading.get_ident()

    def note(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        if threading.get_ident() != owner:
            return
        seen.append(one_state(model, output[0] if isinstance(output, tuple) else output))

    handle = decoder_layers(model)[layer - 1].register_forward_hook(note)
    try:
        yield seen
    finally:
        handle.remove()
