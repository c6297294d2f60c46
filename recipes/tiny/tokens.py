"""Byte-level BPE over the corpus, and the corpus as one array of token ids."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from corpus import SourceFile
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"


def train_tokenizer(sources: Sequence[SourceFile], vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with one special token, which separates files and ends a text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((s.text for s in sources), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def encode_files(tokenizer: PreTrainedTokenizerFast, sources: Sequence[SourceFile]) -> np.ndarray:
    """All files end to end, each followed by the end-of-text id: [num_tokens] uint16."""
    parts: list[int] = []
    for source in sources:
        parts += tokenizer.encode(source.text, verbose=False)
        parts.append(tokenizer.eos_token_id)
    return np.asarray(parts, dtype=np.uint16)


def cached_tokens(path: Path, tokenizer: PreTrainedTokenizerFast, sources: Sequence[SourceFile]) -> np.ndarray:
    """`encode_files`, kept on disk between runs; a kill leaves the whole file or none."""
    if not path.exists():
        partial = path.with_suffix(".partial.npy")
        np.save(partial, encode_files(tokenizer, sources))
        partial.replace(path)
    return np.load(path)
