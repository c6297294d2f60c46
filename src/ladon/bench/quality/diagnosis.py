"""Where tokens are lost in real decoding: is the truth in the lattice, in the tree, in what is accepted?

What is true after a step's root is known when the text has gone on. So lattices and trees are kept until then, on the
host, which takes time: nothing is timed in such a run. Only trees that one lattice makes are judged, not those into
which n-grams are merged.

Shapes: K depths, C candidates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ladon.calibrate.simulate import mean_leaf_mass, reached, true_rows, true_slots
from ladon.calibrate.temperatures import expected_calibration_error
from ladon.decoder.decoder import Decoder
from ladon.drafting.proposer import Proposer, TreeBuilder
from ladon.engine.sequence import Row
from ladon.engine.step import Step
from ladon.trees.lattice import Lattice
from ladon.trees.token_tree import TokenTree
from ladon.util.files import rounded
from ladon.util.observer import Observer
from ladon.util.tensors import with_tensors


@runtime_checkable
class Builds(Protocol):
    """A proposer that makes a lattice and hands it to what builds the tree."""

    build: TreeBuilder


class DiagnosedDecoder(Decoder):
    """A decoder from which one may take what its newest trees were grown from. It decodes as any other.

    With n-grams there is nothing to take: what is merged into the trees comes from no lattice.
    """

    _newest: tuple[Lattice, TokenTree] | None = None

    def take_drafts(self) -> tuple[Lattice, TokenTree] | None:
        """The lattice and the grown trees of the step just taken, one per row of it; None if it grew none."""
        newest, self._newest = self._newest, None
        return newest

    def _proposer(self, observer: Observer) -> Proposer:
        proposer = super()._proposer(observer)
        if isinstance(proposer, Builds) and not self._plan.ngrams:
            proposer.build = self._noting(proposer.build)
        return proposer

    def _noting(self, build: TreeBuilder) -> TreeBuilder:
        def noted(lattice: Lattice, root: Tensor, max_nodes: int) -> TokenTree:
            tree = build(lattice, root, max_nodes)
            self._newest = lattice, tree
            return tree

        return noted


@dataclass(kw_only=True, slots=True)
class _Draft:
    """What one row-step verifies a tree of: its lattice and its grown tree (one row each), and where its root stands.

    `accepted` drafts were accepted of it, perhaps more than the row then took.
    """

    row: Row
    place: int  # of the first token after the root, among the row's new tokens
    lattice: Lattice
    tree: TokenTree
    accepted: int = 0

    @property
    def is_known(self) -> bool:
        """Whether the row's text has gone on for as long as the lattice is deep, or has ended."""
        return self.row.finished or len(self.row.tokens) >= self.place + self.lattice.depth

    def truth(self) -> Tensor:
        """The tokens after the root, [1, K]; -1 past the answer's end."""
        said = self.row.tokens[self.place : self.place + self.lattice.depth]
        return torch.tensor([*said, *[-1] * (self.lattice.depth - len(said))], device="cpu")[None]


class Diagnosis:
    """Row-steps judged by what was said in the end, of as many runs as are followed."""

    def __init__(self) -> None:
        """Nothing has been followed yet."""
        self._waiting: list[_Draft] = []
        self._prefixes: list[tuple[int, ...]] = []  # known, oracle, selected, accepted, top
        self._judged: list[list[tuple[Tensor, Tensor]]] = []  # of each depth: probabilities [C], which one is right
        self._leaves: list[Tensor] = []
        self._undrafted = 0

    def follow(self, decoder: DiagnosedDecoder, rows: Sequence[Row]) -> Iterator[Step]:
        """Decode rows, all together, and judge their steps."""
        drafts: dict[Row, _Draft] = {}
        for step in decoder.decode(rows):
            if step.accepted is not None:
                for row, count in zip(step.rows, step.accepted.count.tolist(), strict=False):  # then those that joined
                    self._note_outcome(drafts.get(row), count - 1)
            drafts = _drafts_of(decoder.take_drafts(), step.rows)
            self._judge_known()
            yield step
        self._judge_known()

    def _note_outcome(self, draft: _Draft | None, accepted: int) -> None:
        if draft is None:
            self._undrafted += 1
        else:
            draft.accepted = accepted
            self._waiting.append(draft)

    def _judge_known(self) -> None:
        for draft in self._waiting:
            if draft.is_known:
                self._judge(draft)
        self._waiting = [draft for draft in self._waiting if not draft.is_known]

    def _judge(self, draft: _Draft) -> None:
        truth = draft.truth()
        rows, slots = true_rows(draft.lattice, truth), true_slots(draft.tree, truth, -1)
        known, selected = int((truth >= 0).sum()), int((slots >= 0).sum())
        accepted = min(draft.accepted, known)
        self._prefixes.append((known, int(rows.oracle), selected, accepted, int(rows.top)))
        self._leaves.append(draft.lattice.leaf_mass())
        self._judged += [[] for _ in range(draft.lattice.depth - len(self._judged))]
        for depth in range(min(accepted + 1, known)):  # the parents of its candidates were accepted
            probabilities = rows.log_probs[0, depth].exp()
            if probabilities[0] > 0:  # else the path has no row here
                self._judged[depth].append((probabilities, rows.right[0, depth]))

    def document(self) -> dict[str, Any]:
        """The means over all row-steps that had a tree, as docs/reference/metrics.md defines them; JSON values."""
        num_depths = len(self._judged)
        names = ("known", "oracle", "selected", "accepted", "top")
        columns = torch.tensor(self._prefixes, dtype=torch.long, device="cpu").reshape(-1, len(names)).T
        return {
            "row_steps": len(self._prefixes),
            "undrafted": self._undrafted,
            **{name: reached(column, num_depths) for name, column in zip(names, columns, strict=True)},
            "leaf_mass": mean_leaf_mass(self._leaves, num_depths),
            "error": {
                "positions": [len(judged) for judged in self._judged],
                "top": [_error([(p[:1], right[:1]) for p, right in judged]) for judged in self._judged],
                "all": [_error(judged) for judged in self._judged],
            },
        }


def _drafts_of(drafted: tuple[Lattice, TokenTree] | None, rows: Sequence[Row]) -> dict[Row, _Draft]:
    """What each row will verify a tree of, on the host."""
    if drafted is None:
        return {}
    lattice, tree = with_tensors(drafted[0], Tensor.cpu), with_tensors(drafted[1], Tensor.cpu)
    lattices = [with_tensors(lattice, itemgetter(slice(place, place + 1))) for place in range(len(rows))]
    return {
        row: _Draft(row=row, place=len(row.tokens), lattice=lattices[place], tree=tree.rows([place]))
        for place, row in enumerate(rows)
    }


def _error(judged: Sequence[tuple[Tensor, Tensor]]) -> float | None:
    if not judged:
        return None
    probabilities, right = (torch.cat(column) for column in zip(*judged, strict=True))
    error: float | None = rounded(expected_calibration_error(probabilities, right))
    return error
