"""Hit rates of the heads on the base's own greedy text, and the best fixed trees that follow from them.

A head's candidate is right when it is what the base itself says k + 1 places on. Text that the base generated greedily
gives that for every position at once: there the next tokens are the base's own picks.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ladon.fixed_tree import best_fixed_tree
from ladon.heads import Heads

RANKS = 16  # candidates counted per head; a hit beyond them counts as a miss
TREE_SIZES = (8, 16, 32, 64)
NEW_TOKENS = 128


@torch.no_grad()
def greedy_ranks(model: PreTrainedModel, heads: Heads, prompt: Tensor) -> Tensor:
    """Rank of the base's own continuation under each head, at every position of a greedy continuation.

    Args:
        model: the base.
        heads: its heads, bound to it.
        prompt: [T] token ids.

    Returns:
        [positions, K] int64, ranks from 0; `RANKS` means below all that are counted.
    """
    output = model.generate(
        input_ids=prompt[None], attention_mask=torch.ones_like(prompt[None]), max_new_tokens=NEW_TOKENS, do_sample=False
    )[0]
    last = len(prompt) - 1  # the first position whose next token is the base's own
    positions = torch.arange(last, len(output) - heads.num_heads - 1)
    hidden = model.base_model(input_ids=output[None], use_cache=False).last_hidden_state[0]
    candidates = heads(hidden[positions]).topk(RANKS, dim=-1).indices  # [P, K, RANKS]
    offsets = torch.arange(2, heads.num_heads + 2)
    right = candidates == output[positions[:, None] + offsets][:, :, None]
    return torch.where(right.any(-1), right.int().argmax(-1), RANKS)


def hit_rates(ranks: Tensor) -> list[list[float]]:
    """How often each rank of each head is right, given that the shallower heads' counted candidates held the truth.

    Args:
        ranks: [positions, K] from `greedy_ranks`.

    Returns:
        [K][RANKS], each in [0, 1].
    """
    rates = []
    alive = torch.ones(len(ranks), dtype=torch.bool)
    for column in ranks.T:
        counts = torch.bincount(column[alive], minlength=RANKS + 1)[:RANKS]
        rates.append([round(x, 6) for x in (counts / alive.sum().clamp(min=1)).tolist()])
        alive &= column < RANKS
    return rates


def calibrate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, heads: Heads, prompts: list[str]
) -> dict[str, object]:
    """Hit rates over the prompts' greedy continuations and the best fixed tree of each size."""
    ranks = []
    for i, prompt in enumerate(prompts, start=1):
        ranks.append(greedy_ranks(model, heads, torch.tensor(tokenizer.encode(prompt))))
        if i % 10 == 0 or i == len(prompts):
            print(f"calibrated on {i}/{len(prompts)} prompts", flush=True)
    rates = hit_rates(torch.cat(ranks))
    trees = {str(size): [list(path) for path in best_fixed_tree(rates, size).paths] for size in TREE_SIZES}
    return {
        "prompts": len(prompts),
        "positions": sum(map(len, ranks)),
        "hit_rates": rates,
        "trees": trees,
    }
