"""Logits to tokens: what the target itself says after each node, by the sampling parameters of each sequence.

Sequences of one step may have several kinds of parameters; each kind is asked once, for all its sequences. What a
constraint forbids has a logit of -inf before that. Greedy takes the greatest score; sampling adds Gumbel noise first.

Where parameters ask callbacks of the user's, nodes are taken one after the other along what is said, as in plain
decoding: a callback hears of no prefix that was not said, nor of one after an end-of-sequence token.

Shapes: B sequences, b of them with the same parameters, N nodes, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ladon.constraints.bitmask import TokenBitmask
from ladon.sampling.gumbel import gumbel_noise
from ladon.sampling.lossy import Admitted, Rule, admitted, admitted_by_picks
from ladon.sampling.sampling_params import DEAD_END, NO_TOKEN, Context, Nodes, SamplingParams, Sequenced
from ladon.trees.token_tree import TokenTree, ancestor_mask, root_tree
from ladon.trees.transfer import to_host

_BLOCK = 64  # entries per block; V is a multiple of it in nearly every model
_MANY = 1 << 17  # logits from which two small searches cost less than one large one


def greedy(logits: Tensor) -> Tensor:
    """The likeliest tokens, [...] int64, of logits [..., V]; the first of equal maxima, as `transformers` takes it.

    The float32 copy changes no order and is what `generate` compares; in bfloat16 itself argmax is five times slower
    on a CPU.
    """
    return first_best(logits.float())


def first_best(scores: Tensor) -> Tensor:
    """Place of the first of the greatest scores, [...] int64, of scores [..., V] as they are."""
    in_blocks = scores.device.type == "cpu" and scores.numel() >= _MANY and scores.shape[-1] % _BLOCK == 0
    return _argmax_in_blocks(scores) if in_blocks else scores.argmax(-1)


def _argmax_in_blocks(logits: Tensor) -> Tensor:
    """The same as argmax: first the block with the maximum, then the place in it.

    On a CPU a maximum is vectorised and an argmax is not: this takes 0.4 of its time.
    """
    blocks = logits.reshape(*logits.shape[:-1], -1, _BLOCK)  # [..., V / block, block]
    best = blocks.amax(-1).argmax(-1, keepdim=True)  # [..., 1]
    inside = blocks.gather(-2, best[..., None].expand(*best.shape, _BLOCK)).squeeze(-2).argmax(-1)
    return best.squeeze(-1) * _BLOCK + inside


def noisy(scores: Tensor, context: Context, nodes: Nodes) -> Tensor:
    """Scores [b, N, V] with the noise of each node's place and row: the greatest is a draw from their softmax.

    Costs the noise, [b, depths, V]: nodes of one depth share it.
    """
    assert context.seeds is not None and context.first is not None  # whoever draws says so
    positions = context.first[:, None] + torch.arange(nodes.tree.max_depth + 1, device=scores.device)
    noise = gumbel_noise(context.seeds, positions, scores.shape[-1], scores.dtype)
    rows = torch.arange(len(scores), device=scores.device)[:, None]
    places = (rows * noise.shape[1] + nodes.depths).flatten()  # on a CPU, indexing by two tensors takes 6 times as long
    return noise.flatten(0, 1).index_select(0, places).view_as(scores).add_(scores)


class Sampler:
    """Samples the tokens of one step.

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
        self._groups: list[tuple[SamplingParams, Context]] = []
        self._keeps = any(row.keeps for row in rows)
        grammars = [row.grammar for row in rows]
        self._masks = self._constrained = None
        if any(grammar is not None for grammar in grammars):
            self._masks = TokenBitmask(grammars, num_nodes, device)
            self._constrained = torch.tensor([grammar is not None for grammar in grammars], device=device)
        places: dict[SamplingParams, list[int]] = {}
        for place, row in enumerate(rows):
            places.setdefault(row.sampling_params, []).append(place)
        for params, group in places.items():
            self._groups.append((params, _context(params, [rows[place] for place in group], device)))
        self._places = [] if len(places) == 1 else [torch.tensor(group, device=device) for group in places.values()]

    def after_prompts(self, logits: Tensor) -> Sampled:
        """What is said after the rows as they are written now: one node each, from the logits there, [B, V]."""
        ends = _ends(logits)
        return self.after(logits[:, None], ends.tree, ends.ancestors)

    def after(self, raw: Tensor, tree: TokenTree, ancestors: Tensor, kept: Tensor | None = None) -> Sampled:
        """The token after each node of the trees.

        Args:
            raw: the logits there, [B, N, V].
            tree: the trees, [B, N].
            ancestors: who sees whom, [B, N, N] bool.
            kept: which nodes of the trees that were given they are, [B, N]; None if pruning left all.
        """
        logits = raw if self._masks is None else self._masks.on(raw, kept)
        nodes = Nodes(tree=tree, ancestors=ancestors)
        if len(self._groups) == 1:
            ((params, context),) = self._groups
            scores, tokens = self._said(params, logits, context, nodes, self._constrained)
            return Sampled(tokens, raw, scores if self._keeps else None, self._admitted(params, scores, tokens, tree))
        tokens, found, judged = torch.empty_like(tree.tokens), None, None
        for (params, context), index in zip(self._groups, self._places, strict=True):
            own = _of_rows(nodes, index)
            guided = None if self._constrained is None else self._constrained[index]
            scores, said = self._said(params, logits[index], context, own, guided)
            tokens[index] = said
            if self._keeps:
                found = torch.empty_like(logits, dtype=scores.dtype) if found is None else found
                found[index] = scores.to(found.dtype)
            own_judged = self._admitted(params, scores, said, own.tree)
            if own_judged is not None:
                judged = judged or Admitted(torch.empty_like(ancestors[:, 0]), torch.empty_like(tree.log_probs))
                judged.nodes[index] = own_judged.nodes
                judged.log_probs[index] = own_judged.log_probs.to(tree.log_probs.dtype)
        return Sampled(tokens, raw, found, judged)

    def _said(
        self, params: SamplingParams, logits: Tensor, context: Context, nodes: Nodes, guided: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Scores [b, N, V] and the tokens sampled from them, [b, N]."""
        if params.asks:
            is_lossy = self._rule is not None and params.draws
            return _along_what_is_said(params, logits, context, nodes, guided, goes_everywhere=is_lossy)
        scores = params.scores(logits, context, nodes)
        return scores, _sampled(_drawn(params, scores, context, nodes), guided, is_drawn=params.draws)

    def _admitted(self, params: SamplingParams, scores: Tensor, tokens: Tensor, tree: TokenTree) -> Admitted | None:
        """What the lossy rule says of the nodes, if there is one, and a tree."""
        if self._rule is None or tree.num_nodes == 1:
            return None
        return admitted(self._rule, scores, tree) if params.draws else admitted_by_picks(tree, tokens)


def _sampled(scores: Tensor, guided: Tensor | None, *, is_drawn: bool) -> Tensor:
    """The tokens of the greatest scores; `NO_TOKEN` after NaN, and where a draw finds no token that is allowed.

    Rows that are `guided` [b] by a constraint get `DEAD_END` where none is left.
    """
    tokens = first_best(scores)
    best = scores.gather(-1, tokens[..., None])[..., 0]  # NaN, if there is one: it counts as the greatest
    tokens = tokens.masked_fill(~best.isfinite() if is_drawn else best.isnan(), NO_TOKEN)
    return tokens if guided is None else tokens.masked_fill((best == -torch.inf) & guided[:, None], DEAD_END)


def _drawn(params: SamplingParams, scores: Tensor, context: Context, nodes: Nodes) -> Tensor:
    """Scores [b, N, V], with noise where tokens are drawn."""
    return noisy(scores, context, nodes) if params.draws else scores


def _along_what_is_said(
    params: SamplingParams,
    logits: Tensor,
    context: Context,
    nodes: Nodes,
    guided: Tensor | None,
    *,
    goes_everywhere: bool,
) -> tuple[Tensor, Tensor]:
    """Scores and tokens of the nodes that are said, each asked about when its parent is known; `NO_TOKEN` elsewhere.

    A node after which a callback raises has no token, and its row the error, which counts if the row gets there. Reads
    the device once for the trees, and once for each depth.

    Args:
        params: ask callbacks.
        logits: after the nodes, [b, N, V].
        context: of the rows.
        nodes: their trees.
        guided: rows with a constraint, [b]; None if there is none.
        goes_everywhere: go on to each child that its parent's scores leave possible, for lossy rules of acceptance.
    """
    tree = nodes.tree
    tokens, scores = torch.full_like(tree.tokens, NO_TOKEN), torch.full_like(logits, -torch.inf, dtype=torch.float32)
    for row in context.rows:
        row.failure = None
    asked: list[tuple[int, int, list[int]]] = [(place, 0, []) for place in range(len(logits))]
    children = _children(tree) if tree.num_nodes > 1 else []
    while asked:
        found, said = [], []
        for place, node, path in asked:
            where, ends = context.of_node(place, path), _ends(logits[place, node, None])
            own = _scores_or_failure(params, logits[place, node][None, None], where, ends)
            of_row = None if guided is None else guided[place, None]
            said.append(_sampled(_drawn(params, own, where, ends), of_row, is_drawn=params.draws)[0])
            found.append(own[0, 0])
        at = tuple(torch.tensor(part, device=logits.device) for part in zip(*[item[:2] for item in asked], strict=True))
        after, following = torch.stack(found), torch.cat(said)
        scores = scores.to(after.dtype)
        tokens[at], scores[at] = following, after
        next_ones = [
            (index, (place, child, [*path, token]))
            for index, (place, node, path) in enumerate(asked)
            for child, token in (children[place].get(node, []) if children else [])
            if token not in context.rows[place].end_ids and token < logits.shape[-1]
        ]
        if not next_ones:
            break
        which = torch.tensor([[index, item[2][-1]] for index, item in next_ones], device=logits.device).unbind(1)
        goes = after[which] > -torch.inf if goes_everywhere else following[which[0]] == which[1]
        asked = [item for (_, item), go in zip(next_ones, to_host(goes[None])[0], strict=True) if go]
    return scores, tokens


def _children(tree: TokenTree) -> list[dict[int, list[tuple[int, int]]]]:
    """Of each row, by node: its children that are no padding, each with its token. Reads the device."""
    table = to_host(torch.cat([tree.tokens, tree.parents, (tree.log_probs > -torch.inf).long()], dim=1))
    found = []
    for values in table:
        of_row: dict[int, list[tuple[int, int]]] = {}
        columns = (values[start : start + tree.num_nodes] for start in range(0, len(values), tree.num_nodes))
        for node, (token, parent, is_real) in enumerate(zip(*columns, strict=True)):
            if node > 0 and is_real:
                of_row.setdefault(parent, []).append((node, token))
        found.append(of_row)
    return found


def _scores_or_failure(params: SamplingParams, logits: Tensor, context: Context, nodes: Nodes) -> Tensor:
    """Scores [1, 1, V] after a node; NaN if a callback raises, and the row has the error."""
    try:
        return params.scores(logits, context, nodes)
    except Exception as error:
        context.rows[0].failure = error
        return torch.full_like(logits, torch.nan, dtype=torch.float32)


class Sampled(NamedTuple):
    """What is said after each node.

    Attributes:
        tokens: the tokens, [B, N] int64.
        logits: after each node, [B, N, V].
        scores: what the sampling parameters made of them, [B, N, V], without noise; None if no row keeps anything.
        admitted: what a lossy rule says of the nodes; None without one.
    """

    tokens: Tensor
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


def _context(params: SamplingParams, rows: Sequence[Sequenced], device: torch.device) -> Context:
    seeds = first = prefixes = None
    if params.draws:
        keys = [[row.seed, len(row.prompt) + len(row.tokens)] for row in rows]
        seeds, first = torch.tensor(keys, dtype=torch.int64, device=device).unbind(1)
    if params.reads:
        prefixes = [_prefix(row, device) for row in rows]
    return Context(rows=rows, seeds=seeds, first=first, prefixes=prefixes)


def _prefix(row: Sequenced, device: torch.device) -> Tensor:
    prompt = (row.prompt if row.padded is None else row.padded).to(device)
    return torch.cat([prompt, torch.tensor(row.tokens, dtype=prompt.dtype, device=device)])


def scores_of(row: Sequenced, logits: Tensor) -> Tensor:
    """The scores [V] whose greatest a row says next, as it is written now, noise included; `logits` are [V]."""
    logits = logits[None, None]
    if row.grammar is not None:
        logits = TokenBitmask([row.grammar], 1, logits.device).on(logits, None)
    context, ends = _context(row.sampling_params, [row], logits.device), _ends(logits[:, 0])
    return _drawn(row.sampling_params, row.sampling_params.scores(logits, context, ends), context, ends)[0, 0]


def _ends(logits: Tensor) -> Nodes:
    """Roots that stand for the last tokens of rows, [B, 1]; nobody asks what these are."""
    tree = root_tree(torch.zeros(len(logits), dtype=torch.int64, device=logits.device))
    return Nodes(tree=tree, ancestors=ancestor_mask(tree.parents, 0))
