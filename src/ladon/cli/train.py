"""`ladon train`: heads for a model."""

from __future__ import annotations

import os
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ladon.cli import options
from ladon.cli.options import MACHINE, OUTPUT, TRAIN, about, argument, flag, option
from ladon.cli.output import print_json, say
from ladon.errors import InputError
from ladon.train.config import TrainOptions


@options.command(
    without=("heads", "dtype", "ignore_generation_config", "family_options"),
    model=option(TRAIN, "demo", "NAME", options.MODEL),
)
def train(
    target: options.Target,
    settings: TrainOptions,
    rows: str = argument("ROWS", "JSONL, JSON or Parquet file, such as `ladon distill` writes, or a hub data set."),
    out: Path = option(OUTPUT, ..., "DIR", "Folder for checkpoints and heads."),
    family_option: list[str] | None = option(TRAIN, None, "NAME=VALUE", about(TrainOptions, "family_options")),
    field: str | None = option(TRAIN, None, "NAME", "A field with text to learn, if it is not one of the usual ones."),
    limit: int | None = option(TRAIN, None, "N", "Take the first N rows only.", min=1),
    split: str = option(TRAIN, "train", "NAME", "Split of a data set from the hub."),
    device_map: str | None = option(MACHINE, None, "MAP", "Spread the model over devices: auto, balanced, ..."),
    load_in_4bit: bool = flag(MACHINE, "--load-in-4bit", "Quantise the frozen model; needs bitsandbytes."),
    load_in_8bit: bool = flag(MACHINE, "--load-in-8bit", "Quantise the frozen model; needs bitsandbytes."),
    as_json: bool = options.JSON,
) -> None:
    """Train heads on answers of the model, on the frozen model (MEDUSA-1) or together with it (--joint, MEDUSA-2).

    DIR gets the heads; with --joint it gets heads/ and the tuned model in model/. After a kill, the same command goes
    on where it stopped and ends with the same heads. Started by torchrun or accelerate launch, it trains in parallel.

    For example:

        ladon train answers.jsonl --model path/to/model --out heads
        ladon train answers.jsonl --model path/to/model --out tuned --joint lora --heads-warmup-steps 500
        torchrun --nproc-per-node 8 -m ladon.cli train answers.jsonl --model path/to/model --out heads
    """
    from ladon.cli.loading import heads_place, load

    settings = replace(settings, family_options=parse_family_options(family_option or []))
    if settings.init_heads is not None:
        settings = replace(settings, init_heads=str(heads_place(settings.init_heads)))
    placement = _placement(device_map, load_in_4bit, load_in_8bit)
    from ladon.train.data.rows import read_rows
    from ladon.train.run import train as run

    dtype = "float32" if settings.precision == "fp32" else "auto"
    loaded = load(replace(target, dtype=dtype, device=_own_device(target.device)), placement)
    examples = read_rows(rows, loaded.tokenizer, field=field, limit=limit, split=split)
    source = Path(rows).name if Path(rows).exists() else rows
    report = run(loaded.model, loaded.tokenizer, examples, settings, out, say, source=source, field=field)
    if as_json and os.environ.get("RANK", "0") == "0":
        print_json(report)


def parse_family_options(texts: list[str]) -> tuple[tuple[str, int | str], ...]:
    """Settings given as name=value; a whole number becomes one."""
    found: list[tuple[str, int | str]] = []
    for text in texts:
        name, sign, value = text.partition("=")
        if not (name and sign and value):
            raise InputError(f"--family-option is {text!r}; give name=value, such as expansion=4")
        found.append((name.replace("-", "_"), int(value) if value.isdecimal() else value))
    return tuple(found)


def _own_device(name: str) -> str:
    """Where this process of several puts its model, unless it is told."""
    rank = os.environ.get("LOCAL_RANK")
    if name != "auto" or rank is None:
        return name
    import torch

    return f"cuda:{rank}" if torch.cuda.is_available() else "cpu"


def _placement(device_map: str | None, in_4bit: bool, in_8bit: bool) -> dict[str, Any]:
    """How a model that is spread or quantised is loaded; {} for one that is neither."""
    found: dict[str, Any] = {} if device_map is None else {"device_map": device_map}
    if in_4bit and in_8bit:
        raise InputError("--load-in-4bit and --load-in-8bit exclude each other; give one")
    if in_4bit or in_8bit:
        if find_spec("bitsandbytes") is None:
            option = "--load-in-4bit" if in_4bit else "--load-in-8bit"
            raise InputError(f"{option} needs bitsandbytes, which is not installed; pip install bitsandbytes")
        import torch
        from transformers import BitsAndBytesConfig

        found["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=in_4bit, load_in_8bit=in_8bit, bnb_4bit_compute_dtype=torch.bfloat16
        )
        found.setdefault("device_map", {"": int(os.environ.get("LOCAL_RANK", "0"))})
    return found
