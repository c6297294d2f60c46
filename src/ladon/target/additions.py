"""What others have added to a model, where its configuration does not show it: hooks, adapters, code of their own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from ladon.heads.wrapped import adapter_state

_LIBRARIES = ("torch", "transformers")  # whose layers the self-test has a verdict on once and for all
_HARMLESS_HOOKS = (*_LIBRARIES, "accelerate", "ladon")  # theirs move tensors, or note them
_ONLY_LOOKS = "only_looks"  # an attribute that says so of any other hook
_KINDS = ("_forward_pre_hooks", "_forward_hooks")
_COMPILED = "_torchdynamo_orig_callable"  # what a function has that torch.compile made
_PREPARING = ("prepare_inputs_for_generation", "_update_model_kwargs_for_generation")  # for each forward of `generate`


@dataclass(frozen=True, kw_only=True, slots=True)
class Additions:
    """The additions to a model at some time.

    Attributes:
        hooks: of others, "NAME on MODULE" each, but for those that declare `only_looks = True`. What they do may change
            between calls without a trace.
        has_code: whether any part runs code from elsewhere than torch and transformers, or is compiled.
        is_compiled: whether any part is compiled.
        state: a number that changes when hooks, modules or forwards are exchanged, and adapters switched.
    """

    hooks: tuple[str, ...]
    has_code: bool
    is_compiled: bool
    state: int

    @classmethod
    def of(cls, model: nn.Module) -> Additions:
        """Those of `model` now. Does not read the device."""
        hooks: list[str] = []
        facts: list[Any] = [adapter_state(model)]
        classes: set[type[nn.Module]] = set()
        for hook in _global_hooks():
            hooks.append(f"{_name(hook)} on every module")
            facts.append(id(hook))
        for name, module in model.named_modules():
            classes.add(type(module))
            facts.append(id(module))
            for hook in _hooks(module):
                hooks.append(f"{_name(hook)} on {name or type(model).__name__}")
                facts.append(id(hook))
            facts += [id(_function(call)) for call in _own_calls(module)]
        has_code = not all(map(_is_known, classes)) or any(map(_runs_other_forward, model.modules()))
        methods = [method for name in _PREPARING if (method := getattr(model, name, None)) is not None]
        facts += [id(_function(method)) for method in methods]
        has_code = has_code or not all(_is_from(method, _LIBRARIES) for method in methods)
        compiled = any(hasattr(call, _COMPILED) for module in model.modules() for call in _own_calls(module))
        return cls(hooks=tuple(hooks), has_code=has_code, is_compiled=compiled, state=hash(tuple(facts)))

    @property
    def are_known(self) -> bool:
        """Whether the model consists of layers of torch and transformers alone."""
        return not self.hooks and not self.has_code

    @property
    def mark(self) -> int | None:
        """What a model has in common with itself at another time if nothing here has changed; None if nobody knows."""
        return None if self.hooks else self.state


def _hooks(module: nn.Module) -> Iterator[Any]:
    for kind in _KINDS:
        for hook in tuple(vars(module).get(kind, {}).values()):  # a thread may add ours meanwhile
            if not _is_harmless(hook):
                yield hook


def _global_hooks() -> Iterator[Any]:
    for kind in _KINDS:
        for hook in tuple(getattr(nn.modules.module, f"_global{kind}").values()):
            if not _is_harmless(hook):
                yield hook


def _runs_other_forward(module: nn.Module) -> bool:
    """Whether the object is compiled, or carries a forward of its own other than accelerate's, which moves tensors."""
    return len(_own_calls(module)) > ("_hf_hook" in vars(module))


def _own_calls(module: nn.Module) -> list[Any]:
    """What a module runs instead of its class's forward."""
    return [call for name in ("forward", "_compiled_call_impl") if (call := vars(module).get(name)) is not None]


def _is_known(kind: type[nn.Module]) -> bool:
    return kind.__module__.partition(".")[0] in _LIBRARIES and _is_from(kind.forward, _LIBRARIES)


def _function(called: Any) -> Any:
    while isinstance(called, partial):
        called = called.func
    return getattr(called, "__func__", called)


def _is_from(called: Any, libraries: tuple[str, ...]) -> bool:
    """Whether a function, or an object that is called, is defined in one of these packages."""
    function = _function(called)
    where = getattr(function, "__module__", None) or type(function).__module__
    return where.partition(".")[0] in libraries


def _is_harmless(hook: Any) -> bool:
    return bool(getattr(_function(hook), _ONLY_LOOKS, False)) or _is_from(hook, _HARMLESS_HOOKS)


def _name(called: Any) -> str:
    function = _function(called)
    return str(getattr(function, "__qualname__", type(function).__qualname__))
