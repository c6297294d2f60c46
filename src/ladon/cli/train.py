"""`ladon train`: heads for a model."""

from __future__ import annotations

import os
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from ladon.cli import options
from ladon.cli.output import print_json, say
from ladon.config import help_of
from ladon.errors import InputError
from ladon.train.config import TrainOptions


def _option(name: str, metavar: str | None = None) -> Any:
    return Option(f"--{name.replace('_', '-')}", metavar=metavar, help=_help(name))


def _switch(name: str) -> Any:
    option = name.replace("_", "-")
    return Option(f"--{option}/--no-{option}", help=_help(name))


def _help(name: str) -> str:
    text = help_of(TrainOptions, name)
    return f"{text[0].upper()}{text[1:]}."


_DEFAULTS = TrainOptions()
_RowsArgument = Annotated[
    str,
    Argument(metavar="ROWS", help="JSONL, JSON or Parquet file, such as `ladon distill` writes, or a hub data set."),
]
_OutOption = Annotated[Path, Option("--out", metavar="DIR", help="Folder for checkpoints and heads.")]
_FamilyOption = Annotated[
    list[str] | None, Option("--family-option", metavar="NAME=VALUE", help=_help("family_options"))
]
_FieldOption = Annotated[
    str | None,
    Option("--field", metavar="NAME", help="A field with text to learn, if it is not one of the usual ones."),
]
_LimitOption = Annotated[int | None, Option("--limit", metavar="N", min=1, help="Take the first N rows only.")]
_SplitOption = Annotated[str, Option("--split", metavar="NAME", help="Split of a data set from the hub.")]
_DeviceMapOption = Annotated[
    str | None, Option("--device-map", metavar="MAP", help="Spread the model over devices: auto, balanced, ...")
]
_FourBitOption = Annotated[bool, Option("--load-in-4bit", help="Quantise the frozen model; needs bitsandbytes.")]
_EightBitOption = Annotated[bool, Option("--load-in-8bit", help="Quantise the frozen model; needs bitsandbytes.")]


def train(
    rows: _RowsArgument,
    out: _OutOption,
    model: options.ModelOption = "demo",
    num_heads: Annotated[int, _option("num_heads")] = _DEFAULTS.num_heads,
    family: Annotated[str, _option("family")] = _DEFAULTS.family,
    family_option: _FamilyOption = None,
    init_heads: Annotated[str | None, _option("init_heads", "DIR")] = _DEFAULTS.init_heads,
    markov_rank: Annotated[int, _option("markov_rank")] = _DEFAULTS.markov_rank,
    markov_successors: Annotated[int, _option("markov_successors")] = _DEFAULTS.markov_successors,
    markov_gate: Annotated[bool, _switch("markov_gate")] = _DEFAULTS.markov_gate,
    markov_start: Annotated[str, _option("markov_start")] = _DEFAULTS.markov_start,
    hidden_correction: Annotated[int, _option("hidden_correction")] = _DEFAULTS.hidden_correction,
    freeze_heads: Annotated[bool, _switch("freeze_heads")] = _DEFAULTS.freeze_heads,
    labels: Annotated[str, _option("labels")] = _DEFAULTS.labels,
    label_temperature: Annotated[float, _option("label_temperature")] = _DEFAULTS.label_temperature,
    variation: Annotated[float, _option("variation")] = _DEFAULTS.variation,
    learn: Annotated[str, _option("learn")] = _DEFAULTS.learn,
    decay: Annotated[float, _option("decay")] = _DEFAULTS.decay,
    steps: Annotated[int | None, _option("steps")] = _DEFAULTS.steps,
    epochs: Annotated[float, _option("epochs")] = _DEFAULTS.epochs,
    batch_size: Annotated[int, _option("batch_size")] = _DEFAULTS.batch_size,
    accumulation: Annotated[int, _option("accumulation")] = _DEFAULTS.accumulation,
    length: Annotated[int, _option("length")] = _DEFAULTS.length,
    packing: Annotated[str, _option("packing")] = _DEFAULTS.packing,
    optimizer: Annotated[str, _option("optimizer")] = _DEFAULTS.optimizer,
    learning_rate: Annotated[float | None, _option("learning_rate")] = _DEFAULTS.learning_rate,
    weight_decay: Annotated[float, _option("weight_decay")] = _DEFAULTS.weight_decay,
    schedule: Annotated[str, _option("schedule")] = _DEFAULTS.schedule,
    warmup: Annotated[float, _option("warmup")] = _DEFAULTS.warmup,
    clip: Annotated[float, _option("clip")] = _DEFAULTS.clip,
    precision: Annotated[str, _option("precision")] = _DEFAULTS.precision,
    chunk_rows: Annotated[int, _option("chunk_rows")] = _DEFAULTS.chunk_rows,
    joint: Annotated[str, _option("joint")] = _DEFAULTS.joint,
    heads_warmup_steps: Annotated[int, _option("heads_warmup_steps")] = _DEFAULTS.heads_warmup_steps,
    base_learning_rate: Annotated[float | None, _option("base_learning_rate")] = _DEFAULTS.base_learning_rate,
    base_divisor: Annotated[float, _option("base_divisor")] = _DEFAULTS.base_divisor,
    base_loss: Annotated[str, _option("base_loss")] = _DEFAULTS.base_loss,
    heads_weight: Annotated[float, _option("heads_weight")] = _DEFAULTS.heads_weight,
    heads_ramp: Annotated[str, _option("heads_ramp")] = _DEFAULTS.heads_ramp,
    lora_rank: Annotated[int, _option("lora_rank")] = _DEFAULTS.lora_rank,
    lora_alpha: Annotated[float, _option("lora_alpha")] = _DEFAULTS.lora_alpha,
    lora_dropout: Annotated[float, _option("lora_dropout")] = _DEFAULTS.lora_dropout,
    early_exit: Annotated[int | None, _option("early_exit", "LAYER")] = _DEFAULTS.early_exit,
    held_out: Annotated[str, _option("held_out")] = _DEFAULTS.held_out,
    eval_every: Annotated[int, _option("eval_every")] = _DEFAULTS.eval_every,
    speedup: Annotated[bool, _switch("speedup")] = _DEFAULTS.speedup,
    save_every: Annotated[int, _option("save_every")] = _DEFAULTS.save_every,
    log_every: Annotated[int, _option("log_every")] = _DEFAULTS.log_every,
    report_to: Annotated[str, _option("report_to")] = _DEFAULTS.report_to,
    seed: Annotated[int, _option("seed")] = _DEFAULTS.seed,
    resume: Annotated[bool, _switch("resume")] = _DEFAULTS.resume,
    field: _FieldOption = None,
    limit: _LimitOption = None,
    split: _SplitOption = "train",
    device: options.DeviceOption = "auto",
    device_map: _DeviceMapOption = None,
    load_in_4bit: _FourBitOption = False,
    load_in_8bit: _EightBitOption = False,
    threads: options.ThreadsOption = None,
    trust_remote_code: options.TrustOption = False,
    as_json: options.JsonOption = False,
) -> None:
    """Train heads on answers of the model, on the frozen model (MEDUSA-1) or together with it (--joint, MEDUSA-2).

    DIR gets the heads; with --joint it gets heads/ and the tuned model in model/. After a kill, the same command goes
    on where it stopped and ends with the same heads. Started by torchrun or accelerate launch, it trains in parallel.

    For example:

        ladon train answers.jsonl --model path/to/model --out heads
        ladon train answers.jsonl --model path/to/model --out tuned --joint lora --heads-warmup-steps 500
        torchrun --nproc-per-node 8 -m ladon.cli train answers.jsonl --model path/to/model --out heads
    """
    given = dict(locals())
    from ladon.cli.loading import DEMO, load
    from ladon.demo.bundled import demo_path

    given["family_options"] = parse_family_options(family_option or [])
    if init_heads == DEMO:
        given["init_heads"] = str(demo_path() / "heads")
    chosen = TrainOptions(**{setting.name: given[setting.name] for setting in fields(TrainOptions)})
    placement = _placement(device_map, load_in_4bit, load_in_8bit)
    from ladon.train.data.rows import read_rows
    from ladon.train.run import train as run

    loaded = load(
        model,
        None,
        dtype="float32" if precision == "fp32" else "auto",
        device=_own_device(device),
        threads=threads,
        trust_remote_code=trust_remote_code,
        placement=placement,
    )
    examples = read_rows(rows, loaded.tokenizer, field=field, limit=limit, split=split)
    report = run(
        loaded.model,
        loaded.tokenizer,
        examples,
        chosen,
        out,
        say,
        source=Path(rows).name if Path(rows).exists() else rows,
        field=field,
    )
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
