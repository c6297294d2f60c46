"""What `ladon calibrate` found out about heads, as it lies beside them in `calibration.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ladon.errors import HeadsError

CALIBRATION_FILE = "calibration.json"
FORMAT = "ladon-calibration"
VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Measurements of one set of heads on one model. Only the temperatures change what is drafted.

    Attributes:
        heads: hash of the heads' weights that were measured (`Heads.weights_hash`).
        temperatures: one per depth, [K]: head k's logits are divided by it before the softmax.
        hit_rates: [K][ranks]: how often each rank is right, given that the shallower depths' candidates held the truth.
        marginal_hit_rates: [K][ranks]: the same over all positions.
        error: calibration error per depth before and after the temperatures, as `docs/metrics.md` defines it.
        fixed_trees: rank paths of the best fixed tree per number of nodes, root included.
        step_times: seconds of a decode step per number of nodes, with the machine they were measured on.
        measured_on: prompts, positions and settings behind the numbers.
    """

    heads: str
    temperatures: Sequence[float]
    hit_rates: Sequence[Sequence[float]]
    marginal_hit_rates: Sequence[Sequence[float]] = ()
    error: Mapping[str, Any] = field(default_factory=dict)
    fixed_trees: Mapping[str, Sequence[Sequence[int]]] = field(default_factory=dict)
    step_times: Mapping[str, Any] = field(default_factory=dict)
    measured_on: Mapping[str, Any] = field(default_factory=dict)

    def save(self, folder: str | Path) -> None:
        """Write `calibration.json` into the folder of the heads; whoever looks sees the old file or the new one."""
        path = Path(folder) / CALIBRATION_FILE
        partial = path.with_name(f"{path.name}.partial")
        document = {"format": FORMAT, "version": VERSION, **asdict(self)}
        partial.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        partial.replace(path)


def read_calibration(folder: Path) -> Calibration | None:
    """The calibration in a folder of heads; None if there is none.

    Raises:
        HeadsError: the file is damaged, or of another version.
    """
    path = folder / CALIBRATION_FILE
    if not path.exists():
        return None
    again = "Run `ladon calibrate` again, or remove the file"
    try:
        document: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise HeadsError(f"{path} cannot be read ({error}). {again}") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT or document.get("version") != VERSION:
        raise HeadsError(f"{path} is no {FORMAT} file of version {VERSION}. {again}")
    values = {name: value for name, value in document.items() if name not in ("format", "version")}
    try:
        found = Calibration(**values)
    except TypeError as error:
        raise HeadsError(f"{path} has missing or unknown fields ({error}). {again}") from error
    temperatures = found.temperatures
    if not isinstance(temperatures, list) or not all(isinstance(t, int | float) and t > 0 for t in temperatures):
        raise HeadsError(f"{path}: temperatures are {temperatures!r}, expected a number above 0 per head. {again}")
    return found
