"""Loops flatter every drafter: what share of an output repeats itself, and what is accepted where it does not.

A token is repeated when the 8-gram of output tokens that ends with it has occurred in the same output before. A decode
step is repeated when any token that it emitted is repeated. Prompts do not count: copying from them is no loop.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

NGRAM = 8


@dataclass(kw_only=True)
class Repetition:
    """Counts over any number of outputs.

    Attributes:
        ngrams: 8-grams in the outputs.
        repeated_ngrams: those that occurred before in the same output.
        steps: decode steps that emitted no repeated token.
        tokens: tokens emitted by those steps.
    """

    ngrams: int = 0
    repeated_ngrams: int = 0
    steps: int = 0
    tokens: int = 0

    def add(self, tokens: Sequence[int], counts: Sequence[int]) -> None:
        """Add one output.

        Args:
            tokens: all its tokens; the first comes from prefill.
            counts: how many of them each decode step emitted; they sum to `len(tokens) - 1`.
        """
        repeated = repeated_tokens(tokens)
        self.ngrams += max(0, len(tokens) - NGRAM + 1)
        self.repeated_ngrams += sum(repeated)
        start = 1
        for count in counts:
            if not any(repeated[start : start + count]):
                self.steps += 1
                self.tokens += count
            start += count

    @property
    def share(self) -> float:
        """Repeated 8-grams over all 8-grams, 0 to 1; NaN when every output is shorter than 8 tokens."""
        return self.repeated_ngrams / self.ngrams if self.ngrams else math.nan

    @property
    def acceptance_length(self) -> float:
        """Tokens per step over the steps that repeat nothing; NaN when there is none."""
        return self.tokens / self.steps if self.steps else math.nan


def repeated_tokens(tokens: Sequence[int]) -> list[bool]:
    """For each token, whether the 8-gram that ends with it occurred earlier."""
    seen: set[tuple[int, ...]] = set()
    repeated = [False] * len(tokens)
    for end in range(NGRAM, len(tokens) + 1):
        gram = tuple(tokens[end - NGRAM : end])
        repeated[end - 1] = gram in seen
        seen.add(gram)
    return repeated
