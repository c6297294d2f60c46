"""Which fixed tree suits these heads: hit rates of their candidates over the model's own answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ladon.bench.systems import LadonSystem
from ladon.bench.workloads import Question, prompt_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ladon.heads import Heads


RANKS = 10  # MEDUSA's own search looks at the ten best candidates of each head
_CHUNK = 64  # positions whose [K, V] logits are held at a time


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
    answers = []
    for done, question in enumerate(questions, start=1):
        ids = prompt_ids(tokenizer, question, [])
        answers.append((ids, plain.run([ids], max_new_tokens).outputs[0]))
        progress("calibrating the fixed tree", done, len(questions))
    return hit_rates(model, heads, answers)


@torch.no_grad()
def hit_rates(
    model: PreTrainedModel, heads: Heads, answers: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> list[list[float]]:
    """How often the candidate of each rank of each head is the token that the model went on to say.

    Args:
        model: the target.
        heads: its heads, bound to it.
        answers: (prompt ids, new token ids) of each sequence; only guesses about new tokens count.

    Returns:
        [K][10] shares; head k's guesses are counted where the token k + 1 places ahead is known.
    """
    hits = torch.zeros(heads.num_heads, RANKS)
    totals = torch.zeros(heads.num_heads)
    for prompt, output in answers:
        tokens = torch.tensor([*prompt, *output], device=model.device)
        hidden = _hidden_states(model, tokens)[len(prompt) - 1 :]
        for start in range(0, len(hidden), _CHUNK):
            ranked = heads(hidden[start : start + _CHUNK]).topk(RANKS, dim=-1).indices  # [t, K, ranks]
            for head in range(heads.num_heads):
                first = len(prompt) - 1 + start + head + 2
                said = tokens[first : first + len(ranked)]
                hits[head] += (ranked[: len(said), head] == said[:, None]).sum(0).cpu()
                totals[head] += len(said)
    rates: list[list[float]] = (hits / totals.clamp(min=1)[:, None]).tolist()
    return rates


def _hidden_states(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """What the output projection receives at each position, [T, H]."""
    seen: list[Tensor] = []

    def keep(module: Any, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0][0])

    handle = model.get_output_embeddings().register_forward_pre_hook(keep)
    try:
        model(input_ids=tokens[None], use_cache=False)
    finally:
        handle.remove()
    return seen[0]
