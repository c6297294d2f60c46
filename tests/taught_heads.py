"""Heads that have learned a little of a tiny model's own answers, and the prompts of these."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from ladon.heads import Heads

PROMPTS = [torch.tensor(ids) for ids in ([5, 6, 7, 8], [9, 10], [3, 20, 40], [77], [8, 8, 9])]
NEW_TOKENS = 40


def taught(tiny_llama: PreTrainedModel, heads: Heads, updates: int = 60) -> Heads:
    """Heads that learned the model's own answers, a little: some guesses are right at every depth."""
    tiny_llama.generation_config.eos_token_id = 61  # ends some of the answers
    ids = torch.cat([prompt[-1:] for prompt in PROMPTS])[:, None]
    with torch.no_grad():
        rows = tiny_llama.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None
        )
        hidden = tiny_llama.model(rows).last_hidden_state[:, : NEW_TOKENS - 4]
    optimizer = torch.optim.Adam(heads.parameters(), lr=3e-3)
    for _ in range(updates):
        targets = torch.stack([rows[:, k : k + NEW_TOKENS - 4] for k in (2, 3, 4)], dim=2)
        following = torch.stack([rows[:, k : k + NEW_TOKENS - 4] for k in (1, 2, 3)], dim=2)
        loss = torch.nn.functional.cross_entropy(heads.corrected(hidden, following).flatten(0, 2), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return heads.eval().requires_grad_(False)
