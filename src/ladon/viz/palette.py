"""One set of colours for every picture; told apart by hue and lightness, readable on light and dark grounds."""

from __future__ import annotations

from ladon.viz.record import BONUS

_DEPTHS = ("#2f9e77", "#2b8cbe", "#6a6fd1", "#a855b8", "#c2447f", "#b5563c", "#8a7a2b")
_BONUS = "#e07b00"


def origin_colour(origin: int) -> str:
    """Colour (#rrggbb) of a token by its origin: the bonus token, or drafted at a depth of 1 or more."""
    return _BONUS if origin == BONUS else _DEPTHS[(origin - 1) % len(_DEPTHS)]


def origin_name(origin: int) -> str:
    """The origin in words."""
    return "bonus token" if origin == BONUS else f"drafted, depth {origin}"
