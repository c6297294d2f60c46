"""`attach` for code that only knows `model.generate`, and `detach`.

The model object carries a bound method under the name of the class's own. Copies of the model then carry a method bound
to the copy, which sees that it is not the model it was made for; pickling a bound method keeps its name only, so that a
saved model loads with the class's `generate`.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import TYPE_CHECKING, Any

from ladon.decoder.decoder import Decoder
from ladon.decoder.request import own_generate
from ladon.heads import Heads
from ladon.heads.wrapped import unwrapped

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def attach(model: PreTrainedModel, heads: Heads | None = None, **options: Any) -> Decoder:
    """Make `model.generate` decode with trees, for pipelines and any code that calls it; `detach` undoes it.

    Args:
        model: the model, or a peft model; only this object changes. Copies of it, and what is saved of it, decode as
            without Ladon. Of a compiled module, the model inside is what changes.
        heads: its decoding heads.
        **options: as `Decoder` takes them.

    Returns:
        The decoder, whose `stats` tell about the last call.
    """
    decoder = Decoder(model, heads, **options)
    override_generate(unwrapped(model).outer, decoder.generate)
    return decoder


def detach(model: PreTrainedModel) -> None:
    """Give `model` back the `generate` it had before `attach`; nothing happens if `attach` was not called."""
    restore_generate(getattr(model, "_orig_mod", model))


def override_generate(model: PreTrainedModel, replacement: Callable[..., Any]) -> None:
    """Let `model.generate` call `replacement`, which must take its arguments as the class's own does.

    Calls with `custom_generate`, and all calls on copies of the model, go to the class's own. An override that is
    there already is replaced.
    """
    restore_generate(model)
    vars(model)["generate"] = MethodType(_Override(model, replacement), model)


def restore_generate(model: PreTrainedModel) -> None:
    """Put back what `override_generate` found on the model object; without an override nothing happens."""
    override = _override_on(model)
    if override is not None:
        del vars(model)["generate"]
        vars(model).update(override.before)


class _Override:
    """The function of the bound method.

    Attributes:
        before: the entry that was on the model object before, if there was one.
    """

    __name__ = "generate"  # what pickle looks up on the loaded model

    def __init__(self, model: PreTrainedModel, replacement: Callable[..., Any]) -> None:
        self._model, self._replacement = model, replacement
        self.before = {name: value for name, value in vars(model).items() if name == "generate"}

    def __call__(self, model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        """`generate` on `model`, which may be a copy of the one this was made for."""
        if model is not self._model or kwargs.get("custom_generate") is not None:
            return own_generate(model)(*args, **kwargs)
        return self._replacement(*args, **kwargs)


def _override_on(model: PreTrainedModel) -> _Override | None:
    function = getattr(vars(model).get("generate"), "__func__", None)
    return function if isinstance(function, _Override) else None
