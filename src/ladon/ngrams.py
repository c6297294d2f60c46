"""n-grams: what followed the last tokens where they stood before, in the prompt or in what was written since.

An index of one row says where the tokens at its end occurred earlier, and how many tokens match there. Each occurrence
goes on in some way; together they are a tree of guesses. How often such a guess is right depends on how long the match
is, and one that was followed for d tokens is d tokens longer: so one table of rates, by length of the match, serves
every depth. It starts from measured rates and learns from each token that is emitted, whether or not guesses were
verified.

The idea is prompt lookup decoding's and the suffix automata's (arXiv 2411.10666); here all that has matched is kept as
a tree with probabilities. Everything here is plain host arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import NamedTuple

_SHORTEST = 2  # tokens that must match
_LONGEST = 32  # tokens beyond which a longer match says no more
_LOOKED_AT = 16  # newest occurrences that are compared
_KEPT = 8  # of them, with the longest matches


class Occurrence(NamedTuple):
    """An earlier place of the tokens at the end.

    Attributes:
        end: where the text goes on there.
        length: how many tokens before it are those at the end, `_LONGEST` at most.
    """

    end: int
    length: int


class TokenIndex:
    """One row's tokens and where its pairs of tokens stood before. A token costs O(1), in time and in memory.

    Attributes:
        tokens: all of them.
    """

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        """Begin with these tokens."""
        self.tokens: list[int] = []
        self._newest: dict[tuple[int, int], int] = {}  # of each pair of tokens, where the text goes on after it
        self._before: list[int] = [0]  # of each such place, the one before with the same pair; 0 for none
        self.extend(tokens)

    def extend(self, tokens: Iterable[int]) -> None:
        """More tokens have come."""
        text, newest, before = self.tokens, self._newest, self._before
        last = text[-1] if text else -1
        for token in tokens:
            text.append(token)
            pair = last, token
            before.append(newest.get(pair, 0))
            newest[pair] = len(text)
            last = token

    def occurrences(self) -> list[Occurrence]:
        """Earlier places of the tokens at the end, the longest matches first, of equally long ones the newest first."""
        found: list[Occurrence] = []
        text, before = self.tokens, self._before
        end = before[-1]
        for _ in range(_LOOKED_AT):
            if end <= 1:  # the first token has no pair
                break
            found.append(Occurrence(end, _match(text, end)))
            end = before[end]
        found.sort(key=lambda place: -place.length)
        return found[:_KEPT]


def _match(text: Sequence[int], end: int) -> int:
    """How many tokens before `end` are those at the end of the text, where two are known to be."""
    most = min(_LONGEST, end)
    if text[end - most : end] == text[len(text) - most :]:
        return most
    length, shift = _SHORTEST, len(text) - end
    while text[end - length - 1] == text[end - length - 1 + shift]:
        length += 1
    return length


class _Key(NamedTuple):
    """What a guess is rated by.

    Attributes:
        length: class of the longest match that leads to it.
        count: occurrences that lead to it, `_MOST_COUNTED` at most.
        standing: one of the four below.
    """

    length: int
    count: int
    standing: int


_ALONE, _AHEAD, _CONTESTED, _BEHIND = range(4)  # no other guess; others' matches are shorter; as good as; others failed
_AS_GOOD = 2  # tokens by which the other's match is shorter at the most
_LENGTH_CLASSES = (3, 4, 5, 9, 17)  # where the next one begins
_MOST_COUNTED = 3
# How often guesses were right: by standing, length class and count. Measured on what the bundled model wrote after
# held-out code, code that it was to write again, and HumanEval's prompts (benchmarks/ngrams.py --rates).
_MEASURED = (
    ((0.53, 0.73, 0.86), (0.67, 0.88, 0.90), (0.86, 0.92, 0.95), (0.90, 0.93, 0.96), (0.93, 0.97, 0.98), (0.95, 0.98, 0.99)),
    ((0.53, 0.73, 0.86), (0.67, 0.88, 0.90), (0.70, 0.80, 0.90), (0.75, 0.88, 0.93), (0.80, 0.90, 0.93), (0.84, 0.96, 0.98)),
    ((0.23, 0.35, 0.45), (0.36, 0.50, 0.80), (0.42, 0.50, 0.80), (0.48, 0.50, 0.80), (0.50, 0.50, 0.85), (0.50, 0.50, 0.90)),
    ((0.15, 0.35, 0.50), (0.30, 0.45, 0.60), (0.55, 0.60, 0.70), (0.55, 0.60, 0.70), (0.60, 0.70, 0.80), (0.60, 0.70, 0.80)),
)  # fmt: skip
_MEASURED_WEIGHT = 12.0  # guesses that a measured rate stands for
_KEEP = 0.98  # of the evidence, with each guess of a kind: another text has other rates
_DEEPEST = 32
_LEAST = math.log(0.02)  # of a path, below which it is no guess


@dataclass(slots=True)
class Draft:
    """A row's guesses as a tree, best first: node 0 is the root.

    Attributes:
        tokens: token id of each node.
        parents: its parent, -1 for the root.
        log_probs: of the path to it.
        depths: its depth.
        match: tokens that match at the root, the longest of all occurrences; 0 if there is none.
    """

    tokens: list[int]
    parents: list[int] = field(default_factory=lambda: [-1])
    log_probs: list[float] = field(default_factory=lambda: [0.0])
    depths: list[int] = field(default_factory=lambda: [0])
    match: int = 0
    guesses: list[list[tuple[int, _Key, int]]] = field(default_factory=list)


class Rates:
    """How often guesses of a kind are right: as measured once, then as they turn out here."""

    def __init__(self) -> None:
        self._right: dict[_Key, float] = {}
        self._weight: dict[_Key, float] = {}
        for standing, lengths in enumerate(_MEASURED):
            for length, counts in enumerate(lengths):
                for count, rate in enumerate(counts, start=1):
                    self._right[_Key(length, count, standing)] = rate * _MEASURED_WEIGHT
                    self._weight[_Key(length, count, standing)] = _MEASURED_WEIGHT

    def of(self, key: _Key) -> float:
        return self._right[key] / self._weight[key]

    def learn(self, draft, tokens):
        node = 0
        for token in tokens:
            children = draft.guesses[node] if node < len(draft.guesses) else []
            found = -1
            for guess, key, child in children:
                hit = guess == token
                keep = _KEEP if self._weight[key] > 50 else 1.0
                self._right[key] = self._right[key] * keep + hit
                self._weight[key] = self._weight[key] * keep + 1
                if hit:
                    found = child
                    break
            if found < 0:
                return
            node = found


def draft(index: TokenIndex, rates: Rates, num_nodes: int, *, is_chain: bool = False) -> Draft:
    text = index.tokens
    occurrences = index.occurrences()
    found = Draft([text[-1]])
    if not occurrences:
        return found
    found.match = occurrences[0].length
    found.tokens.clear(); found.parents.clear(); found.log_probs.clear(); found.depths.clear()
    heap = [(0.0, 0, text[-1], -1, 0, occurrences, None, 0)]
    pushed = 1
    total = len(text)
    while heap and len(found.tokens) < num_nodes:
        cost, _, token, parent, depth, places, siblings, place = heappop(heap)
        node = len(found.tokens)
        found.tokens.append(token); found.parents.append(parent); found.log_probs.append(-cost); found.depths.append(depth)
        if siblings is not None:
            siblings[place] = (siblings[place][0], siblings[place][1], node)
        own: list = []
        found.guesses.append(own)
        if depth == _DEEPEST:
            continue
        groups: dict[int, list[Occurrence]] = {}
        for o in places:
            at = o.end + depth
            if at >= total:
                at = o.end + depth % (total - o.end)
            groups.setdefault(text[at], []).append(o)
        left = 0.0
        lengths = [g[0].length for g in groups.values()]
        for rank, (tok, group) in enumerate(groups.items()):
            length = group[0].length + depth
            if rank: standing = _BEHIND
            elif len(lengths) == 1: standing = _ALONE
            else:
                standing = _CONTESTED if lengths[1] >= lengths[0] - _AS_GOOD else _AHEAD
            cls = sum(length >= c for c in _LENGTH_CLASSES)
            key = _Key(cls, min(len(group), _MOST_COUNTED), standing)
            rate = rates.of(key)
            own.append((tok, key, -1))
            c = cost - math.log(rate) - left
            if -c >= _LEAST:
                heappush(heap, (c, pushed, tok, node, depth + 1, group, own, rank))
                pushed += 1
            left += math.log1p(-rate)
            if is_chain: break
    return found
