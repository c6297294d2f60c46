"""Random trees with a plain Python account of what they mean: the other side of every comparison."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from ladon.trees.token_tree import TokenTree


@dataclass(frozen=True)
class Drawn:
    """A tree with its shape as lists.

    Attributes:
        tree: the tree, [B, N].
        parents: the same parents on the host.
        real: which slots are no padding.
    """

    tree: TokenTree
    parents: list[list[int]]
    real: list[list[bool]]

    def path(self, row: int, node: int) -> list[int]:
        """Nodes from the root to `node`."""
        found = [node]
        while self.parents[row][found[0]] >= 0:
            found.insert(0, self.parents[row][found[0]])
        return found

    def depth(self, row: int, node: int) -> int:
        """Steps from the root to `node`."""
        return len(self.path(row, node)) - 1

    def tokens(self, row: int, nodes: list[int]) -> list[int]:
        """Token ids of these nodes."""
        return [int(token) for token in self.tree.tokens[row, nodes]]


def draw(rng: random.Random, caps: list[int | None], num_nodes: int, vocab_size: int) -> Drawn:
    """A random tree per row, no deeper than its cap, with some padding at the end of some rows."""
    parents, real = [], []
    for cap in caps:
        depths, row_parents, row_real = [0], [-1], [True]
        kept = rng.randint(max(1, num_nodes - 3), num_nodes)
        for node in range(1, num_nodes):
            allowed = [parent for parent in range(node) if row_real[parent] and (cap is None or depths[parent] < cap)]
            row_real.append(node < kept and bool(allowed))
            row_parents.append(rng.choice(allowed) if row_real[-1] else 0)
            depths.append(depths[row_parents[-1]] + 1)
        parents.append(row_parents)
        real.append(row_real)
    shape = (len(caps), num_nodes)
    tokens = [[rng.randrange(3, vocab_size) for _ in range(num_nodes)] for _ in caps]
    for row_tokens, row_parents in zip(tokens, parents, strict=True):
        _make_siblings_differ(row_tokens, row_parents, vocab_size)
    tree = TokenTree(
        tokens=torch.tensor(tokens),
        parents=torch.tensor(parents),
        log_probs=torch.zeros(shape).masked_fill(~torch.tensor(real), -torch.inf),
        max_depth=num_nodes - 1,
    )
    return Drawn(tree, parents, real)


def _make_siblings_differ(tokens: list[int], parents: list[int], vocab_size: int) -> None:
    """The next token that is free takes the place of one that a sibling has."""
    taken: set[tuple[int, int]] = set()
    for node, parent in enumerate(parents):
        while (parent, tokens[node]) in taken:
            tokens[node] = tokens[node] + 1 if tokens[node] + 1 < vocab_size else 3
        taken.add((parent, tokens[node]))


def pad_paths(paths: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Accepted paths as `accept` gives them: [B, A], padded by repeating the last node, and the counts [B]."""
    width = max(map(len, paths))
    padded = [path + path[-1:] * (width - len(path)) for path in paths]
    return torch.tensor(padded), torch.tensor([len(path) for path in paths])


@torch.no_grad()
def plain_logits(model: PreTrainedModel, sequences: list[list[int]]) -> Tensor:
    """Logits after each sequence, [sequences, V], by plain forwards without cache; equal lengths share one."""
    found: dict[int, Tensor] = {}
    for length in {len(sequence) for sequence in sequences}:
        chosen = [index for index, sequence in enumerate(sequences) if len(sequence) == length]
        logits = model(torch.tensor([sequences[index] for index in chosen]), use_cache=False).logits[:, -1]
        found |= dict(zip(chosen, logits, strict=True))
    return torch.stack([found[index] for index in range(len(sequences))])


@st.composite
def parent_arrays(draw, max_nodes: int = 24) -> list[int]:
    """A random tree in topological order."""
    size = draw(st.integers(1, max_nodes))
    return [-1, *(draw(st.integers(0, node - 1)) for node in range(1, size))]
