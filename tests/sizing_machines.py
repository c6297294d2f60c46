"""A simulated machine for tests of sizing: what steps cost, what heads say and what the target then accepts.

Nothing here reads a clock. Trees are the best paths of a table of rank probabilities per depth, as dynamic growth makes
them; how sure the heads are differs from step to step.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

from ladon.tree_size.policy import PLAIN, PrunedSteps, Sizing, StepRecord

DEPTHS, RANKS, MOST = 4, 8, 128
CostFunction = Callable[[int, float, float, int], float]  # batch, nodes, context, grown -> milliseconds


def linear(batch: int, nodes: float, context: float, grown: int) -> float:
    """A CPU of two cores: time grows from the second token on."""
    rows = batch * nodes**0.9
    return 1.6 + 0.5 * rows + 0.04 * batch * nodes * context / 4096 + drafting(batch, grown)


def float32_cpu(batch: int, nodes: float, context: float, grown: int) -> float:
    """Few rows take a slow kernel: two nodes cost more than four."""
    rows = batch * nodes
    slow = 3.0 if 2 <= rows <= 3 else 0.0
    return 3.6 + 0.22 * rows + slow + 0.1 * batch * context / 1024 + drafting(batch, grown)


def gpu(batch: int, nodes: float, context: float, grown: int) -> float:
    """Flat to a knee, then in stairs of 64 rows."""
    rows = batch * nodes
    stairs = max(0, -(-(rows - 128) // 64))
    return 20.0 + 3.5 * stairs + 0.2 * batch * context / 1024 + 0.3 * drafting(batch, grown)


def flat(batch: int, nodes: float, context: float, grown: int) -> float:
    """A CPU that reads its weights slowly: nodes cost nearly nothing, drafting a fifth of a step."""
    return 12.0 + 0.08 * batch * nodes + 0.1 * batch * context / 1024 + (2.7 if grown > 1 else 0.0)


def drafting(batch: int, grown: int) -> float:
    return 0.0 if grown == 1 else 0.8 + 0.05 * batch + 0.001 * grown


MACHINES = (linear, float32_cpu, gpu)


@cache
def best_paths(sureness: float) -> tuple[tuple[tuple[int, ...], float], ...]:
    """The most probable rank paths when rank r at any depth has the probability of `rank_probabilities`."""
    steps = rank_probabilities(sureness)
    heap = [(-steps[0], (0,))]
    found = []
    while heap and len(found) < MOST - 1:
        value, path = heapq.heappop(heap)
        found.append((path, -value))
        *above, rank = path
        if rank + 1 < RANKS:
            heapq.heappush(heap, (value / steps[rank] * steps[rank + 1], (*above, rank + 1)))
        if len(path) < DEPTHS:
            heapq.heappush(heap, (value * steps[0], (*path, 0)))
    return tuple(found)


def rank_probabilities(sureness: float) -> list[float]:
    """Of the first ranks, best first; `sureness` is that of the best one."""
    return [sureness * (1.0 - sureness) ** rank for rank in range(RANKS)]


@cache
def mass(sureness: float, edges: tuple[int, ...]) -> tuple[tuple[float, ...], ...]:
    paths = best_paths(sureness)
    return tuple(
        tuple(sum(p for path, p in paths[: edge - 1] if len(path) == depth) for edge in edges)
        for depth in range(1, DEPTHS + 1)
    )


@dataclass
class Heads:
    """What heads say and what is true: each a sureness per row and step.

    Attributes:
        claimed: mean sureness that they state.
        true: mean sureness that is so.
        spread: how far a step may be from the mean, up or down.
    """

    claimed: float
    true: float
    spread: float = 0.25

    def draw(self, dice: random.Random) -> tuple[float, float]:
        """(claimed, true) of one row and step."""
        shift = dice.uniform(-self.spread, self.spread)
        claimed, true = (round(min(max(mean * (1 + shift), 0.02), 0.95), 2) for mean in (self.claimed, self.true))
        return claimed, true

    def __str__(self) -> str:
        """For the names of tests."""
        return f"heads-{self.claimed}-{self.true}"


GOOD = Heads(claimed=0.6, true=0.6)
FAIR = Heads(claimed=0.4, true=0.35)
BAD = Heads(claimed=0.05, true=0.02)
BOASTING = Heads(claimed=0.7, true=0.03)


@dataclass
class Run:
    """What a simulated run came to.

    Attributes:
        tokens: emitted per row.
        seconds: of all steps.
        sizes: nodes of each step.
        errors: relative error of each prediction of a step's time, None where there was none.
    """

    tokens: int = 0
    seconds: float = 0.0
    sizes: list[int] = field(default_factory=list)
    errors: list[float | None] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Tokens per row and second."""
        return self.tokens / self.seconds


@dataclass(frozen=True)
class SimulatedPruning:
    """What pruning does on a simulated machine.

    Attributes:
        steps: what it keeps, after which share of the layers.
        keeps: share of the accepted nodes that it lets through, at each depth.
        score: milliseconds of the early score.
    """

    steps: PrunedSteps
    keeps: float
    score: float


class Simulation:
    """Decodes as the engine does: verify, draft up to `reach`, observe, choose.

    With `pruning`, sizes above its `keep` may be pruned: they take the time of their work, `score` more, and keep so
    much of what would be accepted.
    """

    def __init__(
        self,
        sizing: Sizing,
        machine: CostFunction,
        heads: Heads,
        *,
        batch: int = 1,
        noise: float = 0.05,
        seed: int = 0,
        pruning: SimulatedPruning | None = None,
    ) -> None:
        self.sizing, self.machine, self.heads, self.batch = sizing, machine, heads, batch
        self.pruning, self.num_pruned = pruning, 0
        self.context, self.noise, self.dice = 64.0, noise, random.Random(seed)
        self._size, self._trees = PLAIN, []
        self.slower = 1.0
        self.cut_at: int | None = None  # depth at which trees are cut in every second step

    def run(self, tokens: int) -> Run:
        """Until each row has emitted so many tokens, on average."""
        done = Run()
        emitted = 0
        while emitted < tokens * self.batch:
            emitted += self.step(done)
        done.tokens = emitted / self.batch
        return done

    def step(self, done: Run) -> int:
        batch, context, nodes = self.batch, self.context, self._size.nodes
        pruning = self.pruning if self._size.pruned else None
        kept = nodes if pruning is None else min(nodes, pruning.steps.keep)
        expected, accepted = self._verify(nodes, 1.0 if kept == nodes or pruning is None else pruning.keeps)
        if self.cut_at is not None and len(done.sizes) % 2:
            expected, accepted = expected[: self.cut_at], accepted[: self.cut_at]
        grown = self.sizing.reach(batch, context)
        milliseconds = self.machine(batch, nodes, context, grown)
        if pruning is not None and kept < nodes:
            self.num_pruned += 1
            milliseconds = self.machine(batch, pruning.steps.work(nodes, kept), context, grown) + pruning.score
        seconds = self.slower * 1e-3 * milliseconds
        seconds *= 1.0 + self.noise * self.dice.gauss(0.0, 1.0)
        predicted = self.sizing.observe(
            StepRecord(
                batch=batch,
                context=context,
                nodes=nodes,
                kept=kept,
                tokens=batch + sum(accepted),
                grown=grown,
                seconds=seconds,
                expected=expected,
                accepted=accepted,
            )
        )
        self._trees = [self.heads.draw(self.dice) for _ in range(batch)] if grown > 1 else []
        self._size = self.sizing.choose(self._sums(), batch, context)
        emitted = batch + sum(accepted)
        self.context += emitted / batch
        done.seconds += seconds
        done.sizes.append(nodes)
        done.errors.append(abs(predicted - seconds) / seconds if predicted > 0 and 0 < seconds < 60 else None)
        return emitted

    def _sums(self) -> list[list[float]] | None:
        if not self._trees:
            return None
        edges = tuple(self.sizing.edges)
        tables = [mass(claimed, edges) for claimed, _ in self._trees]
        return [[sum(column) for column in zip(*rows, strict=True)] for rows in zip(*tables, strict=True)]

    def _verify(self, nodes: int, keeps: float) -> tuple[list[float], list[int]]:
        if nodes == 1 or not self._trees:
            return [], []
        expected, accepted = [0.0] * DEPTHS, [0] * DEPTHS
        for claimed, true in self._trees:
            paths = best_paths(claimed)[: nodes - 1]
            for path, value in paths:
                expected[len(path) - 1] += value
            inside = {path for path, _ in paths}
            said: tuple[int, ...] = ()
            for depth in range(DEPTHS):
                said += (self._rank(true),)
                if said not in inside or (keeps < 1.0 and self.dice.random() > keeps):
                    break
                accepted[depth] += 1
        return expected, accepted

    def _rank(self, true: float) -> int:
        draw = self.dice.random()
        for rank, probability in enumerate(rank_probabilities(true)):
            draw -= probability
            if draw < 0:
                return rank
        return RANKS
