"""Models inside other objects, and adapters inside models.

peft puts a model into a `PeftModel` and layers around some of its own; `torch.compile` and data parallelism put it into
a module that passes calls on. Decoding needs the transformers model itself, and the adapters that are switched on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from ladon.errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ELSEWHERE = "use the peft model's own generate for it, or an adapter that changes layers, such as LoRA"
_NOT_RUN = {
    "POLY": f"its POLY adapter mixes skills by the task_ids of each row; {_ELSEWHERE}",
    "XLORA": f"its X-LoRA adapter weighs experts by a forward over the whole sequence; {_ELSEWHERE}",
}
_INNER = ("base_layer", "original_module", "token_adapter", "model")  # where peft keeps the layer that one stands for
_PLAIN = (str, bool, int, float, type(None))


class Unwrapped(NamedTuple):
    """A model with what stands around it taken away.

    Attributes:
        outer: whose `generate` is the reference: a peft model, or the model itself.
        model: the transformers model that runs.
    """

    outer: Any
    model: PreTrainedModel


def unwrapped(given: Any) -> Unwrapped:
    """The model that decodes when somebody gives this one.

    A compiled module is taken out of its wrapper, as `generate` of transformers does; so is one with adapters in its
    layers, which run as they are.

    Raises:
        UnsupportedModelError: it is no model of transformers, is wrapped in a module of another kind, or has an adapter
            that acts through other things than the layers.
    """
    from transformers import PreTrainedModel

    if isinstance(given, PreTrainedModel):
        return Unwrapped(given, given)
    name, otherwise = type(given).__name__, "give a causal language model of transformers"
    if isinstance(given, nn.Module):
        modules = given._modules
        if "_orig_mod" in modules:
            return unwrapped(modules["_orig_mod"])
        if any(cls.__module__.startswith("peft.") for cls in type(given).__mro__):
            return Unwrapped(given, _inside_peft(given))
        if isinstance(modules.get("module"), nn.Module):
            otherwise = f"it wraps a {type(modules['module']).__name__}: give that, its .module"
    raise UnsupportedModelError(f"{name} is not a model that Ladon decodes with; {otherwise}")


def _inside_peft(given: nn.Module) -> PreTrainedModel:
    """The transformers model in a peft model whose active adapters act in its layers alone."""
    from transformers import PreTrainedModel

    active: Any = getattr(given, "active_adapters", ())
    configs: Any = getattr(given, "peft_config", {})
    disabled = getattr(given, "_adapters_disabled", False)
    for adapter in [active] if isinstance(active, str) else active:
        reason = None if disabled else _refusal(configs.get(adapter))
        if reason is not None:
            raise UnsupportedModelError(f"{type(given).__name__} cannot be decoded by Ladon: {reason}")
    model: Any = given
    while not isinstance(model, PreTrainedModel):
        inner = model._modules.get("base_model") or model._modules.get("model")
        if inner is None:
            raise UnsupportedModelError(
                f"{type(given).__name__} holds a {type(model).__name__}, not a model of transformers; give it one"
            )
        model = inner
    return model


def _refusal(config: Any) -> str | None:
    """Why an adapter of this configuration does not run, or None."""
    kind = str(getattr(config, "peft_type", "")).rpartition(".")[-1]
    if getattr(config, "is_prompt_learning", False):
        what = "puts virtual tokens before the prompt, which Ladon does not give to the model"
        return f"its {kind} adapter {what}; {_ELSEWHERE}"
    if getattr(config, "alora_invocation_tokens", None):
        return f"its activated LoRA begins at invocation tokens of each prompt; {_ELSEWHERE}"
    return _NOT_RUN.get(kind)


def base_layer(module: nn.Module) -> nn.Module:
    """The layer that a layer of peft stands for; any other module itself."""
    if not type(module).__module__.startswith("peft."):
        return module
    inner = next((found for name in _INNER if (found := module._modules.get(name)) is not None), None)
    return module if inner is None else base_layer(inner)


def adapter_layers(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """The layers of peft in a model, each with the layer that it stands for."""
    for module in model.modules():
        inner = base_layer(module)
        if inner is not module:
            yield module, inner


def adapter_state(model: nn.Module) -> int:
    """A number that changes when adapters are added, switched, scaled, disabled or merged. Not their weights."""
    return hash(tuple((id(layer), repr(sorted(_plain_values(vars(layer))))) for layer, _ in adapter_layers(model)))


def _plain_values(values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        parts: Iterable[Any] = (value,)
        if isinstance(value, dict):
            parts = value.values()
        elif isinstance(value, list | tuple | set):
            parts = value
        if name != "training" and all(isinstance(part, _PLAIN) for part in parts):
            yield name, repr(value)


def active_adapters(model: nn.Module) -> list[str]:
    """The names of the adapters that change what a model says; merged ones, now part of its weights, are not."""
    return sorted({name for layer, _ in adapter_layers(model) for name in _active_in(layer)})


def adapter_parameters(model: nn.Module) -> tuple[set[nn.Parameter], list[nn.Parameter]]:
    """All parameters of a model's adapters, and those of the active ones in order."""
    every: set[nn.Parameter] = set()
    active: list[nn.Parameter] = []
    for layer, inner in adapter_layers(model):
        own = set(inner.parameters())
        added = [(name, parameter) for name, parameter in layer.named_parameters() if parameter not in own]
        names = set(_active_in(layer))
        active += [p for name, p in added if names & {*name.split("."), *_active_everywhere(layer)} and p not in every]
        every |= {parameter for _, parameter in added}
    return every, active


def _active_everywhere(layer: Any) -> list[str]:
    """The name of the only adapter of a layer that has no names for them."""
    return [] if hasattr(layer, "active_adapters") else _active_in(layer)


def _active_in(layer: Any) -> list[str]:
    if getattr(layer, "disable_adapters", False) or getattr(layer, "merged", False):
        return []
    names: Any = getattr(layer, "active_adapters", type(layer).__name__)
    return [names] if isinstance(names, str) else list(names)
