"""What tests of the command line, the benchmark and the pictures work with: a tiny model, heads, a tokenizer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from ladon.heads import Heads, new_heads

TEXT = "def read(self, name):\n    for line in self.lines:\n        return line\n"
CONTEXT = 128
ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Tiny:
    """A random model whose heads guess well enough to be accepted now and then, in memory and on disk."""

    folder: Path
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    heads: Heads

    @property
    def arguments(self) -> list[str]:
        """Options that name it on the command line."""
        return ["--model", str(self.folder / "model"), "--heads", str(self.folder / "heads")]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level: every text round-trips, and a character beyond ASCII takes several tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator([TEXT] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>", pad_token="<|end|>")


def make_tiny(folder: Path) -> Tiny:
    """Make the model, train its heads for a moment on its own greedy text, and save everything in `folder`."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.06,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config).eval()
    heads = new_heads(model, num_heads=3)
    ids = torch.randint(1, len(tokenizer), (16, 4))
    with torch.no_grad():
        rows = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)
        hidden = model.model(rows).last_hidden_state
    optimizer = torch.optim.Adam([p for p in heads.parameters() if p.requires_grad], lr=1e-2)
    length = rows.shape[1] - 4
    for _ in range(60):
        logits = heads(hidden[:, :length])
        loss = sum(
            torch.nn.functional.cross_entropy(logits[:, :, k].flatten(0, 1), rows[:, k + 2 : k + 2 + length].flatten())
            for k in range(3)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    heads.eval().save(folder / "heads")
    return Tiny(folder=folder, model=model, tokenizer=tokenizer, heads=heads)


def write_jsonl(path: Path, rows: list[dict[str, object]]) -> Path:
    """Rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
