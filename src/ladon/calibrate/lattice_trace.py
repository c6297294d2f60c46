"""A recorded trace: at every position of a model's own answers, what its heads offered and what was then said.

Shapes: P positions, R rows (answers), K depths (one per head), C candidates, G temperatures of the grid.

All that `ladon calibrate` fits or simulates is computed from such a trace, without the model. Probabilities under any
temperature need the full softmax's normaliser, which the candidates alone do not give: it is kept on a grid of
temperatures, between which it is smooth. Hit rates, by which fixed trees are chosen, are shares of its ranks.

It is recorded (`record`) while the target decodes plainly: at every token of its answers the heads say what they guess.
Heads, or hidden corrections, that read the tokens before their guesses are given the true ones, so they speak when an
answer has ended. `probe` is a quick look at heads by the same means.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ladon.config import HIDDEN, MARKOV, PRODUCT, DecoderOptions
from ladon.decoder.request import end_ids
from ladon.drafting.head_chaining import own_joint
from ladon.drafting.proposer import Proposer
from ladon.engine.engine import Engine
from ladon.engine.sequence import Row
from ladon.errors import InputError
from ladon.heads import Heads
from ladon.heads.correction import MarkovCorrection
from ladon.target.target import Target
from ladon.tree_size.observer import TreeSizes
from ladon.trees.lattice import Correction, outside
from ladon.trees.token_tree import TokenTree, root_tree
from ladon.util.tensors import with_tensors

FORMAT = "ladon-lattice-trace"
VERSION = "2"
GRID = tuple(2.0 ** (quarter / 4) for quarter in range(-8, 9))  # temperatures 1/4 to 4
_TENSORS = ("tokens", "logits", "log_normalizers", "roots", "truth", "row_starts")
_OPTIONAL = ("gates",)
TOO_FEW = 0.05  # trained heads are right on a third of the tokens or more, heads of another model on next to none
_TOKENS = 20
_PROMPTS = (
    "The capital of France is",
    "Once upon a time, there was a",
    "To make a cup of tea, first",
    "def read_lines(path):\n",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class LatticeTrace:
    """Positions of all rows, one row after the other; a row's positions are in the order of its answer.

    A position is an answer token after which there is another one: the root of the tree that a decode step starting
    there would verify.

    Attributes:
        tokens: each head's best candidates, [P, K, C] int32, best first.
        logits: their logits as the head gave them, [P, K, C] float32.
        log_normalizers: log of the sum over the head's vocabulary of exp((logit - greatest logit) / T), for each T of
            `GRID`, [P, K, G] float32.
        roots: the answer's token at the position, [P] int32.
        truth: the token that the model itself said k places after the root, [P, K] int32; -1 past the answer's end.
        row_starts: first position of each row, and P at the end, [R + 1] int64.
        gates: what a gated Markov correction multiplies its strengths by, [P, K] float32; None: 1 everywhere.
        heads: hash of the heads' weights (`Heads.weights_hash`).
        joint: "product", or "paths" or "hidden" if heads or their correction have read the tokens before their guesses:
            candidates are then those after the true tokens, and mean nothing where the truth is not known.
        about: what was recorded: model, dtype, prompts; JSON values.
        correction: the heads' Markov correction, as `ladon.trees.lattice.conditioned` takes it, where it is still to be
            applied to what they offered; it stays with the heads and is not saved. None: nothing is.
    """

    tokens: Tensor
    logits: Tensor
    log_normalizers: Tensor
    roots: Tensor
    truth: Tensor
    row_starts: Tensor
    gates: Tensor | None = None
    heads: str = ""
    joint: str = PRODUCT
    about: Mapping[str, Any] = field(default_factory=dict)
    correction: Correction | None = None

    @property
    def num_positions(self) -> int:
        """P."""
        return self.tokens.shape[0]

    @property
    def num_heads(self) -> int:
        """K."""
        return self.tokens.shape[1]

    @property
    def num_candidates(self) -> int:
        """C."""
        return self.tokens.shape[2]

    @property
    def num_rows(self) -> int:
        """R."""
        return len(self.row_starts) - 1

    def ranks(self) -> Tensor:
        """The rank that each head gives the truth, from 0: [P, K] int64; C if it is no candidate, -1 if not known."""
        right = self.tokens == self.truth[:, :, None]
        ranks = torch.where(right.any(-1), right.int().argmax(-1), self.num_candidates)
        return ranks.masked_fill(self.truth < 0, -1)

    def log_probs(self, depth: int, temperature: float = 1.0) -> Tensor:
        """Log-probabilities of one head's candidates under the full softmax at a temperature.

        Args:
            depth: of the candidates, from 1.
            temperature: by which the logits are divided. Between two temperatures of `GRID` the normaliser is that of
                a cubic through the four nearest ones (within 0.001 for logits that spread over 30).

        Returns:
            [P, C] float32; NaN logits become -inf, as in `lattice.from_logits`.

        Raises:
            InputError: a temperature outside the grid.
        """
        if not GRID[0] <= temperature <= GRID[-1]:
            raise InputError(
                f"temperature {temperature!r} is outside what a trace holds; give {GRID[0]:g} to {GRID[-1]:g}"
            )
        normalizer = self.log_normalizers[:, depth - 1] @ _cubic_weights(temperature)
        logits = self.logits[:, depth - 1] / temperature
        log_probs = (logits - logits[:, :1] - normalizer[:, None]).clamp(max=0.0)
        return log_probs.nan_to_num(nan=-torch.inf, neginf=-torch.inf)

    def given_the_truth(self) -> LatticeTrace:
        """What the heads offer after the true tokens, corrected by the one just before each guess.

        Returns:
            The same trace with candidates in their corrected order; the normalisers are those of the candidates and
            one cell for all other tokens. Where the truth is not known, candidates mean nothing. A trace without a
            correction is as it is.
        """
        if self.correction is None:
            return self
        given = torch.stack([self.log_probs(depth) for depth in range(1, self.num_heads + 1)], dim=1)
        before = torch.cat([self.roots[:, None], self.truth[:, :-1]], dim=1).clamp(min=0).long()
        added = self.correction(before[:, :, None], self.tokens.long())[:, :, 0].cpu()
        scores = given + (added if self.gates is None else added * self.gates[..., None])
        logits, order = scores.sort(dim=-1, descending=True, stable=True)
        rest, most = outside(given), logits[:, :, 0]
        grid = torch.tensor(GRID, dtype=torch.float32, device="cpu")
        apart = (logits - most[..., None])[..., None] / grid
        normalizers = torch.logaddexp(apart.logsumexp(-2), (rest - most)[..., None] / grid)
        tokens = self.tokens.gather(-1, order)
        return replace(self, tokens=tokens, logits=logits, log_normalizers=normalizers, correction=None)

    def of_rows(self, rows: Sequence[int]) -> LatticeTrace:
        """The trace of some rows, in the order given."""
        starts = self.row_starts.tolist()
        parts = [torch.arange(starts[row], starts[row + 1], device="cpu") for row in rows]
        index = torch.cat([torch.arange(0, device="cpu"), *parts])
        chosen = with_tensors(self, lambda table: table if table is self.row_starts else table[index])
        return replace(chosen, row_starts=torch.tensor([0, *map(len, parts)], device="cpu").cumsum(0))

    def save(self, path: str | Path) -> None:
        """Write a safetensors file; whoever looks sees the old file or the new one."""
        target = Path(path)
        partial = target.with_name(f"{target.name}.partial")
        about = {"format": FORMAT, "version": VERSION, "heads": self.heads, "joint": self.joint}
        about["about"] = json.dumps(dict(self.about))
        tensors = {name: getattr(self, name) for name in (*_TENSORS, *_OPTIONAL)}
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}
        try:
            save_file(tensors, partial, metadata=about)
            partial.replace(target)
        except (OSError, SafetensorError) as error:
            partial.unlink(missing_ok=True)
            raise InputError(f"cannot write the trace {target}: {error}; give another place") from error

    @classmethod
    def load(cls, path: str | Path) -> LatticeTrace:
        """Read what `save` wrote.

        Raises:
            InputError: the file cannot be read, or is no trace of this version.
        """
        again = "record it again with `ladon calibrate --trace`"
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise InputError(f"cannot read the trace {path}: {error}; {again}") from error
        is_whole = tensors.keys() - set(_OPTIONAL) == set(_TENSORS)
        if (metadata.get("format"), metadata.get("version")) != (FORMAT, VERSION) or not is_whole:
            raise InputError(f"{path} is no {FORMAT} file of version {VERSION}; {again}")
        named = {"heads": metadata["heads"], "joint": metadata.get("joint", PRODUCT)}
        return cls(**tensors, **named, about=json.loads(metadata["about"]))


def _cubic_weights(temperature: float) -> Tensor:
    """What each temperature of the grid weighs in Lagrange's cubic in log T through the four nearest ones, [G]."""
    at = math.log2(temperature / GRID[0]) / math.log2(GRID[1] / GRID[0])
    first = min(max(math.floor(at) - 1, 0), len(GRID) - 4)
    places = range(first, first + 4)
    weights = torch.zeros(len(GRID), dtype=torch.float32, device="cpu")
    for i in places:
        weights[i] = math.prod((at - j) / (i - j) for j in places if j != i)
    return weights


def hit_rates(ranks: Tensor, num_candidates: int) -> list[list[float]]:
    """How often each rank of each head is right, given that the shallower heads' counted candidates held the truth.

    Args:
        ranks: [P, K].
        num_candidates: C.

    Returns:
        [K][C], each in [0, 1]; 0 where no position counts.
    """
    return _shares(ranks, on_true_path(ranks, num_candidates), num_candidates)


def marginal_hit_rates(ranks: Tensor, num_candidates: int) -> list[list[float]]:
    """The same over all positions, whatever the shallower heads guessed."""
    return _shares(ranks, ranks >= 0, num_candidates)


def on_true_path(ranks: Tensor, num_candidates: int) -> Tensor:
    """Where the truth of a depth is known, and that of each shallower depth is a candidate: [P, K] bool."""
    held = (ranks >= 0) & (ranks < num_candidates)
    before = torch.cat([torch.ones_like(held[:, :1]), held[:, :-1]], dim=1).cumprod(1).bool()
    return before & (ranks >= 0)


def _shares(ranks: Tensor, counted: Tensor, num_candidates: int) -> list[list[float]]:
    rates = []
    for column, counts in zip(ranks.T, counted.T, strict=True):
        hits = torch.bincount(column[counts], minlength=num_candidates + 1)[:num_candidates]
        rates.append([round(rate, 6) for rate in (hits / counts.sum().clamp(min=1)).tolist()])
    return rates


def record(
    model: PreTrainedModel,
    heads: Heads,
    prompts: Sequence[Tensor],
    *,
    max_new_tokens: int,
    batch_size: int = 16,
    num_candidates: int = DecoderOptions().num_candidates,
    about: Mapping[str, Any] | None = None,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> LatticeTrace:
    """Let `model` answer the prompts greedily, one token per step, and note the heads' candidates at every token.

    The hidden rows are those of decoding itself, so no text is read twice; they are kept until their answer has ended.
    Logits over the vocabulary exist for as many tokens as there are rows in a batch at a time.

    Args:
        model: the target.
        heads: its heads.
        prompts: 1-D token ids each, without padding.
        max_new_tokens: tokens per answer at most; an end-of-sequence token ends one earlier.
        batch_size: prompts decoded together.
        num_candidates: C, candidates kept per head.
        about: what the trace should say about itself.
        progress: called with (what, prompts answered, prompts in all).

    Raises:
        InputError: a prompt is empty or fills the model's context.
        UnsupportedModelError: the model cannot decode with Ladon.
    """
    heads = heads.bound(model, force=True)
    target = Target(model)
    rows = [row_of(index, prompt, max_new_tokens, target) for index, prompt in enumerate(prompts)]
    recorder = _Recorder(heads, num_candidates, batch_size)
    engine = Engine(target, recorder, TreeSizes(1, target.device), max_rows=batch_size)
    joined: list[Row] = []
    done = 0
    for step in engine.run(rows):
        joined += step.joined
        ended = sum(row.finished for row in step.rows)
        if ended:
            done += ended
            progress("recording the heads' guesses", done, len(rows))
    numbers = {row: number for number, row in enumerate(joined)}
    answers = [recorder.answers[numbers[row]] for row in rows]
    return _assemble(answers, [row.tokens for row in rows], heads, about or {})


class _Recorder(Proposer):
    """A proposer that drafts nothing, and keeps the heads' candidates at every token of the answers."""

    def __init__(self, heads: Heads, num_candidates: int, chunk: int) -> None:
        self._heads, self._num_candidates, self._chunk = heads, min(num_candidates, heads.vocab_size), chunk
        self._rows: list[_Answer] = []
        self._joined = 0
        # Of each answer, by its number: tokens, logits, log-normalisers, roots; gates if there are any.
        self.answers: dict[int, list[Tensor]] = {}

    def join(self, prompts: Sequence[Tensor], hidden: Tensor, states: Sequence[Tensor] = ()) -> None:
        """Rows are numbered in the order in which they join."""
        self._rows += [_Answer(self._joined + place) for place in range(len(prompts))]
        self._joined += len(prompts)

    def propose(self, hidden: Tensor, root: Tensor, max_nodes: int) -> TokenTree:
        """The root alone; what the heads will guess from is noted."""
        for row, state, token in zip(self._rows, hidden, root, strict=True):
            row.hidden.append(state)
            row.roots.append(token)
        return root_tree(root)

    def keep(self, rows: Sequence[int]) -> None:
        """The rows at these places stay; the answers of the others are whole, and the heads look at them."""
        kept = [self._rows[place] for place in rows]
        for answer in self._rows:
            if answer not in kept:
                self._look_at(answer)
        self._rows = kept

    def _look_at(self, answer: _Answer) -> None:
        roots, states = torch.stack(answer.roots), torch.stack(answer.hidden)
        following = functional.pad(roots, (0, self._heads.num_heads - 1)).unfold(0, self._heads.num_heads, 1)
        parts = (torch.split(whole, self._chunk) for whole in (states, following))
        found = [
            candidate_tables(self._heads, hidden, tokens, self._num_candidates)
            for hidden, tokens in zip(*parts, strict=True)
        ]
        tables = [torch.cat(tables).cpu() for tables in zip(*found, strict=True)]
        correction = self._heads.correction
        gates = correction.gates(states) if isinstance(correction, MarkovCorrection) else None
        of_gates = [] if gates is None else [gates.float().cpu()]
        self.answers[answer.number] = [*tables, roots.int().cpu(), *of_gates]


@dataclass(eq=False, slots=True)
class _Answer:
    """A row under way: its number, and of each token so far the hidden row before it [H] and the token itself []."""

    number: int
    hidden: list[Tensor] = field(default_factory=list)
    roots: list[Tensor] = field(default_factory=list)


def candidate_tables(
    heads: Heads, hidden: Tensor, following: Tensor, num_candidates: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The heads' best candidates after true tokens, as `LatticeTrace` keeps them.

    Args:
        heads: bound to their model; without their correction, if it is Markov's.
        hidden: [P, H], as `Heads.forward` takes it.
        following: [P, K] int64, the K tokens after each, as `Heads.forward` takes them.
        num_candidates: C.

    Returns:
        tokens [P, K, C] int32, logits [P, K, C] float32, log-normalisers [P, K, G] float32.
    """
    hidden_joint = own_joint(heads) == HIDDEN
    logits = (heads.corrected if hidden_joint else heads)(hidden, following).float()
    top, entries = logits.topk(min(num_candidates, logits.shape[-1]), dim=-1)
    logits = logits - top[..., :1]
    normalizers = torch.stack([(logits / temperature).exp().sum(-1).log() for temperature in GRID], dim=-1)
    token_ids = heads.token_ids
    return (entries if token_ids is None else token_ids[entries]).int(), top, normalizers


def row_of(index: int, prompt: Tensor, max_new_tokens: int, target: Target) -> Row:
    """A row for a prompt, which ends at the model's own end tokens.

    Raises:
        InputError: the prompt is empty or fills the model's context.
    """
    if len(prompt) == 0:
        raise InputError(f"prompt {index + 1} has no tokens; give some text to continue")
    limit = target.context_limit
    room = max_new_tokens if limit is None else min(max_new_tokens, limit - len(prompt))
    if room < 1:
        raise InputError(
            f"prompt {index + 1} has {len(prompt)} tokens, the model's context limit is {limit}; shorten it"
        )
    ends = end_ids(target.model.generation_config.eos_token_id)
    return Row(prompt=prompt, max_new_tokens=room, is_stop=ends.__contains__)


def _assemble(
    recorded: Sequence[Sequence[Tensor]], answers: Sequence[Sequence[int]], heads: Heads, about: Mapping[str, Any]
) -> LatticeTrace:
    """Put what was recorded of each answer together; its last token had nothing to follow it and is left out."""
    tokens, logits, normalizers, roots, *gates = (
        torch.cat([table[:-1] for table in tables]) for tables in zip(*recorded, strict=True)
    )
    return LatticeTrace(
        tokens=tokens,
        logits=logits,
        log_normalizers=normalizers,
        roots=roots,
        truth=_following(answers, heads.num_heads),
        row_starts=torch.tensor([0, *(len(answer) - 1 for answer in answers)], device="cpu").cumsum(0),
        gates=gates[0] if gates else None,
        heads=heads.weights_hash,
        joint=PRODUCT if own_joint(heads) == MARKOV else own_joint(heads),
        about=about,
        correction=correction_of(heads),
    )


def _following(answers: Sequence[Sequence[int]], num_heads: int) -> Tensor:
    """The `num_heads` tokens after each token but the last of every answer, [P, K] int32; -1 where there is none."""
    padded = torch.tensor(list(chain.from_iterable([*answer, *[-1] * num_heads] for answer in answers)), device="cpu")
    windows = padded.unfold(0, num_heads + 1, 1)
    return windows[(windows[:, 0] >= 0) & (windows[:, 1] >= 0), 1:].int()


def correction_of(heads: Heads) -> Correction | None:
    """The heads' Markov correction for traces, which lie on the CPU in float32 and hold its gates; None for none."""
    correction = heads.correction
    return copy.deepcopy(correction).cpu().float().among if isinstance(correction, MarkovCorrection) else None


def probe(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, heads: Heads) -> float:
    """How often head 1's best token is what the model goes on to say: a quick look at whether heads belong to it.

    The model continues a few short prompts by 20 tokens each, greedily; head 1 is asked at every position of these
    answers.

    Args:
        model: the target, in evaluation mode.
        tokenizer: its tokenizer.
        heads: bound to the model.

    Returns:
        A share, 0 to 1. Under `TOO_FEW` the heads guess next to nothing right.

    Raises:
        UnsupportedModelError: the model cannot decode with Ladon.
    """
    prompts = [tokenizer(text, return_tensors="pt")["input_ids"][0] for text in _PROMPTS]
    ranks = record(model, heads, prompts, max_new_tokens=_TOKENS).ranks()[:, 0]
    return float((ranks == 0).double().mean()) if len(ranks) else 0.0
