"""A record of what decoding did, step by step, for people to look at. Reads whole trees from the device."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass

from ladon.engine.step import Step
from ladon.trees.token_tree import ancestor_mask, node_depths


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


class Trace(Iterator[TraceStep]):
    """The decode steps of a batch's first row, each made when it is asked for; the prefill is done at once.

    Attributes:
        first: the prefill's token, the root of the first tree.
    """

    def __init__(self, steps: Iterator[Step], length: int) -> None:
        """`steps` is a run of the engine, whose first step is the prefill's; `length` is that of the prompt."""
        self.first = next(step for step in steps if step.emitted).emitted[0][0]  # a long prompt takes several steps
        self._steps = _decode_steps(steps, length)

    def __next__(self) -> TraceStep:
        """Decode one step."""
        return next(self._steps)

    def close(self) -> None:
        """Decode no further."""
        self._steps.close()


def _decode_steps(steps: Iterator[Step], length: int) -> Generator[TraceStep]:
    for index, step in enumerate(steps):
        tree, accepted = step.tree, step.accepted
        assert tree is not None and accepted is not None  # only the prefill's step has neither
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
        length += count
