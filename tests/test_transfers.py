"""The host reads the device once a step, in `to_host`, and nowhere else in Ladon's own code.

Two nets: the Python methods that read a tensor are patched, and a dispatch mode sees the operators whose result's value
or shape needs a read. Both look for the innermost frame that is Ladon's or the model's: reads by the model are its own.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import ladon
from drafts import FIXED
from ladon import engine as engine_module
from ladon.engine import Row

LADON = str(Path(ladon.__file__).parent)
READERS = ("item", "tolist", "numpy", "cpu", "nonzero", "__bool__", "__int__", "__float__", "__index__", "__array__")
READING_OPERATORS = (
    "_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2", "unique_consecutive",
)  # fmt: skip


class Reads:
    """Counts allowed reads and remembers forbidden ones."""

    def __init__(self) -> None:
        self.allowed = 0
        self.forbidden: list[str] = []

    def note(self, what: str) -> bool:
        """Judge a read by the innermost frame of Ladon or transformers; whether it was Ladon's."""
        frame = sys._getframe(2)
        while frame is not None:
            name = frame.f_code.co_filename
            if name.startswith(LADON):
                if frame.f_code is not engine_module.to_host.__code__:
                    self.forbidden.append(f"{what} at {name}:{frame.f_lineno}")
                return True
            if "/transformers/" in name:
                return False
            frame = frame.f_back
        return False


class Net(TorchDispatchMode):
    def __init__(self, reads: Reads) -> None:
        super().__init__()
        self._reads = reads

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1]
        )
        if name in READING_OPERATORS or by_mask:
            self._reads.note(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def reads(monkeypatch):
    found = Reads()
    for name in READERS:
        original = getattr(torch.Tensor, name)

        def reader(tensor, *args, _original=original, _name=name, **kwargs):
            if _name == "tolist" and sys._getframe(1).f_code is engine_module.to_host.__code__:
                found.allowed += 1
            else:
                found.note(_name)
            return _original(tensor, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, reader)
    return found


@pytest.mark.parametrize("tree", ["dynamic", "chain", "off", FIXED], ids=["dynamic", "chain", "off", "fixed"])
def test_one_read_per_step(tiny_llama, reads, tree):
    heads = ladon.new_heads(tiny_llama, num_heads=3)
    decoder = ladon.Decoder(tiny_llama, heads, tree=tree)
    prompts = [torch.arange(3, 9), torch.arange(5, 25), torch.arange(7, 8)]
    rows = [Row(prompt=p, max_new_tokens=n, is_stop=lambda _: False) for p, n in zip(prompts, (9, 20, 14), strict=True)]
    run = decoder._engine().run(rows)
    reads.forbidden.clear()  # what comes before the run is no part of it
    with Net(reads):
        num_steps = sum(1 for _ in run)
    assert reads.forbidden == []
    assert reads.allowed == num_steps > 10


def test_the_nets_catch_reads(reads):
    """A read from Ladon's code is seen by each net; otherwise the test above proves nothing."""
    code = compile("def peek(t): return t.item(), bool(t.sum()), t[t > 0], t.nonzero()", LADON + "/peek.py", "exec")
    scope: dict = {}
    exec(code, scope)
    with Net(reads):
        scope["peek"](torch.ones(1))
    seen = {line.split(" at ")[0] for line in reads.forbidden}
    assert {"item", "__bool__", "index", "nonzero", "_local_scalar_dense"} <= seen
