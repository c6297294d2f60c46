"""How often the heads are right about what the model itself goes on to say: what fixed trees are chosen by."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ladon.config import DecoderOptions
from ladon.forwards import lock_of, projection_inputs
from ladon.heads import Heads
from ladon.heads.ends import output_projection

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Candidates counted per head, as many as the dynamic tree sees; a hit beyond them counts as a miss.
RANKS = DecoderOptions().num_candidates
_CHUNK = 64  # positions whose [K, V] logits are held at a time


@torch.no_grad()
def answer_ranks(model: PreTrainedModel, heads: Heads, prompt: Tensor, answer: Tensor) -> Tensor:
    """The rank that each head gives the model's own greedy answer, at every position of it.

    Args:
        model: the target.
        heads: its heads, bound to it.
        prompt: [T] token ids.
        answer: [A] token ids, what the model says after the prompt.

    Returns:
        [P, K] int64, ranks from 0; `RANKS` means below all that are counted. Position p is the p-th whose next token
        is the answer's; there are as many as have the token that the last head guesses.
    """
    tokens = torch.cat([prompt, answer]).to(model.device)
    first = len(prompt) - 1
    positions = torch.arange(first, max(first, len(tokens) - heads.num_heads - 1), device=tokens.device)
    hidden = _hidden_states(model, tokens)
    offsets = torch.arange(2, heads.num_heads + 2, device=tokens.device)
    said = tokens[positions[:, None] + offsets]
    ranks = torch.full((len(positions), heads.num_heads), RANKS, device=tokens.device)
    for start in range(0, len(positions), _CHUNK):
        part = slice(start, start + _CHUNK)
        logits = heads(hidden[positions[part]])
        right = logits.topk(min(RANKS, heads.vocab_size), dim=-1).indices == said[part, :, None]
        ranks[part] = torch.where(right.any(-1), right.int().argmax(-1), RANKS)
    return ranks


def hit_rates(ranks: Tensor) -> list[list[float]]:
    """How often each rank of each head is right, given that the shallower heads' counted candidates held the truth.

    Args:
        ranks: [positions, K], as `answer_ranks` gives them.

    Returns:
        [K][RANKS], each in [0, 1].
    """
    rates = []
    alive = torch.ones(len(ranks), dtype=torch.bool, device=ranks.device)
    for column in ranks.T:
        counts = torch.bincount(column[alive], minlength=RANKS + 1)[:RANKS]
        rates.append([round(rate, 6) for rate in (counts / alive.sum().clamp(min=1)).tolist()])
        alive &= column < RANKS
    return rates


def _hidden_states(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """What the output projection receives at each position of `tokens` [T]: [T, H]. It maps only one of them."""
    first = torch.zeros(1, dtype=torch.int64, device=tokens.device)
    with lock_of(model), projection_inputs(output_projection(model).module, first) as seen:
        model(input_ids=tokens[None], use_cache=False)
    return seen[0][0]
