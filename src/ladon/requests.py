"""From `generate`'s prepared arguments to rows, and from rows to what `generate` returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ladon.engine import Row
from ladon.errors import InputError

if TYPE_CHECKING:
    from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
    from transformers.generation.utils import GenerateDecoderOnlyOutput

_UNSET = (
    "unset the options that ask for it, in the call or in model.generation_config (on the command line: "
    "--ignore-generation-config)"
)
_UNSUPPORTED_OUTPUTS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")


def refuse_unsupported(
    config: GenerationConfig, processors: LogitsProcessorList | None, model_kwargs: dict[str, Any]
) -> None:
    """Raise `InputError` for anything that would change the output and is not supported."""
    if config.do_sample:
        raise InputError("do_sample=True: sampling is not supported yet; pass do_sample=False for greedy decoding")
    mode = str(config.get_generation_mode().value)
    if mode != "greedy_search":
        raise InputError(
            f"generation mode {mode} is not supported; Ladon decodes greedily (num_beams=1, no assistant): {_UNSET}"
        )
    if processors:
        names = ", ".join(type(processor).__name__ for processor in processors)
        raise InputError(f"logits processors are not supported yet, got {names}; {_UNSET}")
    for name in _UNSUPPORTED_OUTPUTS:
        if getattr(config, name, False):
            raise InputError(f"{name}=True is not supported yet; leave it off")
    if model_kwargs.get("inputs_embeds") is not None:
        raise InputError("inputs_embeds is not supported; pass input_ids")
    cache = model_kwargs.get("past_key_values")
    if cache is not None and cache.get_seq_length() > 0:
        raise InputError("past_key_values with content is not supported yet; pass the whole prompt as input_ids")


def make_rows(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    criteria: StoppingCriteriaList | None,
    config: GenerationConfig,
    context_limit: int | None,
) -> list[Row]:
    """One row per prompt, its padding stripped.

    Args:
        input_ids: [B, T], padded wherever `attention_mask` [B, T] is 0.
        attention_mask: None when nothing is padded.
        criteria: stop rules; EOS and the length limit among them are handled as numbers, the others called.
        config: the prepared generation config: end-of-sequence ids and `max_length`.
        context_limit: the greatest length of a sequence that the model was made for, if any.

    Raises:
        InputError: a prompt is empty, or leaves no room for a token.
    """
    width = input_ids.shape[1]
    max_new_tokens = config.max_length - width
    if max_new_tokens < 1:
        raise InputError(
            f"no room for a token: {max_new_tokens} may be generated. Ask for max_new_tokens of 1 or more, or a "
            f"max_length above the prompt's {width}"
        )
    eos = getattr(config, "_eos_token_tensor", None)
    eos_token_ids = frozenset[int]() if eos is None else frozenset(eos.reshape(-1).tolist())
    rows = []
    for index, ids in enumerate(input_ids):
        prompt = ids if attention_mask is None else ids[attention_mask[index].bool()]
        if len(prompt) == 0:
            raise InputError(f"prompt {index} is empty; give at least one token")
        limit = max_new_tokens
        if context_limit is not None:
            limit = min(limit, context_limit - len(prompt))
            if limit < 1:
                raise InputError(
                    f"prompt {index} has {len(prompt)} tokens, the model's context limit is {context_limit}; shorten "
                    f"the prompt to {context_limit - 1} tokens or fewer"
                )
        rows.append(Row(prompt=prompt, max_new_tokens=limit, is_stop=_stop_rule(ids, eos_token_ids, criteria)))
    return rows


def _stop_rule(
    padded_prompt: Tensor, eos_token_ids: frozenset[int], criteria: StoppingCriteriaList | None
) -> Callable[[int], bool]:
    """Ends a row at an end-of-sequence token, or when one of the user's criteria says so of the row so far."""
    from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

    others = [c for c in criteria or [] if not isinstance(c, EosTokenCriteria | MaxLengthCriteria)]
    if not others:
        return eos_token_ids.__contains__
    so_far = padded_prompt.tolist()

    def is_stop(token: int) -> bool:
        so_far.append(token)
        sequence = torch.tensor([so_far])
        return token in eos_token_ids or any(bool(torch.as_tensor(c(sequence, None)).any()) for c in others)

    return is_stop


def end_ids(token_ids: int | Sequence[int] | None) -> frozenset[int]:
    """End-of-sequence ids, in any of the forms that generation configs hold them."""
    return frozenset([token_ids] if isinstance(token_ids, int) else token_ids or ())


def stop_string_rule(stop_strings: str | list[str], tokenizer: Any) -> Callable[..., Any]:
    """The criterion of transformers for stop strings; raises `InputError` without a tokenizer."""
    from transformers.generation.stopping_criteria import StopStringCriteria

    if tokenizer is None:
        raise InputError("stop_strings needs the tokenizer; pass tokenizer=... as well")
    criterion: Callable[..., Any] = StopStringCriteria(tokenizer, stop_strings)
    return criterion


def pack_output(input_ids: Tensor, rows: list[Row], config: GenerationConfig) -> Tensor | GenerateDecoderOnlyOutput:
    """Prompts and new tokens as one tensor [B, T + new], rows that ended earlier padded on the right."""
    pad = getattr(config, "_pad_token_tensor", None)
    pad_id = 0 if pad is None else int(pad)
    longest = max(len(row.tokens) for row in rows)
    new = torch.tensor([row.tokens + [pad_id] * (longest - len(row.tokens)) for row in rows], device=input_ids.device)
    sequences = torch.cat([input_ids, new.to(input_ids.dtype)], dim=1)
    if not config.return_dict_in_generate:
        return sequences
    from transformers.generation.utils import GenerateDecoderOnlyOutput

    return GenerateDecoderOnlyOutput(sequences=sequences)
