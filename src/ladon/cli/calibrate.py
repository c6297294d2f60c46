"""`ladon calibrate`: how often heads are right on their model, how sure they may be, and what a tree costs here."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from ladon.cli import options
from ladon.cli.options import MEASURE, OUTPUT, WHAT, argument, flag, option
from ladon.cli.output import check_writable, print_json, progress_bar, say, show
from ladon.cli.prompts import asked_of
from ladon.config import BenchOptions
from ladon.errors import InputError


@options.command(without=("ignore_generation_config",))
def calibrate(
    target: options.Target,
    prompts: str | None = argument(
        "PROMPTS",
        "What `ladon distill` reads: JSONL, Parquet or a data set on the hub, of prompts or chats; for the "
        "bundled model, code that nothing else uses.",
        None,
    ),
    max_new_tokens: int = options.new_tokens(BenchOptions.max_new_tokens),
    limit: int | None = options.LIMIT,
    batch: int = option(WHAT, 16, "N", "Prompts answered together.", min=1),
    step_times: bool = option(MEASURE, True, None, "Time decode steps on this machine."),
    pruning: bool = option(MEASURE, False, None, "Find out whether early pruning pays on this machine, and how."),
    batches: str = option(MEASURE, "1,4", "N,...", "Sequences decoded together in timed steps."),
    contexts: str = option(MEASURE, "256", "N,...", "Tokens in the cache of each sequence in timed steps."),
    trace: Path | None = option(OUTPUT, None, "FILE", "Write the recorded trace too, a safetensors file."),
    from_trace: Path | None = option(
        MEASURE, None, "FILE", "Use a trace that was recorded before; the model answers nothing."
    ),
    simulate: str = option(
        MEASURE, "8,16,32,64", "N,...", "Sizes of trees to simulate, root included. The chain always is."
    ),
    out: Path | None = option(OUTPUT, None, "DIR", "Write calibration.json into this folder, not into the heads' own."),
    dry_run: bool = flag(OUTPUT, "--dry-run", "Measure and show, but write no calibration."),
    as_json: bool = options.JSON,
) -> None:
    """Measure heads on their model: hit rates, temperatures, the best fixed trees, and step times on this machine.

    The result is calibration.json beside the heads, which decoding then uses: dynamic trees are grown from
    probabilities divided by the temperatures. About 100 prompts of the kind that the model will be asked are enough.
    Step times go into the cache folder of this machine too (LADON_CACHE, else ~/.cache/ladon): `--budget auto` starts
    from them.

    For example:

        ladon calibrate prompts.jsonl --model path/to/model --heads path/to/heads
        ladon calibrate --dry-run --limit 20
    """
    if from_trace is not None and (prompts is not None or limit is not None or trace is not None or pruning):
        raise InputError("--from-trace has its answers: leave out the prompts, --limit, --trace and --pruning")
    sizes = _sizes(simulate)
    timed = options.parse_counts("--batches", batches), options.parse_counts("--contexts", contexts)
    folder = _destination(target, out, dry_run)
    check_writable(trace)
    from rich.text import Text

    from ladon.calibrate.findings import HeadsMeasurement
    from ladon.calibrate.summary import summary
    from ladon.cli.loading import DEMO, heads_place, load

    loaded = load(target)
    loaded.require_heads()
    assert loaded.heads is not None
    with progress_bar() as progress:
        work = HeadsMeasurement(loaded.model, loaded.heads, heads_place(target.heads or DEMO), progress)
        if pruning:
            work.check_prunable()
        if from_trace is not None:
            recorded = work.read(from_trace)
        else:
            name, asked = asked_of(loaded, prompts, limit)
            recorded = work.record(loaded.name, name, asked, max_new_tokens, batch)
        if trace is not None:
            recorded.save(trace)
        measured = work.step_times(recorded, *timed) if step_times else []
        found = work.findings(recorded, sizes, measured)
        profile = None if folder is None else work.write(found, measured, folder)
        if pruning:
            found = replace(found, pruning=work.pruning(asked))
            if folder is not None:
                found.save(folder)
    about = found.measured_on
    title = f"{loaded.name} · {about.get('dtype', '')} · {about['answers']} prompts · {about['positions']} positions"
    show([Text(title, "bold"), *summary(found)])
    if folder is not None:
        say(f"ladon: written to {folder}" + (f"; step times to {profile}" if profile else ""))
    if as_json:
        print_json(found.document())


def _sizes(text: str) -> tuple[int, ...]:
    """Numbers of nodes; "chain" may be named, though it is always simulated."""
    sizes = [part for part in text.split(",") if part.strip() != "chain"]
    return options.parse_counts("--simulate", ",".join(sizes)) if sizes else ()


def _destination(target: options.Target, out: Path | None, dry_run: bool) -> Path | None:
    """The folder to write to; None in a dry run."""
    from ladon.cli.loading import DEMO
    from ladon.heads.calibration import CALIBRATION_FILE

    if dry_run:
        return None
    if out is None:
        heads = target.heads
        if heads == DEMO or (heads is None and target.model == DEMO):
            raise InputError("the bundled heads stay as they are; give --out DIR for the calibration, or --dry-run")
        if heads is None:
            raise InputError("no heads; give --heads FOLDER, the heads of this model")
        out = Path(os.path.expanduser(heads))
        if not out.is_dir():
            raise InputError(f"{heads} is no folder here, so nothing can be written beside it; give --out DIR")
    check_writable(out / CALIBRATION_FILE)
    return out
