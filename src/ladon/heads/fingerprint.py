"""Which model a set of heads was trained for, recognised from a few of its weights.

Samples are rounded to bfloat16, so a checkpoint published in bfloat16 has the same fingerprint when it is loaded in
float32, and most samples survive a detour over float16. Groups are compared one by one: a quantised model keeps its
embedding readable while its layers are not, and a fine-tuned one often keeps its embedding while its layers moved.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ladon.errors import HeadsError
from ladon.heads.model_parts import input_embedding, is_plain, output_projection

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SAMPLES = 64
MIN_AGREEMENT = 0.875  # float32 -> float16 -> bfloat16 changes about 6 % of the samples; another model nearly all
PLAIN_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """Samples of a model's weights, 4 hexadecimal digits (the bits of a bfloat16) each.

    Attributes:
        embedding: samples of the input embedding; empty when it cannot be read (quantised, or on the meta device).
        projection: samples of the output projection; empty likewise.
        body: samples over all other matrices; empty likewise.
        body_matrices: how many matrices `body` was sampled over.
    """

    embedding: str = ""
    projection: str = ""
    body: str = ""
    body_matrices: int = 0


def fingerprint(model: PreTrainedModel, sample: Callable[[Sequence[Tensor]], str] | None = None) -> Fingerprint:
    """Fingerprint of `model`. Reads at most 192 numbers from the device.

    Args:
        model: the model.
        sample: samples some of its matrices, if they lie elsewhere; `samples_of` by default.
    """
    sample = sample or samples_of
    embedding, projection = input_embedding(model), output_projection(model).weight
    body = [p for p in model.parameters() if p.ndim >= 2 and p is not embedding and p is not projection]
    return Fingerprint(
        embedding=sample([embedding]), projection=sample([projection]), body=sample(body), body_matrices=len(body)
    )


def agreement(saved: Fingerprint, found: Fingerprint) -> dict[str, float | None]:
    """Share of equal samples per group; None where one side could not be read."""
    shares: dict[str, float | None] = {}
    for group in ("embedding", "projection", "body"):
        left, right = getattr(saved, group), getattr(found, group)
        comparable = left and right and (group != "body" or saved.body_matrices == found.body_matrices)
        shares[group] = _share_of_equal(left, right) if comparable else None
    return shares


def differing(shares: Mapping[str, float | None]) -> list[str]:
    """The groups, with their shares, in which fewer samples agree than one and the same model would show."""
    return [f"{group} {share:.0%}" for group, share in shares.items() if share is not None and share < MIN_AGREEMENT]


def check_same_base(name: str, saved: Fingerprint | None, model: PreTrainedModel) -> None:
    """Raise `HeadsError` if `model` is not the one that heads were trained on; warn where that cannot be told.

    Args:
        name: where that one came from, as people know it; "" for nowhere.
        saved: its fingerprint, if one was taken.
        model: the one at hand.
    """
    name = name or "an unnamed model"
    if saved is None:
        _warn("the heads carry no fingerprint of the model they were trained on")
        return
    shares = agreement(saved, fingerprint(model))
    wrong = differing(shares)
    if wrong:
        raise HeadsError(
            f"these heads were trained on {name}, whose weights differ from this model's (samples that agree: "
            f"{', '.join(wrong)}, at least {MIN_AGREEMENT:.0%} expected). Load the heads of this model, or pass "
            "force=True: the text stays exact, fewer guesses are right"
        )
    unread = [group for group, share in shares.items() if share is None]
    if unread:
        _warn(f"the weights of {' and '.join(unread)} cannot be compared with those of {name}")


def _warn(reason: str) -> None:
    warnings.warn(f"cannot verify that these heads belong to this model: {reason}", stacklevel=5)


def _share_of_equal(left: str, right: str) -> float:
    pairs = [(left[i : i + 4], right[i : i + 4]) for i in range(0, 4 * SAMPLES, 4)]
    return sum(a == b for a, b in pairs) / SAMPLES


def places(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Where the samples lie: which of the matrices of these numbers of entries, and the place in it, flattened."""
    matrices = [i * len(sizes) // SAMPLES for i in range(SAMPLES)]
    return [(matrix, i * 2_654_435_761 % sizes[matrix]) for i, matrix in enumerate(matrices)]


def digits(values: Sequence[Tensor]) -> str:
    """Scalars as the digits of a `Fingerprint`."""
    bits = torch.stack([value.to("cpu", torch.bfloat16) for value in values]).view(torch.int16).tolist()
    return "".join(f"{value & 0xFFFF:04x}" for value in bits)


def samples_of(matrices: Sequence[Tensor]) -> str:
    """`SAMPLES` weights spread over the matrices, or "" when any of them cannot be read as plain numbers."""
    readable = all(is_plain(m) and not m.is_meta and m.numel() > 0 for m in matrices)
    if not matrices or not readable:
        return ""
    found = places([m.numel() for m in matrices])
    return digits([matrices[matrix].detach().reshape(-1)[place] for matrix, place in found])
