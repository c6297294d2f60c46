"""Write the bundle: model, tokenizer, heads with their calibration, provenance and the model card."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from ladon.heads import Heads, load_heads

MAX_BYTES = 25_000_000
RECORD = "training.json"  # how the model itself came about: kept where new heads are made for it


@dataclass(frozen=True, kw_only=True)
class StageRecord:
    """One stage of the model's own training, as the card shows it. Losses are in nats per token."""

    name: str
    steps: int
    tokens: int
    train_loss: float | None = None
    held_out_loss: float | None = None

    @property
    def row(self) -> str:
        """Its row of the card's table."""
        losses = ["" if loss is None else f"{loss:.3f}" for loss in (self.train_loss, self.held_out_loss)]
        return f"| {self.name} | {self.steps} | {self.tokens / 1e6:.1f} | {' | '.join(losses)} |"


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """Everything that is exported.

    Attributes:
        model: folder of the model and its tokenizer.
        heads: folder of its calibrated heads.
        corpus: provenance of the text.
        stages: the model's own training.
        commands: what made the heads.
    """

    model: Path
    heads: Path
    corpus: dict[str, Any]
    stages: Sequence[StageRecord]
    commands: Sequence[str]


def read_stages(folder: Path) -> list[StageRecord]:
    """The stages of a model that this recipe exported before."""
    path = folder / RECORD
    if not path.exists():
        raise SystemExit(f"{path} is missing: --model takes a folder that this recipe made")
    return [StageRecord(**stage) for stage in json.loads(path.read_text(encoding="utf-8"))]


def export(bundle: Bundle, folder: Path) -> None:
    """Write all files into `folder`; files there that are not the recipe's stay."""
    folder.mkdir(parents=True, exist_ok=True)
    model = AutoModelForCausalLM.from_pretrained(bundle.model, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(bundle.model)
    heads = load_heads(bundle.heads, model).to(torch.bfloat16)
    if heads.calibration is None:
        raise SystemExit(f"{bundle.heads} holds no calibration that fits its heads")
    settings = heads.training_record["settings"]
    settings["init_heads"] = Path(settings["init_heads"]).name  # where they lay here says nothing
    heads.base_name = f"the {model.config.model_type} model of recipes/tiny"
    model.config._name_or_path = ""
    for name in ("is_local", "local_files_only"):  # how it was loaded here says nothing about it
        tokenizer.init_kwargs.pop(name, None)
    model.save_pretrained(folder)  # rotary buffers are not saved, so they lose nothing
    tokenizer.save_pretrained(folder)
    heads.save(folder / "heads")
    _write_json(folder / "corpus.json", bundle.corpus)
    _write_json(folder / RECORD, [stage.__dict__ for stage in bundle.stages])
    (folder / "README.md").write_text(model_card(bundle, model, heads), encoding="utf-8")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"exported {size / 1e6:.1f} MB to {folder}")
    if size > MAX_BYTES:
        raise SystemExit(f"the bundle has {size} bytes, more than {MAX_BYTES}. Train a smaller model")


def model_card(bundle: Bundle, model: PreTrainedModel, heads: Heads) -> str:
    """What the model is, from what, how good, and what it is not good for."""
    config, held_out = model.config, bundle.corpus["held_out"]
    calibration = heads.calibration
    assert calibration is not None  # `export` looks
    rows = [
        f"| {depth} | {' | '.join(f'{sum(rates[:top]):.3f}' for top in (1, 2, 3, 4, 5))} |"
        for depth, rates in enumerate(calibration.marginal_hit_rates, start=1)
    ]
    return CARD.format(
        arch=config.model_type,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        vocab=config.vocab_size,
        context=config.max_position_embeddings,
        million=sum(p.numel() for p in model.parameters()) / 1e6,
        heads_million=sum(p.numel() for p in heads.parameters()) / 1e6,
        num_heads=heads.num_heads,
        rank=heads.options["markov_rank"],
        python=bundle.corpus["python"],
        files=bundle.corpus["files"],
        megabytes=bundle.corpus["bytes"] / 1e6,
        sha256=bundle.corpus["sha256"],
        calibration=", ".join(held_out["calibration"]),
        prompts=", ".join(held_out["prompts"]),
        unused=" and ".join(bundle.corpus["not_used"]),
        stages="\n".join(stage.row for stage in bundle.stages),
        commands="\n".join(bundle.commands),
        table="\n".join(rows),
        calibration_prompts=calibration.measured_on["answers"],
        calibration_positions=calibration.measured_on["positions"],
    )


CARD = """\
---
license: apache-2.0
language: code
tags: [medusa, speculative-decoding]
---

# Ladon's bundled model

A small {arch} language model of Python code with {num_heads} decoding heads, made so that Ladon can be tried, tested
and measured offline. It completes Python source text; it is no assistant.

- Model: {million:.1f}M parameters, {layers} layers, hidden size {hidden}, vocabulary {vocab} (byte-level BPE), context
  {context} tokens, bfloat16.
- Heads: `heads/`, {heads_million:.1f}M parameters, family "shared": a residual MLP per head on the model's own output
  projection, and a correction of rank {rank} by the token before each guess; with their calibration.

## Data

The sources of Python {python}'s standard library and of the wheels in its `ensurepip` (pip and what it carries):
{files} files, {megabytes:.1f} MB. `corpus.json` has the hash of each (all together: sha256 {sha256}).
Never trained on, nor are their tests: {calibration} (used to calibrate) and {prompts} (used as prompts); nor {unused},
which are used for nothing, because other files hold pieces of them.

## Training of the model

By `recipes/tiny`; losses in nats per token, the held-out ones over evenly spaced windows of the held-out modules.

| stage | steps | tokens (M) | train loss | held-out loss |
|---|---|---|---|---|
{stages}

Where base and heads learn together, the heads' loss reaches the base, as in MEDUSA-2 (arXiv 2401.10774, section 2.2.2).
The model then foretells more of its own text than one that never had heads: expect a lower acceptance length from heads
on a model that was trained alone.

## Training of the heads

On the model's own answers to beginnings of its training files and of files that it never saw, the model frozen, then
the correction, the heads frozen too:

```text
{commands}
```

Head k guesses the token k + 1 places after the one it reads; the share of positions where the token that the model
itself goes on to say is among its best 1 to 5, by the head alone, over {calibration_positions} positions in greedy
continuations of {calibration_prompts} calibration prompts:

| head | top 1 | top 2 | top 3 | top 4 | top 5 |
|---|---|---|---|---|---|
{table}

## Limits

- It knows the standard library's style and little else. What it writes often looks right and seldom is; never run it
  unread.
- Greedy text of a model this small repeats itself, and repetition flatters every drafter: measure on text that does not
  repeat, or report the share of repeated n-grams beside the result.
- It may reproduce pieces of its training text.

## Licence

Weights: Apache-2.0, as the rest of Ladon. The training text is part of CPython, under the PSF License Agreement
(https://docs.python.org/3/license.html), and of the packages in `ensurepip`, under the licences inside those wheels
(MIT, BSD, Apache-2.0, PSF, MPL-2.0).
"""


def _write_json(path: Path, document: object) -> None:
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
