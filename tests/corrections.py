"""Markov corrections that correct, heads with them, and every path that they make."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from transformers import PreTrainedModel

import ladon
from ladon.heads import Heads
from ladon.heads.correction import MarkovCorrection


def made(num_heads: int = 3, vocab_size: int = 11, rank: int = 4, seed: int = 0) -> MarkovCorrection:
    """A correction that corrects."""
    correction = MarkovCorrection(num_heads=num_heads, vocab_size=vocab_size, rank=rank)
    correction.initialise(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        correction.after.normal_(std=2.0, generator=generator)
        correction.strength.uniform_(0.5, 1.5, generator=generator)
    return correction


def corrected_heads(model: PreTrainedModel, rank: int = 4, seed: int = 0, **options: int) -> Heads:
    heads = ladon.new_heads(model, num_heads=3, markov_rank=rank, **options)
    assert heads.correction is not None
    drawn = made(3, heads.vocab_size, rank, seed)
    heads.correction.load_state_dict(heads.correction.state_dict() | drawn.state_dict())
    return heads


@torch.no_grad()
def brute_force(
    logits: Tensor, root: int, correction: MarkovCorrection, num_candidates: int, temperatures: Tensor
) -> dict[tuple[int, ...], float]:
    """Every path over the candidates with its log-probability, one token after the other."""
    base = logits.log_softmax(-1)
    tops = [base[k].topk(num_candidates) for k in range(len(base))]
    paths: dict[tuple[int, ...], float] = {}

    def extend(path: tuple[int, ...], value: float) -> None:
        depth = len(path)
        if depth == len(base):
            return
        before = path[-1] if path else root
        added = correction(torch.full((len(base),), before))[depth]
        scores = {int(token): float(base[depth, token] + added[token]) for token in tops[depth].indices}
        mass = 1.0 - float(tops[depth].values.exp().sum())
        rest = math.log(mass) if mass > 0 else -math.inf
        temperature = float(temperatures[depth])
        total = sum(math.exp(score / temperature) for score in scores.values()) + math.exp(rest / temperature)
        for token, score in scores.items():
            child = score / temperature - math.log(total)
            paths[(*path, token)] = value + child
            extend((*path, token), value + child)

    extend((), 0.0)
    return paths
