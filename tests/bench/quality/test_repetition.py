"""Repetition: repeated 8-grams, and what is accepted where nothing repeats."""

from __future__ import annotations

import math

import pytest

from ladon.bench.quality.repetition import Repetition, repeated_tokens


def test_repeated_tokens_end_an_8_gram_seen_before() -> None:
    once = list(range(8))
    assert repeated_tokens(once + once) == [False] * 15 + [True]
    assert repeated_tokens([7] * 10) == [False] * 8 + [True, True]
    assert repeated_tokens(list(range(30))) == [False] * 30
    assert repeated_tokens([]) == []


def test_acceptance_where_nothing_repeats() -> None:
    counts = Repetition()
    counts.add([0, *[7] * 10], [2, 2, 4, 2])  # the 8-gram of sevens ends at 8 first, and again at 9 and 10
    assert (counts.steps, counts.tokens) == (3, 8)
    assert counts.acceptance_length == pytest.approx(8 / 3)
    assert counts.share == pytest.approx(2 / 4)
    counts.add([1, 2, 3], [1, 1])  # too short for an 8-gram
    assert (counts.ngrams, counts.steps, counts.tokens) == (4, 5, 10)
    assert math.isnan(Repetition().share) and math.isnan(Repetition().acceptance_length)
