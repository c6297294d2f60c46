"""The colours of tokens by origin, readable on light and dark grounds.

Files have exact colours. A terminal has the user's own sixteen, which fit its ground and which every kind has.
"""

from __future__ import annotations

from ladon.viz.record import BONUS

_DEPTHS = ("#2f9e77", "#2b8cbe", "#6a6fd1", "#a855b8", "#c2447f", "#b5563c", "#8a7a2b")
_BONUS = "#e07b00"
_ANSI_DEPTHS = ("green", "cyan", "blue", "magenta", "red", "bright_green", "bright_cyan")
_ANSI_BONUS = "yellow"

_MODES = {
    "plain": "#6b7280",
    "transformers": "#a3a9b3",
    "chain": "#2b8cbe",
    "fixed": "#b5563c",
    "dynamic": "#2f9e77",
    "auto": "#5b3fa8",
    "pruned": "#c2447f",
    "ngrams": "#8a6d1d",
    "dynamic+ngrams": "#1b6ca8",
    "auto+ngrams": "#241a52",
}


def mode_colour(mode: str) -> str:
    """Colour (#rrggbb) of a decoding mode in plots."""
    return _MODES[mode]


def origin_colour(origin: int) -> str:
    """Colour (#rrggbb) of a token by its origin: the bonus token, or drafted at a depth of 1 or more."""
    return _BONUS if origin == BONUS else _DEPTHS[(origin - 1) % len(_DEPTHS)]


def ansi_colour(origin: int) -> str:
    """The same for a terminal: the name of one of its colours."""
    return _ANSI_BONUS if origin == BONUS else _ANSI_DEPTHS[(origin - 1) % len(_ANSI_DEPTHS)]


def origin_name(origin: int) -> str:
    """The origin in words."""
    return "bonus token" if origin == BONUS else f"drafted, depth {origin}"
