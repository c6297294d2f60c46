"""The lattice: per depth, the candidates a proposer offers, with their log-probabilities.

A path through the lattice starts in row 0 of depth 1; taking candidate c of row r at depth k leads to row
`next_row[k, r, c]` of depth k + 1. With R = 1 every path sees the same candidates at a depth: MEDUSA's independent
heads, whose joint distribution is the product of their marginals. With R > 1 a depth's candidates depend on the token
before. Heads that read the whole path so far have partial paths as rows: at each depth they are asked after some of the
paths there are, all at once; the others stay leaves.

Shapes: B sequences, K depths (one per head), R conditioning rows, C candidates, D logits, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from ladon.trees.fixed_tree import FixedTree

# Tokens before [B, K, R] and guesses [B, K, C] to what the former add to the latter's logits, [B, K, R, C] float32.
Correction = Callable[[Tensor, Tensor], Tensor]
# Tokens before [B, K, R] to further guesses after each, the heads' own log-probabilities of these, and what is added to
# them: [B, K, R, m] each.
Successors = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Lattice:
    """Candidate tables. In each row of a table tokens are distinct and log-probabilities sorted, greatest first.

    Attributes:
        tokens: candidate token ids, [B, K, R, C] int64.
        log_probs: log-probability given the conditioning row, [B, K, R, C] float32, <= 0; -inf is padding.
        next_row: row of the next depth that a candidate leads to, [B, K, R, C] int64; -1 keeps the candidate a leaf.
            None when R = 1, where it is 0 everywhere.
    """

    tokens: Tensor
    log_probs: Tensor
    next_row: Tensor | None = None

    @property
    def depth(self) -> int:
        """K, the number of depths."""
        return self.tokens.shape[1]

    @property
    def num_rows(self) -> int:
        """R, the number of conditioning rows."""
        return self.tokens.shape[2]

    @property
    def num_candidates(self) -> int:
        """C, the number of candidates per row."""
        return self.tokens.shape[3]

    def leaf_mass(self) -> Tensor:
        """How probable it is that a path ends at a depth because nothing was guessed after its token, [B, K - 1].

        Of all depths but the last: the total probability of the paths to candidates that lead to no row.
        """
        reach = torch.zeros_like(self.log_probs[:, 0, :, 0])
        reach[:, 0] = 1.0
        lost = [reach[:, :0]]
        for level in range(self.depth - 1):
            mass = (reach[:, :, None] * self.log_probs[:, level].exp()).flatten(1)
            rows = torch.zeros_like(mass).long() if self.next_row is None else self.next_row[:, level].flatten(1)
            lost.append((mass * (rows < 0)).sum(1, keepdim=True))
            reach = torch.zeros_like(reach).scatter_add(1, rows.clamp(min=0), mass * (rows >= 0))
        return torch.cat(lost, dim=1)


def from_logits(
    logits: Tensor, num_candidates: int, *, temperatures: Tensor | None = None, token_ids: Tensor | None = None
) -> Lattice:
    """The lattice of independent heads: each depth's best candidates under the *full* softmax.

    Normalising over the vocabulary and not over the candidates keeps a flat head from looking sure of itself, which
    would draw nodes to its children.

    Args:
        logits: head outputs, [B, K, D]; row k predicts the token k + 1 places after the root.
        num_candidates: C; more than D is cut to D.
        temperatures: [K], by which each depth's logits are divided first; None leaves them.
        token_ids: the token of each of the D entries, [D] int64; None: entry i is token i.

    Returns:
        A lattice with R = 1. NaN logits (a broken head) become padding, so that nothing is drafted from them.
    """
    logits = logits.float()
    if temperatures is not None:
        logits = logits / temperatures[:, None]
    normalizer = logits.logsumexp(-1, keepdim=True)
    top, tokens = logits.topk(min(num_candidates, logits.shape[-1]), dim=-1)
    log_probs = (top - normalizer).clamp(max=0.0).nan_to_num(nan=-torch.inf, neginf=-torch.inf)
    if token_ids is not None:
        tokens = token_ids[tokens]
    return Lattice(tokens=tokens[:, :, None], log_probs=log_probs[:, :, None])


def after_tokens(first: Lattice, later: Lattice, rows: Tensor) -> Lattice:
    """The lattice of guesses made after certain tokens of each depth: a candidate that is none of them is a leaf.

    Args:
        first: its first depth is what may follow the root; the best C count (R = 1).
        later: what may follow each of `rows`, of the further depths: [B, R (K - 1), 1, C], a row's depths together.
        rows: tokens of the depth before, distinct, [B, K - 1, R] int64.

    Returns:
        A lattice of K depths. Row 0 of the first depth is the one in use.
    """
    num_rows = rows.shape[2]

    def joined(after_root: Tensor, after_rows: Tensor) -> Tensor:
        root_row = after_root[:, :1, :, : after_rows.shape[3]].expand(-1, -1, num_rows, -1)
        by_depth = after_rows.reshape(*rows.mT.shape, after_rows.shape[3]).transpose(1, 2)  # [B, K - 1, R, C]
        return torch.cat([root_row, by_depth], dim=1)

    tokens, log_probs = joined(first.tokens, later.tokens), joined(first.log_probs, later.log_probs)
    is_row = tokens[:, :-1, ..., None] == rows[:, :, None, None]  # [B, K - 1, R, C, R]
    places = (is_row * torch.arange(1, num_rows + 1, device=rows.device)).sum(-1) - 1
    leaves = torch.full_like(tokens[:, -1:], -1)
    return Lattice(tokens=tokens, log_probs=log_probs, next_row=torch.cat([places, leaves], dim=1))


def conditioned(
    candidates: Lattice,
    root: Tensor,
    correction: Correction,
    *,
    temperatures: Tensor | None = None,
    num_rows: int | None = None,
    successors: Successors | None = None,
    gates: Tensor | None = None,
) -> Lattice:
    """The lattice in which a guess depends on the token before it: rows are the best candidates of the depth before.

    No table is V wide: of the tokens that are no candidates only the total probability is known, and it is left as the
    head gave it, one further cell of the distribution. Temperatures act on that distribution, so that the children of a
    node never sum to more than 1.

    Args:
        candidates: independent heads' (R = 1), without temperatures.
        root: the token picked last, [B] int64.
        correction: what a token adds to the logits of those that may follow it.
        temperatures: [K], by which the corrected log-probabilities are divided; None leaves them.
        num_rows: R; what follows the other candidates is not known, and they stay leaves. None: a row for each.
        successors: guesses that a row has beside those of its depth; they are leaves.
        gates: what everything that is added at a depth is multiplied by, [B, K]; None leaves it.

    Returns:
        A lattice whose rows hold C candidates, or C + m with successors. The first depth's rows are all after the root;
        row 0 is the one in use.
    """
    tokens, given = candidates.tokens[:, :, 0], candidates.log_probs[:, :, 0]  # [B, K, C]
    num_rows = min(num_rows or tokens.shape[2], tokens.shape[2])
    before = torch.cat([root[:, None, None].expand(-1, 1, num_rows), tokens[:, :-1, :num_rows]], dim=1)
    given, added = given[:, :, None], correction(before, tokens)  # [B, K, 1, C], [B, K, R, C]
    tokens = tokens[:, :, None].expand_as(added)
    if successors is not None:
        more, own, own_added = successors(before)
        own = own.masked_fill(own >= given[..., -1:], -torch.inf)  # candidates already, or as good as the last
        given, added = torch.cat([given.expand_as(added), own], dim=-1), torch.cat([added, own_added], dim=-1)
        tokens = torch.cat([tokens, more], dim=-1)
    if gates is not None:
        added = added * gates[:, :, None, None].float()
    log_probs = within(given + added, outside(given), temperatures)
    log_probs, order = log_probs.sort(dim=-1, descending=True, stable=True)
    next_row = order.masked_fill(order >= num_rows, -1)
    return Lattice(tokens=tokens.gather(-1, order), log_probs=log_probs, next_row=next_row)


def outside(log_probs: Tensor) -> Tensor:
    """Log-probability of all that is no candidate, from the candidates' own [..., C]."""
    return (1.0 - log_probs.exp().sum(-1)).clamp(min=0.0).log()


def within(scores: Tensor, rest: Tensor, temperatures: Tensor | None = None) -> Tensor:
    """Log-probabilities of candidates beside one cell for all other tokens.

    Args:
        scores: of the candidates, [B, K, R, C], unnormalised.
        rest: of the other tokens together, [B, K, R] or as many as broadcast to that.
        temperatures: [K], by which both are divided; None leaves them.
    """
    if temperatures is not None:
        scores, rest = scores / temperatures[:, None, None], rest / temperatures[:, None]
    total = torch.logaddexp(scores.logsumexp(-1), rest)
    return (scores - total[..., None]).nan_to_num(nan=-torch.inf, neginf=-torch.inf).clamp(max=0.0)


# Partial paths [B, R, k] int64, the root first, and which path of the depth before each goes on from, [B, R] int64, to
# the logits of head k after each of them, [B, R, D].
After = Callable[[Tensor, Tensor], Tensor]
# Log-probabilities of all paths of a depth [B, R, C], and that depth, from 1, to the places among the R x C of those
# that the next head is asked after, [B, R'] int64.
Rows = Callable[[Tensor, int], Tensor]


def best_rows(num_rows: int) -> Rows:
    """The most probable paths of a depth, `num_rows` of them: a beam.

    With N - 2 rows, growth to N nodes is exact over all paths: what follows a path that has N - 2 better ones at its
    depth has N - 1 better ones itself, and a tree has no room for more. Which of equals are taken makes no difference.
    """

    def choose(log_probs: Tensor, depth: int) -> Tensor:
        flat = log_probs.flatten(1)
        return flat.topk(min(num_rows, flat.shape[1]), dim=1).indices

    return choose


def rows_with_children(tree: FixedTree) -> Rows:
    """The paths that have children in a fixed tree, whatever their probability; in a chain one of each depth."""

    def choose(log_probs: Tensor, depth: int) -> Tensor:
        places = _places_with_children(tree, log_probs.shape[2], log_probs.device)[depth - 1]
        return places.expand(log_probs.shape[0], -1)

    return choose


@lru_cache(maxsize=64)
def _places_with_children(tree: FixedTree, num_candidates: int, device: torch.device) -> tuple[Tensor, ...]:
    """Of each depth but the last, the places [R] of such paths among the rows before times their candidates."""
    have_children = {path[:-1] for path in tree.paths}
    before: list[tuple[int, ...]] = [()]
    places = []
    for depth in range(1, tree.max_depth):
        paths = [path for path in tree.paths if len(path) == depth and path in have_children]
        flat = [before.index(path[:-1]) * num_candidates + path[-1] for path in paths]
        places.append(torch.tensor(flat, dtype=torch.long, device=device))
        before = paths
    return tuple(places)


def along_paths(
    after: After,
    root: Tensor,
    rows: Rows,
    *,
    depth: int,
    num_candidates: int,
    temperatures: Tensor | None = None,
    token_ids: Tensor | None = None,
) -> Lattice:
    """The lattice whose rows at a depth are paths of the depth before.

    Args:
        after: the heads.
        root: the token picked last, [B] int64.
        rows: which paths of a depth lead to rows of the next; all others are leaves.
        depth: K, how many heads are asked.
        num_candidates: C; more than D is cut to D.
        temperatures: of K depths or more, by which the logits are divided first; None leaves them.
        token_ids: the token of each of the D logits, [D] int64; None: entry i is token i.

    Returns:
        A lattice whose R is the most paths that any head was asked after; rows beyond those of a depth are padding.
    """
    paths, path_values = root[:, None, None], torch.zeros_like(root[:, None], dtype=torch.float32)
    parents = torch.zeros_like(root[:, None])
    tokens, log_probs, next_rows = [], [], []
    for level in range(depth):
        temperature = None if temperatures is None else temperatures[level : level + 1]
        # `from_logits` takes each path's row for a depth of its own.
        found = from_logits(after(paths, parents), num_candidates, temperatures=temperature, token_ids=token_ids)
        tokens.append(found.tokens[:, :, 0])
        log_probs.append(found.log_probs[:, :, 0])
        next_rows.append(torch.full_like(tokens[-1], -1))
        if level + 1 < depth:
            values = path_values[:, :, None] + log_probs[-1]
            chosen = rows(values, level + 1)
            numbers = torch.arange(chosen.shape[1], device=root.device).expand_as(chosen)
            next_rows[-1].flatten(1).scatter_(1, chosen, numbers)
            parents = chosen // values.shape[2]
            before = paths.gather(1, parents[:, :, None].expand(-1, -1, level + 1))
            paths = torch.cat([before, tokens[-1].flatten(1).gather(1, chosen)[:, :, None]], dim=2)
            path_values = values.flatten(1).gather(1, chosen)
    return Lattice(
        tokens=_stacked(tokens, 0), log_probs=_stacked(log_probs, -torch.inf), next_row=_stacked(next_rows, -1)
    )


def _stacked(tables: list[Tensor], padding: float) -> Tensor:
    """Tables [B, r, C] of each depth as one, [B, K, R, C]."""
    most = max(table.shape[1] for table in tables)
    padded = [functional.pad(table, (0, 0, 0, most - table.shape[1]), value=padding) for table in tables]
    return torch.stack(padded, dim=1)
