"""A user's own proof: with trees the same is said as without, on this model, by this law, on these prompts.

Plain decoding says everything once, each prompt alone; trees say it again, together. Where they part, the scores from
which both picked there, noise and processors included, tell rounding from a mistake (`ladon.bench.quality.identity`).

For a lossy rule of acceptance: how far it takes texts from the target's law, and what it gains. The distance is defined
in docs/reference/metrics.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ladon.bench.findings import Difference
from ladon.bench.quality.identity import first_difference, margin_of, near_tie_bound
from ladon.decoder.decoder import Decoder
from ladon.engine.sequence import Row
from ladon.engine.step import Step
from ladon.heads import Heads
from ladon.sampling.lossy import Nucleus, Typical
from ladon.sampling.sampler import scores_of
from ladon.target.target import Target
from ladon.util.devices import working_dtype

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What one law came to.

    Attributes:
        law: its name.
        prompts: how many were answered.
        tokens: that plain decoding wrote.
        acceptance_length: of the trees.
        differences: the first one of each prompt whose answers differ.
    """

    law: str
    prompts: int
    tokens: int
    acceptance_length: float
    differences: Sequence[Difference] = field(default_factory=list)

    @property
    def near_ties(self) -> int:
        """Differences that rounding explains."""
        return sum(difference.is_near_tie for difference in self.differences)

    @property
    def is_exact(self) -> bool:
        """Whether nothing but rounding makes a difference."""
        return self.near_ties == len(self.differences)


@dataclass(frozen=True, kw_only=True, slots=True)
class Distance:
    """What a rule came to.

    Attributes:
        accept: its name.
        settings: of the rule.
        tokens: emitted by decode steps.
        acceptance_length: of the rule.
        total_variation: mean over these tokens of the total variation distance between the law by which a token was
            said and the target's, 0 to 1.
    """

    accept: str
    settings: dict[str, float]
    tokens: int
    acceptance_length: float
    total_variation: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Proof:
    """A model and prompts on which trees are put to the proof, by any law.

    Attributes:
        model: the target.
        heads: its heads.
        prompts: token ids of each, [T].
        batch: prompts that trees answer together.
        max_new_tokens: of each answer.
        tree: options of the decoder that uses trees.
        progress: told after each answer, or step.
    """

    model: PreTrainedModel
    heads: Heads | None
    prompts: Sequence[Tensor]
    batch: int
    max_new_tokens: int
    tree: Mapping[str, Any]
    progress: Progress = lambda what, done, total: None

    def verdict(self, name: str, law: Mapping[str, Any]) -> Verdict:
        """Compare the answers to all prompts.

        Args:
            name: of the law.
            law: `generate`'s options that say how tokens are picked; `seed` is an int, if there is one.
        """
        plain, trees = Decoder(self.model, tree="off"), Decoder(self.model, self.heads, **self.tree)
        expected, found = self._rows(plain, **law), self._rows(trees, **law)
        for done, row in enumerate(expected, start=1):
            for _ in plain.decode([row]):
                pass
            self.progress(f"{name}: plain", done, len(expected))
        for _ in trees.decode(found, max_rows=self.batch):
            self.progress(f"{name}: trees", sum(row.finished for row in found), len(found))
        target, pairs = Target(self.model), enumerate(zip(found, expected, strict=True))
        differences = [difference_of(target, number, ours, theirs) for number, (ours, theirs) in pairs]
        return Verdict(
            law=name,
            prompts=len(self.prompts),
            tokens=sum(len(row.tokens) for row in expected),
            acceptance_length=trees.stats.acceptance_length,
            differences=[difference for difference in differences if difference is not None],
        )

    def is_repeatable(self) -> bool:
        """Whether two runs with `deterministic=True` take the same steps to the same answers."""
        runs = []
        for _ in range(2):
            decoder = Decoder(self.model, self.heads, **{**self.tree, "deterministic": True})
            rows = self._rows(decoder)
            steps = [step.emitted for step in decoder.decode(rows, max_rows=self.batch)]
            runs.append((steps, [row.tokens for row in rows]))
        return runs[0] == runs[1]

    def distance(self, law: Mapping[str, Any], rule: Typical | Nucleus) -> Distance:
        """Answer all prompts by a law and a rule of acceptance."""
        name = type(rule).__name__.lower()
        decoder = Decoder(self.model, self.heads, **self.tree, accept=rule)
        rows, total = self._rows(decoder, **law, output_scores=True, return_dict_in_generate=True), 0.0
        for step in decoder.decode(rows, max_rows=self.batch):
            total += step_distance(step)
            self.progress(name, sum(row.finished for row in rows), len(rows))
        return Distance(
            accept=name,
            settings=asdict(rule),
            tokens=decoder.stats.tokens,
            acceptance_length=decoder.stats.acceptance_length,
            total_variation=total / max(decoder.stats.tokens, 1),
        )

    def _rows(self, decoder: Decoder, **law: Any) -> list[Row]:
        return decoder.rows(self.prompts, max_new_tokens=self.max_new_tokens, **law)


def difference_of(target: Target, number: int, ours: Row, theirs: Row) -> Difference | None:
    """Where a row's text first leaves that of another row of the same prompt, law and seed; None if it does not."""
    place = first_difference(ours.tokens, theirs.tokens)
    if place is None:
        return None
    if place >= min(len(ours.tokens), len(theirs.tokens)):
        return Difference(prompt=number, position=place, margin=math.inf, bound=0.0)
    scores, logits = said_from(target, theirs, place)
    margin = margin_of(scores, ours.tokens[place], theirs.tokens[place])
    bound = near_tie_bound(working_dtype(target.device, target.dtype), logits)
    return Difference(prompt=number, position=place, margin=margin, bound=bound)


@torch.no_grad()
def said_from(target: Target, row: Row, place: int) -> tuple[Tensor, Tensor]:
    """Scores [V] whose greatest is the new token `place` of a row, and the logits [V] before its law."""
    before = replace(row, tokens=row.tokens[:place])
    written = torch.tensor(before.tokens, dtype=row.prompt.dtype, device=row.prompt.device)
    _, logits = target.prefill([torch.cat([row.prompt, written])], target.new_cache(1))
    return scores_of(before, logits[0]), logits[0].float()


def step_distance(step: Step) -> float:
    """Sum of the distances of a step's tokens; its rows keep scores, which are dropped here. Reads the device.

    By a lossy rule an accepted token is certain, given the tree: the distance is what the target gives all other
    tokens. The last token of a step is drawn from the target's law: 0.
    """
    total = 0.0
    if step.accepted is not None:
        counts = step.accepted.count.tolist()
        for row, taken, count in zip(step.rows, step.emitted, counts, strict=False):
            if row.sampling_params.draws and count > 1:
                laws = torch.stack(row.kept["scores"][: len(taken[: count - 1])]).cpu().double().softmax(-1)
                said = torch.tensor(taken[: count - 1], device=laws.device)
                total += float((1.0 - laws.gather(1, said[:, None])).sum())
    for row in step.rows:
        row.kept.clear()
    return total
