"""What a benchmark works on and what it finds: the data between runner, checks and report."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ladon.bench.systems import Budget, Run
from ladon.bench.workloads import Question
from ladon.heads import Heads
from ladon.trees.fixed_tree import FixedTree

Progress = Callable[[str, int, int], None]  # what is being done, how many of how many calls are finished
Key = tuple[str, Budget, int]  # mode, budget, batch


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """The first place where an output leaves the reference.

    Attributes:
        prompt: number of the prompt, from 0.
        position: index into the new tokens.
        margin: the best logit there minus the lower of the two tokens'; infinite if the output is cut short.
        bound: margin below which rounding explains the difference (`near_tie_bound`).
        deviation: greatest distance between the mode's logits there and the reference's, infinite if the mode did not
            come to that place again; None if not measured.
    """

    prompt: int
    position: int
    margin: float
    bound: float
    deviation: float | None = None

    @property
    def is_near_tie(self) -> bool:
        """Whether rounding explains it: a small margin, and equal logits where they were measured."""
        return self.margin < self.bound and (self.deviation is None or self.deviation < self.bound)


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """What is measured.

    Attributes:
        name: the model's name in results.
        model: the target, in the dtype that is timed.
        tokenizer: its tokenizer.
        heads: its heads; None measures plain decoding only.
        fixed_tree: gives the fixed tree of a size (nodes, root included) for mode "fixed".
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    heads: Heads | None
    fixed_tree: Callable[[int], FixedTree]


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One answer to give: a turn of a question, with its reference answer.

    Attributes:
        number: which of all requests, from 0.
        question: the question.
        ids: the prompt, earlier turns and answers included.
        reference: plain decoding's answer in the timed dtype, alone.
    """

    number: int
    question: Question
    ids: list[int]
    reference: list[int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """One system's runs at one batch size.

    Attributes:
        system: its name: a mode, or "transformers".
        budget: nodes per step and row, or "auto"; None for transformers.
        batch: rows decoded together.
        groups: the requests of each group.
        timed: runs by repeat, then by group.
        profiled: likewise, with stage times and, at batch 1, step counts; empty for transformers.
        fitted_step_ms: `nodes` and `ms` of each size, as a mode that chooses sizes knows them in the end.
    """

    system: str
    budget: Budget | None
    batch: int
    groups: list[list[Request]]
    timed: list[list[Run]]
    profiled: list[list[Run]]
    fitted_step_ms: list[dict[str, Any]] = field(default_factory=list)

    def answers(self, runs: Sequence[Run]) -> Iterator[tuple[Request, list[int], Run]]:
        """Each request with its output and the run that gave it, of one repeat's runs."""
        for group, run in zip(self.groups, runs, strict=True):
            for request, output in zip(group, run.outputs, strict=True):
                yield request, output, run

    @property
    def label(self) -> str:
        """Mode and, if it has one, budget in one word, as in "dynamic-16"."""
        return f"{self.system}-{self.budget}" if isinstance(self.budget, int) else self.system


@dataclass(kw_only=True)
class Findings:
    """Everything a report is made from.

    Attributes:
        requests: all requests.
        measured: one entry per batch size and system, plain decoding among them.
        differences: by mode, budget and batch: outputs that left plain decoding of the timed dtype.
        float32_differences: likewise, float32 outputs that left transformers' `generate`.
        diagnoses: likewise, where tokens are lost (`ladon.bench.quality.diagnosis`), of the modes that were looked at.
        unchecked: why not every output could be compared in float32; None if every one was.
    """

    requests: list[Request] = field(default_factory=list)
    measured: list[Measured] = field(default_factory=list)
    differences: dict[Key, list[Difference]] = field(default_factory=dict)
    float32_differences: dict[Key, list[Difference]] = field(default_factory=dict)
    diagnoses: dict[Key, dict[str, Any]] = field(default_factory=dict)
    unchecked: str | None = None
