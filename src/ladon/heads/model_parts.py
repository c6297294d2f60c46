"""The parts of a target that heads touch: its input embedding, decoder layers, final norm and output projection."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ladon.errors import HeadsError, UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class OutputProjection(NamedTuple):
    """The target's map from hidden states to logits.

    Attributes:
        module: the module itself: calling it maps [..., H] to [..., V], quantised or not, bias included.
        weight: its weight, [V, H] unless it is quantised.
        hidden_size: H.
        vocab_size: V.
    """

    module: nn.Module
    weight: Tensor
    hidden_size: int
    vocab_size: int


def output_projection(model: PreTrainedModel) -> OutputProjection:
    """The target's output projection; its sizes come from the module itself, since configs disagree about names."""
    getter: Any = model.get_output_embeddings
    module = getter()
    if module is None or not hasattr(module, "weight"):
        raise HeadsError(f"{type(model).__name__} has no output projection; heads need a causal language model")
    weight = module.weight
    vocab_size, hidden_size = weight.shape if weight.ndim == 2 else (0, 0)
    return OutputProjection(
        module=module,
        weight=weight,
        hidden_size=int(getattr(module, "in_features", hidden_size)),
        vocab_size=int(getattr(module, "out_features", vocab_size)),
    )


def input_embedding_module(model: PreTrainedModel) -> nn.Module:
    """The target's input embedding: calling it maps token ids [...] to [..., H], scaling included if it scales."""
    module: nn.Module = model.get_input_embeddings()
    return module


def input_embedding(model: PreTrainedModel) -> Tensor:
    """Weight of the target's input embedding, [V, H] unless it is quantised."""
    weight: Any = input_embedding_module(model).weight
    return cast(Tensor, weight)


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
        return torch.ones(hidden_size), torch.zeros(hidden_size), False
    weight = next(norm.parameters())
    signs = torch.ones(hidden_size, dtype=weight.dtype, device=weight.device)
    signs[1::2] = -1.0  # of mean square 1, and of mean 0 if H is even
    above, below, lifted = (norm(values[None])[0].float().cpu() for values in (signs, -signs, signs + 1.0))
    signs = signs.float().cpu()
    is_centred = bool(torch.allclose(lifted, above, rtol=0.05, atol=0.05))
    return (above - below) / 2 * signs, (above + below) / 2, is_centred
