"""What `never_slower.py` measures: which cells there are, and the models, heads and prompts behind them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from synthetic import SyntheticDecoder, SyntheticDrafts
from tasks import edit_of
from transformers import LlamaConfig, LlamaForCausalLM

from ladon import new_heads
from ladon.bench.systems import LadonSystem
from ladon.demo.bundled import demo_prompts, load_demo
from ladon.heads import load_heads
from ladon.trees.fixed_tree import FixedTree, best_fixed_tree

BATCHES = (1, 2, 4, 8, 16)
MEDUSA_NODES = 64
_PIECES = 160  # of held-out code, about 250 tokens each

Prompts = list[list[int]]  # token ids of the rows that are decoded together


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One combination to measure.

    Attributes:
        model: demo (the bundled one) or large (random weights, four times as many).
        heads: bundled, untrained, or synthetic (imagined ones with the bundled heads' hit rates).
        task: kind of prompts: code, humaneval or edits.
        context: prompt tokens of each row; None leaves prompts as long as they are.
        batch: rows.
    """

    model: str
    heads: str
    task: str
    context: int | None
    batch: int

    @property
    def name(self) -> str:
        """As `--cells` takes it."""
        return f"{self.model}/{self.heads}/{self.task}/c{self.context or 'own'}/b{self.batch}"


def all_cells(limit: int, has_humaneval: bool) -> list[Cell]:
    """Every cell, cheap ones first; `limit` is the longest prompt that leaves room for the new tokens."""
    tasks = ["edits", *(["humaneval"] if has_humaneval else [])]
    demo = [("demo", heads, "code", context) for context in (64, 1024) for heads in ("bundled", "untrained")]
    found = [Cell(model=m, heads=h, task=t, context=c, batch=b) for m, h, t, c in demo for b in BATCHES]
    found += [Cell(model="demo", heads="bundled", task=t, context=None, batch=b) for t in tasks for b in (1, 4)]
    found += [Cell(model="demo", heads="bundled", task="code", context=limit, batch=b) for b in (1, 2)]
    found += [Cell(model="large", heads="synthetic", task="code", context=64, batch=b) for b in BATCHES]
    found.append(Cell(model="large", heads="synthetic", task="code", context=1024, batch=1))
    return sorted(found, key=lambda cell: (cell.model, (cell.context or 0) >= 1024, cell.batch))


class Materials:
    """Models, heads and prompts, each made when it is first needed."""

    def __init__(self, heads: Path | None, humaneval: Path | None) -> None:
        """`heads`: other heads of the bundled model, calibrated; `humaneval`: its problems as JSONL."""
        self._model, self._tokenizer, own = load_demo()
        self._heads = own if heads is None else load_heads(heads, self._model).eval()
        self._humaneval = humaneval
        self._tokenizer.model_max_length = 2**30  # texts are cut to the length wanted after they are tokens
        self._model.generation_config.eos_token_id = None  # every row runs to its last token
        if self._heads.calibration is None:
            raise SystemExit("the heads have no calibration; run `ladon calibrate` for them, or give --heads FOLDER")

    @property
    def hit_rates(self) -> Sequence[Sequence[float]]:
        """Those of the calibrated heads, [K][C]."""
        assert self._heads.calibration is not None  # looked at above
        return self._heads.calibration.hit_rates

    @property
    def medusa_tree(self) -> FixedTree:
        """The best fixed tree of MEDUSA's size for these heads."""
        return best_fixed_tree(self.hit_rates, MEDUSA_NODES)

    def longest_prompt(self, max_new_tokens: int) -> int:
        """The most prompt tokens that leave room for the new ones."""
        return int(self._model.config.max_position_embeddings) - max_new_tokens

    def model(self, cell: Cell) -> Any:
        """The cell's target."""
        return self._model if cell.model == "demo" else self._large

    @cached_property
    def _large(self) -> Any:
        """32 million random parameters with the bundled model's vocabulary and context."""
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=self._model.config.vocab_size,
            hidden_size=512,
            intermediate_size=1792,
            num_hidden_layers=8,
            num_attention_heads=8,
            num_key_value_heads=8,
            max_position_embeddings=self._model.config.max_position_embeddings,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=None,
            pad_token_id=0,
        )
        return LlamaForCausalLM(config).eval()

    def systems(self, cell: Cell, groups: Sequence[Prompts], max_new_tokens: int) -> Callable[..., LadonSystem]:
        """Makes a system of the cell for these groups of prompts, from `mode`, `budget` and perhaps `fixed_tree`."""
        model, heads = self.model(cell), self._heads
        if cell.heads != "bundled":
            torch.manual_seed(0)
            heads = new_heads(model, num_heads=len(self.hit_rates)).eval()
        system = partial(LadonSystem, model, heads)
        if cell.heads != "synthetic":
            return system
        answers: dict[tuple[int, ...], list[int]] = {}
        for prompts in groups:
            plain = system(mode="plain", budget=1).run(prompts, max_new_tokens)
            answers |= {tuple(prompt): output for prompt, output in zip(prompts, plain.outputs, strict=True)}
        drafts = SyntheticDrafts(answers, self.hit_rates, vocab_size=model.config.vocab_size)
        return partial(system, make=partial(SyntheticDecoder, drafts=drafts))

    def prompts(self, cell: Cell, group: int = 0) -> Prompts:
        """One prompt per row, all different, of exactly the cell's context if it has one; others in each group."""
        texts = {"code": self._code, "edits": self._edits, "humaneval": self._problems}[cell.task](cell, group)
        prompts = [list(self._tokenizer(text)["input_ids"]) for text in texts]
        if cell.context is None:
            return prompts
        if min(map(len, prompts)) < cell.context:
            raise SystemExit(f"{cell.name}: a prompt has fewer than {cell.context} tokens")
        return [prompt[-cell.context :] for prompt in prompts]

    def _code(self, cell: Cell, group: int) -> list[str]:
        """Pieces of held-out code, one after the other until there are enough tokens."""
        count = 1 + (cell.context or 0) // 160  # the shortest has more than 160 tokens
        pieces = _from(demo_prompts(_PIECES), group * cell.batch * count)
        rows = [pieces[row :: cell.batch] for row in range(cell.batch)]
        return ["\n\n\n".join(row[:count]) for row in rows]

    def _edits(self, cell: Cell, group: int) -> list[str]:
        """Code to write again with a change."""
        return [edit_of(piece, self._tokenizer) for piece in _from(demo_prompts(_PIECES), group * cell.batch)][
            : cell.batch
        ]

    def _problems(self, cell: Cell, group: int) -> list[str]:
        """HumanEval's prompts, spread over the file."""
        assert self._humaneval is not None  # else the cell is not among those to measure
        rows = [json.loads(line) for line in self._humaneval.read_text(encoding="utf-8").splitlines() if line.strip()]
        rows = _from(rows, group * (len(rows) // 7))
        return [row["prompt"].rstrip("\n") for row in rows[:: len(rows) // cell.batch][: cell.batch]]


def _from(items: Sequence[Any], start: int) -> list[Any]:
    """All items, beginning with another one, those before it at the end."""
    start %= len(items)
    return [*items[start:], *items[:start]]
