"""The options of a `Decoder` that decide what is drafted: which trees, of what size, from what, and pruned how."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ladon.config import AUTO_BUDGET, MOST_NGRAM_NODES, MOST_NODES, DecoderOptions
from ladon.drafting.head_chaining import joint_of
from ladon.drafting.mtp import MtpProposer
from ladon.drafting.ngram_lookup import NgramLookup, looks_up
from ladon.drafting.own_proposer import OwnDrafter, OwnProposer, check_methods
from ladon.drafting.proposer import Proposer, RootProposer, as_chain, check_candidates, check_tree, drafting
from ladon.errors import HeadsError, InputError, TreeError, UnsupportedModelError
from ladon.heads import Heads
from ladon.heads.early_exit import load_early_exit
from ladon.heads.model_parts import decoder_layers
from ladon.heads.mtp import MtpHeads
from ladon.target.pruning.pruner import Pruning
from ladon.target.target import Target
from ladon.tree_size.adaptive import AutoSizing
from ladon.tree_size.frozen import FrozenSizing
from ladon.tree_size.latency_model import LatencyModel
from ladon.tree_size.policy import FixedSizing, PrunedSteps, Sizing
from ladon.tree_size.profile_store import machine_of, place_of, read_profile
from ladon.trees.fixed_tree import FixedTree, TreeSize
from ladon.util.observer import Observer

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
    has_own: bool = False,
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
        has_own: whether a drafter of the user's drafts.
    """
    if tree == "off":
        return FixedSizing(1)
    if budget != "auto":
        return FixedSizing(int(budget))
    most = MOST_NODES if has_own else largest_budget(tree, heads, num_candidates, ngrams=ngrams)
    if most == 1 or isinstance(tree, FixedTree):
        return FixedSizing(most)
    times = read_profile(place_of(model, heads)) if heads is not None else []
    if not deterministic and os.environ.get(DETERMINISTIC_VARIABLE, "0") in ("", "0"):
        return AutoSizing(most, times, _pruned_steps(pruning, model), has_heads=has_own or heads is not None)
    if heads is None or not times:
        return FixedSizing(min(AUTO_BUDGET, most))
    return FrozenSizing(LatencyModel(times), most, heads.num_heads)


def _pruned_steps(pruning: Pruning | None, model: PreTrainedModel) -> PrunedSteps | None:
    if pruning is None or not isinstance(pruning.keep, int):
        return None
    return PrunedSteps(keep=pruning.keep, share=pruning.layer / len(decoder_layers(model)))


Prune = str | Pruning
OFF, AUTO = "off", "auto"
_LAYER_AND_KEEP = re.compile(r"(\d+):(\d+)")
_AGAIN = "run `ladon calibrate --pruning` again"


def chosen_pruning(prune: Prune, heads: Heads | None, target: Target) -> Pruning | None:
    """How to prune, tested on the model; None for not at all.

    Args:
        prune: "off"; "auto": what the calibration of the heads found to pay, if anything; a `Pruning`; or its layer
            and the nodes to keep, such as "4:16".
        heads: of the decoder.
        target: its model.

    Raises:
        InputError: an unknown option, or a `Pruning` that does not fit the model.
        HeadsError: the model has no such layer, or the calibration or the early exit beside the heads is damaged.
        UnsupportedModelError: a `Pruning` was given, and the model cannot be pruned so. With "auto" it is not pruned.
    """
    prune = prune if prune in (OFF, AUTO) else _given(prune)
    if isinstance(prune, Pruning):
        target.pruner(prune)
        return prune
    if prune == OFF or heads is None or heads.calibration is None:
        return None
    found = heads.calibration.pruning
    best = found.get("best")
    if best is None or not _was_measured_here(found.get("place", {}), target):
        return None
    return still_chosen(calibrated(best, heads, target), prune, target)


def _given(prune: Prune) -> Pruning:
    if isinstance(prune, Pruning):
        return prune
    found = _LAYER_AND_KEEP.fullmatch(str(prune))
    if found is None:
        raise InputError(f'prune is {prune!r}; give "off", "auto", a layer and the nodes to keep ("4:16") or a Pruning')
    return Pruning(layer=int(found[1]), keep=int(found[2]))


def still_chosen(pruning: Pruning | None, prune: Prune, target: Target) -> Pruning | None:
    """The same again, tested if the model has changed since; None if option "auto" meets one that cannot be pruned."""
    if pruning is None or prune != AUTO:
        return pruning
    try:
        target.pruner(pruning)
    except (InputError, UnsupportedModelError):  # the former for an output projection that is packed or elsewhere
        return None
    return pruning


def calibrated(best: Mapping[str, Any], heads: Heads, target: Target) -> Pruning | None:
    """The pruning that a calibration names, with the early exit beside the heads; None if that is another one now."""
    early_exit = None
    if best["trained"]:
        early_exit = None if heads.folder is None else load_early_exit(heads.folder, target.model)
        if early_exit is None or early_exit.layer != best["layer"]:
            return None  # it was measured with an early exit that is not there any more
    names = ("layer", "keep", "criterion", "weight", "top_k")
    try:
        return Pruning(**{name: best[name] for name in names}, early_exit=early_exit)
    except InputError as error:
        raise HeadsError(f"the pruning in the heads' calibration cannot be used ({error}); {_AGAIN}") from error


def _was_measured_here(place: Mapping[str, Any], target: Target) -> bool:
    """Whether timings of a place hold for this model on this machine, as far as is recorded; warns if they do not."""
    here = machine_of(target.model)
    others = [f"{name} {place[name]}, not {here[name]}" for name in here if place.get(name, here[name]) != here[name]]
    if others:
        warnings.warn(
            f"pruning is left off: it was found to pay with {'; '.join(others)}. To find out here, {_AGAIN}",
            stacklevel=4,
        )
    return not others


@dataclass(frozen=True, kw_only=True)
class DraftPlan:
    """The options of a `Decoder` that decide what is drafted.

    Attributes:
        tree: "dynamic", "chain", "off" or a fixed tree.
        budget: nodes per step and row, or "auto".
        num_candidates: kept per head.
        joint: as `joint_of` gives it, "paths" with its rows, if any were named: "paths:16".
        ngrams: whether n-grams draft too.
        own: the drafter of the user's, or what makes it; None: heads draft, or nobody.
    """

    tree: str | FixedTree
    budget: int | str
    num_candidates: int
    joint: str
    ngrams: bool
    own: OwnDrafter | None = None

    @classmethod
    def of(
        cls,
        heads: Heads | None,
        tree: str | FixedTree | TreeSize,
        budget: int | str,
        num_candidates: int,
        ngrams: str,
        joint: str,
        own: OwnDrafter | None = None,
    ) -> DraftPlan:
        """The options checked; see `Decoder`.

        Raises:
            TreeError: an option that is none, more candidates than tokens, or a fixed tree that the heads cannot fill.
            InputError: an unknown joint, heads beside a proposer, or a proposer that lacks methods.
            HeadsError: a joint that the heads are not made for.
        """
        if own is not None:
            _check_own(own, heads, tree)
        if isinstance(tree, TreeSize):
            tree, budget, num_candidates = tree.options(budget)
        DecoderOptions(num_candidates=num_candidates, ngrams=ngrams)  # checks them
        check_candidates(num_candidates, heads)
        tree, budget = check_tree(tree, heads, num_candidates), check_budget(budget)
        drafter, wanted = (heads, ("auto", "on")) if own is None else (own, ("on",))
        with_ngrams = ngrams in wanted and looks_up(tree, drafter, budget)
        joint = joint_of(heads, joint)
        return cls(tree=tree, budget=budget, num_candidates=num_candidates, joint=joint, ngrams=with_ngrams, own=own)

    def fitting(self, target: Target, heads: Heads | None) -> DraftPlan:
        """The plan for this target: heads, and drafters of the user's, draft chains where it verifies nothing else.

        Raises:
            TreeError: a fixed tree that branches, where the target verifies chains only.
        """
        drafter = heads if self.own is None else self.own
        if drafter is None or target.supports_trees:
            return self
        tree = as_chain(self.tree)
        return replace(self, tree=tree, ngrams=self.ngrams and looks_up(tree, drafter, self.budget))

    def sizing(self, target: Target, heads: Heads | None, pruning: Pruning | None, *, deterministic: bool) -> Sizing:
        """Who chooses the sizes."""
        has = {"ngrams": self.ngrams, "deterministic": deterministic, "has_own": self.own is not None}
        return make_sizing(self.budget, self.tree, target.model, heads, self.num_candidates, pruning, **has)

    def proposer(self, target: Target, heads: Heads | None, observer: Observer) -> Proposer:
        """What drafts on the device."""
        if self.own is not None and self.tree != "off":
            is_chain = self.fitting(target, None).tree == "chain"
            return OwnProposer(self.own, _vocab_size(target), is_chain=is_chain, observer=observer)
        if heads is None or self.tree == "off":
            return RootProposer()
        tree = self.fitting(target, heads).tree
        if isinstance(heads, MtpHeads):
            return MtpProposer(heads, target.model, tree, self.num_candidates, self.budget, observer, self.joint)
        return drafting(heads, tree, self.num_candidates, self.budget, observer, self.joint)

    def lookup(self, target: Target) -> NgramLookup | None:
        """The n-grams of one engine; None if they have no part."""
        if not self.ngrams:
            return None
        return NgramLookup(is_chain=self.tree == "chain" or not target.supports_trees)


def _check_own(own: OwnDrafter, heads: Heads | None, tree: object) -> None:
    check_methods(own)
    if heads is not None:
        raise InputError("there are both heads and a proposer, and one of them drafts; leave the other out")
    if isinstance(tree, FixedTree | TreeSize):
        raise TreeError(
            f"tree is a {type(tree).__name__}, but a proposer of your own decides what its trees look like; give "
            'tree="dynamic", or "chain" if they must not branch'
        )


def _vocab_size(target: Target) -> int:
    """How many tokens the model can both read and say."""
    readable = getattr(target.model.get_input_embeddings(), "num_embeddings", target.vocab_size)
    return min(int(readable), target.vocab_size)
