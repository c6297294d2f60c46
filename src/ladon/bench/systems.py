"""The things compared: Ladon's modes, and transformers' own `generate`, behind one method.

Both give decode time with prefill left out. Ladon counts it itself (`DecodeStats`). For `generate`, a stopping
criterion, which is called once after each new token, takes the time of the first call (prefill and first token done)
and of the last; the tokens between, all but the first of each row, are the decode tokens. The time to the first token
runs from the call of `generate` in both; for Ladon it is the whole call but for the decode steps, so that it includes
packing the output.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from ladon.decoder.decoder import Decoder
from ladon.decoder.options import AUTO, OFF
from ladon.decoder.request import end_ids
from ladon.engine.stats import DecodeStats
from ladon.errors import InputError
from ladon.heads import Heads
from ladon.tree_size.acceptance_model import Sums
from ladon.tree_size.adaptive import AutoSizing
from ladon.tree_size.policy import Size, Sizing, StepRecord
from ladon.trees.fixed_tree import FixedTree

Budget = int | str  # nodes per step and row, or "auto"


class StepFacts(NamedTuple):
    """One decode step; NaN stands for what nobody predicted.

    Attributes:
        record: what it did and took.
        predicted_seconds: what the sizing had predicted for it.
    """

    record: StepRecord
    predicted_seconds: float

    @property
    def tokens(self) -> float:
        """Tokens per row: accepted drafts and the bonus token, even where a row ended before."""
        return self.record.tokens / self.record.batch

    @property
    def expected_tokens(self) -> float:
        """What the trees' probabilities, uncorrected, had let expect."""
        return 1 + sum(self.record.expected) / self.record.batch if self.record.expected else math.nan


class NotedSizing:
    """A sizing whose steps are kept; what it decides stays the same."""

    def __init__(self, sizing: Sizing, steps: list[StepFacts] | None = None) -> None:
        """`sizing` decides; `steps` are added to, if given."""
        self._sizing = sizing
        self._steps: list[StepFacts] = [] if steps is None else steps
        self.edges: Sequence[int] = sizing.edges
        self.probes = sizing.probes

    def for_run(self) -> NotedSizing:
        """One for another run, whose steps are kept with the others."""
        return NotedSizing(self._sizing.for_run(), self._steps)

    def reach(self, batch: int, context: float) -> int:
        """As the sizing says."""
        return self._sizing.reach(batch, context)

    def choose(self, sums: Sums | None, batch: int, context: float, of_heads: Sums | None = None) -> Size:
        """As the sizing says."""
        return self._sizing.choose(sums, batch, context, of_heads)

    def observe(self, record: StepRecord) -> float:
        """Let the sizing learn, and keep what happened."""
        predicted = self._sizing.observe(record)
        self.probes = self._sizing.probes
        self._steps.append(StepFacts(record, predicted))
        return predicted

    def taken(self) -> list[StepFacts]:
        """The steps since the last call."""
        steps = list(self._steps)
        self._steps.clear()
        return steps

    def fit(self, steps: Sequence[StepFacts]) -> list[dict[str, Any]]:
        """`nodes` and predicted `ms` of each size, as known by now, at the batch and mean context of `steps`."""
        if not isinstance(self._sizing, AutoSizing) or not steps:
            return []
        batch, cost = steps[0].record.batch, self._sizing.cost
        own = [step.record.context for step in steps if step.record.batch == batch]
        context = sum(own) / len(own)
        seconds = {nodes: cost.predict(batch, nodes, context, drafts=nodes > 1) for nodes in self.edges}
        return [{"nodes": nodes, "ms": 1e3 * time} for nodes, time in seconds.items() if math.isfinite(time)]


def by_size(steps: Sequence[StepFacts]) -> list[dict[str, Any]]:
    """The histogram of sizes, smallest first, with the means of the steps of each.

    Returns:
        Of each size `nodes`, `steps`, `tokens` and `expected_tokens` per row-step, `step_ms` and `predicted_ms`; means
        over the row-steps or steps that have such a number, None if none has.
    """
    groups: dict[int, list[StepFacts]] = {}
    for step in steps:
        groups.setdefault(step.record.nodes, []).append(step)
    return [
        {
            "nodes": nodes,
            "steps": len(group),
            "tokens": _mean([(step.tokens, step.record.batch) for step in group]),
            "expected_tokens": _mean([(step.expected_tokens, step.record.batch) for step in group]),
            "step_ms": _mean([(1e3 * step.record.seconds, 1) for step in group]),
            "predicted_ms": _mean([(1e3 * step.predicted_seconds, 1) for step in group]),
        }
        for nodes, group in sorted(groups.items())
    ]


def prediction_error(steps: Sequence[StepFacts]) -> float:
    """Mean relative error of the predicted times, as `DecodeStats.prediction_error`; NaN if nothing was predicted."""
    errors = [
        abs(step.predicted_seconds - step.record.seconds) / step.record.seconds
        for step in steps
        if math.isfinite(step.predicted_seconds) and step.record.seconds > 0.0
    ]
    return sum(errors) / len(errors) if errors else math.nan


def _mean(weighted: Sequence[tuple[float, int]]) -> float | None:
    """The weighted mean of the values that are numbers."""
    known = [(value, weight) for value, weight in weighted if math.isfinite(value)]
    total = sum(weight for _, weight in known)
    return sum(value * weight for value, weight in known) / total if total else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One call on one group of prompts.

    Attributes:
        outputs: new token ids of each row, cut after its first end-of-sequence token.
        stats: counts and times.
        seconds: wall time of the whole call, prefill included.
        first_token_seconds: from the call to the first tokens, one of each row.
        steps: the decode steps; none for transformers.
    """

    outputs: list[list[int]]
    stats: DecodeStats
    seconds: float
    first_token_seconds: float
    steps: list[StepFacts] = field(default_factory=list)

    @property
    def step_counts(self) -> list[int]:
        """Tokens that a single row took from each step, within the last of which it may have ended; [] for several."""
        counts = [int(step.tokens) for step in self.steps] if len(self.outputs) == 1 else []
        return [*counts[:-1], self.stats.tokens - sum(counts[:-1])] if counts else []


class System(Protocol):
    """One way to decode."""

    name: str

    def run(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> Run:
        """Decode a group of prompts together."""


class LadonSystem:
    """A mode of Ladon at a budget.

    Attributes:
        name: the mode.
        budget: nodes verified per step and row, root included: what was asked for, or all that the mode can use; "auto"
            where each step has its own size.
        decoder: the decoder itself.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        heads: Heads | None,
        *,
        mode: str,
        budget: Budget,
        fixed_tree: FixedTree | None = None,
        prune: str = AUTO,
        profile: bool = False,
        make: Callable[..., Decoder] = Decoder,
    ) -> None:
        """Make the mode's decoder.

        Args:
            model: the target.
            heads: its heads; not used by modes "plain" and "ngrams".
            mode: one of `ladon.config.BENCH_MODES`.
            budget: nodes per step and row, or "auto".
            fixed_tree: the tree of mode "fixed".
            prune: how mode "pruned" prunes, as for `Decoder`.
            profile: measure stages.
            make: makes the decoder, called as `Decoder` is.
        """
        self.name = mode
        tree: str | FixedTree = {"plain": "off", "chain": "chain"}.get(mode, "dynamic")
        most = {"plain": 1, "chain": heads.num_heads + 1 if heads else 1}.get(mode)
        if mode == "fixed":
            if fixed_tree is None:
                raise InputError("mode fixed needs a tree; give one with --fixed-tree, or leave the mode out")
            tree, most = fixed_tree, fixed_tree.num_nodes
        options = {"tree": tree, "budget": budget, "prune": prune if mode == "pruned" else OFF, "profile": profile}
        options["ngrams"] = "auto" if mode.endswith("ngrams") else "off"
        self.decoder = make(model, None if mode in ("plain", "ngrams") else heads, **options)
        if mode == "pruned" and self.decoder.pruning is None:
            raise InputError(
                "mode pruned: no pruning is known to pay; run ladon calibrate --pruning, or say how (4:16)"
            )
        self.decoder.sizing = self._noted = NotedSizing(self.decoder.sizing)
        self.budget = min(budget, most) if isinstance(budget, int) and most is not None else budget

    def run(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> Run:
        """Decode a group of prompts together."""
        started = time.perf_counter()
        sequences = self.decoder.generate(
            **_inputs(self.decoder.model, prompts),
            max_new_tokens=max_new_tokens,
            do_sample=False,
        )
        seconds = time.perf_counter() - started
        return Run(
            outputs=_outputs(self.decoder.model, sequences, prompts),
            stats=self.decoder.stats,
            seconds=seconds,
            first_token_seconds=seconds - self.decoder.stats.decode_seconds,
            steps=self.taken_steps(),
        )

    def taken_steps(self) -> list[StepFacts]:
        """The decode steps since the last call."""
        return self._noted.taken()

    def fitted_step_ms(self, runs: Sequence[Run]) -> list[dict[str, Any]]:
        """What a mode that chooses sizes predicts by now for each of them, at the batch and context of these runs."""
        return self._noted.fit([step for run in runs for step in run.steps])


class TransformersSystem:
    """transformers' greedy `generate`, untouched."""

    name = "transformers"

    def __init__(self, model: PreTrainedModel) -> None:
        """`model` is used as it is."""
        self._model = model

    def run(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> Run:
        """Decode a group of prompts together."""
        clock = _TokenClock(self._model.device)
        started = time.perf_counter()
        sequences = type(self._model).generate(
            self._model,
            **_inputs(self._model, prompts),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            stopping_criteria=StoppingCriteriaList([clock]),
        )
        _wait(self._model.device)
        seconds = time.perf_counter() - started
        outputs = _outputs(self._model, sequences, prompts)
        decoded = sum(len(row) - 1 for row in outputs)
        stats = DecodeStats(
            prefill_tokens=sum(len(prompt) for prompt in prompts),
            prefill_seconds=clock.first - started,
            forwards=clock.calls - 1,
            row_steps=decoded,
            tokens=decoded,
            decode_seconds=clock.last - clock.first,
        )
        return Run(outputs=outputs, stats=stats, seconds=seconds, first_token_seconds=clock.first - started)


def merged(stats: Sequence[DecodeStats]) -> DecodeStats:
    """The sums of several runs' counts and times."""
    total = DecodeStats()
    for part in stats:
        for name, value in vars(part).items():
            setattr(total, name, _sum(getattr(total, name), value))
    return total


def _sum(one: Any, other: Any) -> Any:
    """Of two numbers, or of two tables of numbers by key."""
    if isinstance(one, dict):
        return {key: one.get(key, 0) + other.get(key, 0) for key in one | other}
    return one + other


class _TokenClock(StoppingCriteria):
    """Never stops; takes the time of its first and its last call."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.calls, self.first, self.last = 0, 0.0, 0.0

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """Take the time; no row is done."""
        if self.calls == 0:
            _wait(self._device)
        self.last = time.perf_counter()
        self.first = self.first or self.last
        self.calls += 1
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


def _inputs(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Prompts padded on the left, as `generate` wants them."""
    ids = [torch.tensor(list(prompt), device="cpu") for prompt in prompts]
    rows = {"input_ids": ids, "attention_mask": [torch.ones_like(prompt) for prompt in ids]}
    padded = {name: pad_sequence(parts, batch_first=True, padding_side="left") for name, parts in rows.items()}
    return {name: table.to(model.device) for name, table in padded.items()}


def _outputs(model: PreTrainedModel, sequences: Any, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    stops = end_ids(model.generation_config.eos_token_id)
    rows: list[list[int]] = sequences[:, max(map(len, prompts)) :].tolist()
    return [cut(row, stops) for row in rows]


def cut(tokens: list[int], stops: frozenset[int]) -> list[int]:
    """The tokens up to the first of `stops`, that one included."""
    return next((tokens[: place + 1] for place, token in enumerate(tokens) if token in stops), tokens)
