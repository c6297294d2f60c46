"""`ladon train`: heads for a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from ladon.cli import options
from ladon.cli.output import print_json, say
from ladon.errors import InputError
from ladon.train.config import TrainOptions


def _option(name: str, **more: object):  # type: ignore[no-untyped-def]
    from ladon.config import help_of

    text = help_of(TrainOptions, name)
    return Option(f"--{name.replace('_', '-')}", help=f"{text[0].upper()}{text[1:]}.", **more)  # type: ignore[arg-type]


_DEFAULTS = TrainOptions()


def train(
    rows: Annotated[str, Argument(metavar="ROWS", help="JSONL, JSON or Parquet file, or a data set on the hub.")],
    out: Annotated[Path, Option("--out", metavar="DIR", help="Folder for checkpoints and heads.")],
    model: options.ModelOption = "demo",
    num_heads: Annotated[int, _option("num_heads")] = _DEFAULTS.num_heads,
    family: Annotated[str, _option("family")] = _DEFAULTS.family,
    family_option: Annotated[
        list[str] | None, Option("--family-option", metavar="NAME=VALUE", help="A setting of the family; repeatable.")
    ] = None,
    init_heads: Annotated[str | None, _option("init_heads")] = None,
    labels: Annotated[str, _option("labels")] = _DEFAULTS.labels,
    decay: Annotated[float, _option("decay")] = _DEFAULTS.decay,
    steps: Annotated[int | None, _option("steps")] = None,
    epochs: Annotated[float, _option("epochs")] = _DEFAULTS.epochs,
    batch_size: Annotated[int, _option("batch_size")] = _DEFAULTS.batch_size,
    accumulation: Annotated[int, _option("accumulation")] = _DEFAULTS.accumulation,
    length: Annotated[int, _option("length")] = _DEFAULTS.length,
    optimizer: Annotated[str, _option("optimizer")] = _DEFAULTS.optimizer,
    learning_rate: Annotated[float | None, _option("learning_rate")] = None,
    weight_decay: Annotated[float, _option("weight_decay")] = _DEFAULTS.weight_decay,
    schedule: Annotated[str, _option("schedule")] = _DEFAULTS.schedule,
    warmup: Annotated[float, _option("warmup")] = _DEFAULTS.warmup,
    clip: Annotated[float, _option("clip")] = _DEFAULTS.clip,
    precision: Annotated[str, _option("precision")] = _DEFAULTS.precision,
    chunk_rows: Annotated[int, _option("chunk_rows")] = _DEFAULTS.chunk_rows,
    held_out: Annotated[str, _option("held_out")] = _DEFAULTS.held_out,
    save_every: Annotated[int, _option("save_every")] = _DEFAULTS.save_every,
    log_every: Annotated[int, _option("log_every")] = _DEFAULTS.log_every,
    report_to: Annotated[str, _option("report_to")] = _DEFAULTS.report_to,
    seed: Annotated[int, _option("seed")] = _DEFAULTS.seed,
    device: options.DeviceOption = "auto",
    threads: options.ThreadsOption = None,
    trust_remote_code: options.TrustOption = False,
    as_json: options.JsonOption = False,
) -> None:
    """Train heads on answers, as `ladon distill` writes them.

    For example:

        ladon train answers.jsonl --model path/to/model --out heads
    """
    chosen = TrainOptions(
        num_heads=num_heads,
        family=family,
        family_options=parse_family_options(family_option or []),
        init_heads=init_heads,
        labels=labels,
        decay=decay,
        steps=steps,
        epochs=epochs,
        batch_size=batch_size,
        accumulation=accumulation,
        length=length,
        optimizer=optimizer,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        schedule=schedule,
        warmup=warmup,
        clip=clip,
        precision=precision,
        chunk_rows=chunk_rows,
        held_out=held_out,
        save_every=save_every,
        log_every=log_every,
        report_to=report_to,
        seed=seed,
    )
    from ladon.cli.loading import load
    from ladon.train.rows import read_rows
    from ladon.train.run import train as run

    loaded = load(
        model,
        None,
        dtype="float32" if precision == "fp32" else "auto",
        device=device,
        threads=threads,
        trust_remote_code=trust_remote_code,
    )
    examples = read_rows(rows, loaded.tokenizer)
    report = run(loaded.model, loaded.tokenizer, examples, chosen, out, say)
    if as_json:
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
