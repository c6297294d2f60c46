"""What a decoder's budget means: a fixed number of nodes, or who chooses it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from ladon.auto_sizing import AutoSizing
from ladon.config import AUTO_BUDGET, MOST_NGRAM_NODES, MOST_NODES
from ladon.errors import TreeError
from ladon.fixed_tree import FixedTree
from ladon.heads.model_parts import decoder_layers
from ladon.profiles import place_of, read_profile
from ladon.pruning import Pruning
from ladon.sizing import FixedSizing, FrozenSizing, PrunedSteps, Sizing
from ladon.step_cost import StepCost

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ladon.heads import Heads

DETERMINISTIC_VARIABLE = "LADON_DETERMINISTIC"


def check_budget(budget: int | str) -> int | str:
    """The budget option; `TreeError` if it is none."""
    if budget != "auto" and (isinstance(budget, bool) or not isinstance(budget, int) or budget < 1):
        raise TreeError(f'budget is {budget!r}; give "auto" or a number of nodes, 1 or more (the root is one of them)')
    return budget


def largest_budget(tree: str | FixedTree, heads: Heads | None, num_candidates: int, *, ngrams: bool = False) -> int:
    """Nodes of the largest tree that such heads, and n-grams, can fill, as far as automatic sizes go."""
    if heads is None or tree == "off":
        return MOST_NGRAM_NODES if ngrams else 1
    if isinstance(tree, FixedTree):
        return tree.num_nodes
    if tree == "chain":
        return heads.num_heads + 1
    width = num_candidates if heads.token_ids is None else min(num_candidates, heads.token_ids.shape[0])
    width = min(width, heads.vocab_size)
    nodes: int = sum(width**depth for depth in range(heads.num_heads + 1))
    return min(MOST_NODES, nodes + (MOST_NGRAM_NODES if ngrams else 0))


def make_sizing(
    budget: int | str,
    tree: str | FixedTree,
    model: PreTrainedModel,
    heads: Heads | None,
    num_candidates: int,
    pruning: Pruning | None = None,
    *,
    deterministic: bool,
    ngrams: bool,
) -> Sizing:
    """Who chooses the sizes of a decoder's trees.

    Args:
        budget: the decoder's, checked.
        tree: the decoder's.
        model: the target.
        heads: its heads, bound to it; None for plain decoding.
        num_candidates: candidates kept per head.
        pruning: the decoder's. A sizing that learns takes it step by step where it pays, if it keeps a number of nodes;
            else trees are always pruned.
        deterministic: whether no clock may enter; the environment variable LADON_DETERMINISTIC=1 asks for it too.
        ngrams: whether n-grams draft too.
    """
    if tree == "off":
        return FixedSizing(1)
    if budget != "auto":
        return FixedSizing(int(budget))
    most = largest_budget(tree, heads, num_candidates, ngrams=ngrams)
    if most == 1 or isinstance(tree, FixedTree):
        return FixedSizing(most)
    times = read_profile(place_of(model, heads)) if heads is not None else []
    if not deterministic and os.environ.get(DETERMINISTIC_VARIABLE, "0") in ("", "0"):
        return AutoSizing(most, times, _pruned_steps(pruning, model), has_heads=heads is not None)
    if heads is None or not times:
        return FixedSizing(min(AUTO_BUDGET, most))
    return FrozenSizing(StepCost(times), most, heads.num_heads)


def _pruned_steps(pruning: Pruning | None, model: PreTrainedModel) -> PrunedSteps | None:
    if pruning is None or not isinstance(pruning.keep, int):
        return None
    return PrunedSteps(keep=pruning.keep, share=pruning.layer / len(decoder_layers(model)))
