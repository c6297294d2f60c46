"""The two ends of a target that heads touch: its input embedding and its output projection."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, cast

from torch import Tensor, nn

from ladon.errors import HeadsError
from ladon.heads.wrapped import unwrapped

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
    getter: Any = unwrapped(model).model.get_output_embeddings
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
    module: nn.Module = unwrapped(model).model.get_input_embeddings()
    return module


def input_embedding(model: PreTrainedModel) -> Tensor:
    """Weight of the target's input embedding, [V, H] unless it is quantised."""
    weight: Any = input_embedding_module(model).weight
    return cast(Tensor, weight)
