"""A device that is not the CPU, on a CPU: tensors that say they are elsewhere, and are refused beside others.

It has no float64, as Apple's has none. Numbers are computed by the CPU, so that results are those of the CPU. torch
knows one such device per process: run as a script, this file decodes in every way on it, and compares.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.utils.backend_registration
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import ladon
from greedy import BATCH, MASK, plain
from ladon.util.devices import input_device, widest_float
from toys import Residues, deep_llama

torch.utils.backend_registration._setup_privateuseone_for_python_backend("elsewhere")  # type: ignore[attr-defined]
DEVICE = torch.device("elsewhere:0")


class Elsewhere(Tensor):
    """A tensor on the device; its numbers are in `inner`."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Elsewhere:
        if inner.dtype == torch.float64:
            raise TypeError("this device has no float64")
        shape: dict[str, Any] = {"strides": inner.stride(), "storage_offset": inner.storage_offset()}
        made = Tensor._make_wrapper_subclass(cls, inner.shape, **shape, dtype=inner.dtype, device=DEVICE)
        made.inner = inner
        return made

    def __repr__(self) -> str:
        return f"Elsewhere({self.inner!r})"

    def tolist(self) -> Any:
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operation, on the CPU; its results are where its inputs are, or where it is told to put them."""
    tensors: list[Tensor] = []
    tree_map(lambda value: tensors.append(value) if isinstance(value, Tensor) else None, (args, kwargs))
    here = [tensor for tensor in tensors if not isinstance(tensor, Elsewhere)]
    there = [tensor for tensor in tensors if isinstance(tensor, Elsewhere)]
    device = kwargs.get("device")
    is_copy = func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
    if there and not is_copy and any(tensor.ndim > 0 for tensor in here):
        raise RuntimeError(f"Expected all tensors to be on the same device, but found at least two, in {func}")
    is_there = bool(there) if device is None else torch.device(device).type == DEVICE.type
    if func is torch.ops.aten.copy_.default:
        is_there = isinstance(args[0], Elsewhere)
    if device is not None and torch.device(device).type == DEVICE.type:
        kwargs = {**kwargs, "device": torch.device("cpu")}
        if kwargs.get("dtype") == torch.float64:
            raise TypeError("this device has no float64")
    known = {id(tensor.inner): tensor for tensor in there}
    unwrapped = tree_map(lambda value: value.inner if isinstance(value, Elsewhere) else value, (args, kwargs))
    found = func(*unwrapped[0], **unwrapped[1])
    if not is_there:
        return found

    def wrapped(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return known[id(value)] if id(value) in known else Elsewhere(value)

    return tree_map(wrapped, found)


def _empty_strided(size: Any, stride: Any, **kwargs: Any) -> Tensor:
    return Elsewhere(torch.empty_strided(size, stride, dtype=kwargs.get("dtype"), device="cpu"))


def _empty(size: Any, **kwargs: Any) -> Tensor:
    return Elsewhere(torch.empty(size, dtype=kwargs.get("dtype"), device="cpu"))


def _copy_from(source: Tensor, target: Tensor, *_: Any) -> Tensor:
    """Between the devices, from within torch."""
    inner = [tensor.inner if isinstance(tensor, Elsewhere) else tensor for tensor in (source, target)]
    inner[1].copy_(inner[0])
    return target


_LIBRARY = torch.library.Library("aten", "IMPL")  # kept: what it registers lives as long
for _name, _made in (("empty_strided", _empty_strided), ("empty.memory_format", _empty), ("_copy_from", _copy_from)):
    _LIBRARY.impl(_name, _made, "PrivateUse1")


def move(module: nn.Module) -> nn.Module:
    """Put a module's parameters and buffers on the device."""
    for part in module.modules():
        for name, own in part._parameters.items():
            if own is not None:
                part._parameters[name] = nn.Parameter(Elsewhere(own.detach()), requires_grad=False)
        for name, own in part._buffers.items():
            if own is not None:
                part._buffers[name] = Elsewhere(own)
    return module


def check() -> None:
    """Decode on the device, with the default device there too, and compare with the CPU."""
    model = deep_llama(3).float()
    heads = ladon.new_heads(model, 3, markov_rank=4)
    generator = torch.Generator("cpu").manual_seed(3)
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    call: dict[str, Any] = {"attention_mask": MASK, "max_new_tokens": 8}
    sampled = {**call, "do_sample": True, "seed": 3}
    kept = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    toy = Residues(modulus=12, classes=2, ends=False)
    expected = plain(model, BATCH, **call)
    drawn = ladon.Decoder(model, heads, budget=12).generate(BATCH, **sampled)
    constrained = ladon.Decoder(model, heads, budget=12).generate(BATCH, **call, constraint=toy)

    move(model)
    ids = BATCH.to(DEVICE)
    call["attention_mask"] = sampled["attention_mask"] = MASK.to(DEVICE)
    for default in (None, DEVICE):
        torch.set_default_device(default)
        assert input_device(model) == DEVICE and widest_float(DEVICE) == torch.float32
        assert torch.equal(plain(model, ids, **call).cpu(), expected), "transformers itself"
        for options in ({"budget": 12}, {"tree": "chain"}) if default is None else ({"budget": "auto"},):
            decoder = ladon.Decoder(model, heads, **options)
            assert torch.equal(decoder.generate(ids, **call).cpu(), expected), options
            assert {parameter.device for parameter in decoder.heads.parameters()} == {DEVICE}
    else:
        decoder = ladon.Decoder(model, heads, budget=12)
        assert torch.equal(decoder.generate(ids, **sampled).cpu(), drawn)
        assert torch.equal(decoder.generate(ids, **call, constraint=toy).cpu(), constrained)
        found = decoder.generate(ids, **call, **kept)
        assert torch.equal(found.sequences.cpu(), expected) and found.scores[0].device == DEVICE
        mask = (found.sequences != 0).long()
        decoder.generate(found.sequences, attention_mask=mask, max_new_tokens=2, past_key_values=found.past_key_values)
        assert decoder.stats.reused_tokens > 0
        assert torch.equal(ladon.Decoder(model).generate(ids, **call).cpu(), expected), "n-grams"
        pruning = ladon.Pruning(layer=2, keep=6, criterion="top-k")
        decoder = ladon.Decoder(model, heads, budget=12, prune=pruning)
        assert torch.equal(decoder.generate(ids, **call).cpu(), expected)
        assert ladon.new_heads(model, 2).up_weight.device == DEVICE


if __name__ == "__main__":
    torch.accelerator.synchronize = lambda *_: None  # type: ignore[assignment] # the device has no streams
    check()
