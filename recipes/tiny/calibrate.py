"""The best fixed trees of the heads, from their hit rates on the base's own greedy text.

A head's candidate is right when it is what the base itself says k + 1 places on. Text that the base generated greedily
gives that for every position at once: there the next tokens are the base's own picks.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ladon.calibrate.ranks import hit_rates
from ladon.calibrate.recording import record
from ladon.fixed_tree import best_fixed_tree
from ladon.heads import Heads

TREE_SIZES = (8, 16, 32, 64)
NEW_TOKENS = 128


def calibrate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, heads: Heads, prompts: list[str]
) -> dict[str, object]:
    """Hit rates over the prompts' greedy continuations and the best fixed tree of each size."""
    ids = [torch.tensor(tokenizer.encode(prompt)) for prompt in prompts]

    def show(what: str, done: int, total: int) -> None:
        print(f"calibrated on {done}/{total} prompts", flush=True)

    trace = record(model, heads, ids, max_new_tokens=NEW_TOKENS, progress=show)
    rates = hit_rates(trace.ranks(), trace.num_candidates)
    trees = {str(size): [list(path) for path in best_fixed_tree(rates, size).paths] for size in TREE_SIZES}
    return {
        "prompts": len(prompts),
        "positions": trace.num_positions,
        "hit_rates": rates,
        "trees": trees,
    }
