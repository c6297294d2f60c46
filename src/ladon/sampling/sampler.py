"""Logits to tokens: what the target itself says after each node, by the sampling parameters of each sequence.

Sequences of one step may have several kinds of parameters; each kind is asked once, for all its sequences. What a
constraint forbids has a logit of -inf before that. Greedy takes the greatest score; sampling adds Gumbel noise first.

Shapes: B sequences, b of them with the same parameters, N nodes, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from ladon.constraints.bitmask import TokenMasks
from ladon.constraints.state import Guide
from ladon.errors import InputError
from ladon.sampling.gumbel import gumbel_noise
from ladon.sampling.lossy import Admitted, Rule, admitted, admitted_by_picks
from ladon.trees.token_tree import TokenTree, ancestor_mask, node_depths, root_tree

NO_TOKEN = -1  # the pick where a law is none, as that of NaN logits: equal to no node's token
DEAD_END = -2  # the pick where a law leaves nothing of what a row's constraint allows


@dataclass(frozen=True, kw_only=True, slots=True)
class Context:
    """What is known of a step's rows before its forward.

    Attributes:
        rows: the rows, b of them.
        seeds: of their noise, [b] int64; None if nothing is drawn.
        first: the position, among a row's real tokens, of the token after its root, [b] int64; None likewise.
        prefixes: each row's token ids up to its root, [T], padding of the prompt included; None if nobody reads them.
    """

    rows: Sequence[Sequenced]
    seeds: Tensor | None = None
    first: Tensor | None = None
    prefixes: list[Tensor] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Nodes:
    """The trees of a step's rows, as they were verified.

    Attributes:
        tree: the trees, [b, N].
        ancestors: who sees whom, [b, N, N] bool.
    """

    tree: TokenTree
    ancestors: Tensor

    @property
    def depths(self) -> Tensor:
        """Of the nodes, [b, N]."""
        return node_depths(self.ancestors)


class Picker(Protocol):
    """The law of a row."""

    @property
    def draws(self) -> bool:
        """Whether it needs noise, and so the rows' seeds."""

    @property
    def reads(self) -> bool:
        """Whether it needs the rows' token ids."""

    @property
    def is_plain(self) -> bool:
        """Whether it must be asked once per emitted token, in order: then nothing is drafted."""

    def law(self, logits: Tensor, context: Context, nodes: Nodes) -> Tensor:
        """Scores after each node, [b, N, V], from the logits there.

        The greatest is said, or a token drawn from their softmax.
        """


class Sequenced(Protocol):
    """What a law may depend on besides the logits: a row, as far as it is written."""

    prompt: Tensor
    padded: Tensor | None
    number: int
    seed: int
    tokens: list[int]
    picker: Picker
    guide: Guide | None
    keeps: frozenset[str]


_BLOCK = 64  # entries per block; V is a multiple of it in nearly every model
_MANY = 1 << 17  # logits from which two small searches cost less than one large one


def pick(logits: Tensor) -> Tensor:
    """Greedy picks, [...] int64, of logits [..., V]; the first of equal maxima, as `transformers` takes it.

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


class Greedy:
    """The law of greedy decoding: the likeliest token."""

    draws = reads = is_plain = False

    def law(self, logits: Tensor, context: Context, nodes: Nodes) -> Tensor:
        """The logits, in float32 as `generate` compares them; see `ladon.sampling.sampler.Picker`."""
        return logits.float()


GREEDY = Greedy()


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampler:
    """Picks drawn from the target's distribution, as `generate` makes it: temperature, then top_k, then top_p.

    Attributes:
        temperature: the logits are divided by it; above 0.
        top_k: only the likeliest so many tokens, and those that tie with the last of them; 0 for no bound.
        top_p: only the likeliest tokens whose predecessors together have a probability below it; 1 for no bound.
    """

    draws: ClassVar[bool] = True
    reads: ClassVar[bool] = False
    is_plain: ClassVar[bool] = False

    temperature: float
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        """Raise `InputError` for settings that define no distribution."""
        check_settings(self.temperature, self.top_k, self.top_p)
        if self.temperature == 0:
            raise InputError("temperature is 0, which is greedy decoding; give no sampler for it")

    def law(self, logits: Tensor, context: Context | None = None, nodes: Nodes | None = None) -> Tensor:
        """What is left of logits [..., V]; see `ladon.sampling.sampler.Picker`."""
        work = torch.float64 if logits.dtype == torch.float64 else torch.float32
        return _cut(logits.to(work) / self.temperature, self.top_k, self.top_p)


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


def check_settings(temperature: float, top_k: int, top_p: float) -> None:
    """Raise `InputError` unless they are a temperature of 0 (greedy) or more, a count and a probability above 0."""
    if not 0 <= temperature < math.inf:
        raise InputError(f"temperature is {temperature}; give 0 for greedy decoding, or a number above it")
    if top_k < 0:
        raise InputError(f"top_k is {top_k}; give a number of tokens, or 0 for no bound")
    if not 0 < top_p <= 1:
        raise InputError(f"top_p is {top_p}; give a probability above 0, or 1 for no bound")


def _cut(scores: Tensor, top_k: int, top_p: float) -> Tensor:
    """Scores [..., V] with -inf for the tokens that are not sampled from."""
    if 0 < top_k < scores.shape[-1]:
        least = scores.topk(top_k).values[..., -1:]
        scores = scores.masked_fill(scores < least, -torch.inf)
    if top_p < 1:
        ranked, order = scores.sort(stable=True, dim=-1, descending=True)
        probabilities = ranked.softmax(-1)
        beyond = probabilities.cumsum(-1) - probabilities >= top_p
        beyond[..., 0] = False
        scores = scores.masked_fill(beyond.scatter(-1, order, beyond), -torch.inf)
    return scores


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
