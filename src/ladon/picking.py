"""What the target itself says after each node, by each row's own law: greedy, sampled, with processors or without.

A row's picker knows the law. Rows of one step may have several; each is asked once, for all its rows. What a row's
constraint forbids has a logit of -inf before its law is asked.

Shapes: B rows, N nodes, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ladon.lossy import Admitted, Rule, admitted, admitted_by_picks
from ladon.pickers import DEAD_END, NO_TOKEN, Context, Nodes, Picker, Sequenced
from ladon.sampling import first_best, noisy
from ladon.token_masks import TokenMasks
from ladon.tree import TokenTree, ancestor_mask, root_tree


class Picking:
    """The picks of one step.

    Made before the forward: what goes up to the device waits until that has done all it was given.
    """

    def __init__(
        self, rows: Sequence[Sequenced], device: torch.device, num_nodes: int = 1, rule: Rule | None = None
    ) -> None:
        """For the rows of the step, as far as they are written now.

        Args:
            rows: the rows.
            device: of the logits.
            num_nodes: so many nodes of their trees are verified, the first ones.
            rule: lossy, asked too if there is one.
        """
        self._rule = rule
        self._groups: list[tuple[Picker, Context]] = []
        self._keeps = any(row.keeps for row in rows)
        guides = [row.guide for row in rows]
        self._masks = self._guided = None
        if any(guide is not None for guide in guides):
            self._masks = TokenMasks(guides, num_nodes, device)
            self._guided = torch.tensor([guide is not None for guide in guides], device=device)
        places: dict[Picker, list[int]] = {}
        for place, row in enumerate(rows):
            places.setdefault(row.picker, []).append(place)
        for picker, group in places.items():
            self._groups.append((picker, _context(picker, [rows[place] for place in group], device)))
        one_law = len(places) == 1
        self._places = [] if one_law else [torch.tensor(group, device=device) for group in places.values()]

    def after_prompts(self, logits: Tensor) -> Said:
        """What is said after the rows as they are written now: one node each, from the logits there, [B, V]."""
        ends = _ends(logits)
        return self.after(logits[:, None], ends.tree, ends.ancestors)

    def after(self, raw: Tensor, tree: TokenTree, ancestors: Tensor, kept: Tensor | None = None) -> Said:
        """What the rows' laws say after each node of their trees.

        Args:
            raw: the logits there, [B, N, V].
            tree: the trees, [B, N].
            ancestors: who sees whom, [B, N, N] bool.
            kept: which nodes of the trees that were given they are, [B, N]; None if pruning left all.
        """
        logits = raw if self._masks is None else self._masks.on(raw, kept)
        nodes = Nodes(tree=tree, ancestors=ancestors)
        if len(self._groups) == 1:
            ((picker, context),) = self._groups
            scores = picker.law(logits, context, nodes)
            picks = _picked(_drawn(picker, scores, context, nodes), self._guided, is_drawn=picker.draws)
            return Said(picks, raw, scores if self._keeps else None, self._admitted(picker, scores, picks, tree))
        picks, found, judged = torch.empty_like(tree.tokens), None, None
        for (picker, context), index in zip(self._groups, self._places, strict=True):
            own = _of_rows(nodes, index)
            scores = picker.law(logits[index], context, own)
            guided = None if self._guided is None else self._guided[index]
            picks[index] = said = _picked(_drawn(picker, scores, context, own), guided, is_drawn=picker.draws)
            if self._keeps:
                found = torch.empty_like(logits, dtype=scores.dtype) if found is None else found
                found[index] = scores.to(found.dtype)
            own_judged = self._admitted(picker, scores, said, own.tree)
            if own_judged is not None:
                judged = judged or Admitted(torch.empty_like(ancestors[:, 0]), torch.empty_like(tree.log_probs))
                judged.nodes[index] = own_judged.nodes
                judged.log_probs[index] = own_judged.log_probs.to(tree.log_probs.dtype)
        return Said(picks, raw, found, judged)

    def _admitted(self, picker: Picker, scores: Tensor, picks: Tensor, tree: TokenTree) -> Admitted | None:
        """What the lossy rule says of the nodes, if there is one, and a tree."""
        if self._rule is None or tree.num_nodes == 1:
            return None
        return admitted(self._rule, scores, tree) if picker.draws else admitted_by_picks(tree, picks)


def _picked(scores: Tensor, guided: Tensor | None, *, is_drawn: bool) -> Tensor:
    """The tokens of the greatest scores; `NO_TOKEN` after NaN, and where a draw finds no token that is allowed.

    Rows that are `guided` [b] by a constraint get `DEAD_END` where none is left.
    """
    picks = first_best(scores)
    best = scores.gather(-1, picks[..., None])[..., 0]  # NaN, if there is one: it counts as the greatest
    picks = picks.masked_fill(~best.isfinite() if is_drawn else best.isnan(), NO_TOKEN)
    return picks if guided is None else picks.masked_fill((best == -torch.inf) & guided[:, None], DEAD_END)


def _drawn(picker: Picker, scores: Tensor, context: Context, nodes: Nodes) -> Tensor:
    """A law's scores [b, N, V], with noise where it draws."""
    return noisy(scores, context, nodes) if picker.draws else scores


class Said(NamedTuple):
    """What is said after each node.

    Attributes:
        picks: the tokens, [B, N] int64.
        logits: after each node, [B, N, V].
        scores: what the laws made of them, [B, N, V], without noise; None if no row keeps anything.
        admitted: what a lossy rule says of the nodes; None without one.
    """

    picks: Tensor
    logits: Tensor
    scores: Tensor | None
    admitted: Admitted | None = None

    def along(self, path: Tensor) -> dict[str, Tensor]:
        """Logits and scores of the nodes [B, A], each [B, A, V]; empty if no row keeps anything."""
        if self.scores is None:
            return {}
        rows = torch.arange(len(path), device=path.device)[:, None]
        return {"logits": self.logits[rows, path].float(), "scores": self.scores[rows, path]}


def _of_rows(nodes: Nodes, index: Tensor) -> Nodes:
    tree = nodes.tree
    own = TokenTree(
        tokens=tree.tokens[index],
        parents=tree.parents[index],
        log_probs=tree.log_probs[index],
        max_depth=tree.max_depth,
    )
    return Nodes(tree=own, ancestors=nodes.ancestors[index])


def _context(picker: Picker, rows: Sequence[Sequenced], device: torch.device) -> Context:
    seeds = first = prefixes = None
    if picker.draws:
        keys = [[row.seed, len(row.prompt) + len(row.tokens)] for row in rows]
        seeds, first = torch.tensor(keys, dtype=torch.int64, device=device).unbind(1)
    if picker.reads:
        prefixes = [_prefix(row, device) for row in rows]
    return Context(rows=rows, seeds=seeds, first=first, prefixes=prefixes)


def _prefix(row: Sequenced, device: torch.device) -> Tensor:
    prompt = (row.prompt if row.padded is None else row.padded).to(device)
    return torch.cat([prompt, torch.tensor(row.tokens, dtype=prompt.dtype, device=device)])


def scores_of(row: Sequenced, logits: Tensor) -> Tensor:
    """The scores [V] whose greatest a row says next, as it is written now, noise included; `logits` are [V]."""
    logits = logits[None, None]
    if row.guide is not None:
        logits = TokenMasks([row.guide], 1, logits.device).on(logits, None)
    context, ends = _context(row.picker, [row], logits.device), _ends(logits[:, 0])
    return _drawn(row.picker, row.picker.law(logits, context, ends), context, ends)[0, 0]


def _ends(logits: Tensor) -> Nodes:
    """Roots that stand for the last tokens of rows, [B, 1]; nobody asks what these are."""
    tree = root_tree(torch.zeros(len(logits), dtype=torch.int64, device=logits.device))
    return Nodes(tree=tree, ancestors=ancestor_mask(tree.parents, 0))
