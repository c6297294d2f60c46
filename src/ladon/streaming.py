"""What a streamer of `generate` gets."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from typing import Any

import torch

from ladon.errors import InputError
from ladon.requests import Request
from ladon.steps import Step


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
