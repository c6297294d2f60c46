"""What the keys of a checkpoint of heads mean: a layout is a pattern per role, and the parts are what it finds."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ladon.errors import HeadsError
from ladon.heads.formats.files import Checkpoint

HEAD, LAYER, KIND = r"(?P<head>\d+)", r"(?P<layer>\d+)", r"(?P<kind>weight|bias)"
Place = tuple[int, int, str]  # head and layer, from 0, and "weight" or "bias"


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How one system names the tensors of heads.

    Attributes:
        name: as the user knows it.
        block: pattern of a residual block's key, with the groups head, layer and kind.
        projection: pattern of a head's own output projection: head and kind, and the layer if it is numbered on.
        residual: likewise, of what a block adds its input through; None where it adds the input itself.
        single: role -> pattern of keys that occur once: "shared" and "embedding" (copies of the base's output
            projection and input embedding), "token_map" (which tokens the logits are of).
        beside: pattern of the keys that may lie beside the heads, as those of the base model do; None allows none.
        is_whole: whether those are a model in transformers' format.
    """

    name: str
    block: str
    projection: str
    residual: str | None = None
    single: Mapping[str, str] = field(default_factory=dict)
    beside: str | None = None
    is_whole: bool = False


@dataclass
class Parts:
    """The keys of one checkpoint by what they mean.

    Attributes:
        blocks: by head, layer and kind.
        projections: likewise; the layer is -1 where the layout does not number it.
        residuals: likewise.
        single: role -> key.
        beside: the keys that are no part of the heads.
    """

    blocks: dict[Place, str] = field(default_factory=dict)
    projections: dict[Place, str] = field(default_factory=dict)
    residuals: dict[Place, str] = field(default_factory=dict)
    single: dict[str, str] = field(default_factory=dict)
    beside: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)


def sort_keys(layout: Layout, keys: Iterable[str]) -> Parts:
    """The keys as this layout reads them."""
    parts = Parts()
    tables = [(layout.block, parts.blocks), (layout.projection, parts.projections)]
    if layout.residual:
        tables.append((layout.residual, parts.residuals))
    for key in keys:
        for pattern, table in tables:
            match = re.fullmatch(pattern, key)
            if match:
                found = match.groupdict()
                table[int(found["head"]), int(found.get("layer") or -1), found["kind"]] = key
                break
        else:
            role = next((role for role, pattern in layout.single.items() if re.fullmatch(pattern, key)), None)
            if role is not None:
                parts.single[role] = key
            elif layout.beside is not None and re.fullmatch(layout.beside, key):
                parts.beside.append(key)
            else:
                parts.unknown.append(key)
    return parts


def counts(name: str, places: Iterable[Place]) -> tuple[int, int]:
    """Numbers of heads and of layers per head.

    Raises:
        HeadsError: indices with a gap, or heads of different depths.
    """
    layers: dict[int, set[int]] = {}
    for head, layer, _ in places:
        layers.setdefault(head, set()).add(layer)
    _check_gaps(name, "head", sorted(layers))
    for head, found in sorted(layers.items()):
        _check_gaps(name, f"head {head}, layer", sorted(found))
    depths = {head: len(found) for head, found in layers.items()}
    if len(set(depths.values())) > 1:
        listed = ", ".join(f"head {head} {depth}" for head, depth in sorted(depths.items()))
        raise HeadsError(f"{name}: heads have different numbers of layers ({listed}); they must have the same")
    return len(layers), depths[0]


def check_shapes(checkpoint: Checkpoint, expected: Mapping[str, Sequence[int]]) -> None:
    """Raise `HeadsError` naming every tensor whose shape is another."""
    wrong = [
        f"{key} is {list(checkpoint.slots[key].shape)}, expected {list(shape)}"
        for key, shape in expected.items()
        if checkpoint.slots[key].shape != torch.Size(shape)
    ]
    if wrong:
        raise HeadsError(f"{checkpoint.name}: {some(wrong, '; ')}. The file is damaged or of another layout")


def some(items: Sequence[str], separator: str = ", ", most: int = 6) -> str:
    """The first few of a list, for a message."""
    more = f"{separator}and {len(items) - most} more" if len(items) > most else ""
    return separator.join(items[:most]) + more


def _check_gaps(name: str, what: str, indices: Sequence[int]) -> None:
    missing = sorted(set(range(max(indices) + 1)) - set(indices))
    if missing:
        raise HeadsError(
            f"{name}: {what} indices are {some([str(i) for i in indices])}, but "
            f"{some([str(i) for i in missing])} {'is' if len(missing) == 1 else 'are'} missing; the file is incomplete"
        )
