"""Expected tokens: corrections by what was accepted, and typical trees."""

from __future__ import annotations

import random

import pytest

from ladon.tree_size.acceptance_model import AcceptanceModel


def test_the_heads_are_taken_at_their_word_at_first() -> None:
    expectation = AcceptanceModel(3)
    sums = [[0.0, 1.0, 1.4], [0.0, 0.2, 0.8]]
    assert expectation.tokens(sums, 2) == pytest.approx([2.0, 3.2, 4.2])
    assert expectation.typical_tokens(2) == [2.0, 2.0, 2.0]  # nothing was drafted yet


def test_one_rejected_draft_says_little() -> None:
    """A gate that takes one failure for 0 % would switch good heads off."""
    expectation = AcceptanceModel(2)
    expectation.learn_outcome([0.6], [0], 1)
    assert 0.7 < expectation.corrections()[0] < 1.0


@pytest.mark.parametrize(("claimed", "true"), [(0.8, 0.2), (0.3, 0.45), (0.6, 0.6)])
def test_corrections_approach_the_truth(claimed: float, true: float) -> None:
    dice = random.Random(1)
    expectation = AcceptanceModel(2)
    for _ in range(300):
        expectation.learn_outcome([claimed], [int(dice.random() < true)], 1)
    assert expectation.corrections()[0] == pytest.approx(true / claimed, rel=0.25)


def test_what_is_long_past_is_forgotten() -> None:
    expectation = AcceptanceModel(2)
    for _ in range(500):
        expectation.learn_outcome([0.5], [0], 1)
    assert expectation.corrections()[0] < 0.05
    for _ in range(100):
        expectation.learn_outcome([8.0], [8], 16)
    assert expectation.corrections()[0] > 0.95


def test_a_sudden_change_is_noticed() -> None:
    """Another text, on which the same heads are wrong: some twenty steps tell."""
    dice = random.Random(3)
    expectation = AcceptanceModel(2)
    for _ in range(500):
        expectation.learn_outcome([0.7], [int(dice.random() < 0.7)], 1)
    assert expectation.corrections()[0] > 0.85
    for _ in range(25):
        expectation.learn_outcome([0.7], [int(dice.random() < 0.03)], 1)
    assert expectation.corrections()[0] < 0.4


def test_a_depth_that_was_not_verified_keeps_its_correction() -> None:
    expectation = AcceptanceModel(2)
    for _ in range(50):
        expectation.learn_outcome([0.5, 0.4], [0, 0], 1)
    before = expectation.corrections()[1]
    for _ in range(50):
        expectation.learn_outcome([0.5, 0.0], [0, 0], 1)
    assert expectation.corrections()[1] == before


def test_pruned_trees_say_what_pruning_keeps_and_nothing_of_the_heads() -> None:
    dice = random.Random(2)
    expectation = AcceptanceModel(2)
    for _ in range(200):
        expectation.learn_outcome([0.8], [int(dice.random() < 0.4)], 1)
    before = expectation.corrections()
    assert expectation.kept_by_pruning == 1.0
    for _ in range(200):
        expectation.learn_outcome([0.8], [int(dice.random() < 0.3)], 1, pruned=True)
    assert expectation.corrections() == before
    assert expectation.kept_by_pruning == pytest.approx(0.75, abs=0.15)
    assert expectation.rows_verified == 400


def test_edges_that_were_not_grown_keep_what_is_known() -> None:
    expectation = AcceptanceModel(3)
    expectation.learn_trees([[0.0, 0.5, 0.9]], 1, 3)
    expectation.learn_trees([[0.0, 0.3, 0.3]], 1, 2)  # grown to the second edge only
    assert expectation.typical_tokens(10) == pytest.approx([10.0, 14.0, 19.0])


def test_depths_that_trees_do_not_reach_count_as_nothing() -> None:
    """A drafter of the user's may have much to say at one step, and little or nothing at the next."""
    expectation = AcceptanceModel(2)
    expectation.learn_trees([[0.0, 0.8], [0.0, 0.4]], 1, 2)
    expectation.learn_trees([[0.0, 0.8]], 1, 2)
    assert expectation.typical_tokens(1) == pytest.approx([1.0, 1.0 + 0.8 + 0.2])
    for _ in range(200):
        expectation.learn_trees([], 1, 2)
    assert expectation.typical_tokens(1) == pytest.approx([1.0, 1.0], abs=1e-3)
