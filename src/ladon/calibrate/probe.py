"""A quick look at whether heads belong to a model: how often the first one is right on a few words."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ladon.decoder.decoder import Decoder
from ladon.heads import Heads
from ladon.heads.ends import output_projection
from ladon.target.hooks import lock_of, projection_inputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TOO_FEW = 0.05  # trained heads are right on a third of the tokens or more, heads of another model on next to none
_TOKENS = 20
_PROMPTS = (
    "The capital of France is",
    "Once upon a time, there was a",
    "To make a cup of tea, first",
    "def read_lines(path):\n",
)


@torch.no_grad()
def probe(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, heads: Heads) -> float:
    """How often head 1's best token is what the model goes on to say.

    The model continues a few short prompts by 20 tokens each, greedily, with the heads' chain; then head 1 is asked at
    every position of these answers.

    Args:
        model: the target, in evaluation mode.
        tokenizer: its tokenizer.
        heads: bound to the model.

    Returns:
        A share, 0 to 1. Under `TOO_FEW` the heads guess next to nothing right.

    Raises:
        UnsupportedModelError: the model cannot verify the heads' guesses.
    """
    decoder = Decoder(model, heads, tree="chain")
    right = asked = 0
    for text in _PROMPTS:
        prompt = tokenizer(text, return_tensors="pt")["input_ids"].to(model.device)
        rows = decoder.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=_TOKENS, do_sample=False)
        assert isinstance(rows, torch.Tensor)  # no dict was asked for
        with lock_of(model), projection_inputs(output_projection(model).module) as seen:
            model(rows)
        start, end = prompt.shape[1] - 1, rows.shape[1] - 2
        if end <= start:
            continue
        guesses = heads.draft(seen[0][0, start:end], rows[0, start + 1 : end + 1])[:, 0].argmax(-1)
        if heads.token_ids is not None:
            guesses = heads.token_ids[guesses]
        right += int((guesses == rows[0, start + 2 :]).sum())
        asked += end - start
    return right / asked if asked else 0.0
