"""Hit rates of the heads on a set of questions, from which mode "fixed" takes its tree."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from ladon.bench.workloads import Question, prompt_ids
from ladon.calibrate.drafting import correction_of
from ladon.calibrate.findings import given_the_truth
from ladon.calibrate.ranks import hit_rates
from ladon.calibrate.recording import record

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ladon.heads import Heads


def calibrate(
    model: PreTrainedModel,
    heads: Heads,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    max_new_tokens: int,
    progress: Callable[[str, int, int], None],
) -> list[list[float]]:
    """Hit rates over the model's own greedy answers to the first turn of each question."""
    prompts = [torch.tensor(prompt_ids(tokenizer, question, []), device="cpu") for question in questions]
    trace = record(model, heads, prompts, max_new_tokens=max_new_tokens, progress=progress)
    given = given_the_truth(trace, correction_of(heads))
    return hit_rates(given.ranks(), given.num_candidates)
