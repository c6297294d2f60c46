"""The tensors of a dataclass, changed together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, TypeVar

from torch import Tensor

Of = TypeVar("Of")


def with_tensors(values: Of, change: Callable[[Tensor], Tensor]) -> Of:
    """A dataclass as it is, but for each of its tensors, which `change` makes another of."""
    of: Any = values
    found = {field.name: getattr(of, field.name) for field in fields(of)}
    changed: Of = replace(of, **{name: change(value) for name, value in found.items() if isinstance(value, Tensor)})
    return changed
