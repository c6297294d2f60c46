"""What an engine's step did: for callers, and between the step's own parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from ladon.engine.sequence import Row
from ladon.sampling.acceptance import Accepted
from ladon.target.verify_output import VerifyOutput
from ladon.trees.token_tree import TokenTree


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """What one step did.

    Attributes:
        rows: the rows it served: first those that it decoded, then those whose prompts it has read to the end. None in
            a step that has only read on in prompts.
        emitted: the tokens each row took, in order: accepted drafts, then the bonus token unless the row ended before;
            for a prompt read to its end, the first token. None for a row that was cancelled meanwhile.
        tree: the verified trees of the rows decoded, on the device; None if there was none.
        accepted: the accepted paths, on the device; None likewise.
    """

    rows: list[Row]
    emitted: list[list[int]]
    tree: TokenTree | None = None
    accepted: Accepted | None = None

    @property
    def joined(self) -> list[Row]:
        """The rows whose prompts it has read to the end."""
        return self.rows if self.tree is None else self.rows[self.tree.batch_size :]


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What a step's forward says of b rows, on the device: where they go on from, and what the host must know.

    Attributes:
        places: the rows.
        hidden: hidden state of the last token kept, [b, H].
        root: the token picked last, [b].
        table: of each row, the number of its new tokens, then these, [b, 1 + A]; the rest is meaningless.
        verified: what the target said of the trees; None for prompts.
        accepted: the accepted paths likewise.
        kept: logits and scores from which the new tokens were picked, [b, A, V] each, if a row keeps such.
    """

    places: list[int]
    hidden: Tensor
    root: Tensor
    table: Tensor
    verified: VerifyOutput | None = None
    accepted: Accepted | None = None
    kept: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def num_pruned(self) -> int:
        """Node slots per row that were given to the target and that it pruned."""
        return 0 if self.verified is None else self.verified.num_pruned
