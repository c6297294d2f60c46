"""What a row's law is asked with, and what it answers: protocols and records only.

Shapes: b rows, N nodes, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ladon.constraints import Guide
from ladon.tree import TokenTree, node_depths

NO_TOKEN = -1  # the pick where a law is none, as that of NaN logits: equal to no node's token
DEAD_END = -2  # the pick where a law leaves nothing of what a row's constraint allows


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


class Picker(Protocol):
    """The law of a row."""

    @property
    def draws(self) -> bool:
        """Whether it needs noise, and so the rows' seeds."""

    @property
    def reads(self) -> bool:
        """Whether it needs the rows' token ids."""

    @property
    def is_plain(self) -> bool:
        """Whether it must be asked once per emitted token, in order: then nothing is drafted."""

    def law(self, logits: Tensor, context: Context, nodes: Nodes) -> Tensor:
        """Scores after each node, [b, N, V], from the logits there.

        The greatest is said, or a token drawn from their softmax.
        """


class Sequenced(Protocol):
    """What a law may depend on besides the logits: a row, as far as it is written."""

    prompt: Tensor
    padded: Tensor | None
    number: int
    seed: int
    tokens: list[int]
    picker: Picker
    guide: Guide | None
    keeps: frozenset[str]
