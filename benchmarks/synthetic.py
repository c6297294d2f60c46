"""Heads of any quality, imagined: the truth is drafted at the depths and ranks at which measured heads have it.

A model of random weights has no heads that guess well, but what it would gain from such heads can be measured all the
same: its plain answers are recorded, and then drafted with the hit rates of other heads. What is decoded stays what the
model says; only how much of it is accepted, and what that costs, is what the imagined heads would bring.

Shapes: P recorded answers, T places in an answer, K depths, C candidates.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ladon.decoder.decoder import Decoder
from ladon.drafting.proposer import Proposer, TreeBuilder, tree_builder
from ladon.errors import InputError
from ladon.heads import Heads
from ladon.sampling.acceptance import Accepted
from ladon.trees import lattice
from ladon.trees.lattice import Lattice
from ladon.trees.token_tree import TokenTree, root_tree
from ladon.util.observer import SILENT, Observer

Prompt = tuple[int, ...]


class SyntheticDrafts:
    """What the imagined heads say at every place of the recorded answers.

    At each place and depth the true token stands at rank r as often as the hit rates say, or at none; wrong tokens
    stand elsewhere. Depths are independent of each other, as the hit rates, which are given that the depths before
    held the truth, make them. The draws depend on the seed, the prompt and the place alone: not on who else is
    decoded, nor in which steps.

    Attributes:
        num_heads: K.
        num_candidates: C.
    """

    def __init__(
        self,
        answers: Mapping[Prompt, Sequence[int]],
        hit_rates: Sequence[Sequence[float]],
        *,
        vocab_size: int,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        """Draw everything at once.

        Args:
            answers: plain decoding's new tokens after each prompt, at least one each.
            hit_rates: [K][C], how often each rank holds the truth, given that the depths before did; in any order, for
                a lattice needs the likeliest first, and ranks are renamed to that.
            vocab_size: V, more than C.
            seed: of the draws.
            device: where drafts are needed.

        Raises:
            InputError: rates that are no probabilities, or of several lengths; too small a vocabulary; no answer.
        """
        rates = _checked_rates(hit_rates).sort(dim=1, descending=True).values
        self.num_heads, self.num_candidates = rates.shape
        if vocab_size <= self.num_candidates:
            raise InputError(f"{vocab_size} tokens cannot fill {self.num_candidates} ranks with wrong ones; give fewer")
        if not answers or not all(answers.values()):
            raise InputError("no recorded answer, or an empty one; give plain decoding's tokens for every prompt")
        places = max(map(len, answers.values())) + self.num_heads + 1  # the last step may go past the end by so many
        drafts = [_drafted(prompt, answer, rates, places, vocab_size, seed) for prompt, answer in answers.items()]
        self._tokens = torch.stack(drafts).to(device)
        self._log_probs = rates.log().float().to(device)
        self._number = {prompt: number for number, prompt in enumerate(answers)}

    def number_of(self, prompt: Tensor) -> int:
        """Which of the recorded answers belongs to a prompt, [T] token ids.

        Raises:
            InputError: none does.
        """
        number = self._number.get(tuple(prompt.tolist()))
        if number is None:
            raise InputError("a prompt without a recorded answer; record what plain decoding says after it first")
        return number

    def at(self, numbers: Tensor, places: Tensor) -> Lattice:
        """The candidates after root number `places` [B] of the answers `numbers` [B]."""
        tokens = self._tokens[numbers, places.clamp(max=self._tokens.shape[1] - 1)]
        return Lattice(
            tokens=tokens[:, :, None], log_probs=self._log_probs[None, :, None].expand(len(tokens), -1, 1, -1)
        )


def _checked_rates(hit_rates: Sequence[Sequence[float]]) -> Tensor:
    """The rates as a table [K, C] of float64."""
    widths = {len(ranks) for ranks in hit_rates}
    if len(widths) != 1 or 0 in widths:
        raise InputError(
            f"hit rates of {len(hit_rates)} depths with {sorted(widths)} ranks; give as many ranks for each"
        )
    rates = torch.tensor([list(map(float, ranks)) for ranks in hit_rates], dtype=torch.float64, device="cpu")
    if not bool(((rates >= 0) & (rates.sum(1, keepdim=True) <= 1 + 1e-6)).all()):
        raise InputError(
            "hit rates are no probabilities: each must be 0 or more, and those of a depth sum to at most 1"
        )
    return rates


def _drafted(prompt: Prompt, answer: Sequence[int], rates: Tensor, places: int, vocab_size: int, seed: int) -> Tensor:
    """Candidate tokens after each root of one answer, [T, K, C]."""
    num_heads, num_candidates = rates.shape
    generator = torch.Generator("cpu").manual_seed(zlib.crc32(f"{seed} {prompt}".encode()))  # it takes 32 bits
    drawn = torch.rand(places, num_heads, 1, generator=generator, dtype=torch.float64, device="cpu")
    rank = (drawn >= rates.cumsum(1)).sum(-1)  # [T, K]; C: the truth is not among the candidates
    padded = torch.tensor([*answer, *[answer[-1]] * (places + num_heads)], device="cpu")
    truth = padded[torch.arange(places, device="cpu")[:, None] + torch.arange(1, num_heads + 1, device="cpu")]
    # Consecutive tokens around the truth: distinct, and none but that at the drawn rank is right.
    return (truth[:, :, None] + torch.arange(num_candidates, device="cpu") - rank[:, :, None]) % vocab_size


class SyntheticProposer(Proposer):
    """Drafts what the imagined heads say; rows join and leave as with any proposer.

    Attributes:
        build: makes trees of the candidates.
    """

    def __init__(
        self, drafts: SyntheticDrafts, build: TreeBuilder, observer: Observer = SILENT, heads: Heads | None = None
    ) -> None:
        """`build` makes trees of the candidates; `heads` run at each draft, for the time that they take alone."""
        self._drafts, self.build, self._observer, self._heads = drafts, build, observer, heads
        self._numbers = self._places = torch.zeros(0, dtype=torch.long, device="cpu")

    def join(self, prompts: Sequence[Tensor], hidden: Tensor, states: Sequence[Tensor] = ()) -> None:
        """Look up the new rows' answers; their first root is the first token of it."""
        numbers = torch.tensor([self._drafts.number_of(prompt) for prompt in prompts], device=hidden.device)
        self._numbers = torch.cat([self._numbers.to(hidden.device), numbers])
        self._places = torch.cat([self._places.to(hidden.device), torch.zeros_like(numbers)])

    def propose(self, hidden: Tensor, root: Tensor, max_nodes: int) -> TokenTree:
        """The tree over the imagined candidates."""
        if max_nodes == 1:
            return root_tree(root)
        with self._observer.stage("heads"):
            if self._heads is not None:
                logits = self._heads.draft(hidden, root)
                lattice.from_logits(logits, self._drafts.num_candidates, token_ids=self._heads.token_ids)
            candidates = self._drafts.at(self._numbers, self._places)
        with self._observer.stage("growth"):
            return self.build(candidates, root, max_nodes)

    def observe(self, accepted: Accepted, hidden: Tensor) -> None:
        """Each row goes on by the tokens that it emitted."""
        self._places = self._places + accepted.count

    def keep(self, rows: Sequence[int]) -> None:
        """Forget the rows that have left."""
        kept = torch.tensor(rows, dtype=torch.long, device=self._places.device)
        self._numbers, self._places = self._numbers[kept], self._places[kept]


class SyntheticDecoder(Decoder):
    """A decoder whose trees come from imagined heads, at the cost of real ones of whatever weights."""

    def __init__(self, model: PreTrainedModel, heads: Heads, drafts: SyntheticDrafts, **options: Any) -> None:
        """`heads` run at each draft; `options` are those of `Decoder`."""
        super().__init__(model, heads, **options)
        self._drafts = drafts

    def _proposer(self, observer: Observer) -> Proposer:
        if self.heads is None or self._plan.tree == "off":
            return super()._proposer(observer)
        return SyntheticProposer(self._drafts, tree_builder(self._plan.tree), observer, self.heads)
