"""What an engine's step did: for callers and observers, and between the step's own parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from ladon.engine.sequence import Row
from ladon.sampling.acceptance import Accepted
from ladon.target.verify_output import VerifyOutput
from ladon.trees.token_tree import TokenTree


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """What one step did.

    Attributes:
        rows: the sequences it served: first those that it decoded, then those whose prompts it has read to the end.
            None in a step that has only read on in prompts.
        emitted: the tokens each took, in order: accepted drafts, then the bonus token unless the sequence ended before;
            for a prompt read to its end, the first token. None for a sequence that was cancelled meanwhile.
        tree: the verified trees of the sequences decoded, on the device; None if there was none.
        accepted: the accepted paths, on the device; None likewise.
        counts: of each sequence decoded, the nodes on its accepted path, root included.
        num_dropped: node slots per sequence that were verified in part only, beside those of `tree`.
        num_grown: slots of the trees drafted for the next step; 1 if none were.
        admitted: the sequences that have joined.
        read: sequences whose prompts were read on, each with the number of tokens.
    """

    rows: list[Row] = field(default_factory=list)
    emitted: list[list[int]] = field(default_factory=list)
    tree: TokenTree | None = None
    accepted: Accepted | None = None
    counts: Sequence[int] = ()
    num_dropped: int = 0
    num_grown: int = 1
    admitted: Sequence[Row] = ()
    read: Sequence[tuple[Row, int]] = ()

    @property
    def joined(self) -> list[Row]:
        """The sequences whose prompts it has read to the end."""
        return self.rows if self.tree is None else self.rows[self.tree.batch_size :]


class Admission(NamedTuple):
    """Who has joined in a step, and how far prompts were read.

    Attributes:
        admitted: the sequences that have joined.
        read: sequences whose prompts were read on, each with the number of tokens.
        outcome: what is said after those that are read to their end; None if there is none.
    """

    admitted: list[Row]
    read: list[tuple[Row, int]]
    outcome: Outcome | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What a step's forward says of b sequences, on the device: where they go on from, and what the host must know.

    Attributes:
        places: the sequences.
        hidden: hidden state of the last token kept, [b, H].
        root: the token sampled last, [b].
        table: of each sequence, the number of its new tokens, then these, [b, 1 + A]; the rest is meaningless.
        kept: logits and scores from which the new tokens were sampled, [b, A, V] each, if a sequence keeps such.
        verified: what the target said of the trees; None for prompts.
        accepted: the accepted paths likewise.
    """

    places: list[int]
    hidden: Tensor
    root: Tensor
    table: Tensor
    kept: Mapping[str, Tensor] = field(default_factory=dict)
    verified: VerifyOutput | None = None
    accepted: Accepted | None = None
