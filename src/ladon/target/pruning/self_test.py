"""The test a model must pass before its trees are pruned: do the survivors get the logits that they get unpruned?

Two rows of different lengths hold a tree each. It is verified whole and, in another cache, with nodes dropped after
layer l; both commit the same path, and a second tree follows, so that what the later layers left in the cache is tested
too. The control is what logits of the wrong nodes would differ by.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from ladon.errors import UnsupportedModelError
from ladon.target.pruning.pruner import Pruning
from ladon.target.self_test import Testable, allowed_share, check_blame, first_line
from ladon.target.verify_output import VerifyOutput
from ladon.trees.token_tree import TokenTree
from ladon.util.devices import is_out_of_memory

if TYPE_CHECKING:
    from ladon.target.kv_cache import TreeCache

_PARENTS = ((-1, 0, 0, 1, 2, 1, 4, 4), (-1, 0, 1, 0, 3, 3, 2, 6))
_LENGTHS = (4, 7)
_KEPT = 5
_STEPS = 2


class _Prunable(Testable, Protocol):
    """The part of a target that the test runs."""

    def verify(self, tree: TokenTree, cache: TreeCache, pruning: Pruning | None = None) -> VerifyOutput: ...


def check_pruning(target: _Prunable, layer: int) -> None:
    """Raise `UnsupportedModelError` unless this model's trees can be pruned after a layer."""
    name = f"{type(target.model).__name__} cannot be pruned after layer {layer}"
    otherwise = "Use prune='off' for it"
    try:
        difference, control = measure(target, layer)
    except Exception as error:
        if is_out_of_memory(error):  # no matter of pruning
            raise
        if not isinstance(error, UnsupportedModelError):
            check_blame(error, target.model)
        raise UnsupportedModelError(f"{name}: {first_line(error)}. {otherwise}") from error
    allowed = allowed_share(target)
    if not difference <= allowed * control:
        raise UnsupportedModelError(
            f"{name}: what survives differs by {difference:.2g} from what it is unpruned (other nodes differ by "
            f"{control:.2g}; allowed is {allowed:.0%} of that). {otherwise}"
        )


@torch.no_grad()
def measure(target: _Prunable, layer: int) -> tuple[float, float]:
    """Root mean square difference of survivors' logits to unpruned ones, and that of a neighbour's logits."""
    generator = torch.Generator("cpu").manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randint(target.vocab_size, shape, generator=generator, device="cpu").to(target.device)

    prompts = [draw(length) for length in _LENGTHS]
    caches = [target.new_cache(len(prompts)) for _ in range(2)]
    for cache in caches:
        target.prefill(prompts, cache)
    pruning = Pruning(layer=layer, keep=_KEPT, criterion="top-k")  # which every output projection allows
    squares = torch.zeros(2, dtype=torch.float64, device="cpu")
    for _ in range(_STEPS):
        tree = _tree(draw(len(prompts), len(_PARENTS[0])))
        whole, cut = target.verify(tree, caches[0]), target.verify(tree, caches[1], pruning)
        if cut.nodes is None:
            raise UnsupportedModelError("no layer dropped anything")
        expected = whole.logits.gather(1, cut.nodes[:, :, None].expand_as(cut.logits)).cpu().double()
        logits = cut.logits.cpu().double()
        differences = [logits - expected, expected.roll(1, dims=1) - expected]
        squares += torch.stack([difference.square().mean() for difference in differences])
        deepest = cut.ancestors.sum(-1).argmax(-1)  # the end of a path that survived
        path = [row[mask].tolist() for row, mask in zip(cut.nodes, _rows_at(cut.ancestors, deepest), strict=True)]
        counts = [len(nodes) for nodes in path]
        padded = [nodes + nodes[-1:] * (max(counts) - len(nodes)) for nodes in path]
        for cache in caches:
            cache.commit(torch.tensor(padded, device=target.device), torch.tensor(counts, device=target.device))
            cache.mirror(counts)
    difference, control = (squares / _STEPS).sqrt().tolist()
    return difference, control


def _rows_at(table: Tensor, index: Tensor) -> Tensor:
    return table[torch.arange(len(index), device=index.device), index]


def _tree(tokens: Tensor) -> TokenTree:
    parents = torch.tensor(_PARENTS, device=tokens.device)
    log_probs = torch.zeros(tokens.shape, dtype=torch.float32, device=tokens.device)
    return TokenTree(tokens=tokens, parents=parents, log_probs=log_probs, max_depth=4)
