"""What a decoder's `prune` option means for its heads and its model."""

from __future__ import annotations

from typing import Any

from ladon.errors import InputError, UnsupportedModelError
from ladon.heads import Heads
from ladon.heads.early_exit import load_early_exit
from ladon.pruning import Pruning
from ladon.target import Target

Prune = str | Pruning


def chosen_pruning(prune: Prune, heads: Heads | None, target: Target) -> Pruning | None:
    """How to prune, tested on the model; None for not at all.

    Args:
        prune: "off"; "auto": what the calibration of the heads found to pay, if anything; or a `Pruning`.
        heads: of the decoder.
        target: its model.

    Raises:
        InputError: an unknown option, or an early exit of another model.
        HeadsError: the model has no such layer, or the early exit beside the heads is damaged.
        UnsupportedModelError: a `Pruning` was given, and the model cannot be pruned so. With "auto" it is not pruned.
    """
    if isinstance(prune, Pruning):
        target.pruner(prune)
        return prune
    if prune not in ("off", "auto"):
        raise InputError(f'prune is {prune!r}; give "off", "auto" or a ladon.Pruning')
    if prune == "off" or heads is None or heads.calibration is None:
        return None
    found = calibrated(heads.calibration.pruning.get("best"), heads, target)
    try:
        if found is not None:
            target.pruner(found)
    except UnsupportedModelError:
        return None
    return found


def calibrated(best: dict[str, Any] | None, heads: Heads, target: Target) -> Pruning | None:
    """The pruning that a calibration names, with the early exit beside the heads; None if it names none."""
    if best is None:
        return None
    early_exit = None
    if best["trained"]:
        early_exit = None if heads.folder is None else load_early_exit(heads.folder, target.model)
        if early_exit is None or early_exit.layer != best["layer"]:
            return None  # it was measured with an early exit that is not there any more
    names = ("layer", "keep", "criterion", "weight", "top_k")
    return Pruning(**{name: best[name] for name in names}, early_exit=early_exit)
