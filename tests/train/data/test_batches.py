"""Which token each head learns at each position, documents that share rows, and rows that are refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ladon.errors import InputError
from ladon.train.data.batches import Collator, RowOrder, packed
from ladon.train.data.rows import Document, Example, documents_from

HEADS = 4


def document(tokens: list[int], learned: list[bool] | None = None, name: str = "d") -> Document:
    mask = [True] * len(tokens) if learned is None else learned
    return Document(name, np.asarray(tokens, dtype=np.int32), np.asarray(mask))


def goals(rows: list[list[Document]], num_heads: int = HEADS) -> dict[tuple[int, int], int]:
    """(flat position, head from 1) -> the token to learn, from a batch."""
    batch = Collator(num_heads, vocab_size=1000)(rows)
    return {
        (int(position), head + 1): int(batch["labels"][i, head])
        for i, position in enumerate(batch["rows"])
        for head in range(num_heads)
        if batch["mask"][i, head]
    }


def test_head_k_learns_the_token_k_plus_1_after_the_one_it_reads() -> None:
    """On 100, 101, 102, ... the right answer is the position's own token + k + 1: a shift by one would show."""
    tokens = list(range(100, 110))
    found = goals([[document(tokens)]])
    for (position, head), label in found.items():
        assert label == tokens[position] + head + 1
    assert set(found) == {(t, k) for t in range(10) for k in range(1, HEADS + 1) if t + k + 1 < 10}


def test_the_next_token_and_those_that_follow() -> None:
    batch = Collator(3, vocab_size=1000)([[document(list(range(100, 106)))]])
    assert batch["next_rows"].tolist() == [0, 1, 2, 3, 4]
    assert batch["next_labels"].tolist() == [101, 102, 103, 104, 105]
    assert batch["following"][1].tolist() == [102, 103, 104]  # row 1 reads token 101


def test_a_head_sees_no_other_document_and_no_filling() -> None:
    first, second = document([10, 11, 12, 13]), document([50, 51, 52, 53, 54])
    batch = Collator(HEADS, vocab_size=1000)([[first, second], [document([90, 91, 92])]])
    assert batch["input_ids"].tolist() == [[10, 11, 12, 13, 50, 51, 52, 53, 54], [90, 91, 92, 0, 0, 0, 0, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2, 3, 4], [0, 1, 2, 0, 1, 2, 3, 4, 5]]
    expected = {(0, 1): 12, (1, 1): 13, (0, 2): 13, (4, 1): 52, (5, 1): 53, (6, 1): 54, (4, 2): 53, (5, 2): 54}
    expected |= {(4, 3): 54, (9, 1): 92}
    assert goals([[first, second], [document([90, 91, 92])]]) == expected


@given(st.lists(st.booleans(), min_size=2, max_size=24), st.integers(1, 4))
def test_learned_are_exactly_the_positions_of_the_rule(mask: list[bool], num_heads: int) -> None:
    tokens = list(range(100, 100 + len(mask)))
    expected = {
        (t, k): tokens[t + k + 1]
        for t in range(len(mask))
        for k in range(1, num_heads + 1)
        if t + k + 1 < len(mask) and mask[t + 1] and mask[t + k + 1]
    }
    assert goals([[document(tokens, mask)]], num_heads) == expected


def test_a_vocabulary_of_the_heads_own() -> None:
    tokens = [5, 9, 7, 5, 9]
    batch = Collator(2, vocab_size=10, token_ids=torch.tensor([9, 5]))([[document(tokens)]])
    found = {(int(r), k): int(batch["labels"][i, k]) for i, r in enumerate(batch["rows"]) for k in (0, 1)}
    learned = {(int(r), k) for i, r in enumerate(batch["rows"]) for k in (0, 1) if batch["mask"][i, k]}
    assert learned == {(1, 0), (2, 0), (0, 1), (1, 1)}  # 7, which head 1 would learn at 0, is none of theirs
    assert {place: found[place] for place in learned} == {(1, 0): 1, (2, 0): 0, (0, 1): 1, (1, 1): 0}


@settings(deadline=None)
@given(st.lists(st.integers(1, 32), min_size=1, max_size=60))
def test_packing_keeps_every_document_once_and_rows_short(sizes: list[int]) -> None:
    rows = packed(sizes, 32)
    assert sorted(i for row in rows for i in row) == list(range(len(sizes)))
    fills = [sum(sizes[i] for i in row) for row in rows]
    assert max(fills) <= 32
    assert sum(fill <= 16 for fill in fills) <= 1  # two half-empty rows would have been one


def test_the_rows_of_a_run_are_permutations_one_after_another() -> None:
    documents = [document([i, i, i], name=str(i)) for i in range(5)]
    order = RowOrder(documents, [[i] for i in range(5)], count=12, seed=3)
    names = [order[i][0].id for i in range(len(order))]
    assert len(names) == 12
    assert sorted(names[:5]) == sorted(names[5:10]) == ["0", "1", "2", "3", "4"]
    assert names[:5] != names[5:10]
    again = RowOrder(documents, [[i] for i in range(5)], count=12, seed=3)
    assert [again[i][0].id for i in (11, 2, 7)] == [names[11], names[2], names[7]]


def test_rows_with_nothing_to_learn_are_dropped_with_the_reason() -> None:
    examples = [
        Example("masked", [1, 2, 3, 4], [False] * 4),
        Example("one", [1, 2, 3, 4], [False, False, False, True]),
        Example("late", list(range(20)), [False] * 12 + [True] * 8),
        Example("good", list(range(20)), [False] * 2 + [True] * 18),
        Example("empty", [], []),
    ]
    documents, notes = documents_from(examples, vocab_size=50, length=10)
    assert [d.id for d in documents] == ["good"]
    assert len(documents[0].tokens) == 10
    assert notes == {
        "dropped: no learned token": 2,
        "dropped: fewer than two learned tokens in a row": 1,
        "dropped: its answer comes after the first 10 tokens": 1,
        "cut to 10 tokens": 1,
    }


def test_data_without_anything_to_learn_is_refused() -> None:
    with pytest.raises(InputError, match="no row; give rows"):
        documents_from([], vocab_size=50, length=10)
    with pytest.raises(InputError, match=r"nothing|anything to learn \(1 dropped: no learned token\)"):
        documents_from([Example("a", [1, 2, 3], [False] * 3)], vocab_size=50, length=10)


@pytest.mark.parametrize("wrong", [50, -1])
def test_a_token_beyond_the_vocabulary_names_its_row(wrong: int) -> None:
    with pytest.raises(InputError, match=rf"row bad has the token id {wrong}.*vocabulary has 50.*tokenizer"):
        documents_from([Example("bad", [1, wrong, 3], [True] * 3)], vocab_size=50, length=10)


def test_prompts_are_learned_where_that_is_asked_for() -> None:
    document = Document("a", np.arange(4, dtype=np.int32), np.array([False, False, True, True]))
    assert document.all_learned().learned.all() and not document.learned.all()
    assert document.all_learned().tokens is document.tokens
