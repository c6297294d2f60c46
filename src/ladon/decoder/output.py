"""From decoded sequences to what `generate` returns, and to what its streamer gets."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.generation.utils import GenerateDecoderOnlyOutput

from ladon.decoder.request import Request
from ladon.engine.sequence import Row, warn_of_dead_ends
from ladon.engine.stats import DecodeStats
from ladon.engine.step import Step
from ladon.errors import InputError
from ladon.target.prefix_cache import KeptCache


@dataclass
class DecodeOutput(GenerateDecoderOnlyOutput):
    """transformers' output of `return_dict_in_generate`, and what a decoder knows besides.

    Attributes:
        stats: counts and times.
        seeds: of the rows' noise; a row can be drawn again alone with its own.
        complete: of each row, whether its text is whole, as its constraint has it; None without one.
    """

    stats: DecodeStats | None = None
    seeds: Sequence[int] | None = None
    complete: Sequence[bool | None] | None = None


def pack_output(request: Request, stats: DecodeStats) -> Tensor | DecodeOutput:
    """Prompts and new tokens as one tensor [B, T + new], rows that ended earlier padded on the right.

    Warns of rows that their constraint let go no further.
    """
    input_ids, rows, config = request.input_ids, request.rows, request.config
    warn_of_dead_ends(rows)
    pad = getattr(config, "_pad_token_tensor", None)
    pad_id = 0 if pad is None else int(pad)
    longest = max(len(row.tokens) for row in rows)
    new = torch.tensor([row.tokens + [pad_id] * (longest - len(row.tokens)) for row in rows], device=input_ids.device)
    sequences = torch.cat([input_ids, new], dim=1)  # int64, as from `generate`, whatever the prompts were
    if not config.return_dict_in_generate:
        return sequences
    scores, logits = (_kept(rows, name) for name in ("scores", "logits"))
    seeds = tuple(row.seed for row in rows)
    complete = tuple(row.complete for row in rows)
    kept: Any = None  # transformers declares a cache of its own kind
    if rows[0].keeps_past:
        kept = KeptCache([row.past for row in rows if row.past is not None])
    return DecodeOutput(
        sequences=sequences,
        scores=scores,
        logits=logits,
        past_key_values=kept,
        stats=stats,
        seeds=seeds,
        complete=complete,
    )


def _kept(rows: list[Row], name: str) -> tuple[Tensor, ...] | None:
    """What rows have kept, for each new token [B, V]; 0 where a row had ended before. None if they keep no such."""
    if name not in rows[0].keeps:
        return None
    longest = max((row.kept[name] for row in rows), key=len)
    nothing = torch.zeros_like(longest[0])
    padded = [[*row.kept[name], *[nothing] * (len(longest) - len(row.tokens))] for row in rows]
    return tuple(torch.stack(values) for values in zip(*padded, strict=True))


def stream(request: Request, steps: Generator[Step, None, None], streamer: Any) -> None:
    """Take steps until a request's rows have ended; a streamer gets the prompt, each new token by itself, and the end.

    That is what transformers' own `generate` puts, in the same order: [1, T], then [1] for each token.

    Args:
        request: the call.
        steps: decode it; closed at once if the streamer raises.
        streamer: has `put` and `end`; None for none.

    Raises:
        InputError: there is a streamer, and there are several prompts.
    """
    if streamer is not None and len(request.rows) > 1:
        raise InputError(f"a streamer shows one sequence, but there are {len(request.rows)}; give one prompt")
    with closing(steps):
        if streamer is None:
            for _ in steps:
                pass
            return
        streamer.put(request.input_ids.cpu())
        try:
            for step in steps:
                for token in step.emitted[0] if step.emitted else ():  # none while a long prompt is read
                    streamer.put(torch.tensor([token]))
        except Exception:  # what it holds back would be lost, and whoever reads from it would wait for ever
            streamer.end()
            raise
        streamer.end()
