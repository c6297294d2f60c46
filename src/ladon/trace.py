"""A record of what decoding did, step by step, for people to look at. Reads whole trees from the device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ladon.engine import Step
from ladon.tree import ancestor_mask, node_depths


@dataclass(frozen=True, kw_only=True, slots=True)
class TraceStep:
    """A record of one decode step of one sequence, on the host.

    Attributes:
        index: number of the step, from 0.
        length: tokens in the cache before the step; the root stands at this position.
        tokens: token id of each node, root first.
        parents: parent of each node, -1 for the root.
        log_probs: log-probability of the path to each node; -inf for padding.
        depths: depth of each node.
        path: accepted nodes, root first.
        emitted: tokens the step emitted: the accepted drafts, then the bonus token unless the sequence ended before.
        bonus: the target's token after the last accepted node.
    """

    index: int
    length: int
    tokens: list[int]
    parents: list[int]
    log_probs: list[float]
    depths: list[int]
    path: list[int]
    emitted: list[int]
    bonus: int


def record(steps: Iterable[Step], length: int) -> Iterator[TraceStep]:
    """The decode steps of a batch's first row, whose prompt has `length` tokens; the prefill's step is left out."""
    index = 0
    for step in steps:
        if step.tree is None or step.accepted is None:
            continue
        tree, accepted = step.tree, step.accepted
        count = int(accepted.count[0])
        yield TraceStep(
            index=index,
            length=length,
            tokens=tree.tokens[0].tolist(),
            parents=tree.parents[0].tolist(),
            log_probs=tree.log_probs[0].tolist(),
            depths=node_depths(ancestor_mask(tree.parents, tree.max_depth))[0].tolist(),
            path=accepted.path[0, :count].tolist(),
            emitted=step.emitted[0],
            bonus=int(accepted.bonus[0]),
        )
        index, length = index + 1, length + count
