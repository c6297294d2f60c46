"""The things compared: Ladon's modes, and transformers' own `generate`, behind one method.

Both give decode time with prefill left out. Ladon counts it itself (`DecodeStats`). For `generate`, a stopping
criterion, which is called once after each new token, takes the time of the first call (prefill and first token done)
and of the last; the tokens between, all but the first of each row, are the decode tokens. The time to the first token
runs from the call of `generate` in both; for Ladon it is the whole call but for the decode steps, so that it includes
packing the output.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from ladon.bench.steps import NotedSizing, StepFacts
from ladon.decoder.decoder import Decoder
from ladon.decoder.options import AUTO, OFF
from ladon.decoder.request import end_ids
from ladon.engine.stats import DecodeStats
from ladon.errors import InputError
from ladon.trees.fixed_tree import FixedTree

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ladon.heads import Heads

Budget = int | str  # nodes per step and row, or "auto"


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One call on one group of prompts.

    Attributes:
        outputs: new token ids of each row, cut after its first end-of-sequence token.
        stats: counts and times.
        seconds: wall time of the whole call, prefill included.
        first_token_seconds: from the call to the first tokens, one of each row.
        step_counts: tokens emitted by each decode step, if they were recorded (one row only).
        steps: the decode steps; none for transformers.
    """

    outputs: list[list[int]]
    stats: DecodeStats
    seconds: float
    first_token_seconds: float
    step_counts: list[int] = field(default_factory=list)
    steps: list[StepFacts] = field(default_factory=list)


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
            profile: measure stages, and record the steps of single rows.
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
        self._decoder = make(model, None if mode in ("plain", "ngrams") else heads, **options)
        if mode == "pruned" and self._decoder.pruning is None:
            raise InputError(
                "mode pruned: no pruning is known to pay; run ladon calibrate --pruning, or say how (4:16)"
            )
        self._decoder.sizing = self._noted = NotedSizing(self._decoder.sizing)
        self.budget = min(budget, most) if isinstance(budget, int) and most is not None else budget
        self._profile = profile

    @property
    def decoder(self) -> Decoder:
        """The decoder itself."""
        return self._decoder

    def run(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> Run:
        """Decode a group of prompts together."""
        started = time.perf_counter()
        sequences = self._decoder.generate(
            **_inputs(self._decoder.model, prompts),
            max_new_tokens=max_new_tokens,
            do_sample=False,
        )
        seconds = time.perf_counter() - started
        outputs, steps = _outputs(self._decoder.model, sequences, prompts), self.taken_steps()
        is_single = self._profile and len(prompts) == 1
        return Run(
            outputs=outputs,
            stats=self._decoder.stats,
            seconds=seconds,
            first_token_seconds=seconds - self._decoder.stats.decode_seconds,
            step_counts=_emitted_by(steps, self._decoder.stats.tokens) if is_single else [],
            steps=steps,
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


def _emitted_by(steps: Sequence[StepFacts], tokens: int) -> list[int]:
    """Tokens that a single row took from each step, which are so many in all: it may have ended within the last one."""
    counts = [int(step.tokens) for step in steps]
    if counts:
        counts[-1] -= sum(counts) - tokens
    return counts


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


def _inputs(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Prompts padded on the left, as `generate` wants them."""
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(list(prompt))
        mask[row, longest - len(prompt) :] = 1
    return {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}


def _outputs(model: PreTrainedModel, sequences: Any, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    stops = end_ids(model.generation_config.eos_token_id)
    longest = max(len(prompt) for prompt in prompts)
    rows: list[list[int]] = sequences[:, longest:].tolist()
    return [cut(row, stops) for row in rows]


def cut(tokens: list[int], stops: frozenset[int]) -> list[int]:
    """The tokens up to the first of `stops`, that one included."""
    return next((tokens[: place + 1] for place, token in enumerate(tokens) if token in stops), tokens)
