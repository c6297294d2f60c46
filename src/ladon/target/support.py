"""Which models can be verified at all, told from the outside: before any forward, with the reason for a refusal.

What passes here is still put to the test (`self_test`); what fails here would fail there too, silently wrong in the
case of recurrent models, but with a less helpful message.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import DynamicCache, cache_utils

from ladon.errors import UnsupportedModelError
from ladon.target.attention_masks import LAYER_TYPES
from ladon.target.rope_regimes import rope_parameters

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ATTENTION = ("sdpa", "eager")
_DYNAMIC = "torch.ao.nn.quantized.dynamic"


def check_model(model: PreTrainedModel, arguments: set[str]) -> None:
    """Raise `UnsupportedModelError` with the reason if this model cannot verify a token tree.

    Args:
        model: a transformers model.
        arguments: names of the arguments its forward takes.
    """
    reason = _refusal(model, arguments)
    if reason is not None:
        raise UnsupportedModelError(f"{type(model).__name__} cannot verify token trees: {reason}")
    attention = model.config.get_text_config(decoder=True)._attn_implementation
    if attention not in _ATTENTION:
        # The user's model is never changed behind their back: which kernel it runs is theirs to decide.
        raise UnsupportedModelError(
            f"{type(model).__name__} runs {attention!r} attention, which takes no token-tree mask; allowed are "
            f"{' and '.join(map(repr, _ATTENTION))}. Load it with attn_implementation='sdpa', or call "
            "model.set_attn_implementation('sdpa')"
        )
    if model.training:
        raise UnsupportedModelError(
            f"{type(model).__name__} is in training mode, where dropout makes every answer different. Call model.eval()"
        )


def _refusal(model: PreTrainedModel, arguments: set[str]) -> str | None:
    """Why a model cannot be verified, or None."""
    config = model.config.get_text_config(decoder=True)
    if model.config.is_encoder_decoder:
        return "it is an encoder-decoder, whose decoder takes no position ids. Use a decoder-only model"
    if model._is_stateful or _has_recurrent_cache(config):
        return (
            "it has recurrent layers, and a running state cannot follow several branches at once. Use plain decoding "
            "of transformers for it, or an attention-only model"
        )
    unknown = sorted(set(getattr(config, "layer_types", None) or ()) - set(LAYER_TYPES))
    if unknown:
        return (
            f"it has layers of type {', '.join(unknown)}; allowed are {', '.join(LAYER_TYPES)}, because others keep a "
            "running state or choose what to attend to by cache slot. Use plain decoding of transformers for it"
        )
    if not isinstance(model.get_output_embeddings(), nn.Module):
        return "it has no output projection (get_output_embeddings() is empty). Load it with a language-model head"
    if any(type(module).__module__.startswith(_DYNAMIC) for module in model.modules()):
        return (
            "it has dynamically quantised layers (torch.ao.quantization), whose rounding depends on all that is in a "
            "forward, so that a token's logits are others beside other tokens. Quantise weights alone, or use plain "
            "decoding of transformers for it"
        )
    if len({str(device) for device in getattr(model, "hf_device_map", {}).values()} - {"cpu", "disk"}) > 1:
        return "it is spread over several devices. Load it on one, e.g. with device_map={'': 0}"
    if "past_key_values" not in arguments:
        return "its forward takes no past_key_values, so nothing could be kept from step to step"
    if "position_ids" not in arguments and config.model_type not in ("bloom", "mpt"):
        return "its forward takes no position_ids, so two nodes cannot share a position"
    return None


def _has_recurrent_cache(config: Any) -> bool:
    """Whether transformers itself would give some layer of this config a recurrent state."""
    recurrent = getattr(cache_utils, "LinearAttentionCacheLayerMixin", None)  # not in transformers 5.0
    if recurrent is None:
        return False
    try:
        layers = DynamicCache(config=config).layers
    except KeyError:  # an unknown layer type, which gets its own refusal
        return False
    return any(isinstance(layer, recurrent) for layer in layers)


def context_limit(config: Any) -> int | None:
    """The most positions a model has, from its text config; None where there is no bound.

    That is `max_position_embeddings`, except where the factor of a rotary scaling comes on top: `linear`,
    `proportional` and `dynamic` scale this number; `yarn` scales the length of the first training, which some configs
    give here and others beside it. Where layer types differ, the widest counts.
    """
    limit: int | None = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)
    if limit is None:
        return None
    return max([limit, *(_scaled(limit, rope) for rope in rope_parameters(config))])


def _scaled(limit: int, rope: dict[str, Any]) -> int:
    """The length that one rotary scaling makes of `limit`."""
    kind, factor = str(rope["rope_type"]), rope.get("factor") or 1.0
    if kind in ("linear", "proportional") or "dynamic" in kind:
        return int(limit * factor)
    if kind == "yarn":
        return int((rope.get("original_max_position_embeddings") or limit) * factor)
    return limit
