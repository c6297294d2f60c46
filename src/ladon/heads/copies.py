"""Copies of modules that share every tensor that is in the right dtype and on the right device already."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


class _Copied(NamedTuple):
    """A tensor, its state when it was looked at, and what stands for it in the copy."""

    own: Tensor
    state: tuple[int, int]
    stand_in: Tensor


class Placement:
    """Tensors in a dtype and on a device: the very same where they fit, else copies."""

    def __init__(self, device: torch.device, dtype: torch.dtype | None, former: Placement | None = None) -> None:
        """What is moved where.

        Args:
            device: of the copies; the meta device leaves tensors where they are, as what goes there is lost.
            dtype: of copies with floating point; None leaves it.
            former: an earlier placement, whose copies serve again if nobody has written to the originals since.
        """
        self._device, self.dtype, self.former = device, dtype, former
        self._known: dict[int, _Copied] = {}

    def without_dtype(self) -> Placement:
        """The same that leaves dtypes as they are."""
        return Placement(self._device, None, self.former)

    def __call__(self, own: Tensor) -> Tensor:
        """A parameter or buffer, as the copy has it."""
        number, state = id(own), (own.data_ptr(), 0 if own.is_inference() else own._version)
        if number not in self._known:
            device = own.device if self._device.type == "meta" else self._device
            dtype = self.dtype if self.dtype is not None and own.is_floating_point() else own.dtype
            former = None if self.former is None else self.former._known.get(number)
            if (own.device, own.dtype) == (device, dtype):
                stand_in = own
            elif (
                former is not None
                and former.own is own
                and former.state == state
                and (former.stand_in.device, former.stand_in.dtype) == (device, dtype)
            ):
                stand_in = former.stand_in
            else:
                moved = own.detach().to(device, dtype)
                stand_in = nn.Parameter(moved, own.requires_grad) if isinstance(own, nn.Parameter) else moved
            self._known[number] = _Copied(own, state, stand_in)
        return self._known[number].stand_in


def shared_copy(module: Module, place: Callable[[Tensor], Tensor]) -> Module:
    """A copy of a module and of those in it, with `place` of each parameter and buffer; all else is shared."""
    made = copy(module)
    made.__dict__ = {**module.__dict__}
    for name in ("_parameters", "_buffers"):
        own: dict[str, Tensor | None] = getattr(module, name)
        made.__dict__[name] = {key: None if one is None else place(one) for key, one in own.items()}
    children = {key: None if one is None else shared_copy(one, place) for key, one in module._modules.items()}
    made.__dict__["_modules"] = children
    return made
