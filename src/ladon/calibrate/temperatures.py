"""One temperature per depth, fitted so that the heads' probabilities are truthful; and how truthful they are.

The calibration error of a depth is an expected calibration error, over the candidates whose parent was accepted:

- Positions: all answer positions at which the true token of every shallower depth is among the candidates, so that the
  parent of this depth's candidates is on the true path.
- Each of them contributes its candidates ("all"), or its best one ("top"): predicted probability p under the full
  softmax, outcome 1 if the candidate is what the model says there, else 0.
- A candidate counts with the weight p. Most candidates have next to no probability, no tree ever holds them, and
  without weights they alone would make the error small.
- Candidates are sorted by p and cut into `BINS` bins of equal weight, equal p (to 1 part in 16,384) never apart. The
  error is the sum over the bins of |weighted sum of p - weighted sum of the outcomes| / the weight of all: 0 to 1.

Finite samples have an error even if every probability is right: about 0.01 for "top" with 7,000 positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ladon.calibrate.lattice_trace import GRID, LatticeTrace, on_true_path

BINS = 10
_CELLS = 1 << 14  # probabilities are sorted to this resolution
_COARSE = [2.0 ** (eighth / 8) for eighth in range(-16, 17)]
_FINE = [2.0 ** (step / 64) for step in range(-7, 8)]


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationError:
    """The calibration error of one depth, 0 to 1; NaN where no position counts.

    Attributes:
        top: over the best candidate of each position.
        all: over all candidates.
        positions: how many positions there are.
    """

    top: float
    all: float
    positions: int


def calibration_errors(trace: LatticeTrace, temperatures: Sequence[float] | None = None) -> list[CalibrationError]:
    """The calibration error of every depth, the heads' logits divided by the temperatures (None leaves them)."""
    depths = range(1, trace.num_heads + 1)
    return [_Depth(trace, k).error(1.0 if temperatures is None else temperatures[k - 1]) for k in depths]


def fit_temperatures(trace: LatticeTrace) -> list[float]:
    """The temperature of each depth, [K], that makes "top" and "all" together least; 1.0 where nothing is known.

    The search is over 1/4 to 4, in steps of an eighth of an octave and then of 1/64 around the best. The negative
    log-likelihood of the truth would be the usual criterion; on the bundled model it left twice the error at the last
    depth, where heads are often sure of the wrong token.
    """
    return [_fitted(_Depth(trace, k)) for k in range(1, trace.num_heads + 1)]


def expected_calibration_error(probabilities: Tensor, outcomes: Tensor) -> float:
    """The error of this module's docstring for predictions [n] and outcomes [n] bool; NaN without any prediction."""
    probabilities = probabilities.double()
    cells = (probabilities * _CELLS).long().clamp(max=_CELLS - 1)
    weights = torch.bincount(cells, probabilities, _CELLS).cumsum(0)
    if not weights[-1] > 0:
        return float("nan")
    gaps = torch.bincount(cells, probabilities * (probabilities - outcomes.double()), _CELLS).cumsum(0)
    last_cells = torch.searchsorted(weights, weights[-1] * torch.arange(1, BINS, device="cpu") / BINS)
    ends = torch.cat([gaps.new_zeros(1), gaps[last_cells], gaps[-1:]])
    return float(ends.diff().abs().sum() / weights[-1])


class _Depth:
    """The positions of one depth that count."""

    def __init__(self, trace: LatticeTrace, depth: int) -> None:
        ranks = trace.ranks()
        self._trace, self._depth = trace, depth
        self._counts = on_true_path(ranks, trace.num_candidates)[:, depth - 1]
        self._right = ranks[self._counts, depth - 1, None] == torch.arange(trace.num_candidates, device="cpu")

    @property
    def positions(self) -> int:
        return len(self._right)

    def error(self, temperature: float) -> CalibrationError:
        probabilities = self._trace.log_probs(self._depth, temperature)[self._counts].exp()
        top = expected_calibration_error(probabilities[:, 0], self._right[:, 0])
        everything = expected_calibration_error(probabilities.flatten(), self._right.flatten())
        return CalibrationError(top=top, all=everything, positions=self.positions)


def _fitted(depth: _Depth) -> float:
    if depth.positions == 0:
        return 1.0

    def cost(temperature: float) -> float:
        found = depth.error(temperature)
        return found.top + found.all

    coarse = _least(cost, _COARSE)
    return round(_least(cost, [coarse * factor for factor in _FINE if GRID[0] <= coarse * factor <= GRID[-1]]), 4)


def _least(cost: Callable[[float], float], temperatures: Sequence[float]) -> float:
    """The temperature of least cost; 1 or the one nearest to it where several have it, as untrained heads do."""
    return min(temperatures, key=lambda temperature: (cost(temperature), abs(temperature - 1.0)))
