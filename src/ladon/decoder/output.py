"""From decoded sequences to what `generate` returns, and to what its streamer gets."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from transformers.generation.utils import GenerateDecoderOnlyOutput

from ladon.decoder.request import Request
from ladon.engine.sequence import Row, warn_of_dead_ends
from ladon.engine.stats import DecodeStats
from ladon.engine.step import Step
from ladon.errors import InputError
from ladon.target.prefix_cache import KeptCache

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(kw_only=True)
class CallResults:
    """What a decoder knows of a call besides its output.

    Attributes:
        stats: counts and times.
        seeds: of the rows' noise; a row can be drawn again alone with its own.
        complete: of each row, whether its text is whole, as its constraint has it; None without one.
    """

    stats: DecodeStats = field(default_factory=DecodeStats)
    seeds: list[int] = field(default_factory=list)
    complete: list[bool | None] = field(default_factory=list)


class LastCalls:
    """The results of the last call of each thread; a thread that has made none sees those of the last call of all."""

    def __init__(self) -> None:
        self._own, self._newest = threading.local(), CallResults()

    @property
    def results(self) -> CallResults:
        """Those of the thread that asks."""
        found: CallResults = getattr(self._own, "results", self._newest)
        return found

    def begin(self) -> CallResults:
        """Results for a call that this thread begins."""
        self._own.results = self._newest = CallResults()
        return self._newest


@dataclass
class DecodeOutput(GenerateDecoderOnlyOutput):
    """transformers' output of `return_dict_in_generate`, and the call's `CallResults`.

    The latter are lists: pipelines of transformers take a tuple for one of tensors.
    """

    stats: DecodeStats | None = None
    seeds: list[int] | None = None
    complete: list[bool | None] | None = None


def pack_output(request: Request, results: CallResults) -> Tensor | DecodeOutput:
    """Prompts and new tokens as one tensor [B, T + new], rows that ended earlier padded on the right.

    Warns of rows that their constraint let go no further.
    """
    input_ids, rows, config = request.input_ids, request.rows, request.config
    warn_of_dead_ends(rows)
    longest = max(len(row.tokens) for row in rows)
    new = torch.tensor(
        [row.tokens + [request.pad_id] * (longest - len(row.tokens)) for row in rows], device=input_ids.device
    )
    sequences = torch.cat([input_ids, new], dim=1)  # int64, as from `generate`, whatever the prompts were
    if not config.return_dict_in_generate:
        return sequences
    scores, logits = (_kept(rows, name) for name in ("scores", "logits"))
    kept: Any = None  # transformers declares a cache of its own kind
    if rows[0].keeps_past:
        kept = KeptCache([row.past for row in rows if row.past is not None])
    return DecodeOutput(
        sequences=sequences,
        scores=scores,
        logits=logits,
        past_key_values=kept,
        stats=results.stats,
        seeds=results.seeds,
        complete=results.complete,
    )


def _kept(rows: list[Row], name: str) -> tuple[Tensor, ...] | None:
    """What rows have kept, for each new token [B, V]; 0 where a row had ended before. None if they keep no such.

    Several rows hold nothing of it afterwards.
    """
    if name not in rows[0].keeps:
        return None
    kept = [row.kept[name] for row in rows]
    if len(rows) == 1:
        return tuple(one[None] for one in kept[0])
    longest = max(kept, key=len)
    nothing, steps = torch.zeros_like(longest[0]), []
    for place in reversed(range(len(longest))):  # rows let go of what is stacked: there is never all of it twice
        steps.append(torch.stack([own.pop() if len(own) > place else nothing for own in kept]))
    return tuple(reversed(steps))


def stream(request: Request, steps: Generator[Step, None, None], streamer: Any) -> None:
    """Take steps until a request's rows have ended; a streamer gets the prompt, then each new token by itself.

    That is what transformers' own `generate` puts, in the same order: [1, T], then [1] for each token.

    Args:
        request: the call.
        steps: decode it; closed at once if the streamer raises.
        streamer: has `put`; None for none.

    Raises:
        InputError: there is a streamer, and there are several prompts.
    """
    if streamer is not None and len(request.rows) > 1:
        raise InputError(f"a streamer shows one sequence, but there are {len(request.rows)}; give one prompt")
    with closing(steps):
        if streamer is not None:
            streamer.put(request.input_ids.cpu())
        for step in steps:
            if streamer is not None and step.emitted:  # none while a long prompt is read
                for token in step.emitted[0]:
                    streamer.put(torch.tensor([token], device="cpu"))


def ends_streamer(generate: Callable[P, R]) -> Callable[P, R]:
    """Let a function end the `streamer` that it is given, once, however the call ends: whoever reads would wait."""
    place = list(inspect.signature(generate).parameters).index("streamer")

    @wraps(generate)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with _ended(kwargs.get("streamer", args[place] if len(args) > place else None)):
            return generate(*args, **kwargs)

    return call


@contextmanager
def _ended(streamer: Any) -> Iterator[None]:
    """End a streamer after the body; one that the body raises goes before an error of the streamer's own."""
    try:
        yield
    except BaseException:
        if streamer is not None:
            try:
                streamer.end()
            except Exception:  # transformers' own first decodes what they hold back, which may be what has failed
                with suppress(Exception):
                    streamer.on_finalized_text("", stream_end=True)
        raise
    if streamer is not None:
        streamer.end()
