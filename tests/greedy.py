"""Small prompts, and what transformers' own greedy generate says after them."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

PROMPT = torch.arange(3, 15)[None]
BATCH = torch.tensor([[0, 0, 0, 5, 6, 7, 8, 9], [11, 12, 13, 14, 15, 16, 17, 18], [0, 21, 22, 23, 24, 25, 26, 27]])
MASK = (BATCH != 0).long()


def plain(model: PreTrainedModel, ids: Tensor = PROMPT, **kwargs: Any) -> Any:
    """The class's own `generate`, whatever is attached to the model; 16 greedy tokens unless told otherwise."""
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 16, "do_sample": False, **kwargs}
    return type(model).generate(model, ids, **options)


PROMPTS = [torch.arange(3, 9), torch.arange(40, 60), torch.tensor([7])]


def generate(model, prompt, n, **kwargs) -> list[int]:
    output = model.generate(
        prompt[None], attention_mask=torch.ones_like(prompt[None]), max_new_tokens=n, do_sample=False, **kwargs
    )
    return output[0, len(prompt) :].tolist()


def one_character_per_token() -> PreTrainedTokenizerFast:
    characters = Tokenizer(models.WordLevel({chr(33 + i): i for i in range(97)}, unk_token="!"))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex(""), "isolated")
    characters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=characters, pad_token="!")
