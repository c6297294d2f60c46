"""Hit rates of the heads on a set of questions, from which mode "fixed" takes its tree."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from ladon.bench.systems import LadonSystem
from ladon.bench.workloads import Question, prompt_ids
from ladon.calibrate.ranks import answer_ranks, hit_rates

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
    plain = LadonSystem(model, heads, mode="plain", budget=1)
    ranks = []
    for done, question in enumerate(questions, start=1):
        ids = prompt_ids(tokenizer, question, [])
        answer = plain.run([ids], max_new_tokens).outputs[0]
        ranks.append(answer_ranks(model, heads, torch.tensor(ids), torch.tensor(answer)))
        progress("calibrating the fixed tree", done, len(questions))
    return hit_rates(torch.cat(ranks))
