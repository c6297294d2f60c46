"""Write the bundle: model, tokenizer, heads, fixed trees, provenance and the model card."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ladon.heads import Heads

MAX_BYTES = 25_000_000


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """Everything that is exported."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    heads: Heads
    corpus: dict[str, object]
    fixed_trees: dict[str, object]
    base_record: dict[str, object]
    first_record: dict[str, object]
    joint_record: dict[str, object]
    command: str


def export(bundle: Bundle, folder: Path) -> None:
    """Write all files into `folder`; files there that are not the recipe's stay."""
    folder.mkdir(parents=True, exist_ok=True)
    bundle.model.config._name_or_path = ""
    bundle.model.to(torch.bfloat16).save_pretrained(folder)  # rotary buffers are not saved, so they lose nothing
    for name in ("is_local", "local_files_only"):  # how it was loaded here says nothing about it
        bundle.tokenizer.init_kwargs.pop(name, None)
    bundle.tokenizer.save_pretrained(folder)
    bundle.heads.to(torch.bfloat16).save(folder / "heads")
    _write_json(folder / "corpus.json", bundle.corpus)
    _write_json(folder / "fixed_trees.json", bundle.fixed_trees)
    (folder / "README.md").write_text(model_card(bundle), encoding="utf-8")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"exported {size / 1e6:.1f} MB to {folder}")
    if size > MAX_BYTES:
        raise SystemExit(f"the bundle has {size} bytes, more than {MAX_BYTES}. Train a smaller model")


def model_card(bundle: Bundle) -> str:
    """What the model is, from what, how good, and what it is not good for."""
    config, training = bundle.model.config, bundle.heads.training_record
    result = training["history"][-1]
    rows = [
        f"| {k} | {loss:.3f} | {' | '.join(f'{value:.3f}' for value in accuracy)} |"
        for k, (loss, accuracy) in enumerate(zip(result["loss"], result["accuracy"], strict=True), start=1)
    ]
    held_out = bundle.corpus["held_out"]
    return CARD.format(
        arch=config.model_type,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        vocab=config.vocab_size,
        context=config.max_position_embeddings,
        million=sum(p.numel() for p in bundle.model.parameters()) / 1e6,
        heads_million=sum(p.numel() for p in bundle.heads.parameters()) / 1e6,
        num_heads=bundle.heads.num_heads,
        python=bundle.corpus["python"],
        files=bundle.corpus["files"],
        megabytes=bundle.corpus["bytes"] / 1e6,
        sha256=bundle.corpus["sha256"],
        calibration=", ".join(held_out["calibration"]),
        prompts=", ".join(held_out["prompts"]),
        unused=" and ".join(bundle.corpus["not_used"]),
        stages="\n".join(
            (
                _stage_row("base, on the standard library", bundle.base_record),
                _stage_row("heads, base frozen, on the standard library", bundle.first_record),
                _stage_row("base and heads together, on all text", bundle.joint_record),
                _stage_row("heads, base frozen, against what the base says of all text", training),
            )
        ),
        table="\n".join(rows),
        calibration_prompts=bundle.fixed_trees["prompts"],
        calibration_positions=bundle.fixed_trees["positions"],
        command=bundle.command,
    )


def _stage_row(name: str, record: dict) -> str:
    last = record["history"][-1]
    tokens = last["step"] * record["settings"]["batch_tokens"] / 1e6
    losses = [f"{last[kind]:.3f}" if kind in last else "" for kind in ("train_loss", "held_out_loss")]
    return f"| {name} | {last['step']} | {tokens:.1f} | {' | '.join(losses)} |"


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
  projection.
- Fixed trees: `fixed_trees.json`, the best fixed trees of several sizes for these heads.

## Data

The sources of Python {python}'s standard library and of the wheels in its `ensurepip` (pip and what it carries):
{files} files, {megabytes:.1f} MB. `corpus.json` has the hash of each (all together: sha256 {sha256}).
Never trained on, nor are their tests: {calibration} (used to calibrate) and {prompts} (used as prompts); nor {unused},
which are used for nothing, because other files hold pieces of them.

## Training

`{command}`

| stage | steps | tokens (M) | train loss | held-out loss |
|---|---|---|---|---|
{stages}

In the third stage the heads' loss reaches the base, as in MEDUSA-2 (arXiv 2401.10774, section 2.2.2). The model then
foretells more of its own text than one that never had heads: expect a lower acceptance length from heads on a model
that was trained alone.

Losses are in nats per token, over evenly spaced windows of the held-out modules. Head k guesses the token k + 1 places
after the one it reads; accuracy is the share of positions where the text's own token is among the best 1 to 5:

| head | held-out loss | top 1 | top 2 | top 3 | top 4 | top 5 |
|---|---|---|---|---|---|---|
{table}

The fixed trees come from {calibration_positions} positions in the model's own greedy continuations of
{calibration_prompts} calibration prompts.

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


def _write_json(path: Path, document: dict[str, object]) -> None:
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
