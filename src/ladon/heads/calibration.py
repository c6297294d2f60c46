"""What `ladon calibrate` found out about heads, as it lies beside them in `calibration.json`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ladon.config import JOINTS, PRODUCT
from ladon.errors import HeadsError
from ladon.heads.formats.files import read_versioned
from ladon.util.files import explained, write_whole

CALIBRATION_FILE = "calibration.json"
FORMAT = "ladon-calibration"
VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Measurements of one set of heads on one model. Only the temperatures change what is drafted.

    Attributes:
        heads: hash of the heads' weights that were measured (`Heads.weights_hash`).
        temperatures: one per depth, [K]: head k's logits are divided by it before the softmax.
        joint: how guesses were joined to paths, which the temperatures belong to: "product", "markov",
            "hidden" or "paths".
        hit_rates: [K][ranks]: how often each rank is right, given that the shallower depths' candidates held the truth.
        marginal_hit_rates: [K][ranks]: the same over all positions; of heads that read the tokens before their guesses,
            or whose hidden correction does, after the true ones.
        error: calibration error per depth without and with temperatures, as `docs/reference/benchmark-files.md`
            defines it, on half of the prompts; the temperatures were fitted on the other half for this.
        fixed_trees: rank paths of the best fixed tree per number of nodes, root included.
        simulated: acceptance length of several trees on the half of `error`, each {"tree", "nodes", "temperatures",
            "acceptance_length", "accepted"}; the last is the share of steps that emitted a draft of each depth.
        prefixes: how far lattices and dynamic trees follow the truth on the half of `error`, as
            `docs/reference/metrics.md` defines it.
        step_times: milliseconds of a decode step per number of nodes, with the machine they were measured on, and the
            budget that they and `simulated` would make the fastest; without the latter where dynamic trees cannot be
            simulated.
        pruning: what early pruning would gain by layer, criterion and kept size, and what is best, if that was asked
            for (`ladon.calibrate.pruning`).
        measured_on: model, prompts, positions and settings behind the numbers.
    """

    heads: str
    temperatures: Sequence[float]
    hit_rates: Sequence[Sequence[float]]
    marginal_hit_rates: Sequence[Sequence[float]] = ()
    error: Mapping[str, Any] = field(default_factory=dict)
    fixed_trees: Mapping[str, Sequence[Sequence[int]]] = field(default_factory=dict)
    simulated: Sequence[Mapping[str, Any]] = ()
    step_times: Mapping[str, Any] = field(default_factory=dict)
    pruning: Mapping[str, Any] = field(default_factory=dict)
    measured_on: Mapping[str, Any] = field(default_factory=dict)
    joint: str = PRODUCT
    prefixes: Mapping[str, Any] = field(default_factory=dict)

    def save(self, folder: str | Path) -> None:
        """Write `calibration.json` into the folder of the heads; whoever looks sees the old file or the new one.

        Raises:
            HeadsError: the folder cannot be written to.
        """
        path = Path(folder) / CALIBRATION_FILE
        with explained(f"cannot write {path}", HeadsError, "give another place"):
            write_whole(path, json.dumps(self.document(), indent=1, allow_nan=False) + "\n")

    def document(self) -> dict[str, Any]:
        """What the file holds, as JSON values."""
        return {"format": FORMAT, "version": VERSION, **asdict(self)}


def read_calibration(folder: Path) -> Calibration | None:
    """The calibration in a folder of heads; None if there is none.

    Raises:
        HeadsError: the file is damaged, or of another version.
    """
    path = folder / CALIBRATION_FILE
    if not path.exists():
        return None
    again = "Remove the file, and run `ladon calibrate` again"
    document = read_versioned(path, FORMAT, VERSION, again)
    try:
        found = Calibration(**document)
    except TypeError as error:
        raise HeadsError(f"{path} has missing or unknown fields ({error}). {again}") from error
    temperatures, rates = found.temperatures, found.hit_rates
    if not isinstance(temperatures, list) or not all(map(_is_temperature, temperatures)):
        raise HeadsError(f"{path}: temperatures are {temperatures!r}, expected a number above 0 per head. {again}")
    if not isinstance(rates, list) or len(rates) != len(temperatures):
        raise HeadsError(f"{path} has hit rates and temperatures of different numbers of heads. {again}")
    for name in ("hit_rates", "marginal_hit_rates"):
        if not all(isinstance(row, list) and all(map(_is_share, row)) for row in getattr(found, name)):
            raise HeadsError(f"{path}: {name} must hold shares from 0 to 1 for each head. {again}")
    wrong = [name for name, kind in _KINDS.items() if not isinstance(getattr(found, name), kind)]
    if not wrong and found.joint not in JOINTS[1:]:
        wrong = ["joint"]
    if not wrong and not _is_pruning(found.pruning):
        wrong = ["pruning"]
    if wrong:
        raise HeadsError(f"{path}: {', '.join(wrong)} cannot be read. {again}")
    return found


_KINDS = {
    "heads": str,
    **dict.fromkeys(("error", "fixed_trees", "step_times", "pruning", "measured_on", "prefixes"), dict),
    "simulated": list,
}


def _is_pruning(pruning: Mapping[str, Any]) -> bool:
    """Whether it is nothing, or says where it was measured and what is best, if anything."""
    best, place = pruning.get("best"), pruning.get("place", {})
    if not isinstance(place, dict) or not (best is None or isinstance(best, dict)):
        return False
    if best is None:
        return True
    counts, kinds = [best.get(name) for name in ("layer", "keep", "top_k")], {"criterion": str, "trained": bool}
    return (
        all(type(count) is int and count >= 1 for count in counts)
        and all(isinstance(best.get(name), kind) for name, kind in kinds.items())
        and _is_temperature(best.get("weight"))
    )


def _is_share(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def _is_temperature(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
