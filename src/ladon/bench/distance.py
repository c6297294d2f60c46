"""How far a lossy rule of acceptance takes texts from the target's law, and what it gains.

The distance is defined in docs/reference/metrics.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ladon.decoder.decoder import Decoder
from ladon.engine.sequence import Row
from ladon.engine.step import Step
from ladon.sampling.lossy import Nucleus, Typical

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ladon.heads import Heads

Progress = Callable[[str, int, int], None]


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


def distance_of(
    model: PreTrainedModel,
    heads: Heads | None,
    prompts: Sequence[Tensor],
    law: Mapping[str, Any],
    rule: Typical | Nucleus,
    *,
    batch: int,
    max_new_tokens: int,
    tree: Mapping[str, Any],
    progress: Progress = lambda what, done, total: None,
) -> Distance:
    """Answer all prompts by the rule.

    Args:
        model: the target.
        heads: its heads.
        prompts: token ids of each, [T].
        law: `generate`'s options that say how tokens are picked.
        rule: of acceptance.
        batch: prompts answered together.
        max_new_tokens: of each answer.
        tree: options of the decoder.
        progress: told after each step.
    """
    name = type(rule).__name__.lower()
    decoder = Decoder(model, heads, **tree, accept=rule)
    keeping: dict[str, Any] = {"output_scores": True, "return_dict_in_generate": True}
    rows = decoder.rows(prompts, max_new_tokens=max_new_tokens, **law, **keeping)

    def steps() -> Iterable[Step]:
        for step in decoder.decode(rows, max_rows=batch):
            yield step
            progress(name, sum(row.finished for row in rows), len(rows))

    total = sum(step_distance(step) for step in steps())
    return Distance(
        accept=name,
        settings=asdict(rule),
        tokens=decoder.stats.tokens,
        acceptance_length=decoder.stats.acceptance_length,
        total_variation=total / max(decoder.stats.tokens, 1),
    )


def step_distance(step: Step) -> float:
    """Sum of the distances of a step's tokens; its rows keep scores, which are dropped here. Reads the device.

    By a lossy rule an accepted token is certain, given the tree: the distance is what the target gives all other
    tokens. The last token of a step is drawn from the target's law: 0.
    """
    total = 0.0
    if step.accepted is not None:
        counts = step.accepted.count.tolist()
        for row, taken, count in zip(step.rows, step.emitted, counts, strict=False):
            total += _distance(row, taken[: count - 1]) if row.sampling_params.draws else 0.0
    for row in step.rows:
        row.kept.clear()
    return total


def _distance(row: Row, accepted: Sequence[int]) -> float:
    if not accepted:
        return 0.0
    laws = torch.stack(row.kept["scores"][: len(accepted)]).double().softmax(-1)
    own = laws.gather(1, torch.tensor(accepted, device=laws.device)[:, None])
    return float((1.0 - own).sum())
