"""What a decoder drafts: which trees, of what size, from what."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ladon.budgets import check_budget, make_sizing
from ladon.config import DecoderOptions
from ladon.fixed_tree import FixedTree
from ladon.heads.mtp import MtpHeads
from ladon.joints import joint_of
from ladon.lookup import Lookup, looks_up
from ladon.mtp import MtpProposer
from ladon.proposers import Proposer, RootProposer, as_chain, check_candidates, check_tree, drafting
from ladon.pruning import Pruning
from ladon.sizing import Sizing
from ladon.stats import StageClock
from ladon.target import Target
from ladon.tree_notations import TreeSize

if TYPE_CHECKING:
    from ladon.heads import Heads


@dataclass(frozen=True, kw_only=True)
class DraftPlan:
    """The options of a `Decoder` that decide what is drafted.

    Attributes:
        tree: "dynamic", "chain", "off" or a fixed tree.
        budget: nodes per step and row, or "auto".
        num_candidates: kept per head.
        joint: as `joint_of` gives it, "paths" with its rows, if any were named: "paths:16".
        ngrams: whether n-grams draft too.
    """

    tree: str | FixedTree
    budget: int | str
    num_candidates: int
    joint: str
    ngrams: bool

    @classmethod
    def of(
        cls,
        heads: Heads | None,
        tree: str | FixedTree | TreeSize,
        budget: int | str,
        num_candidates: int,
        ngrams: str,
        joint: str,
    ) -> DraftPlan:
        """The options checked; see `Decoder`.

        Raises:
            TreeError: an option that is none, more candidates than tokens, or a fixed tree that the heads cannot fill.
            InputError: an unknown joint.
            HeadsError: a joint that the heads are not made for.
        """
        if isinstance(tree, TreeSize):
            tree, budget, num_candidates = tree.options(budget)
        DecoderOptions(num_candidates=num_candidates, ngrams=ngrams)  # checks them
        check_candidates(num_candidates, heads)
        tree, budget = check_tree(tree, heads, num_candidates), check_budget(budget)
        with_ngrams = ngrams != "off" and looks_up(tree, heads, budget)
        joint = joint_of(heads, joint)
        return cls(tree=tree, budget=budget, num_candidates=num_candidates, joint=joint, ngrams=with_ngrams)

    def fitting(self, target: Target, heads: Heads | None) -> DraftPlan:
        """The plan for this target: heads draft chains where it verifies nothing else.

        Raises:
            TreeError: a fixed tree that branches, where the target verifies chains only.
        """
        if heads is None or target.supports_trees:
            return self
        tree = as_chain(self.tree)
        return replace(self, tree=tree, ngrams=self.ngrams and looks_up(tree, heads, self.budget))

    def sizing(self, target: Target, heads: Heads | None, pruning: Pruning | None, *, deterministic: bool) -> Sizing:
        """Who chooses the sizes."""
        has = {"ngrams": self.ngrams, "deterministic": deterministic}
        return make_sizing(self.budget, self.tree, target.model, heads, self.num_candidates, pruning, **has)

    def proposer(self, target: Target, heads: Heads | None, clock: StageClock) -> Proposer:
        """What drafts on the device."""
        if heads is None or self.tree == "off":
            return RootProposer()
        heads.bind(target.model, force=True)  # since then another decoder may have bound them to its own model
        tree = self.fitting(target, heads).tree
        if isinstance(heads, MtpHeads):
            return MtpProposer(heads, target.model, tree, self.num_candidates, self.budget, clock, self.joint)
        return drafting(heads, tree, self.num_candidates, self.budget, clock, self.joint)

    def lookup(self, target: Target) -> Lookup | None:
        """The n-grams of one engine; None if they have no part."""
        if not self.ngrams:
            return None
        return Lookup(is_chain=self.tree == "chain" or not target.supports_trees)
