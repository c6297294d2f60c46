"""Sampling parameters: how the tokens of a sequence are drawn from the logits, greedily or sampled.

Shapes: b sequences, N nodes, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from ladon.constraints.state import GrammarState
from ladon.errors import InputError
from ladon.trees.token_tree import TokenTree, node_depths

NO_TOKEN = -1  # sampled where there is nothing to sample from, as with NaN logits: equal to no node's token


DEAD_END = -2  # sampled where nothing is left of what a constraint allows


@dataclass(frozen=True, kw_only=True, slots=True)
class Context:
    """What is known of a step's rows before its forward.

    Attributes:
        rows: the rows, b of them.
        seeds: of their noise, [b] int64; None if nothing is drawn.
        first: the position, among a row's real tokens, of the token after its root, [b] int64; None likewise.
        prefixes: each row's token ids up to its root, [T], padding of the prompt included; None if nobody reads them.
    """

    rows: Sequence[Sequenced]
    seeds: Tensor | None = None
    first: Tensor | None = None
    prefixes: list[Tensor] | None = None

    def of_node(self, place: int, said: Sequence[int]) -> Context:
        """What is known of one row, if it goes on from its root with these tokens."""
        prefixes = None
        if self.prefixes is not None:
            prefix = self.prefixes[place]
            prefixes = [torch.cat([prefix, torch.tensor(said, dtype=prefix.dtype, device=prefix.device)])]
        return Context(
            rows=[self.rows[place]],
            seeds=None if self.seeds is None else self.seeds[place, None],
            first=None if self.first is None else self.first[place, None] + len(said),
            prefixes=prefixes,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Nodes:
    """The trees of a step's rows, as they were verified.

    Attributes:
        tree: the trees, [b, N].
        ancestors: who sees whom, [b, N, N] bool.
    """

    tree: TokenTree
    ancestors: Tensor

    @property
    def depths(self) -> Tensor:
        """Of the nodes, [b, N]."""
        return node_depths(self.ancestors)


class SamplingParams(Protocol):
    """How tokens of a sequence are sampled: from logits to scores, and whether these are drawn from."""

    @property
    def draws(self) -> bool:
        """Whether it needs noise, and so the rows' seeds."""

    @property
    def reads(self) -> bool:
        """Whether it needs the rows' token ids."""

    @property
    def is_plain(self) -> bool:
        """Whether it must be asked once per emitted token, in order: then nothing is drafted."""

    @property
    def asks(self) -> bool:
        """Whether it asks callbacks of the user's about prefixes: then only about those that are said."""

    def scores(self, logits: Tensor, context: Context, nodes: Nodes) -> Tensor:
        """Scores after each node, [b, N, V], from the logits there.

        The greatest is said, or a token drawn from their softmax.
        """


class Sequenced(Protocol):
    """What scores may depend on besides the logits: a sequence, as far as it is written."""

    prompt: Tensor
    padded: Tensor | None
    number: int
    seed: int
    tokens: list[int]
    sampling_params: SamplingParams
    grammar: GrammarState | None
    keeps: frozenset[str]
    end_ids: frozenset[int]
    failure: Exception | None


class Greedy:
    """Greedy decoding: the likeliest token."""

    draws = reads = is_plain = asks = False

    def scores(self, logits: Tensor, context: Context, nodes: Nodes) -> Tensor:
        """The logits, in float32 as `generate` compares them; see `ladon.sampling.sampling_params.SamplingParams`."""
        return logits.float()


GREEDY = Greedy()


@dataclass(frozen=True, kw_only=True, slots=True)
class TemperatureSampling:
    """Tokens drawn from the target's distribution, as `generate` makes it: temperature, then top_k, then top_p.

    Attributes:
        temperature: the logits are divided by it; above 0.
        top_k: only the likeliest so many tokens, and those that tie with the last of them; 0 for no bound.
        top_p: only the likeliest tokens whose predecessors together have a probability below it; 1 for no bound.
    """

    draws: ClassVar[bool] = True
    reads: ClassVar[bool] = False
    is_plain: ClassVar[bool] = False
    asks: ClassVar[bool] = False

    temperature: float
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        """Raise `InputError` for settings that define no distribution."""
        check_settings(self.temperature, self.top_k, self.top_p)
        if self.temperature == 0:
            raise InputError("temperature is 0, which is greedy decoding; give no sampler for it")

    def scores(self, logits: Tensor, context: Context | None = None, nodes: Nodes | None = None) -> Tensor:
        """What is left of logits [..., V]; see `ladon.sampling.sampling_params.SamplingParams`."""
        work = torch.float64 if logits.dtype == torch.float64 else torch.float32
        return _cut(logits.to(work) / self.temperature, self.top_k, self.top_p)


def check_settings(temperature: float, top_k: int, top_p: float) -> None:
    """Raise `InputError` unless they are a temperature of 0 (greedy) or more, a count and a probability above 0."""
    if not 0 <= temperature < math.inf:
        raise InputError(f"temperature is {temperature}; give 0 for greedy decoding, or a number above it")
    if top_k < 0:
        raise InputError(f"top_k is {top_k}; give a number of tokens, or 0 for no bound")
    if not 0 < top_p <= 1:
        raise InputError(f"top_p is {top_p}; give a probability above 0, or 1 for no bound")


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
