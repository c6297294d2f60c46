"""Hit rates from ranks."""

from __future__ import annotations

import pytest
import torch

from ladon.calibrate.lattice_trace import hit_rates, marginal_hit_rates, on_true_path

C = 4
RANKS = torch.tensor([[0, 0], [0, 1], [2, 0], [C, 0], [1, -1], [0, C]])


def test_hit_rates_count_only_where_the_path_was_right() -> None:
    rates = hit_rates(RANKS, C)
    assert rates[0] == pytest.approx([3 / 6, 1 / 6, 1 / 6, 0.0], abs=1e-5)
    assert rates[1] == pytest.approx([2 / 4, 1 / 4, 0.0, 0.0], abs=1e-5)


def test_marginal_rates_count_every_known_truth() -> None:
    rates = marginal_hit_rates(RANKS, C)
    assert rates[0] == hit_rates(RANKS, C)[0]
    assert rates[1] == pytest.approx([3 / 5, 1 / 5, 0.0, 0.0], abs=1e-5)


def test_the_true_path_ends_where_a_depth_lacks_the_truth_or_the_answer_ends() -> None:
    ranks = torch.tensor([[0, 3, 1], [0, C, 1], [C, 0, 0], [1, 0, -1]])
    assert on_true_path(ranks, C).tolist() == [
        [True, True, True],
        [True, True, False],
        [True, False, False],
        [True, True, False],
    ]


def test_no_position_gives_no_hits() -> None:
    assert hit_rates(torch.empty(0, 2, dtype=torch.long), 3) == [[0.0] * 3] * 2
