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

import itertools
import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import NamedTuple

MOST_GUESSED = 32  # tokens of a path
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


# What a guess is rated by: its standing, the class of the longest match that leads to it, and how many occurrences do.
# No other guess; others, whose matches are shorter; others that are about as good; it comes after those that failed.
_ALONE, _AHEAD, _CONTESTED, _BEHIND = range(4)
_ABOUT = 2  # tokens by which a match that is about as good is shorter at most
_LENGTH_CLASSES = (3, 4, 5, 9, 17)  # lengths where the next class begins
_MOST_SEEN = 3
# How often guesses were right, by standing, class of length and number of occurrences, in what the bundled model wrote
# after held-out code, code that it was to write again, and HumanEval's prompts.
_MEASURED = (
    (
        (0.53, 0.73, 0.86),
        (0.67, 0.88, 0.90),
        (0.86, 0.92, 0.95),
        (0.90, 0.93, 0.96),
        (0.93, 0.97, 0.98),
        (0.95, 0.98, 0.99),
    ),
    (
        (0.53, 0.73, 0.86),
        (0.67, 0.88, 0.90),
        (0.70, 0.80, 0.90),
        (0.75, 0.88, 0.93),
        (0.80, 0.90, 0.93),
        (0.84, 0.96, 0.98),
    ),
    (
        (0.23, 0.35, 0.45),
        (0.36, 0.50, 0.80),
        (0.42, 0.50, 0.80),
        (0.48, 0.50, 0.80),
        (0.50, 0.50, 0.85),
        (0.50, 0.50, 0.90),
    ),
    (
        (0.15, 0.35, 0.50),
        (0.30, 0.45, 0.60),
        (0.55, 0.60, 0.70),
        (0.55, 0.60, 0.70),
        (0.60, 0.70, 0.80),
        (0.60, 0.70, 0.80),
    ),
)
_RARELY = 0.003  # the lowest rate, and how far the greatest is from 1
_WEIGHT = 12.0  # guesses that a measured rate stands for
_MOST_WEIGHT = 50.0  # guesses of a kind that are remembered: another text has other rates
# Share of the heads in a guess in which n-grams have a say too, by class of length: the mixture under which what came
# next was most probable, on the same texts.
_HEADS_SHARE = (0.7, 0.5, 0.2, 0.1, 0.1, 0.05)
_MOST_COST = -math.log(0.02)  # of a path, the negative logarithm of its probability; beyond, it is no guess


class Rates:
    """How often guesses of each kind are right: as measured once, and as it turns out."""

    def __init__(self) -> None:
        """As measured."""
        measured = [rate for lengths in _MEASURED for by_seen in lengths for rate in by_seen]
        self._weight = [_WEIGHT] * len(measured)
        self._right = [_WEIGHT * rate for rate in measured]

    def of(self, kind: int) -> float:
        """The rate, above 0 and below 1: nothing is for ever, and both logarithms are taken."""
        return min(max(self._right[kind] / self._weight[kind], _RARELY), 1.0 - _RARELY)

    def learn(self, kind: int, *, is_right: bool) -> None:
        """One more guess of this kind."""
        if self._weight[kind] >= _MOST_WEIGHT:
            keep = 1.0 - 1.0 / _MOST_WEIGHT
            self._weight[kind] *= keep
            self._right[kind] *= keep
        self._weight[kind] += 1.0
        self._right[kind] += is_right


def _kind(standing: int, length: int, seen: int) -> int:
    """The place of a kind among all; `length` is the match's."""
    length_class = bisect_right(_LENGTH_CLASSES, length)
    return (standing * len(_HEADS_SHARE) + length_class) * _MOST_SEEN + min(seen, _MOST_SEEN) - 1


class _Guess(NamedTuple):
    """What may come next at a node: the token, its kind, and the occurrences that say so."""

    token: int
    kind: int
    places: Sequence[Occurrence]


@dataclass(slots=True)
class Draft:
    """A row's guesses as a tree: nodes best first, the root being node 0.

    Attributes:
        tokens: token id of each node.
        parents: its parent; -1 for the root.
        log_probs: log-probability of the path to it.
        depths: its depth.
        heads_shares: share that heads have in the edges below it.
        guesses: what may follow it, also where that was not worth a node, in the order in which it is to be tried.
        children: nodes by their parent and token.
    """

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    heads_shares: list[float] = field(default_factory=list)
    guesses: list[list[_Guess]] = field(default_factory=list)
    children: dict[tuple[int, int], int] = field(default_factory=dict)

    @classmethod
    def of_root(cls, token: int) -> Draft:
        """The root alone."""
        return cls([token], [-1], [0.0], [0], [1.0], [[]])

    def __len__(self) -> int:
        """Its nodes, root included."""
        return len(self.tokens)

    def teach(self, rates: Rates, tokens: Iterable[int]) -> None:
        """Tell `rates` which guesses turned out right, now that these tokens have come after the root.

        Guesses were to be tried in their order: one that comes after the right one was not put to the test.
        """
        node: int | None = 0
        for token in tokens:
            if node is None:
                return
            for guess in self.guesses[node]:
                rates.learn(guess.kind, is_right=guess.token == token)
                if guess.token == token:
                    break
            node = self.children.get((node, token))


def draft(index: TokenIndex, rates: Rates, num_nodes: int, *, is_chain: bool = False) -> Draft | None:
    """The most probable continuations of a row, best first.

    Args:
        index: the row; its last token is the root.
        rates: how probable guesses are.
        num_nodes: the most nodes, root included.
        is_chain: whether a node may have one child only.

    Returns:
        The tree, its root alone if no guess is worth a node, which may be learnt from even so; None if nothing matches.
    """
    places: Sequence[Occurrence] = index.occurrences()
    if not places:
        return None
    found, text = Draft(), index.tokens
    number = itertools.count()  # of equally probable paths the first one found comes first, and parents before children
    heap: list[tuple[float, int, int, int, int, Sequence[Occurrence]]] = [(0.0, next(number), text[-1], -1, 0, places)]
    while heap and len(found.tokens) < num_nodes:
        cost, _, token, parent, depth, places = heappop(heap)
        node, guesses = len(found.tokens), _guesses(text, places, depth)[: 1 if is_chain else None]
        found.tokens.append(token)
        found.parents.append(parent)
        found.log_probs.append(-cost)
        found.depths.append(depth)
        found.heads_shares.append(_HEADS_SHARE[bisect_right(_LENGTH_CLASSES, places[0].length + depth)])
        found.guesses.append(guesses)
        found.children[parent, token] = node
        for guess in guesses if depth < MOST_GUESSED else ():
            rate = rates.of(guess.kind)
            if cost - math.log(rate) <= _MOST_COST:
                entry = (cost - math.log(rate), next(number), guess.token, node, depth + 1, guess.places)
                heappush(heap, entry)
            cost -= math.log1p(-rate)  # for the others if this one fails
    return found


def _guesses(text: Sequence[int], places: Sequence[Occurrence], depth: int) -> list[_Guess]:
    """What comes `depth` tokens further on at each of these places, those with the longest match first.

    Where a place's own text ends (it is being written again and again), its beginning follows.
    """
    size = len(text)
    tokens = [text[end + (depth if end + depth < size else depth % (size - end))] for end, _ in places]
    if tokens.count(tokens[0]) == len(tokens):  # as mostly
        return [_Guess(tokens[0], _kind(_ALONE, places[0].length + depth, len(places)), places)]
    groups: dict[int, list[Occurrence]] = {}
    for token, place in zip(tokens, places, strict=True):
        groups.setdefault(token, []).append(place)
    best, second, *_ = [group[0].length for group in groups.values()]
    standing = _CONTESTED if second >= best - _ABOUT else _AHEAD
    found = []
    for token, group in groups.items():
        found.append(_Guess(token, _kind(standing, group[0].length + depth, len(group)), group))
        standing = _BEHIND
    return found
