"""Answers from our own engine."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ladon.decoder.decoder import Decoder
from ladon.decoder.request import end_ids
from ladon.engine.sequence import Row
from ladon.errors import InputError
from ladon.heads import Heads
from ladon.heads.fingerprint import fingerprint
from ladon.sampling.sampling_params import GREEDY, TemperatureSampling
from ladon.target.support import context_limit
from ladon.train.data.prompts import Prompt
from ladon.train.distill.distill import Answer, Failure, Settings

# What a checkpoint's generation config may ask for that changes which tokens come; answers are written without it.
_NOT_APPLIED = (
    "repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens",
    "forced_bos_token_id", "forced_eos_token_id", "min_p", "typical_p", "sequence_bias",
)  # fmt: skip
_NEUTRAL = (None, 0, 1, 1.0)


def ignored_settings(model: PreTrainedModel) -> list[str]:
    """What the checkpoint's generation config asks for and answers do without: heads learn the model's own text."""
    config = model.generation_config
    return [name for name in _NOT_APPLIED if getattr(config, name, None) not in _NEUTRAL]


def weights_hash(model: PreTrainedModel) -> str:
    """16 hexadecimal digits that tell a model from another of the same name: of its fingerprint, not of all weights."""
    return hashlib.sha256(repr(sorted(asdict(fingerprint(model)).items())).encode()).hexdigest()[:16]


class LocalModel:
    """Answers with a model in this process."""

    def __init__(
        self,
        model: PreTrainedModel,
        heads: Heads | None,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch: int,
        **options: Any,
    ) -> None:
        """Make the decoder.

        Args:
            model: who answers.
            heads: its heads, which make it faster and change nothing else; None if it has none yet.
            tokenizer: its own.
            batch: prompts answered together.
            **options: as `Decoder` takes them.

        Raises:
            LadonError: what `Decoder` raises.
        """
        self._decoder, self._tokenizer, self._batch = Decoder(model, heads, **options), tokenizer, batch
        self._context_limit = context_limit(model.config.get_text_config(decoder=True))
        self._ends = end_ids(model.generation_config.eos_token_id)
        self._vocab_size = model.get_input_embeddings().num_embeddings
        self._tokens = self._row_steps = 0

    @property
    def acceptance_length(self) -> float | None:
        """Tokens per row-step so far, as `ladon.engine.stats` has it; None without heads, or before the first step."""
        return self._tokens / self._row_steps if self._decoder.heads is not None and self._row_steps else None

    def answers(self, prompts: Sequence[Prompt], settings: Settings) -> Iterator[list[Answer | Failure]]:
        """Answers in order, as they come, `batch` prompts at work; prompts that leave no room for an answer fail."""
        for prompt in prompts:
            if max(prompt.token_ids) >= self._vocab_size:
                raise InputError(
                    f"prompt {prompt.id!r} holds token {max(prompt.token_ids)}, but the model has "
                    f"{self._vocab_size}; encode the prompts with this model's tokenizer"
                )
        rows = [self._row(prompt, settings) for prompt in prompts]
        steps = self._decoder.decode([row for row in rows if row is not None], max_rows=self._batch)
        told = 0
        try:
            for _ in steps:
                done = told
                while done < len(rows) and ((row := rows[done]) is None or row.finished):
                    done += 1
                if done > told:
                    yield [self._outcome(prompts[place], rows[place]) for place in range(told, done)]
                    told = done
        finally:
            self._tokens += self._decoder.stats.tokens
            self._row_steps += self._decoder.stats.row_steps
        if told < len(rows):  # no row at all, or none after the last
            yield [self._outcome(prompts[place], rows[place]) for place in range(told, len(rows))]

    def _row(self, prompt: Prompt, settings: Settings) -> Row | None:
        """The prompt for the engine; None if the context has no room for an answer."""
        room = settings.max_new_tokens
        if self._context_limit is not None:
            room = min(room, self._context_limit - len(prompt.token_ids))
        if room < 1:
            return None
        law: dict[str, Any] = {"temperature": settings.temperature, "top_k": settings.top_k, "top_p": settings.top_p}
        return Row(
            prompt=torch.tensor(prompt.token_ids, device="cpu"),
            max_new_tokens=room,
            is_stop=self._ends.__contains__,
            seed=settings.seed_of(prompt) or 0,
            sampling_params=TemperatureSampling(**law) if settings.temperature else GREEDY,
        )

    def _outcome(self, prompt: Prompt, row: Row | None) -> Answer | Failure:
        if row is None:
            detail = f"{len(prompt.token_ids)} tokens, the context holds {self._context_limit}"
            return Failure(prompt=prompt, reason="prompt too long", detail=detail)
        text = self._tokenizer.decode(row.tokens, skip_special_tokens=True)
        finish = "stop" if row.tokens[-1] in self._ends else "length"
        return Answer(prompt=prompt, token_ids=row.tokens, text=text, finish=finish)
