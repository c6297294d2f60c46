"""n-grams of one row: what is found, how probable it is, and what is learnt from what comes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ladon.drafting.ngram_index import MOST_GUESSED, Draft, Rates, TokenIndex, draft
from ladon.trees.check import check_tree
from ladon.trees.token_tree import TokenTree

texts = st.lists(st.integers(0, 3), max_size=60)  # few tokens, so that much occurs again


def occurrences_of(text: list[int]) -> list[tuple[int, int]]:
    """By looking at every place: where the last two tokens stood before, and how many more match there."""
    found = []
    for end in range(len(text) - 1, 1, -1):
        length = 0
        while length < min(end, 32) and text[end - length - 1] == text[len(text) - length - 1]:
            length += 1
        if length >= 2:
            found.append((end, length))
    return sorted(found[:16], key=lambda place: -place[1])[:8]


@settings(deadline=None)
@given(text=texts, cut=st.integers(0, 60))
def test_an_index_finds_what_looking_everywhere_finds(text, cut):
    index = TokenIndex(text[:cut])
    index.extend(text[cut:])
    assert index.tokens == text
    assert [tuple(place) for place in index.occurrences()] == occurrences_of(text)


@settings(deadline=None)
@given(text=texts, num_nodes=st.integers(2, 20), lessons=st.lists(st.integers(0, 3), max_size=30), chain=st.booleans())
def test_a_draft_is_a_tree_of_probabilities(text, num_nodes, lessons, chain):
    rates, index = Rates(), TokenIndex(text)
    for token in lessons:  # rates of every kind, not only the measured ones
        found = draft(index, rates, num_nodes, is_chain=chain)
        if found is not None:
            found.teach(rates, [token])
        index.extend([token])
    found = draft(index, rates, num_nodes, is_chain=chain)
    assert (found is None) == (not occurrences_of([*text, *lessons]))
    if found is None:
        return
    assert 1 <= len(found) <= num_nodes and found.tokens[0] == index.tokens[-1]
    rows = [torch.tensor([values]) for values in (found.tokens, found.parents, found.log_probs)]
    check_tree(TokenTree(tokens=rows[0], parents=rows[1], log_probs=rows[2], max_depth=max(found.depths)))
    assert found.log_probs == sorted(found.log_probs, reverse=True)
    for node in range(len(found)):
        children = [child for child, parent in enumerate(found.parents) if parent == node]
        assert len({found.tokens[child] for child in children}) == len(children) <= (1 if chain else 9)
        together = sum(math.exp(found.log_probs[child]) for child in children)
        assert together <= math.exp(found.log_probs[node]) * (1 + 1e-9)
        assert 0.0 <= found.heads_shares[node] <= 1.0


def path(found: Draft) -> list[int]:
    """Tokens of the likeliest child, its likeliest child, and so on."""
    node, tokens = 0, []
    while node in found.parents:
        node = found.parents.index(node)
        tokens.append(found.tokens[node])
    return tokens


def test_a_text_that_was_written_once_is_guessed_again():
    code = [5, 6, 7, 8, 9, 10, 11, 12]
    found = draft(TokenIndex([*code, 1, 2, 5, 6]), Rates(), 48)
    assert found is not None
    assert path(found)[:6] == [7, 8, 9, 10, 11, 12]


def test_a_loop_is_guessed_beyond_its_end():
    found = draft(TokenIndex([5, 6, 7] * 6), Rates(), 48)
    assert found is not None
    assert path(found) == ([5, 6, 7] * MOST_GUESSED)[:MOST_GUESSED]


def test_the_longer_match_comes_first():
    """After 1 2 came 3, and after 2 and another token 4: the first knows more, however long ago."""
    found = draft(TokenIndex([9, 1, 2, 3, 8, 1, 2, 4, 9, 1, 2]), Rates(), 48)
    assert found is not None
    assert [found.tokens[node] for node, parent in enumerate(found.parents) if parent == 0] == [3, 4]


def test_nothing_is_guessed_where_nothing_occurs_again():
    for text in ([], [4], [4, 4], [1, 2, 3, 4]):
        assert draft(TokenIndex(text), Rates(), 48) is None


def test_longer_matches_are_surer():
    log_probs = []
    for length in (2, 4, 8, 20):
        copied = list(range(10, 10 + length))
        found = draft(TokenIndex([*copied, 1, 2, *copied]), Rates(), 2)
        assert found is not None
        log_probs.append(found.log_probs[1])
    assert log_probs == sorted(log_probs) and len(set(log_probs)) == 4


def test_rates_follow_what_comes():
    """A text in which no guess is right ends up with low rates, one in which all are with high ones."""
    wrong, right = Rates(), Rates()
    index = TokenIndex([5, 6, 7, 8, 5, 6])
    before = draft(index, wrong, 2).log_probs[1]
    for _ in range(60):
        draft(index, wrong, 2).teach(wrong, [9])
        draft(index, right, 2).teach(right, [7])
    assert math.exp(draft(index, wrong, 2).log_probs[1]) < 0.2
    assert math.exp(draft(index, right, 2).log_probs[1]) > 0.8 > math.exp(before)


@pytest.mark.parametrize("token", [7, 9])
def test_rates_of_a_long_loop_stay_within_bounds(token):
    """Guesses that are right, or wrong, thousands of times in a row: what was measured once is all but forgotten."""
    rates, index = Rates(), TokenIndex([5, 6, 7, 8, 5, 6])
    found = draft(index, rates, 2)
    for _ in range(40000):
        found.teach(rates, [token])
    again = draft(index, rates, 2)
    assert len(again) == (2 if token == 7 else 1)  # hopeless guesses are not made
    assert token == 9 or 0.99 < math.exp(again.log_probs[1]) < 1.0
    for _ in range(10):
        again.teach(rates, [7])
    assert len(draft(index, rates, 2)) == 2  # but they may come to be right again


def test_a_guess_that_was_not_put_to_the_test_teaches_nothing():
    """The second child counts only where the first was wrong, and what comes after a wrong one not at all."""
    rates, index = Rates(), TokenIndex([9, 1, 2, 3, 8, 1, 2, 4, 9, 1, 2])
    found = draft(index, rates, 48)
    before = sum(rates._right), sum(rates._weight)
    found.teach(rates, [3])
    assert sum(rates._weight) == pytest.approx(before[1] + 1)
    found.teach(rates, [4])
    assert sum(rates._weight) == pytest.approx(before[1] + 3)
    found.teach(rates, [7, 8, 9])
    assert sum(rates._weight) == pytest.approx(before[1] + 5)
    assert sum(rates._right) == pytest.approx(before[0] + 2)
