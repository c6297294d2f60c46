"""Records a trace: the target decodes plainly, and at every token the heads say what they would have drafted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ladon.accept import Accepted
from ladon.calibrate.lattice_trace import GRID, LatticeTrace
from ladon.config import HIDDEN, PRODUCT, DecoderOptions
from ladon.engine import Engine
from ladon.errors import InputError
from ladon.heads import Heads
from ladon.heads.hidden_correction import HiddenCorrection
from ladon.requests import end_ids
from ladon.rows import Row
from ladon.stats import DecodeStats, StageClock
from ladon.target import Target
from ladon.tree import TokenTree, root_tree

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
    """Let `model` answer the prompts greedily, one token per step, and note the heads' candidates at every step.

    Of heads with a hidden correction the candidates are those after the true tokens, which are known when the answers
    are: until then the hidden rows are kept, on the host.

    The hidden rows are those of decoding itself, so no text is read twice; logits over the vocabulary exist for one
    step of one batch at a time.

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
    recorder, clock = _Recorder(heads, num_candidates), StageClock({}, enabled=False, device=target.device)
    engine = Engine(target, recorder, budget=1, stats=DecodeStats(), clock=clock, max_rows=batch_size)
    joined: list[Row] = []
    done = 0
    for step in engine.run(rows):
        joined += step.joined
        ended = sum(row.finished for row in step.rows)
        if ended:
            done += ended
            progress("recording the heads' guesses", done, len(rows))
    place_of = {row: place for place, row in enumerate(rows)}
    places = torch.tensor([place_of[row] for row in joined])
    return _assemble(recorder, places, [row.tokens for row in rows], about or {}, batch_size)


class _Recorder:
    """A proposer that drafts nothing, and keeps the candidates that heads would have drafted from.

    With a hidden correction it keeps what they will be made from, the hidden rows.
    """

    def __init__(self, heads: Heads, num_candidates: int) -> None:
        self.heads, self.num_candidates = heads, min(num_candidates, heads.vocab_size)
        self.joint = HIDDEN if isinstance(heads.correction, HiddenCorrection) else PRODUCT
        self._rows = torch.arange(0)
        self._joined = 0
        self.steps: list[list[Tensor]] = []  # of each: rows; tokens, logits, log-normalisers, or hidden rows; roots

    def join(self, prompts: Sequence[Tensor], hidden: Tensor) -> None:
        """Rows are numbered in the order in which they join."""
        self._rows = torch.cat([self._rows, torch.arange(self._joined, self._joined + len(prompts))])
        self._joined += len(prompts)

    def propose(self, hidden: Tensor, root: Tensor, max_nodes: int) -> TokenTree:
        """The root alone; the heads' candidates after it are noted."""
        if self.joint == HIDDEN:
            tables: Sequence[Tensor] = [hidden]
        else:
            tables = candidate_tables(self.heads, hidden, root, self.num_candidates)
        self.steps.append([self._rows, *(table.cpu() for table in tables), root.int().cpu()])
        return root_tree(root)

    def observe(self, accepted: Accepted, hidden: Tensor) -> None:
        """Nothing to learn."""

    def keep(self, rows: Sequence[int]) -> None:
        """The rows at these places stay."""
        self._rows = self._rows[list(rows)]


def candidate_tables(heads: Heads, hidden: Tensor, root: Tensor, num_candidates: int) -> tuple[Tensor, Tensor, Tensor]:
    """The heads' best candidates after each root, as `LatticeTrace` keeps them.

    Args:
        heads: bound to their model.
        hidden: [B, H], as `Heads.draft` takes it.
        root: [B] int64.
        num_candidates: C.

    Returns:
        tokens [B, K, C] int32, logits [B, K, C] float32, log-normalisers [B, K, G] float32.
    """
    return _tables(heads.draft(hidden, root), heads.token_ids, num_candidates)


@torch.no_grad()
def tables_after_truth(
    heads: Heads, hidden: Tensor, roots: Tensor, truth: Tensor, num_candidates: int, batch_size: int
) -> list[Tensor]:
    """What `candidate_tables` gives, of guesses corrected by the true token before each.

    Args:
        heads: bound to their model.
        hidden: [P, H], on the host.
        roots: [P].
        truth: what followed them, [P, K]; -1 where nothing did, and guesses after that mean nothing.
        num_candidates: C.
        batch_size: positions whose logits are in memory together.
    """
    device = next(heads.parameters()).device
    following = torch.cat([roots[:, None], truth[:, :-1]], dim=1).clamp(min=0).long()
    parts = [
        _tables(heads.corrected(rows.to(device), tokens.to(device)), heads.token_ids, num_candidates)
        for rows, tokens in zip(torch.split(hidden, batch_size), torch.split(following, batch_size), strict=True)
    ]
    return [torch.cat([table.cpu() for table in tables]) for tables in zip(*parts, strict=True)]


def _tables(logits: Tensor, token_ids: Tensor | None, num_candidates: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, logits and log-normalisers of the best candidates, from logits [B, K, D]."""
    logits = logits.float()
    top, entries = logits.topk(min(num_candidates, logits.shape[-1]), dim=-1)
    logits = logits - top[..., :1]
    normalizers = torch.stack([(logits / temperature).exp().sum(-1).log() for temperature in GRID], dim=-1)
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
    recorder: _Recorder, places: Tensor, answers: Sequence[Sequence[int]], about: Mapping[str, Any], batch_size: int
) -> LatticeTrace:
    """Sort the steps by row and add what was said; a row's last token had nothing to follow it and is left out.

    `places` says which answer belongs to each row, as the recorder has numbered them.
    """
    rows, *tables = (torch.cat(parts) for parts in zip(*recorder.steps, strict=True))
    rows = places[rows]
    order = rows.argsort(stable=True)
    is_last = torch.ones_like(order, dtype=torch.bool)
    is_last[:-1] = rows[order].diff() > 0
    *tables, roots = (table[order[~is_last]] for table in tables)
    heads, truth = recorder.heads, _following(answers, recorder.heads.num_heads)
    if recorder.joint == HIDDEN:
        tables = tables_after_truth(heads, tables[0], roots, truth, recorder.num_candidates, batch_size)
    tokens, logits, normalizers = tables
    return LatticeTrace(
        tokens=tokens,
        logits=logits,
        log_normalizers=normalizers,
        roots=roots,
        truth=truth,
        row_starts=torch.tensor([0, *(len(answer) - 1 for answer in answers)]).cumsum(0),
        heads=heads.weights_hash,
        about=about,
        joint=recorder.joint,
    )


def _following(answers: Sequence[Sequence[int]], num_heads: int) -> Tensor:
    """The `num_heads` tokens after each token but the last of every answer, [P, K] int32; -1 where there is none."""
    padded = torch.tensor(list(chain.from_iterable([*answer, *[-1] * num_heads] for answer in answers)))
    windows = padded.unfold(0, num_heads + 1, 1)
    return windows[(windows[:, 0] >= 0) & (windows[:, 1] >= 0), 1:].int()
