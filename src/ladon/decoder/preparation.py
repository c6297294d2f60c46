"""What `generate` would give to the model's forward: it must be the prompt and what has been said, and nothing else.

A class may override `prepare_inputs_for_generation`, and peft puts its own on a model object. Trees are verified with
inputs of our own, so what such a method changes would be lost without a word. It is asked what it makes of the call's
prompts, of the first token after them and of the last that may come, beside the method of transformers; where the two
differ, the call is refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache

from ladon.errors import UnsupportedModelError
from ladon.util.devices import input_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_METHOD = "prepare_inputs_for_generation"
_LOOP = ("_sample", "_prefill")
_OTHERWISE = "Use the model's own generate, or the class without it"
# How the forward computes, not what.
_NEUTRAL = {"use_cache", "logits_to_keep", "num_logits_to_keep", "cache_position", "return_dict", "past_key_values"}
_LEFT_OUT = ("attention_mask", "position_ids")
_LIBRARIES = ("transformers", "peft")


def is_of_library(function: Any) -> bool:
    """Whether a function, bound or not, is defined in transformers, or passes calls on to it in peft."""
    return str(getattr(function, "__module__", "")).partition(".")[0] in _LIBRARIES


def refuse_own_loop(model: PreTrainedModel) -> None:
    """Raise `UnsupportedModelError` if the model's class decodes in a loop, or from inputs, of its own."""
    for name in _LOOP:
        if not is_of_library(getattr(model, name, None)) and hasattr(model, name):
            raise UnsupportedModelError(
                f"{type(model).__name__} decodes in a loop of its own ({name}), which trees would replace. {_OTHERWISE}"
            )
    ids = torch.zeros(1, 2, dtype=torch.int64, device=input_device(model))
    refuse_changed_inputs(model, ids, {"position_ids": torch.arange(2, device=ids.device)[None]}, 4)


def refuse_changed_inputs(
    model: PreTrainedModel, input_ids: Tensor, inputs: dict[str, Any], max_length: int
) -> None:
    """Raise `UnsupportedModelError` if a method of the model's own gives its forward other inputs than transformers.

    Args:
        model: the model.
        input_ids: the prompts of a call, [B, T].
        inputs: the call's other model inputs, as `generate` has prepared them.
        max_length: the greatest length of a sequence.
    """
    own = getattr(model, _METHOD, None)
    usual = next((vars(cls)[_METHOD] for cls in type(model).__mro__ if _is_usual(vars(cls).get(_METHOD))), None)
    if own is None or usual is None or getattr(own, "__func__", own) is usual:
        return  # without any, the model has no generate either
    where = getattr(own, "__qualname__", type(own).__qualname__)
    for ids, given in _steps(input_ids, inputs, max_length, inspect.signature(usual).parameters):
        try:
            found = own(ids, **_copied(given))
        except Exception as error:  # it is the user's code
            reason = f"fails with {type(error).__name__}: {str(error).partition(chr(10))[0]}"
        else:
            changed = _differing(found, usual(model, ids, **_copied(given)), given.get("attention_mask"))
            if not changed:
                continue
            reason = f"changes {', '.join(changed)}"
        raise UnsupportedModelError(
            f"{type(model).__name__} prepares its inputs with {where}, which {reason}; Ladon gives the model token ids "
            f"and positions alone. {_OTHERWISE}"
        )


def _is_usual(method: Any) -> bool:
    return str(getattr(method, "__module__", "")).startswith("transformers.")


class _Filled(DynamicCache):
    """A cache that says how much it holds, and holds nothing."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self._length = length

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """What it says it holds."""
        return self._length


def _steps(
    input_ids: Tensor, inputs: dict[str, Any], max_length: int, known: Collection[str]
) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """Arguments of `prepare_inputs_for_generation` in a call's first step, its second and its last.

    Of those that say which step it is, `known` are the ones that the installed transformers has.
    """
    length = input_ids.shape[1]
    for reach in sorted({length, length + 1, max(max_length - 1, length + 1)}):
        given = {**inputs, "past_key_values": _Filled(0 if reach == length else reach - 1)}
        for name in ("attention_mask", "position_ids"):
            if inputs.get(name) is not None:
                given[name] = functional.pad(inputs[name], (0, reach - length), value=1)
        if inputs.get("position_ids") is not None:
            more = torch.arange(1, reach - length + 1, device=input_ids.device)
            given["position_ids"][..., length:] = inputs["position_ids"][..., -1:] + more
        new = length if reach == length else 1
        slots = torch.arange(reach - new, reach, device=input_ids.device)
        steps = {"next_sequence_length": new, "is_first_iteration": reach == length, "cache_position": slots}
        given |= {name: value for name, value in steps.items() if name in known}  # releases differ
        yield functional.pad(input_ids, (0, reach - length), value=1), given


def _copied(given: dict[str, Any]) -> dict[str, Any]:
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in given.items()}


def _differing(found: Any, usual: dict[str, Any], mask: Tensor | None) -> list[str]:
    """The inputs that are not the same, by name. Where nothing is padded, mask and positions may be left out."""
    if not isinstance(found, dict):
        return [f"all inputs to a {type(found).__name__}"]
    names = sorted({*found, *usual} - _NEUTRAL)
    positions = usual.get("position_ids"), found.get("position_ids")
    if mask is None or bool(mask.all()):
        names = [name for name in names if found.get(name) is not None or name not in _LEFT_OUT]
    elif all(isinstance(part, Tensor) and part.shape == mask[:, -part.shape[-1] :].shape for part in positions):
        width = usual["position_ids"].shape[-1]
        real = mask[:, -width:] != 0  # in the padding anything goes
        found, usual = ({**given, "position_ids": given["position_ids"] * real} for given in (found, usual))
    changed = [name for name in names if not _same(found.get(name), usual.get(name))]
    cache = found.get("past_key_values")
    if cache is not None and not isinstance(cache, _Filled):
        changed.append("past_key_values")
    return changed


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return torch.equal(left, right.to(left.device, left.dtype)) if left.shape == right.shape else False
    if isinstance(left, Tensor) or isinstance(right, Tensor):
        return False
    return bool(left is right or left == right)
