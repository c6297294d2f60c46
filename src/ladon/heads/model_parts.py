"""The parts of a target that heads touch: its input embedding, decoder layers, final norm and output projection."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ladon.errors import HeadsError, UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_PLAIN_KINDS = (Tensor, nn.Parameter)  # torchao's quantised weights are subclasses that look like plain ones


class OutputProjection(NamedTuple):
    """The target's map from hidden states to logits.

    Attributes:
        module: the module itself: calling it maps [..., H] to [..., V], quantised or not, bias included.
        weight: its weight, [V, H], on the meta device if it is offloaded; of another shape if its numbers are packed.
        hidden_size: H.
        vocab_size: V.
    """

    module: nn.Module
    weight: Tensor
    hidden_size: int
    vocab_size: int


def output_projection(model: PreTrainedModel) -> OutputProjection:
    """The target's output projection.

    Its sizes come from the module itself, since configs disagree about names, and from the config where it is silent.
    """
    getter: Any = model.get_output_embeddings
    module = getter()
    if not isinstance(module, nn.Module):
        raise HeadsError(f"{type(model).__name__} has no output projection; heads need a causal language model")
    weight, config = _weight_of(module), model.config.get_text_config(decoder=True)
    is_matrix = is_plain(weight) and weight.ndim == 2
    vocab_size, hidden_size = weight.shape if is_matrix else (config.vocab_size, config.hidden_size)
    return OutputProjection(
        module=module,
        weight=weight,
        hidden_size=_first_of(module, ("in_features", "infeatures"), hidden_size),
        vocab_size=_first_of(module, ("out_features", "outfeatures"), vocab_size),
    )


def is_plain(weight: Tensor) -> bool:
    """Whether a weight holds plain numbers: no quantised one, whatever it looks like from the outside."""
    return type(weight) in _PLAIN_KINDS and weight.is_floating_point() and weight.dtype.itemsize > 1


def _weight_of(module: nn.Module) -> Tensor:
    """A module's weight; an empty tensor for one that has none, or a method that makes it."""
    weight: Any = getattr(module, "weight", None)
    return weight if type(weight) in _PLAIN_KINDS else torch.empty(0, dtype=torch.uint8, device="cpu")


def _first_of(module: nn.Module, names: tuple[str, ...], default: int) -> int:
    return next((int(getattr(module, name)) for name in names if hasattr(module, name)), int(default))


def input_embedding_module(model: PreTrainedModel) -> nn.Module:
    """The target's input embedding: calling it maps token ids [...] to [..., H], scaling included if it scales."""
    module: nn.Module = model.get_input_embeddings()
    return module


def input_embedding(model: PreTrainedModel) -> Tensor:
    """Weight of the target's input embedding, [V, H]; of another shape if its numbers are packed."""
    return _weight_of(input_embedding_module(model))


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers of any causal language model, first to last.

    Raises:
        UnsupportedModelError: the model keeps them in no list of their number.
    """
    return _decoder_and_layers(model)[1]


def _decoder_and_layers(model: PreTrainedModel) -> tuple[nn.Module, nn.ModuleList]:
    """The module that holds the layers, and the list of them."""
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    decoder: Any = model.get_decoder()  # beside it there may be a vision tower; ModernBert gives its projection
    for part in (decoder, model.base_model):
        for module in part.modules() if isinstance(part, nn.Module) else ():
            for child in module.children():
                if isinstance(child, nn.ModuleList) and len(child) == count:
                    return module, child
    raise UnsupportedModelError(
        f"{type(model).__name__} has no list of its {count} layers, so there is no place for an early exit; train "
        "without one"
    )


@torch.no_grad()
def final_norm(model: PreTrainedModel, hidden_size: int) -> tuple[Tensor, Tensor, bool]:
    """What the target's final norm multiplies by and adds, [H] each, and whether it takes off the mean.

    Families write it in different ways (Gemma multiplies by 1 + weight), so it is asked, not read.
    """
    norm: nn.Module | None = None
    for child in _decoder_and_layers(model)[0].children():  # it comes last, behind a norm of the embedding
        weight = getattr(child, "weight", None)
        if isinstance(weight, Tensor) and weight.shape == (hidden_size,) and not weight.is_meta:
            norm = child
    if norm is None:
        scale = torch.ones(hidden_size, dtype=torch.float32, device="cpu")
        return scale, torch.zeros_like(scale), False
    weight = next(norm.parameters())
    signs = torch.ones(hidden_size, dtype=weight.dtype, device=weight.device)
    signs[1::2] = -1.0  # of mean square 1, and of mean 0 if H is even
    above, below, lifted = (norm(values[None])[0].float().cpu() for values in (signs, -signs, signs + 1.0))
    signs = signs.float().cpu()
    is_centred = bool(torch.allclose(lifted, above, rtol=0.05, atol=0.05))
    return (above - below) / 2 * signs, (above + below) / 2, is_centred
