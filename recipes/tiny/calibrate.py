"""The best fixed trees of the heads, from their hit rates on the base's own greedy text.

A head's candidate is right when it is what the base itself says k + 1 places on. Text that the base generated greedily
gives that for every position at once: there the next tokens are the base's own picks.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ladon.calibrate.ranks import answer_ranks, hit_rates
from ladon.fixed_tree import best_fixed_tree
from ladon.heads import Heads

TREE_SIZES = (8, 16, 32, 64)
NEW_TOKENS = 128


def calibrate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, heads: Heads, prompts: list[str]
) -> dict[str, object]:
    """Hit rates over the prompts' greedy continuations and the best fixed tree of each size."""
    ranks = []
    for i, prompt in enumerate(prompts, start=1):
        ids = torch.tensor(tokenizer.encode(prompt))
        output = model.generate(
            ids[None], attention_mask=torch.ones_like(ids[None]), max_new_tokens=NEW_TOKENS, do_sample=False
        )[0]
        ranks.append(answer_ranks(model, heads, ids, output[len(ids) :]))
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
