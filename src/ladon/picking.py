"""What the target itself says after each node, by each row's own law: greedy, sampled, with processors or without.

A row's picker knows the law. Rows of one step may have several; each is asked once, for all its rows.

Shapes: B rows, N nodes, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ladon.pickers import Context, Nodes, Picker, Sequenced
from ladon.sampling import first_best
from ladon.tree import TokenTree, ancestor_mask, root_tree


class Picking:
    """The picks of one step.

    Made before the forward: what goes up to the device waits until that has done all it was given.
    """

    def __init__(self, rows: Sequence[Sequenced], device: torch.device) -> None:
        """For the rows of the step, as far as they are written now."""
        self._groups: list[tuple[Picker, Context, Tensor | None]] = []
        places: dict[Picker, list[int]] = {}
        for place, row in enumerate(rows):
            places.setdefault(row.picker, []).append(place)
        for picker, group in places.items():
            index = None if len(places) == 1 else torch.tensor(group, device=device)
            self._groups.append((picker, _context(picker, [rows[place] for place in group], device), index))

    def after_prompts(self, logits: Tensor) -> Tensor:
        """What is said after the rows as they are written now, [B] int64, from the logits there, [B, V]."""
        ends = _ends(logits)
        return self.after(logits[:, None], ends.tree, ends.ancestors)[:, 0]

    def after(self, logits: Tensor, tree: TokenTree, ancestors: Tensor) -> Tensor:
        """What the rows' laws say after each node of their trees, [B, N] int64, from the logits there, [B, N, V]."""
        nodes = Nodes(tree=tree, ancestors=ancestors)
        picks = torch.empty_like(tree.tokens)
        for picker, context, index in self._groups:
            if index is None:
                return first_best(picker.scores(logits, context, nodes))
            picks[index] = first_best(picker.scores(logits[index], context, _of_rows(nodes, index)))
        return picks


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
    logits = logits[None]
    return row.picker.scores(logits[:, None], _context(row.picker, [row], logits.device), _ends(logits))[0, 0]


def _ends(logits: Tensor) -> Nodes:
    """Roots that stand for the last tokens of rows, [B, 1]; nobody asks what these are."""
    tree = root_tree(torch.zeros(len(logits), dtype=torch.int64, device=logits.device))
    return Nodes(tree=tree, ancestors=ancestor_mask(tree.parents, 0))
