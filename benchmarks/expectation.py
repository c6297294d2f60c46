"""Two ways to foresee how many drafts a step accepts, on recorded answers. No timing.

    ladon calibrate --dry-run --no-step-times --limit 40 --trace trace.safetensors
    python benchmarks/expectation.py trace.safetensors

Each answer is decoded on paper with dynamic trees of one size, and before each step both say what they expect:

- paths: the path probabilities of the tree at hand, corrected per depth by what was accepted
  (`ladon.tree_size.acceptance_model`);
- table: ProPD's way (arXiv 2402.13485, as far as it is known): acceptance rates by head and rank, learnt online, whose
  product over a path is its value. It says the same of every tree with the same ranks.

Both start without knowledge of the heads and learn from answer to answer. The last line is one JSON document: for each
size, the mean squared error of the accepted drafts of a step, that of the mean over all steps, and expected / accepted.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ladon.calibrate.lattice_trace import LatticeTrace
from ladon.calibrate.temperatures import fit_temperatures
from ladon.tree_size.acceptance_model import AcceptanceModel
from ladon.trees.grow import grow_dynamic
from ladon.trees.lattice import Lattice

RATE = 0.02  # share of the table that a step replaces
BLOCK = 4096  # positions whose trees exist at a time
Step = tuple[list[tuple[float, list[int]]], list[int]]  # a tree's nodes (probability, ranks), and the true ranks


class RankTable:
    """Acceptance rates by head and rank, given that the path so far was right."""

    def __init__(self, num_heads: int, num_ranks: int) -> None:
        self._rates = [[0.5 ** (rank + 1) for rank in range(num_ranks)] for _ in range(num_heads)]

    def expects(self, nodes: Sequence[tuple[float, list[int]]]) -> float:
        """Accepted drafts."""
        total = 0.0
        for _, ranks in nodes:
            value = 1.0
            for depth, rank in enumerate(ranks):
                value *= self._rates[depth][rank]
            total += value
        return total

    def learn(self, truth: Sequence[int], accepted: int) -> None:
        """The ranks of the true path; depths beyond the first that was not accepted were not seen."""
        for depth in range(min(accepted + 1, len(truth))):
            rates = self._rates[depth]
            for rank in range(len(rates)):
                rates[rank] += RATE * ((truth[depth] == rank) - rates[rank])


def steps_of(trace: LatticeTrace, size: int, temperatures: Sequence[float]) -> list[Step]:
    """For each position, the nodes of its tree and the ranks of what the model then said."""
    depths = range(1, trace.num_heads + 1)
    log_probs = torch.stack([trace.log_probs(k, temperatures[k - 1]) for k in depths], dim=1)
    truth, found = trace.ranks().tolist(), []
    for start in range(0, trace.num_positions, BLOCK):
        part = slice(start, start + BLOCK)
        tokens = trace.tokens[part].long()
        tree = grow_dynamic(
            Lattice(tokens=tokens[:, :, None], log_probs=log_probs[part][:, :, None]), tokens[:, 0, 0], size
        )
        assert tree.depths is not None
        ranks = _ranks(tokens, tree.tokens, tree.depths)
        rows = zip(tree.parents.tolist(), tree.log_probs.exp().tolist(), ranks.tolist(), strict=True)
        found += [_nodes(*row) for row in rows]
    return list(zip(found, truth, strict=True))


def _ranks(candidates: Tensor, tokens: Tensor, depths: Tensor) -> Tensor:
    """The rank of each node's token among its head's candidates, [P, N]; 0 for roots."""
    of_depth = candidates.gather(1, (depths - 1).clamp(min=0)[:, :, None].expand(-1, -1, candidates.shape[2]))
    return (of_depth == tokens[:, :, None]).int().argmax(-1)


def _nodes(parents: list[int], probabilities: list[float], ranks: list[int]) -> list[tuple[float, list[int]]]:
    paths: list[list[int]] = [[]]
    for parent, rank in zip(parents[1:], ranks[1:], strict=True):
        paths.append([*paths[parent], rank])
    return list(zip(probabilities[1:], paths[1:], strict=True))


def walk(trace: LatticeTrace, steps: Sequence[Step]) -> Iterator[Step]:
    """The steps that decoding would have taken."""
    for start, end in pairwise(trace.row_starts.tolist()):
        position = start
        while position < end:
            yield steps[position]
            position += _accepted(*steps[position]) + 1


def _accepted(nodes: Sequence[tuple[float, list[int]]], truth: Sequence[int]) -> int:
    inside = {tuple(ranks) for _, ranks in nodes}
    depth = 0
    while depth < len(truth) and tuple(truth[: depth + 1]) in inside:
        depth += 1
    return depth


def compare(trace: LatticeTrace, size: int, temperatures: Sequence[float]) -> dict[str, float]:
    """What both foresee, and what happens."""
    paths, table = AcceptanceModel(1), RankTable(trace.num_heads, trace.num_candidates)
    foreseen: list[tuple[float, float, int]] = []
    for nodes, truth in walk(trace, steps_of(trace, size, temperatures)):
        masses = [sum(p for p, ranks in nodes if len(ranks) == depth) for depth in range(1, trace.num_heads + 1)]
        accepted = _accepted(nodes, truth)
        foreseen.append((paths.tokens([[mass] for mass in masses], 1)[0] - 1.0, table.expects(nodes), accepted))
        paths.learn_outcome(masses, [int(accepted > depth) for depth in range(trace.num_heads)], 1)
        table.learn(truth, accepted)
    by_paths, by_table, real = torch.tensor(foreseen, dtype=torch.float64).unbind(1)
    return {
        "steps": len(foreseen),
        "error_paths": (by_paths - real).square().mean().item(),
        "error_table": (by_table - real).square().mean().item(),
        "error_mean": (real.mean() - real).square().mean().item(),
        "ratio_paths": (by_paths.sum() / real.sum()).item(),
        "ratio_table": (by_table.sum() / real.sum()).item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace")
    parser.add_argument("--sizes", type=int, nargs="+", default=[4, 16, 64])
    options = parser.parse_args()
    trace = LatticeTrace.load(options.trace)
    kinds = {"temperatures": fit_temperatures(trace), "uncalibrated": [1.0] * trace.num_heads}
    found = {
        kind: {str(size): compare(trace, size, temperatures) for size in options.sizes}
        for kind, temperatures in kinds.items()
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
