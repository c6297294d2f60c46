"""Logits -> picks: what the target itself says.

Sampling adds Gumbel noise to the logits and takes the maximum, which draws from their softmax. The noise of a token is
a hash of (row seed, position, token id), not the next number of a generator: plain and tree decoding then say the same
tokens, a row alone or in a batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ladon.errors import InputError
from ladon.pickers import Context, Nodes

_BLOCK = 64  # entries per block; V is a multiple of it in nearly every model
_MANY = 1 << 17  # logits from which two small searches cost less than one large one


def pick(logits: Tensor) -> Tensor:
    """Greedy picks, [...] int64, of logits [..., V]; the first of equal maxima, as `transformers` takes it.

    The float32 copy changes no order and is what `generate` compares; in bfloat16 itself argmax is five times slower
    on a CPU.
    """
    return first_best(logits.float())


def first_best(scores: Tensor) -> Tensor:
    """Place of the first of the greatest scores, [...] int64, of scores [..., V] as they are."""
    in_blocks = scores.device.type == "cpu" and scores.numel() >= _MANY and scores.shape[-1] % _BLOCK == 0
    return _argmax_in_blocks(scores) if in_blocks else scores.argmax(-1)


def _argmax_in_blocks(logits: Tensor) -> Tensor:
    """The same as argmax: first the block with the maximum, then the place in it.

    On a CPU a maximum is vectorised and an argmax is not: this takes 0.4 of its time.
    """
    blocks = logits.reshape(*logits.shape[:-1], -1, _BLOCK)  # [..., V / block, block]
    best = blocks.amax(-1).argmax(-1, keepdim=True)  # [..., 1]
    inside = blocks.gather(-2, best[..., None].expand(*best.shape, _BLOCK)).squeeze(-2).argmax(-1)
    return best.squeeze(-1) * _BLOCK + inside


class Greedy:
    """The law of greedy decoding: the likeliest token."""

    draws = reads = is_plain = False

    def law(self, logits: Tensor, context: Context, nodes: Nodes) -> Tensor:
        """The logits, in float32 as `generate` compares them; see `ladon.pickers.Picker`."""
        return logits.float()


GREEDY = Greedy()


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampler:
    """Picks drawn from the target's distribution, as `generate` makes it: temperature, then top_k, then top_p.

    Attributes:
        temperature: the logits are divided by it; above 0.
        top_k: only the likeliest so many tokens, and those that tie with the last of them; 0 for no bound.
        top_p: only the likeliest tokens whose predecessors together have a probability below it; 1 for no bound.
    """

    draws: ClassVar[bool] = True
    reads: ClassVar[bool] = False
    is_plain: ClassVar[bool] = False

    temperature: float
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        """Raise `InputError` for settings that define no distribution."""
        check_settings(self.temperature, self.top_k, self.top_p)
        if self.temperature == 0:
            raise InputError("temperature is 0, which is greedy decoding; give no sampler for it")

    def law(self, logits: Tensor, context: Context | None = None, nodes: Nodes | None = None) -> Tensor:
        """What is left of logits [..., V]; see `ladon.pickers.Picker`."""
        work = torch.float64 if logits.dtype == torch.float64 else torch.float32
        return _cut(logits.to(work) / self.temperature, self.top_k, self.top_p)


def noisy(scores: Tensor, context: Context, nodes: Nodes) -> Tensor:
    """Scores [b, N, V] with the noise of each node's place and row: the greatest is a draw from their softmax.

    Costs the noise, [b, depths, V]: nodes of one depth share it.
    """
    assert context.seeds is not None and context.first is not None  # whoever draws says so
    positions = context.first[:, None] + torch.arange(nodes.tree.max_depth + 1, device=scores.device)
    noise = gumbel_noise(context.seeds, positions, scores.shape[-1], scores.dtype)
    rows = torch.arange(len(scores), device=scores.device)[:, None]
    places = (rows * noise.shape[1] + nodes.depths).flatten()  # on a CPU, indexing by two tensors takes 6 times as long
    return noise.flatten(0, 1).index_select(0, places).view_as(scores).add_(scores)


def check_settings(temperature: float, top_k: int, top_p: float) -> None:
    """Raise `InputError` unless they are a temperature of 0 (greedy) or more, a count and a probability above 0."""
    if not 0 <= temperature < math.inf:
        raise InputError(f"temperature is {temperature}; give 0 for greedy decoding, or a number above it")
    if top_k < 0:
        raise InputError(f"top_k is {top_k}; give a number of tokens, or 0 for no bound")
    if not 0 < top_p <= 1:
        raise InputError(f"top_p is {top_p}; give a probability above 0, or 1 for no bound")


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
        seed = int(torch.randint(2**53, ()))
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


def _cut(scores: Tensor, top_k: int, top_p: float) -> Tensor:
    """Scores [..., V] with -inf for the tokens that are not sampled from."""
    if 0 < top_k < scores.shape[-1]:
        least = scores.topk(top_k).values[..., -1:]
        scores = scores.masked_fill(scores < least, -torch.inf)
    if top_p < 1:
        ranked, order = scores.sort(stable=True, dim=-1, descending=True)
        probabilities = ranked.softmax(-1)
        beyond = probabilities.cumsum(-1) - probabilities >= top_p
        beyond[..., 0] = False
        scores = scores.masked_fill(beyond.scatter(-1, order, beyond), -torch.inf)
    return scores
