"""Counts and times of one run; every metric is defined here, once, with its unit.

acceptance length: tokens emitted by decode steps / row-steps; the bonus token counts, so plain decoding has 1.0.
tokens per second: tokens emitted by decode steps / seconds of decode steps; prefill and its token are left out.
overhead: share of the decode steps' time that is not spent in the target's forward (the stage "forward").
tree efficiency: accepted draft nodes / verified draft nodes; roots are no drafts, padding slots cost and count.
illegal share: drafts that a constraint forbids / drafts held against it; they are dropped before the target sees them.
pruned share: node slots that later layers did not see / node slots given to the target; roots are never pruned.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass(kw_only=True)
class Counts:
    """What decoding took, of one row or of all.

    Attributes:
        prefill_tokens: prompt tokens read.
        reused_tokens: prompt tokens that were not read, because their keys and values had been kept (`Row.past`).
        row_steps: decode steps, counted once for each row in them.
        tokens: tokens emitted by decode steps; tokens cut off by a stop or a limit do not count.
        nodes_verified: node slots given to the target; roots, padding slots and pruned ones included.
        nodes_pruned: those of them that were pruned on the way.
        accepted_nodes: draft nodes accepted.
        drafts_checked: drafts held against a row's constraint: those that a tree of the size verified would have had.
        drafts_illegal: those of them that it forbids, or that came after such a one.
    """

    prefill_tokens: int = 0
    reused_tokens: int = 0
    row_steps: int = 0
    tokens: int = 0
    nodes_verified: int = 0
    nodes_pruned: int = 0
    accepted_nodes: int = 0
    drafts_checked: int = 0
    drafts_illegal: int = 0

    @property
    def acceptance_length(self) -> float:
        """Tokens per row-step, bonus token included; NaN before the first step."""
        return _ratio(self.tokens, self.row_steps)

    @property
    def tree_efficiency(self) -> float:
        """Accepted draft nodes per verified draft node; NaN in plain decoding."""
        return _ratio(self.accepted_nodes, self.nodes_verified - self.row_steps)

    @property
    def pruned_share(self) -> float:
        """Share of the node slots given to the target that were pruned, 0 to 1; NaN before the first step."""
        return _ratio(self.nodes_pruned, self.nodes_verified)

    @property
    def illegal_share(self) -> float:
        """Share of the drafts of constrained rows that were dropped before verification, 0 to 1; NaN without such."""
        return _ratio(self.drafts_illegal, self.drafts_checked)

    def add_step(self, *, emitted: int, nodes: int, accepted: int, pruned: int = 0) -> None:
        """Count one row in one decode step: tokens emitted, node slots verified and pruned, draft nodes accepted."""
        self.row_steps += 1
        self.tokens += emitted
        self.nodes_verified += nodes
        self.nodes_pruned += pruned
        self.accepted_nodes += accepted


@dataclass(kw_only=True)
class RowStats(Counts):
    """Counts of one row, and when it got where it is: readings of `time.perf_counter`, None until then.

    Attributes:
        submitted: given to the engine.
        joined: taken into the batch, where its prompt is read.
        first_token: the first token in hand.
        finished: ended, seen by the engine.
    """

    submitted: float | None = None
    joined: float | None = None
    first_token: float | None = None
    finished: float | None = None


@dataclass(kw_only=True)
class DecodeStats(Counts):
    """Counts over one run. Times are seconds of wall clock.

    Attributes:
        prefill_seconds: in which prompts were read. The model's self-test comes before it; where no row decodes
            meanwhile, the growth and the transfer that give the first tokens are in it.
        forwards: decode steps. A step is one forward of the target, or one per span where rows must not share a call
            (`ladon.target.rope_regimes`); prefill and what recomputes a row's cache do not count.
        decode_seconds: time in decode steps; time the caller holds a step's result is left out.
        stage_seconds: the same time by stage, when the run was profiled: "verify" (and of it "forward", the target's
            own forward), "pick", "accept", "commit", "heads", "growth", "transfer", "constraints".
        sizes: decode steps by the number of node slots that they verified per row; 1 is plain decoding.
        probes: decode steps that were taken to learn what a size or the heads are good for.
        sizing_seconds: time of `decode_seconds` and `prefill_seconds` spent deciding on sizes.
        predicted_steps: decode steps whose time was predicted.
        prediction_errors: sum over them of |predicted - measured| / measured, without the time of callers' stop rules.
    """

    prefill_seconds: float = 0.0
    forwards: int = 0
    decode_seconds: float = 0.0
    stage_seconds: dict[str, float] = field(default_factory=dict)
    sizes: dict[int, int] = field(default_factory=dict)
    probes: int = 0
    sizing_seconds: float = 0.0
    predicted_steps: int = 0
    prediction_errors: float = 0.0

    def add_size(self, nodes: int, *, predicted: float, seconds: float) -> None:
        """Count a decode step of so many node slots per row, and what was predicted for it (NaN: nothing)."""
        self.sizes[nodes] = self.sizes.get(nodes, 0) + 1
        if math.isfinite(predicted) and seconds > 0.0:
            self.predicted_steps += 1
            self.prediction_errors += abs(predicted - seconds) / seconds

    @property
    def prediction_error(self) -> float:
        """Mean relative error of the predicted times of steps, 0 is exact; NaN where none was predicted."""
        return _ratio(self.prediction_errors, self.predicted_steps)

    @property
    def sizing_share(self) -> float:
        """Share of decode time spent deciding on sizes, 0 to 1."""
        return _ratio(self.sizing_seconds, self.decode_seconds)

    @property
    def tokens_per_second(self) -> float:
        """Tokens emitted by decode steps per second of decode steps, all rows together."""
        return _ratio(self.tokens, self.decode_seconds)

    @property
    def step_ms(self) -> float:
        """Mean milliseconds of a decode step."""
        return 1e3 * _ratio(self.decode_seconds, self.forwards)

    @property
    def forward_ms(self) -> float:
        """Mean milliseconds of the target's forward in a decode step; NaN unless profiled."""
        return 1e3 * _ratio(self.stage_seconds.get("forward", math.nan), self.forwards)

    @property
    def overhead(self) -> float:
        """Share of decode time outside the target's forward, 0 to 1; NaN unless profiled."""
        return 1.0 - _ratio(self.stage_seconds.get("forward", math.nan), self.decode_seconds)

    @property
    def growth_share(self) -> float:
        """Share of decode time spent growing trees, 0 to 1; NaN unless profiled."""
        return _ratio(self.stage_seconds.get("growth", math.nan), self.decode_seconds)


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else math.nan
