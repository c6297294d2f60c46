"""Where a module computes, and how exactly its device does so: what neither its tensors nor its dtype tell."""

from __future__ import annotations

import os
from functools import lru_cache
from itertools import chain

import torch
from torch import nn

_TF32_VARIABLE = "NVIDIA_TF32_OVERRIDE"  # the driver libraries read it
_REDUCED = {"tf32": torch.float16, "bf16": torch.bfloat16}  # by the bits that factors keep


def device_of(module: nn.Module) -> torch.device | None:
    """Where a module computes, which is where its inputs go; None if nothing tells.

    The parameters of an offloaded module (accelerate's hooks) are on the meta device between forwards; its hook says
    where they are brought for one.
    """
    for hook in _hooks(module):
        device = getattr(hook, "execution_device", None)
        if device is not None and not isinstance(device, dict):
            return torch.device(device)
    tensors = chain(module.parameters(), module.buffers())
    return next((tensor.device for tensor in tensors if not tensor.is_meta), None)


def is_offloaded(model: nn.Module) -> bool:
    """Whether parameters of a module, or of those in it, are elsewhere between forwards."""
    return any(offloading(module) is not None for module in model.modules())


def offloading(module: nn.Module) -> object | None:
    """What holds a module's own parameters between forwards; None if the module does itself."""
    return next((hook for hook in _hooks(module) if getattr(hook, "offload", False)), None)


def _hooks(module: nn.Module) -> tuple[object, ...]:
    hook = getattr(module, "_hf_hook", None)
    return tuple(getattr(hook, "hooks", () if hook is None else (hook,)))


def input_device(model: nn.Module) -> torch.device:
    """Where the inputs of a transformers model go: where its embedding computes."""
    get_embedding = getattr(model, "get_input_embeddings", None)
    embedding = None if get_embedding is None else get_embedding()
    found = device_of(embedding) if isinstance(embedding, nn.Module) else None
    found = device_of(model) if found is None else found
    return torch.device("meta") if found is None else found


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there was not enough memory, on any device; on a CPU it has no class of its own."""
    if isinstance(error, RuntimeError):
        text = str(error).lower()
        return isinstance(error, torch.OutOfMemoryError) or "out of memory" in text or "can't allocate memory" in text
    return isinstance(error, MemoryError)


@lru_cache
def widest_float(device: torch.device) -> torch.dtype:
    """float64, or float32 on a device that has none, such as Apple's."""
    try:
        torch.zeros((), dtype=torch.float64, device=device)
    except (TypeError, RuntimeError):
        return torch.float32
    return torch.float64


def arithmetic(device: torch.device) -> tuple[str, ...]:
    """What decides, besides dtypes, how a device computes now: autocast, and the precision of float32 products.

    The settings are global, or this thread's, and may be others at the next call.
    """
    settings = [str(_autocast_dtype(device)), os.environ.get(_TF32_VARIABLE, "")]
    return (*settings, *_float32_settings(device))


def working_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The dtype whose rounding the products of a model in `dtype` have on a device, as things are set now."""
    lowered = _autocast_dtype(device)
    if lowered is not None and dtype != torch.float64:
        return lowered
    if dtype != torch.float32:
        return dtype
    settings = _float32_settings(device)
    reduced = [_REDUCED[setting] for setting in settings if setting in _REDUCED]
    if device.type == "cuda" and os.environ.get(_TF32_VARIABLE) == "1":
        reduced.append(torch.float16)
    return reduced[-1] if reduced else dtype


def _autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast computes in on a device; None where it is off."""
    try:
        return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    except RuntimeError:  # a device without autocast
        return None


def _float32_settings(device: torch.device) -> tuple[str, ...]:
    """How products of float32 are made on a device: "ieee" or "none" in full, "tf32" or "bf16" with fewer bits."""
    backend = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    setting = getattr(backend.matmul, "fp32_precision", None) if hasattr(backend, "matmul") else None
    if setting is None:  # before torch 2.9 one setting stood for all devices
        setting = {"high": "tf32", "medium": "bf16"}.get(torch.get_float32_matmul_precision(), "ieee")
    return (str(setting),)
