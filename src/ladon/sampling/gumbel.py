"""Gumbel noise as a function of (seed, position, token), and the seeds of a call's sequences.

Sampling adds the noise to the logits and takes the maximum, which draws from their softmax. The noise of a token is a
hash of its sequence's seed, its position and its id, not the next number of a generator: plain and tree decoding then
say the same tokens, a sequence alone or in a batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ladon.errors import InputError


def mix(seed: int, index: int) -> int:
    """The seed of row `index` under `seed`, from 0 to 2^53 - 1: such numbers survive JSON readers with doubles."""
    mixed = (_finish((seed + _GOLDEN) & _MASK64) + index * _GOLDEN) & _MASK64
    return _finish(mixed) >> 11


def row_seeds(seed: int | Sequence[int] | None, num_rows: int) -> list[int]:
    """The seeds of a call's rows.

    Args:
        seed: an int s, of which row i gets mix(s, i); or one for each row, taken as they are; or None: s is drawn from
            torch's global generator, which `torch.manual_seed` sets.
        num_rows: how many there are.

    Raises:
        InputError: not integers of 0 to 2^63 - 1, or not one for each row.
    """
    if seed is None:
        seed = int(torch.randint(2**53, (), device="cpu"))
    seeds = list(seed) if isinstance(seed, Sequence) else [seed]
    if not all(isinstance(one, int) and not isinstance(one, bool) and 0 <= one < 2**63 for one in seeds):
        raise InputError(f"seed is {seed!r}; give a number from 0 to 2^63 - 1, or one for each row")
    if isinstance(seed, int):
        return [mix(seed, index) for index in range(num_rows)]
    if len(seeds) != num_rows:
        raise InputError(f"there are {len(seeds)} seeds for {num_rows} rows; give one number, or one for each row")
    return seeds


def gumbel_noise(seeds: Tensor, positions: Tensor, vocab_size: int, dtype: torch.dtype) -> Tensor:
    """Independent standard Gumbel numbers, [B, D, V], each a function of (seed, position, token id) alone.

    31 bits of hash make one number: none exceeds 22.2, which one in 4e9 should. 32-bit arithmetic takes a third of the
    time of 64-bit arithmetic on a CPU; two rounds take in the 64 bits of the key, so that the numbers of two positions
    are never shifted copies of each other.

    Args:
        seeds: [B] int64.
        positions: [B, D] int64.
        vocab_size: V.
        dtype: of the numbers.
    """
    key = _finish_tensor(_finish_tensor(seeds[:, None] + _signed(_GOLDEN)) + positions * _signed(_GOLDEN))[..., None]
    tokens = torch.arange(vocab_size, device=seeds.device, dtype=torch.int32) * _signed32(0x9E3779B1)
    bits = tokens + key.to(torch.int32)
    scratch = torch.empty_like(bits)  # new memory at each operation would cost more than the operation
    _mix32(bits, scratch)
    _mix32(bits.add_((key >> 32).to(torch.int32)), scratch)
    # -log(-log(1 - v)): where the noise is great, v is near 0 and keeps all its digits
    minus_v = bits.bitwise_and_(0x7FFFFFFF).to(dtype).add_(0.5).mul_(-(2.0**-31)).clamp_(min=2.0**-24 - 1)
    return minus_v.log1p_().neg_().log_().neg_()


_MASK64 = (1 << 64) - 1


_GOLDEN = 0x9E3779B97F4A7C15


_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def _finish(x: int) -> int:
    """The finalizer of splitmix64 (Steele, Lea, Flood 2014), whose output bits each depend on all input bits."""
    x = ((x ^ (x >> 30)) * _FIRST) & _MASK64
    x = ((x ^ (x >> 27)) * _SECOND) & _MASK64
    return x ^ (x >> 31)


def _finish_tensor(x: Tensor) -> Tensor:
    """The same on int64, whose products wrap and whose shifts fill with the sign, which is masked off."""
    x = (x ^ ((x >> 30) & (_MASK64 >> 30))) * _signed(_FIRST)
    x = (x ^ ((x >> 27) & (_MASK64 >> 27))) * _signed(_SECOND)
    return x ^ ((x >> 31) & (_MASK64 >> 31))


def _mix32(x: Tensor, scratch: Tensor) -> None:
    """A 32-bit finalizer of the same kind, with the constants of Wellons' search (lowbias32); int32, in place."""
    for shift, factor in ((16, 0x7FEB352D), (15, _signed32(0x846CA68B)), (16, 1)):
        torch.bitwise_right_shift(x, shift, out=scratch)
        x.bitwise_xor_(scratch.bitwise_and_((1 << (32 - shift)) - 1))
        if factor != 1:
            x.mul_(factor)


def _signed(x: int) -> int:
    return x - (1 << 64) if x >> 63 else x


def _signed32(x: int) -> int:
    return x - (1 << 32) if x >> 31 else x
