"""Records a trace: the target decodes plainly, and at every token of its answers the heads say what they guess.

Heads, or hidden corrections, that read the tokens before their guesses are given the true ones, so they speak when an
answer has ended. `probe` is a quick look at heads by the same means.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ladon.calibrate.lattice_trace import GRID, LatticeTrace
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
from ladon.trees.lattice import Correction
from ladon.trees.token_tree import TokenTree, root_tree

TOO_FEW = 0.05  # trained heads are right on a third of the tokens or more, heads of another model on next to none
_TOKENS = 20
_PROMPTS = (
    "The capital of France is",
    "Once upon a time, there was a",
    "To make a cup of tea, first",
    "def read_lines(path):\n",
)


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
    heads.bind(model, force=True)
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
        row_starts=torch.tensor([0, *(len(answer) - 1 for answer in answers)]).cumsum(0),
        gates=gates[0] if gates else None,
        heads=heads.weights_hash,
        joint=PRODUCT if own_joint(heads) == MARKOV else own_joint(heads),
        about=about,
        correction=correction_of(heads),
    )


def _following(answers: Sequence[Sequence[int]], num_heads: int) -> Tensor:
    """The `num_heads` tokens after each token but the last of every answer, [P, K] int32; -1 where there is none."""
    padded = torch.tensor(list(chain.from_iterable([*answer, *[-1] * num_heads] for answer in answers)))
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
