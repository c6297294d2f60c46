"""Families whose layers need more than the model's forward can be given.

Alibi models (bloom, mpt, falcon with alibi) build their position bias inside forward, from a 2-D mask and by slot;
gpt_neo cuts its local window by slot, with a buffer of its own. To these the right tensors are handed layer by layer,
by a pre-hook that exists only during the call. Positions then come from the tree, as everywhere else.

Bias values are made by the model's own function, so that plain decoding sees the same numbers.
"""

from __future__ import annotations

import inspect
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ladon.target.attention_masks import Locality, Sight, as_additive

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class LayerInputs(ABC):
    """Hands tensors to the layers of one model, for the length of one forward."""

    def __init__(self, model: PreTrainedModel, layers: nn.ModuleList) -> None:
        self.model = model
        self.layers: list[Any] = list(layers)  # each family has its own class of them

    @abstractmethod
    def for_layers(self, sight: Sight) -> list[dict[str, Any]]:
        """The keyword arguments that replace each layer's own."""

    @contextmanager
    def given(self, sight: Sight) -> Iterator[None]:
        """While this lasts, every layer receives what `for_layers` says."""
        with ExitStack() as stack:
            for layer, inputs in zip(self.layers, self.for_layers(sight), strict=True):
                hook = partial(_replace, inputs)
                stack.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
            yield


def _replace(inputs: dict[str, Any], layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """A layer's arguments with `inputs` in their places; some models pass theirs by position."""
    if len(args) > 1:  # more than the hidden states
        names = list(inspect.signature(layer.forward).parameters)[: len(args)]
        args = tuple(inputs.get(name, arg) for name, arg in zip(names, args, strict=True))
        inputs = {name: value for name, value in inputs.items() if name not in names}
    return args, {**kwargs, **inputs}


class _TableAlibi(LayerInputs):
    """Bloom and falcon: bias = slope * key position, from a table that the model's own function fills."""

    _table: Tensor | None = None  # [heads, positions]

    def bias(self, sight: Sight) -> Tensor:
        """Bias of each visible slot, [B * heads, 1, S]."""
        keys, reach = sight.keys.expand(sight.visible.shape[0], -1), sight.reach
        if self._table is None or self._table.shape[1] < reach:
            positions = torch.ones(1, 1 << (reach - 1).bit_length(), dtype=torch.int64, device=keys.device)
            build = sys.modules[type(self.model).__module__].build_alibi_tensor
            heads = self.model.config.num_attention_heads
            self._table = build(positions, heads, dtype=self.model.dtype)[:, 0]
        return self._table.t()[keys].transpose(1, 2).reshape(-1, 1, reach)


class _BloomAlibi(_TableAlibi):
    """Bloom adds the mask to scores that hold the bias already."""

    def for_layers(self, sight: Sight) -> list[dict[str, Any]]:
        mask = as_additive(sight.visible, self.model.dtype)[:, None]
        return [{"alibi": self.bias(sight), "attention_mask": mask}] * len(self.layers)


class _FalconAlibi(_TableAlibi):
    """Falcon's mask carries the scaled bias; the bias alone is passed as well, and read by its eager attention."""

    def for_layers(self, sight: Sight) -> list[dict[str, Any]]:
        config = self.model.config
        alibi = self.bias(sight)
        scaled = alibi.view(sight.visible.shape[0], -1, 1, sight.reach) / math.sqrt(
            config.hidden_size // config.num_attention_heads
        )
        mask = torch.masked_fill(scaled, ~sight.visible[:, None], torch.finfo(self.model.dtype).min)
        return [{"alibi": alibi, "attention_mask": mask}] * len(self.layers)


class _MptAlibi(LayerInputs):
    """Mpt: a bias relative to the first new token, and a mask that is True where nothing may be seen."""

    def for_layers(self, sight: Sight) -> list[dict[str, Any]]:
        slopes = -self.model.base_model.build_mpt_alibi_tensor(self.model.config.n_heads, 2, device=sight.keys.device)
        distance = sight.keys - sight.queries[:, :1]
        bias = _RowBias(slopes[:, 0, 0][None, :, None, None] * distance[:, None, None, :])
        return [{"position_bias": bias, "attention_mask": ~sight.visible[:, None]}] * len(self.layers)


class _RowBias:
    """A bias with a batch dimension, [B, heads, 1, S], for attention code that insists on three dimensions.

    Mpt checks the number of dimensions, cuts the last two to the keys at hand, and adds the result to scores
    [B, heads, N, S]; this has the right size already, so the cut returns it whole.
    """

    def __init__(self, bias: Tensor) -> None:
        self._bias = bias
        self.shape = bias.shape[1:]

    def size(self, dim: int) -> int:
        return self.shape[dim]

    def __getitem__(self, _: Any) -> Tensor:
        return self._bias


class _LayerMasks(LayerInputs):
    """ctrl and xglm: in transformers 5.0 forward rewrites a 4-D mask; the layers take it as it is."""

    def for_layers(self, sight: Sight) -> list[dict[str, Any]]:
        return [{"attention_mask": as_additive(sight.visible, self.model.dtype)[:, None]}] * len(self.layers)


class _GPTNeoWindows(LayerInputs):
    """gpt_neo: the window of local layers goes into the mask, and the slot-wise buffer is opened for the call."""

    def for_layers(self, sight: Sight) -> list[dict[str, Any]]:
        window = Locality(window=self.model.config.window_size)
        masks = {
            kind: {"attention_mask": as_additive(locality.allowed(sight), self.model.dtype)[:, None]}
            for kind, locality in (("global", Locality()), ("local", window))
        }
        return [masks[layer.attn.attention_type] for layer in self.layers]

    @contextmanager
    def given(self, sight: Sight) -> Iterator[None]:
        modules = [layer.attn.attention for layer in self.layers]
        own = [module.bias for module in modules]
        for module, bias in zip(modules, own, strict=True):
            module.bias = bias.new_ones(()).expand(1, 1, sight.reach, sight.reach)
        try:
            with super().given(sight):
                yield
        finally:
            for module, bias in zip(modules, own, strict=True):
                module.bias = bias


def layer_inputs_of(model: PreTrainedModel) -> LayerInputs | None:
    """What the layers of this model must be given, or None for the many families that need nothing."""
    base = model.base_model
    match model.config.model_type:
        case "bloom":
            return _BloomAlibi(model, base.h)
        case "falcon" if model.config.alibi:
            return _FalconAlibi(model, base.h)
        case "mpt":
            return _MptAlibi(model, base.blocks)
        case "ctrl":
            return _LayerMasks(model, base.h)
        case "xglm":
            return _LayerMasks(model, base.layers)
        case "gpt_neo":
            return _GPTNeoWindows(model, base.h)
    return None
