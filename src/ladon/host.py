"""The one place where the host reads the device."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def to_host(values: Tensor) -> list[list[int]]:
    """An int64 table [B, n] as lists. Waits for the device; everything else that decoding does must not."""
    rows: list[list[int]] = values.tolist()
    return rows


def host_values(values: Tensor) -> list[Any]:
    """The numbers of a tensor that the host itself has made, [n] or nested: nothing is waited for."""
    assert values.device.type == "cpu"
    found: list[Any] = values.tolist()
    return found
