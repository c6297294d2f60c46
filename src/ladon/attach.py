"""`attach` for code that only knows `model.generate`, and `detach`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ladon.generation import Decoder
from ladon.heads import Heads
from ladon.override import override_generate, restore_generate

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def attach(model: PreTrainedModel, heads: Heads | None = None, **options: Any) -> Decoder:
    """Make `model.generate` decode with trees, for pipelines and any code that calls it; `detach` undoes it.

    Args:
        model: the model; only this object changes. Copies of it, and what is saved of it, decode as without Ladon.
        heads: its decoding heads.
        **options: as `Decoder` takes them.

    Returns:
        The decoder, whose `stats` tell about the last call.
    """
    decoder = Decoder(model, heads, **options)
    override_generate(model, decoder.generate)
    return decoder


def detach(model: PreTrainedModel) -> None:
    """Give `model` back the `generate` it had before `attach`; nothing happens if `attach` was not called."""
    restore_generate(model)
