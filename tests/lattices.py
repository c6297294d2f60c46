"""Random lattices, their every path, and the paths of a tree."""

from __future__ import annotations

import torch

from ladon.trees.lattice import Lattice


def random_lattice(seed: int, rows: int, depth: int, num_rows: int, candidates: int, style: str) -> Lattice:
    """Random tables; `style` makes ties, saturated heads (log-probability 0) or padding likely."""
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, depth, num_rows, candidates)
    if style == "ties":
        log_probs = -torch.randint(0, 3, shape, generator=generator).float()
    elif style == "saturated":
        log_probs = -100.0 * torch.rand(shape, generator=generator) * (torch.arange(candidates) > 0)
    else:
        log_probs = -3 * torch.rand(shape, generator=generator)
    if style == "padded":
        log_probs = log_probs.masked_fill(torch.rand(shape, generator=generator) < 0.4, -torch.inf)
    log_probs = log_probs.sort(-1, descending=True).values
    vocab = torch.stack([torch.randperm(candidates + 3, generator=generator) for _ in range(rows * depth * num_rows)])
    tokens = vocab[:, :candidates].reshape(shape)
    next_row = None
    if num_rows > 1:
        next_row = torch.randint(-1, num_rows, shape, generator=generator)
    return Lattice(tokens=tokens, log_probs=log_probs, next_row=next_row)


def brute_force(lattice: Lattice, row: int) -> dict[tuple[int, ...], torch.Tensor]:
    """Log-probability of every path, as token ids, summed from the root in float32."""
    found: dict[tuple[int, ...], torch.Tensor] = {}
    frontier = [((), torch.tensor(0.0), 0)]
    for level in range(lattice.depth):
        extended = []
        for path, value, table_row in frontier:
            if table_row < 0:
                continue
            for c in range(lattice.num_candidates):
                total = value + lattice.log_probs[row, level, table_row, c]
                follow = 0 if lattice.next_row is None else int(lattice.next_row[row, level, table_row, c])
                longer = (*path, int(lattice.tokens[row, level, table_row, c]))
                found[longer] = total
                extended.append((longer, total, follow))
        frontier = extended
    return found


def tree_paths(tree, row: int) -> list[tuple[int, ...]]:
    """Token path of every node but the root, by walking the parents."""
    parents, tokens = tree.parents[row].tolist(), tree.tokens[row].tolist()
    paths: list[tuple[int, ...]] = [()]
    for node in range(1, tree.num_nodes):
        paths.append((*paths[parents[node]], tokens[node]))
    return paths[1:]
