"""`ladon calibrate`: how often heads are right on their model, how sure they may be, and what a tree costs here."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from ladon.cli import options
from ladon.cli.output import OutConsole, check_writable, print_json, progress_bar, say
from ladon.cli.prompts import Asked, asked_of
from ladon.config import BenchOptions
from ladon.errors import InputError

if TYPE_CHECKING:
    from ladon.calibrate.lattice_trace import LatticeTrace
    from ladon.calibrate.timing import StepTimes
    from ladon.cli.loading import Loaded
    from ladon.heads.calibration import Calibration

_NEW_TOKENS = BenchOptions().max_new_tokens
_PRUNING_PROMPTS = 32  # whose answers pruning is judged on, at most

_PromptsArgument = Annotated[
    str | None,
    Argument(
        metavar="PROMPTS",
        help="What `ladon distill` reads: JSONL, Parquet or a data set on the hub, of prompts or chats; for the "
        "bundled model, code that nothing else uses.",
        show_default=False,
    ),
]
_LimitOption = Annotated[int | None, Option("--limit", metavar="N", min=1, help="Use only the first so many prompts.")]
_BatchOption = Annotated[int, Option("--batch", metavar="N", min=1, help="Prompts answered together.")]
_TimesOption = Annotated[bool, Option("--step-times/--no-step-times", help="Time decode steps on this machine.")]
_PruningOption = Annotated[
    bool, Option("--pruning/--no-pruning", help="Find out whether early pruning pays on this machine, and how.")
]
_BatchesOption = Annotated[str, Option("--batches", metavar="N,...", help="Rows decoded together in timed steps.")]
_ContextsOption = Annotated[
    str, Option("--contexts", metavar="N,...", help="Tokens in the cache of each row in timed steps.")
]
_TraceOption = Annotated[
    Path | None, Option("--trace", metavar="FILE", help="Write the recorded trace too, a safetensors file.")
]
_FromTraceOption = Annotated[
    Path | None,
    Option("--from-trace", metavar="FILE", help="Use a trace that was recorded before; the model answers nothing."),
]
_SimulateOption = Annotated[
    str,
    Option("--simulate", metavar="N,...", help="Sizes of trees to simulate, root included. The chain always is."),
]
_OutOption = Annotated[
    Path | None,
    Option("--out", metavar="DIR", help="Write calibration.json into this folder, not into the heads' own."),
]
_DryRunOption = Annotated[bool, Option("--dry-run", help="Measure and show, but write no calibration.")]


def calibrate(
    prompts: _PromptsArgument = None,
    model: options.ModelOption = "demo",
    heads: options.HeadsOption = None,
    max_new_tokens: options.NewTokensOption = _NEW_TOKENS,
    limit: _LimitOption = None,
    batch: _BatchOption = 16,
    step_times: _TimesOption = True,
    pruning: _PruningOption = False,
    batches: _BatchesOption = "1,4",
    contexts: _ContextsOption = "256",
    trace: _TraceOption = None,
    from_trace: _FromTraceOption = None,
    simulate: _SimulateOption = "8,16,32,64",
    out: _OutOption = None,
    dry_run: _DryRunOption = False,
    dtype: options.DtypeOption = "auto",
    device: options.DeviceOption = "auto",
    threads: options.ThreadsOption = None,
    trust_remote_code: options.TrustOption = False,
    as_json: options.JsonOption = False,
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
    budgets = tuple(dict.fromkeys(_sizes(simulate)))
    timed = _Timed.of(batches, contexts) if step_times else None
    folder = _destination(model, heads, out, dry_run)
    check_writable(trace)
    from ladon.cli.loading import load, require_heads

    loaded = load(model, heads, dtype=dtype, device=device, threads=threads, trust_remote_code=trust_remote_code)
    require_heads(loaded, "dynamic", "off")
    if pruning:
        _check_prunable(loaded)
    with progress_bar() as progress:
        if from_trace is not None:
            recorded = _read(from_trace, loaded, heads)
        else:
            asked = asked_of(loaded, prompts, limit)
            recorded = _record(loaded, heads, asked, max_new_tokens, batch, progress)
        if trace is not None:
            recorded.save(trace)
        measured = [] if timed is None else timed.measure(loaded, recorded, progress)
        found = _findings(loaded, recorded, budgets, measured)
        profile = None if folder is None else _write(loaded, found, measured, folder)
        if pruning:
            found = replace(found, pruning=_pruning(loaded, asked, progress))
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


def _destination(model: str, heads: str | None, out: Path | None, dry_run: bool) -> Path | None:
    """The folder to write to; None in a dry run."""
    from ladon.cli.loading import DEMO
    from ladon.heads.calibration import CALIBRATION_FILE

    if dry_run:
        return None
    if out is None:
        if heads == DEMO or (heads is None and model == DEMO):
            raise InputError("the bundled heads stay as they are; give --out DIR for the calibration, or --dry-run")
        if heads is None:
            raise InputError("no heads; give --heads FOLDER, the heads of this model")
        out = Path(os.path.expanduser(heads))
        if not out.is_dir():
            raise InputError(f"{heads} is no folder here, so nothing can be written beside it; give --out DIR")
    check_writable(out / CALIBRATION_FILE)
    return out


def _record(
    loaded: Loaded, heads: str | None, asked: Asked, max_new_tokens: int, batch: int, progress: Any
) -> LatticeTrace:
    """Let the model answer the prompts."""
    import torch

    from ladon.calibrate.recording import record
    from ladon.cli.loading import dtype_name

    name, ids = asked
    workload = {"name": name, "sha256": hashlib.sha256(json.dumps(ids).encode()).hexdigest(), "questions": len(ids)}
    about = {"model": loaded.name, "dtype": dtype_name(loaded.model), "max_new_tokens": max_new_tokens}
    assert loaded.heads is not None  # checked when loaded
    trace = record(
        loaded.model,
        loaded.heads,
        [torch.tensor(prompt) for prompt in ids],
        max_new_tokens=max_new_tokens,
        batch_size=batch,
        about={**about, "workload": workload},
        progress=progress,
    )
    return replace(trace, heads=_stored_hash(loaded, heads))


def _read(path: Path, loaded: Loaded, heads: str | None) -> LatticeTrace:
    from ladon.calibrate.lattice_trace import LatticeTrace

    trace = LatticeTrace.load(path)
    if trace.heads != _stored_hash(loaded, heads):
        raise InputError(f"{path} was recorded with other heads; record a trace with these, or name the others")
    return trace


def _stored_hash(loaded: Loaded, heads: str | None) -> str:
    """The hash of the heads as they are stored: float16 keeps less of small weights than the bfloat16 of the hash."""
    import torch

    from ladon.cli.loading import DEMO
    from ladon.demo.bundled import demo_path
    from ladon.heads.factory import read_heads

    assert loaded.heads is not None  # checked when loaded
    if loaded.model.dtype != torch.float16:
        return loaded.heads.weights_hash
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # given when they were loaded for the model
        place = demo_path() / "heads" if heads is None or heads == DEMO else heads
        return read_heads(place, loaded.model).weights_hash


@dataclass(frozen=True, slots=True)
class _Timed:
    """Batch sizes and context lengths at which steps are timed."""

    batches: tuple[int, ...]
    contexts: tuple[int, ...]

    @classmethod
    def of(cls, batches: str, contexts: str) -> _Timed:
        """As they stand on the command line."""
        return cls(options.parse_counts("--batches", batches), options.parse_counts("--contexts", contexts))

    def measure(self, loaded: Loaded, trace: LatticeTrace, progress: Any) -> list[StepTimes]:
        """Time steps in each of these ways, after the beginning of the model's own answers."""
        from ladon.calibrate.timing import measure_step_times

        assert loaded.heads is not None  # checked when loaded
        tokens = trace.truth[:, 0].long()
        longest = max(self.contexts)
        text = tokens.repeat(-(-longest // max(len(tokens), 1)))
        return [
            measure_step_times(loaded.model, loaded.heads, text[:context], batch=batch, progress=progress)
            for context in self.contexts
            for batch in self.batches
        ]


def _findings(loaded: Loaded, trace: LatticeTrace, budgets: tuple[int, ...], measured: list[StepTimes]) -> Calibration:
    from ladon.calibrate.findings import calibrate as find
    from ladon.calibrate.recording import correction_of
    from ladon.cli.loading import dtype_name
    from ladon.util.machine import environment

    place = environment(loaded.model.device) | {"dtype": dtype_name(loaded.model)}
    assert loaded.heads is not None  # checked when loaded
    correction = correction_of(loaded.heads)
    return find(trace, correction=correction, budgets=budgets, step_times=measured, place=place)


def _write(loaded: Loaded, found: Calibration, measured: list[StepTimes], folder: Path) -> Path | None:
    """Write the calibration, and keep the step times for this machine; where, or None if there are none."""
    from ladon.calibrate.timing import profile_of
    from ladon.tree_size.profile_store import place_of, write_profile

    assert loaded.heads is not None  # checked when loaded
    found.save(folder)
    return write_profile(place_of(loaded.model, loaded.heads), profile_of(measured)) if measured else None


def _check_prunable(loaded: Loaded) -> None:
    """Raise `UnsupportedModelError` now, and not after all else was measured, if the model cannot be pruned."""
    from ladon.calibrate.pruning import usable_ways

    assert loaded.heads is not None  # checked when loaded
    usable_ways(loaded.model, loaded.heads)


def _pruning(loaded: Loaded, asked: Asked, progress: Any) -> dict[str, Any]:
    import torch

    from ladon.calibrate.pruning import find_pruning
    from ladon.cli.loading import dtype_name
    from ladon.util.machine import environment

    assert loaded.heads is not None  # checked when loaded
    place = environment(loaded.model.device) | {"dtype": dtype_name(loaded.model)}
    prompts = [torch.tensor(ids) for ids in asked[1][:_PRUNING_PROMPTS]]
    return find_pruning(loaded.model, loaded.heads, prompts, place=place, progress=progress)


def _show(found: Calibration, name: str) -> None:
    """What was found, on standard output."""
    from ladon.calibrate.summary import summary

    about = found.measured_on
    console = OutConsole(highlight=False)
    title = f"{name} · {about.get('dtype', '')} · {about['answers']} prompts · {about['positions']} positions"
    console.print(title, style="bold", markup=False)
    for part in summary(found):
        console.print(part)
