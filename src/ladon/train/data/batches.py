"""Documents packed into rows, and batches of these: which tokens each head learns, and where.

Head k (from 1) reading position t of a document learns token t + k + 1, and only if that token and the next one,
t + 1, are of the document and learned: in decoding the next token is the root, which the model itself has said.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ladon.train.data.rows import Document

NO_PLACE = -1


def packed(sizes: Sequence[int], length: int) -> list[list[int]]:
    """Rows of documents: the longest first, each into the fullest row that has room (best fit).

    Args:
        sizes: tokens of each document, at most `length`.
        length: tokens of a row.

    Returns:
        Indices into `sizes`, each once.
    """
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(length + 1)]  # rows by the tokens that are free in them
    rooms = 0  # bit n is set while there is a row with n free tokens
    for place in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        size = sizes[place]
        fitting = rooms >> size
        if fitting:
            free = size + (fitting & -fitting).bit_length() - 1
            row = with_room[free].pop()
            if not with_room[free]:
                rooms &= ~(1 << free)
        else:
            free, row = length, len(rows)
            rows.append([])
        rows[row].append(place)
        with_room[free - size].append(row)
        rooms |= 1 << (free - size)
    return rows


def rows_of(sizes: Sequence[int], length: int) -> list[list[int]]:
    """Packed rows of `length` tokens, or a row for each document if it is 0."""
    return packed(sizes, length) if length else [[i] for i in range(len(sizes))]


class RowOrder(Dataset[list[Document]]):
    """The rows of a whole training run, in order: every epoch is a new permutation, drawn from seed and epoch.

    As one sequence, the position in the data is a number, and a resumed run needs to know nothing else.

    Args:
        documents: what the rows hold.
        rows: indices into `documents`.
        count: rows in the whole run, over all epochs.
        seed: of the permutations.
    """

    def __init__(self, documents: Sequence[Document], rows: Sequence[Sequence[int]], count: int, seed: int) -> None:
        self._documents, self._rows, self._count, self._seed = documents, rows, count, seed
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        """Rows in the whole run."""
        return self._count

    def __getitem__(self, place: int) -> list[Document]:
        """The documents of a row."""
        epoch, rest = divmod(place, len(self._rows))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng((self._seed, epoch)).permutation(len(self._rows))
        return [self._documents[i] for i in self._rows[self._order[rest]]]


class Collator:
    """Makes a batch of rows of documents.

    The batch holds `input_ids` and `position_ids` [B, T]; `rows` [R], the places of the flattened batch at which a
    head learns something, and for these `labels`, `mask` and `following` [R, K] (mask: what is learned; labels: places
    in the heads' vocabulary); `next_rows` and `next_labels` [N], where the next token is learned, and it.
    Rows are filled up with token 0 at the end, where nothing sees it.

    Args:
        num_heads: K.
        token_ids: [D], the heads' own vocabulary, or None; a token outside of it is not learned.
        vocab_size: V.
    """

    def __init__(self, num_heads: int, vocab_size: int, token_ids: Tensor | None = None) -> None:
        self._num_heads = num_heads
        self._places: Tensor | None = None
        if token_ids is not None:
            self._places = torch.full((vocab_size,), NO_PLACE, device="cpu")
            self._places[token_ids.cpu()] = torch.arange(len(token_ids), device="cpu")

    def __call__(self, rows: Sequence[Sequence[Document]]) -> dict[str, Tensor]:
        """The batch of these rows."""
        length = max(sum(len(document.tokens) for document in row) for row in rows)
        ids = torch.zeros(len(rows), length, dtype=torch.int64, device="cpu")
        positions, segments = torch.zeros_like(ids), torch.full_like(ids, NO_PLACE)
        learned = torch.zeros_like(ids, dtype=torch.bool)
        for i, row in enumerate(rows):
            start = 0
            for number, document in enumerate(row):
                stop = start + len(document.tokens)
                ids[i, start:stop] = torch.from_numpy(document.tokens)
                learned[i, start:stop] = torch.from_numpy(document.learned)
                positions[i, start:stop] = torch.arange(stop - start, device="cpu")
                segments[i, start:stop] = number
                start = stop
            # a document of its own, as far as the model sees
            positions[i, start:] = torch.arange(length - start, device="cpu")
        return self._with_goals(ids, positions, segments, learned)

    def _with_goals(self, ids: Tensor, positions: Tensor, segments: Tensor, learned: Tensor) -> dict[str, Tensor]:
        later_ids = shifted(ids, self._num_heads + 1, 0)  # [B, T, K + 1]
        same = shifted(segments, self._num_heads + 1, NO_PLACE) == segments[..., None]
        goal = same & shifted(learned, self._num_heads + 1, False) & (segments != NO_PLACE)[..., None]
        mask, labels = goal[..., :1] & goal[..., 1:], later_ids[..., 1:]
        if self._places is not None:
            labels = self._places[labels]
            mask = mask & (labels != NO_PLACE)
        mask, labels = mask.flatten(0, 1), labels.flatten(0, 1)
        rows = mask.any(-1).nonzero()[:, 0]
        next_rows = goal[..., 0].flatten().nonzero()[:, 0]
        return {
            "input_ids": ids,
            "position_ids": positions,
            "rows": rows,
            "labels": labels[rows].masked_fill(~mask[rows], 0),
            "mask": mask[rows],
            "following": later_ids[..., :-1].flatten(0, 1)[rows],
            "next_rows": next_rows,
            "next_labels": later_ids[..., 0].flatten()[next_rows],
        }


def shifted(values: Tensor, count: int, fill: float) -> Tensor:
    """For each place t of values [B, T] those at t + 1 to t + `count`, [B, T, count]; `fill` where there is none."""
    length = values.shape[1]
    longer = torch.nn.functional.pad(values, (0, count), value=fill)
    return torch.stack([longer[:, k : k + length] for k in range(1, count + 1)], dim=-1)


def batches_of(documents: Sequence[Document], length: int, collator: Collator, size: int) -> list[dict[str, Tensor]]:
    """Batches of `size` rows of documents, packed to `length` tokens, or not if it is 0."""
    rows = rows_of([len(document.tokens) for document in documents], length)
    groups = [rows[start : start + size] for start in range(0, len(rows), size)]
    return [collator([[documents[i] for i in row] for row in part]) for part in groups]
