"""`ladon calibrate`: how often heads are right on their model, how sure they may be, and what a tree costs here."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ladon.cli import options
from ladon.cli.options import MEASURE, OUTPUT, WHAT, argument, flag, option
from ladon.cli.output import OutConsole, check_writable, print_json, progress_bar, say
from ladon.cli.prompts import Asked, asked_of
from ladon.config import BenchOptions
from ladon.errors import InputError

if TYPE_CHECKING:
    from ladon.calibrate.lattice_trace import LatticeTrace
    from ladon.calibrate.step_times import StepTimes
    from ladon.cli.loading import Loaded
    from ladon.heads.calibration import Calibration

_PRUNING_PROMPTS = 32  # whose answers pruning is judged on, at most


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
    from ladon.cli.loading import load

    loaded = load(target)
    loaded.require_heads()
    with progress_bar() as progress:
        work = _Work(loaded, target.heads, progress)
        if pruning:
            work.check_prunable()
        if from_trace is not None:
            recorded = work.read(from_trace)
        else:
            asked = asked_of(loaded, prompts, limit)
            recorded = work.record(asked, max_new_tokens, batch)
        if trace is not None:
            recorded.save(trace)
        measured = work.step_times(recorded, *timed) if step_times else []
        found = work.findings(recorded, sizes, measured)
        profile = None if folder is None else work.write(found, measured, folder)
        if pruning:
            found = replace(found, pruning=work.pruning(asked))
            if folder is not None:
                found.save(folder)
    _show(found, loaded.name)
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


class _Work:
    """The steps of a calibration, for a model and its heads."""

    def __init__(self, loaded: Loaded, name: str | None, progress: Any) -> None:
        """`name` is what the heads were called; `progress` is told of every step's own."""
        from ladon.cli.loading import dtype_name

        assert loaded.heads is not None  # checked when loaded
        self._loaded, self._name, self._progress = loaded, name, progress
        self._model, self._heads, self._dtype = loaded.model, loaded.heads, dtype_name(loaded.model)

    @property
    def _place(self) -> dict[str, Any]:
        """What measurements are true of."""
        from ladon.util.machine import environment

        return environment(self._model.device) | {"dtype": self._dtype}

    def check_prunable(self) -> None:
        """Raise `UnsupportedModelError` now, and not after all else was measured, if the model cannot be pruned."""
        from ladon.calibrate.pruning import usable_ways

        usable_ways(self._model, self._heads)

    def record(self, asked: Asked, max_new_tokens: int, batch: int) -> LatticeTrace:
        """Let the model answer the prompts."""
        import torch

        from ladon.calibrate.recording import record

        name, ids = asked
        workload = {"name": name, "sha256": hashlib.sha256(json.dumps(ids).encode()).hexdigest(), "questions": len(ids)}
        about = {"model": self._loaded.name, "dtype": self._dtype, "max_new_tokens": max_new_tokens}
        trace = record(
            self._model,
            self._heads,
            [torch.tensor(prompt) for prompt in ids],
            max_new_tokens=max_new_tokens,
            batch_size=batch,
            about={**about, "workload": workload},
            progress=self._progress,
        )
        return replace(trace, heads=self._stored_hash())

    def read(self, path: Path) -> LatticeTrace:
        """A trace that was recorded before; `InputError` if it is of other heads."""
        from ladon.calibrate.lattice_trace import LatticeTrace

        trace = LatticeTrace.load(path)
        if trace.heads != self._stored_hash():
            raise InputError(f"{path} was recorded with other heads; record a trace with these, or name the others")
        return trace

    def _stored_hash(self) -> str:
        """The hash of the heads as they are stored: float16 keeps less of small weights than the hash's bfloat16."""
        import torch

        from ladon.cli.loading import DEMO, heads_place
        from ladon.heads.factory import read_heads

        if self._model.dtype != torch.float16:
            return self._heads.weights_hash
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # given when they were loaded for the model
            return read_heads(heads_place(self._name or DEMO), self._model).weights_hash

    def step_times(self, trace: LatticeTrace, batches: Sequence[int], contexts: Sequence[int]) -> list[StepTimes]:
        """Time steps at every batch size and context length, after the beginning of the model's own answers."""
        from ladon.calibrate.step_times import measure_step_times

        tokens = trace.truth[:, 0].long()
        text = tokens.repeat(-(-max(contexts) // max(len(tokens), 1)))
        return [
            measure_step_times(self._model, self._heads, text[:context], batch=batch, progress=self._progress)
            for context in contexts
            for batch in batches
        ]

    def findings(self, trace: LatticeTrace, budgets: tuple[int, ...], measured: list[StepTimes]) -> Calibration:
        """What the trace and the step times say."""
        from ladon.calibrate.drafting import correction_of
        from ladon.calibrate.findings import calibrate as find

        correction = correction_of(self._heads)
        return find(trace, correction=correction, budgets=budgets, step_times=measured, place=self._place)

    def write(self, found: Calibration, measured: list[StepTimes], folder: Path) -> Path | None:
        """Write the calibration, and keep the step times for this machine; where, or None if there are none."""
        from ladon.calibrate.step_times import profile_of
        from ladon.tree_size.profile_store import place_of, write_profile

        found.save(folder)
        return write_profile(place_of(self._model, self._heads), profile_of(measured)) if measured else None

    def pruning(self, asked: Asked) -> dict[str, Any]:
        """Whether early pruning pays, and how."""
        import torch

        from ladon.calibrate.pruning import find_pruning

        prompts = [torch.tensor(ids) for ids in asked[1][:_PRUNING_PROMPTS]]
        return find_pruning(self._model, self._heads, prompts, place=self._place, progress=self._progress)


def _show(found: Calibration, name: str) -> None:
    """What was found, on standard output."""
    from ladon.calibrate.summary import summary

    about = found.measured_on
    console = OutConsole(highlight=False)
    title = f"{name} · {about.get('dtype', '')} · {about['answers']} prompts · {about['positions']} positions"
    console.print(title, style="bold", markup=False)
    for part in summary(found):
        console.print(part)
