"""Documents that share rows, if the model keeps them apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ladon.heads.ends import output_projection
from ladon.train.modules import hidden_states
from ladon.util.devices import input_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PROBE = 6  # tokens of each of the probe's documents
_SAME = (
    1e-3  # relative change that a document may show when its neighbour changes; experts that share a batch show some
)
_ALIKE = 0.05  # relative difference to the document alone; half precision shows 0.01


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


@torch.no_grad()
def keeps_apart(model: PreTrainedModel) -> bool:
    """Whether position ids that start anew keep two documents in one row from seeing each other.

    transformers masks packed documents by their position ids, but not for every architecture and attention; a
    recurrent layer cannot. So it is tried: the second document must not change with the first, and be as it is alone.
    """
    was_training = model.training
    model.eval()
    try:
        return _second_is_alone(model)
    except (TypeError, ValueError):  # a forward that takes no position ids
        return False
    finally:
        model.train(was_training)


def _second_is_alone(model: PreTrainedModel) -> bool:
    vocab_size = output_projection(model).vocab_size
    generator = torch.Generator("cpu").manual_seed(0)
    ids = torch.randint(vocab_size, (3, _PROBE), generator=generator, device="cpu").to(input_device(model))
    apart = torch.arange(_PROBE, device=ids.device)[None]
    places = torch.cat([apart, apart], dim=1)

    def second(first: int) -> torch.Tensor:
        row = torch.cat([ids[first], ids[2]])[None]
        return hidden_states(model, {"input_ids": row, "position_ids": places}, packed=True)[0, _PROBE:].cpu().double()

    one, other = second(0), second(1)
    alone = hidden_states(model, {"input_ids": ids[2:], "position_ids": apart}, packed=True)[0].cpu().double()
    changed, differs = (one - other).norm() / one.norm(), (one - alone).norm() / alone.norm()
    return bool(changed < _SAME and differs < _ALIKE)


def rows_of(sizes: Sequence[int], length: int) -> list[list[int]]:
    """Packed rows of `length` tokens, or a row for each document if it is 0."""
    return packed(sizes, length) if length else [[i] for i in range(len(sizes))]
