"""Is the text the same? Every output against a reference, and what a difference is worth.

Float32 logits of one prefix differ by 1e-6 to 1e-4 with the shape of the call. So in float32 a difference is a near-tie
only if the reference's two best logits there lie within 1e-4 of each other and all of the mode's logits there lie
within 1e-4 of the reference's; any other difference is an error. In half precision differences are counted and shown
with the reference's margin, and nothing is concluded from them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ladon.bench.systems import LadonSystem
from ladon.target import Target
from ladon.tree import TokenTree

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NEAR_TIE = 1e-4  # of logits, float32


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """The first place where an output leaves the reference.

    Attributes:
        mode: whose output.
        prompt: number of the prompt, from 0.
        position: index into the new tokens.
        margin: the reference's best logit there minus its second best.
        deviation: greatest distance between the mode's logits there and the reference's; None if not measured.
    """

    mode: str
    prompt: int
    position: int
    margin: float
    deviation: float | None = None

    @property
    def is_near_tie(self) -> bool:
        """Whether float32 rounding explains it."""
        return self.margin < NEAR_TIE and self.deviation is not None and self.deviation < NEAR_TIE


def first_difference(output: Sequence[int], reference: Sequence[int]) -> int | None:
    """Index of the first token that differs or is missing in either; None if the outputs are equal."""
    for place, (ours, theirs) in enumerate(zip(output, reference, strict=False)):
        if ours != theirs:
            return place
    return None if len(output) == len(reference) else min(len(output), len(reference))


def margin(model: PreTrainedModel, prompt: Sequence[int], reference: Sequence[int], position: int) -> float:
    """Best logit minus second best where `reference[position]` was picked, from one forward over the whole prefix."""
    prefix = torch.tensor([[*prompt, *reference[:position]]], device=model.device)
    with torch.no_grad():
        logits = model(input_ids=prefix, use_cache=False).logits[0, -1].float()
    return _margin(logits)


def examine(
    model: PreTrainedModel, system: LadonSystem, prompt: Sequence[int], position: int, number: int, max_new_tokens: int
) -> Difference:
    """A float32 difference in full: the logits of `generate` itself against those of the mode's own tree.

    The mode is replayed alone up to the step that gave the token, and that step's tree is verified again.
    """
    reference = _generate_logits(model, prompt, position)
    ours = _mode_logits(model, system, prompt, position, max_new_tokens)
    return Difference(
        mode=system.name,
        prompt=number,
        position=position,
        margin=_margin(reference),
        deviation=float((ours - reference).abs().max()),
    )


def _margin(logits: Tensor) -> float:
    best = logits.topk(2).values
    return float(best[0] - best[1])


def _generate_logits(model: PreTrainedModel, prompt: Sequence[int], position: int) -> Tensor:
    """Logits [V] from which `generate` picked new token `position`."""
    ids = torch.tensor([list(prompt)], device=model.device)
    done = type(model).generate(
        model,
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=position + 1,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    logits: Tensor = done.logits[position][0].float()
    return logits


@torch.no_grad()
def _mode_logits(
    model: PreTrainedModel, system: LadonSystem, prompt: Sequence[int], position: int, max_new_tokens: int
) -> Tensor:
    """Logits [V] from which the mode picked new token `position`."""
    target = Target(model)
    cache = target.new_cache(1)
    ids = torch.tensor(list(prompt), device=model.device)
    if position == 0:
        logits: Tensor = target.prefill([ids], cache)[1][0].float()
        return logits
    emitted: list[int] = []
    for step in system.decoder.trace(ids, max_new_tokens=max_new_tokens):
        emitted = emitted or [step.tokens[0]]
        if position < len(emitted) + len(step.emitted):
            break
        emitted += step.emitted
    target.prefill([torch.tensor([*prompt, *emitted[:-1]], device=model.device)], cache)
    tree = TokenTree(
        tokens=torch.tensor([step.tokens], device=model.device),
        parents=torch.tensor([step.parents], device=model.device),
        log_probs=torch.tensor([step.log_probs], device=model.device),
        max_depth=max(step.depths),
    )
    node = step.path[position - len(emitted)]
    logits = target.verify(tree, cache).logits[0, node].float()
    return logits
