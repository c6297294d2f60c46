"""Scores of a tree's nodes in the middle of a forward, and which of them go on.

A score is the log of how likely a node is, given its parent: 0 for the root, at most 0 for others, -inf for padding.

ProPD (arXiv 2402.13485) asks whether a child is among its parent's k likeliest tokens. That needs the parent's logits
over the whole vocabulary, whose product can cost what pruning saves. The other two criteria look at the tokens that the
tree holds and at no others. `evidence` is what pays: the heads' probability of a child is the prior, and the early
logit, tempered, the evidence that corrects it. An early exit alone ranks the heads' candidates worse than the heads do.

Shapes: B rows, N nodes before, M nodes after, H hidden width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ladon.heads.model_parts import OutputProjection
from ladon.trees.token_tree import TokenTree

LOWEST = -1e4  # the score of a real node, however unlikely: padding is below it, and a sum of them is finite
_REJECTED = -1e8  # below every sum of scores


def node_scores(scores: Tensor, tree: TokenTree) -> Tensor:
    """Scores [B, N] that compare: NaN and -inf of real nodes become `LOWEST`, padding -inf, the root 0."""
    scores = scores.float().nan_to_num(nan=LOWEST, neginf=LOWEST).clamp(LOWEST, 0.0)
    scores = scores.masked_fill(tree.log_probs == -torch.inf, -torch.inf)
    scores[:, 0] = 0.0
    return scores


def path_scores(scores: Tensor, ancestors: Tensor, passed: Tensor | None = None) -> Tensor:
    """Sums of the scores from the root to each node, [B, N]; never above the parent's, not even by rounding.

    Args:
        scores: as `node_scores` gives them, [B, N].
        ancestors: who sees whom, [B, N, N] bool.
        passed: nodes that are not rejected, [B, N]. A rejected node goes with its subtree: whatever is below it comes
            after every node that has no rejected ancestor.
    """
    if passed is not None:
        scores = torch.where(passed, scores, scores + _REJECTED)
    sums = torch.where(ancestors, scores[:, None], 0.0).sum(-1)
    return torch.where(ancestors, sums[:, None], torch.inf).amin(-1)


def best_nodes(paths: Tensor, num_nodes: int) -> Tensor:
    """The best M nodes of each row by path score, in the order of the tree, [B, M] int64.

    A parent's score is at least its child's and its index is smaller, so the stable order puts it first: no node is
    kept without its parent. The root is always kept; padding only where there is nothing else.
    """
    order = paths.sort(dim=1, descending=True, stable=True).indices
    return order[:, :num_nodes].sort(dim=1).values


def is_accepted(paths: Tensor, least: float | None) -> Tensor:
    """Which nodes have a path score of at least `least`, or, with None, no rejected node on their path, [B, N] bool."""
    return paths >= (_REJECTED / 2 if least is None else least)


def cut_tree(tree: TokenTree, ancestors: Tensor, nodes: Tensor) -> tuple[TokenTree, Tensor]:
    """The tree of the nodes [B, M] that `best_nodes` chose, parents renumbered, and its ancestor mask [B, M, M]."""
    num_nodes = nodes.shape[1]
    numbers = torch.arange(num_nodes, device=nodes.device).expand_as(nodes)
    new_number = torch.zeros_like(tree.parents).scatter_(1, nodes, numbers)
    parents = new_number.gather(1, tree.parents.gather(1, nodes).clamp(min=0))
    parents[:, 0] = -1
    survivors = TokenTree(
        tokens=tree.tokens.gather(1, nodes),
        parents=parents,
        log_probs=tree.log_probs.gather(1, nodes),
        max_depth=min(tree.max_depth, num_nodes - 1),
    )
    rows = ancestors.gather(1, nodes[:, :, None].expand(-1, -1, ancestors.shape[2]))
    return survivors, rows.gather(2, nodes[:, None].expand(-1, num_nodes, -1))


_ALL_BUT = 1e-4  # the least probability left for tokens that the tree does not hold


@dataclass(frozen=True, kw_only=True, slots=True)
class EarlyView:
    """What a criterion sees.

    Attributes:
        tree: the tree, [B, N].
        hidden: what the early exit would give the output projection, [B, N, H].
        projection: the target's output projection.
    """

    tree: TokenTree
    hidden: Tensor
    projection: OutputProjection

    @property
    def parents(self) -> Tensor:
        """Each node's parent, [B, N]; the root's is the root."""
        return self.tree.parents.clamp(min=0)

    def own_logits(self) -> Tensor:
        """Early logits after each node of the tree's own tokens, [B, N, N]: gathers N rows of the projection."""
        projection = self.projection
        rows = functional.embedding(self.tree.tokens, projection.weight)
        logits = torch.bmm(self.hidden, rows.transpose(1, 2)).float()
        bias = getattr(projection.module, "bias", None)
        return logits if bias is None else logits + bias[self.tree.tokens].float()[:, None]

    def prior(self) -> tuple[Tensor, Tensor]:
        """Log-probabilities that the proposer gives each node after its parent, and each node's siblings together.

        The node itself counts as a sibling. Both are [B, N], at most 0; `LOWEST` for padding.
        """
        log_probs = self.tree.log_probs.clamp(min=LOWEST)
        own = (log_probs - log_probs.gather(1, self.parents)).clamp(LOWEST, 0.0)
        own = own.masked_fill(self.tree.log_probs == -torch.inf, LOWEST)
        return own, self.over_siblings(own).clamp(max=0.0)

    def over_siblings(self, values: Tensor) -> Tensor:
        """Log of the sum of exp(values) over each node's siblings, itself included, [B, N]."""
        parents = self.tree.parents
        siblings = parents[:, :, None] == parents[:, None]
        return torch.where(siblings, values[:, None], -torch.inf).logsumexp(-1)


def top_k(view: EarlyView, weight: float, k: int) -> tuple[Tensor, Tensor | None]:
    """ProPD's criterion: log-probabilities of the early exit, and whether a child is in its parent's top k.

    Costs a product of [B N, H] with [H, V]. Every node but the last could be a parent, and which ones are is not known
    without reading the device.
    """
    # `forward`, past the hooks: they note what the target projects
    logits = view.projection.module.forward(view.hidden[:, :-1])
    least = logits.topk(min(k, logits.shape[-1]), dim=-1).values[:, :, -1]
    parents = view.parents
    flat = parents * logits.shape[-1] + view.tree.tokens
    own = logits.flatten(1).gather(1, flat)
    normaliser = logits.float().logsumexp(-1)
    return own.float() - normaliser.gather(1, parents), own >= least.gather(1, parents)


def siblings(view: EarlyView, weight: float, k: int) -> tuple[Tensor, Tensor | None]:
    """The early exit divides among siblings what the proposer gives them together."""
    own = _of_parents(view, view.own_logits())
    own = own.masked_fill(view.tree.log_probs == -torch.inf, LOWEST)
    _, together = view.prior()
    return own - view.over_siblings(own) + together, None


def evidence(view: EarlyView, weight: float, k: int) -> tuple[Tensor, Tensor | None]:
    """The proposer's probability of a child times exp(weight * early logit), over what all tokens have of it.

    Tokens that the tree does not hold have the rest of the proposer's probability, and as their evidence the mean over
    the tree's own tokens: an estimate of the normaliser without a look at the vocabulary.
    """
    logits = weight * view.own_logits()
    prior, together = view.prior()
    joint = _of_parents(view, logits) + prior
    rest = torch.log1p(-together.exp().clamp(max=1.0 - _ALL_BUT))
    mean = logits.logsumexp(-1) - math.log(logits.shape[-1])
    return joint - torch.logaddexp(view.over_siblings(joint), rest + mean.gather(1, view.parents)), None


def _of_parents(view: EarlyView, logits: Tensor) -> Tensor:
    """Of logits after each node of each node's token, those of a node's own token after its parent, [B, N]."""
    return logits.gather(1, view.parents[:, None])[:, 0]


Criterion = Callable[[EarlyView, float, int], tuple[Tensor, Tensor | None]]
CRITERIA: dict[str, Criterion] = {"evidence": evidence, "siblings": siblings, "top-k": top_k}
