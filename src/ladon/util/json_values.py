"""Numbers as JSON has them."""

from __future__ import annotations

import math
from typing import Any


def rounded(value: Any) -> Any:
    """A value, or tables and lists of values: numbers to 4 places, None where JSON has no number for one."""
    if isinstance(value, dict):
        return {name: rounded(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(part) for part in value]
    if isinstance(value, float):
        return round(value, 4) if math.isfinite(value) else None
    return value
