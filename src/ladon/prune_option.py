"""What a decoder's `prune` option means for its heads and its model."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from typing import Any

from ladon.errors import HeadsError, InputError, UnsupportedModelError
from ladon.heads import Heads
from ladon.heads.early_exit import load_early_exit
from ladon.profiles import machine_of
from ladon.pruning import Pruning
from ladon.target import Target

Prune = str | Pruning
OFF, AUTO = "off", "auto"
_LAYER_AND_KEEP = re.compile(r"(\d+):(\d+)")
_AGAIN = "run `ladon calibrate --pruning` again"


def chosen_pruning(prune: Prune, heads: Heads | None, target: Target) -> Pruning | None:
    """How to prune, tested on the model; None for not at all.

    Args:
        prune: "off"; "auto": what the calibration of the heads found to pay, if anything; a `Pruning`; or its layer
            and the nodes to keep, such as "4:16".
        heads: of the decoder.
        target: its model.

    Raises:
        InputError: an unknown option, or a `Pruning` that does not fit the model.
        HeadsError: the model has no such layer, or the calibration or the early exit beside the heads is damaged.
        UnsupportedModelError: a `Pruning` was given, and the model cannot be pruned so. With "auto" it is not pruned.
    """
    prune = prune if prune in (OFF, AUTO) else _given(prune)
    if isinstance(prune, Pruning):
        target.pruner(prune)
        return prune
    if prune == OFF or heads is None or heads.calibration is None:
        return None
    found = heads.calibration.pruning
    best = found.get("best")
    if best is None or not _was_measured_here(found.get("place", {}), target):
        return None
    return still_chosen(calibrated(best, heads, target), prune, target)


def _given(prune: Prune) -> Pruning:
    if isinstance(prune, Pruning):
        return prune
    found = _LAYER_AND_KEEP.fullmatch(str(prune))
    if found is None:
        raise InputError(f'prune is {prune!r}; give "off", "auto", a layer and the nodes to keep ("4:16") or a Pruning')
    return Pruning(layer=int(found[1]), keep=int(found[2]))


def still_chosen(pruning: Pruning | None, prune: Prune, target: Target) -> Pruning | None:
    """The same again, tested if the model has changed since; None if option "auto" meets one that cannot be pruned."""
    if pruning is None or prune != AUTO:
        return pruning
    try:
        target.pruner(pruning)
    except (InputError, UnsupportedModelError):  # the former for an output projection that is packed or elsewhere
        return None
    return pruning


def calibrated(best: Mapping[str, Any], heads: Heads, target: Target) -> Pruning | None:
    """The pruning that a calibration names, with the early exit beside the heads; None if that is another one now."""
    early_exit = None
    if best["trained"]:
        early_exit = None if heads.folder is None else load_early_exit(heads.folder, target.model)
        if early_exit is None or early_exit.layer != best["layer"]:
            return None  # it was measured with an early exit that is not there any more
    names = ("layer", "keep", "criterion", "weight", "top_k")
    try:
        return Pruning(**{name: best[name] for name in names}, early_exit=early_exit)
    except InputError as error:
        raise HeadsError(f"the pruning in the heads' calibration cannot be used ({error}); {_AGAIN}") from error


def _was_measured_here(place: Mapping[str, Any], target: Target) -> bool:
    """Whether timings of a place hold for this model on this machine, as far as is recorded; warns if they do not."""
    here = machine_of(target.model)
    others = [f"{name} {place[name]}, not {here[name]}" for name in here if place.get(name, here[name]) != here[name]]
    if others:
        warnings.warn(
            f"pruning is left off: it was found to pay with {'; '.join(others)}. To find out here, {_AGAIN}",
            stacklevel=4,
        )
    return not others
