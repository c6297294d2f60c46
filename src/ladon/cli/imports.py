"""`ladon import`: heads of other systems, in Ladon's own format."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from ladon.cli import options
from ladon.cli.output import print_json, progress_bar, say
from ladon.errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ladon.heads import Heads
    from ladon.heads.formats.detect import Found

_Source = Annotated[str, Argument(metavar="SRC", help="Folder, file or hub id of the heads, or of a model with heads.")]
_Out = Annotated[Path, Option("--out", metavar="DIR", help="A new folder for them.")]
_Model = Annotated[str | None, Option("--model", metavar="NAME", help="Their model: checked, and tried out.")]
_Force = Annotated[bool, Option("--force", help="Accept a model other than the one that the files tell of.")]
_Revision = Annotated[str | None, Option("--revision", metavar="NAME", help="Branch, tag or commit on the hub.")]
_Probe = Annotated[bool, Option("--probe/--no-probe", help="Decode a few words with the heads afterwards.")]


def import_heads(
    source: _Source,
    out: _Out,
    model: _Model = None,
    force: _Force = False,
    revision: _Revision = None,
    probe: _Probe = True,
    dtype: options.DtypeOption = "auto",
    device: options.DeviceOption = "auto",
    threads: options.ThreadsOption = None,
    trust_remote_code: options.TrustOption = False,
    as_json: options.JsonOption = False,
) -> None:
    """Bring heads of MEDUSA, TGI, vLLM, TensorRT-LLM, Model-Optimizer or Hydra into Ladon's format.

    The format is told by the tensors' names and shapes. A model with heads in it (MEDUSA v1.0, Model-Optimizer) is
    split into DIR/model and DIR/heads: its heads belong to that model, not to the one that it was made from. With the
    model at hand, 20 tokens of a few prompts are decoded, and heads that guess next to nothing right are reported.

    For example:

        ladon import medusa-vicuna-7b-v1.3 --model lmsys/vicuna-7b-v1.3 --out heads
        ladon import medusa-1.0-zephyr-7b-beta --out zephyr
    """
    from ladon.cli.loading import load
    from ladon.heads.checkpoint import find_heads, is_own
    from ladon.heads.factory import read_heads
    from ladon.heads.formats.detect import detect
    from ladon.heads.formats.files import new_folder, open_checkpoint

    def loaded_model(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        found = load(name, None, dtype=dtype, device=device, threads=threads, trust_remote_code=trust_remote_code)
        return found.model, found.tokenizer

    place = find_heads(source, revision)
    found = None if is_own(place) else detect(open_checkpoint(place, source))
    base = loaded_model(model) if model is not None else None
    heads = read_heads(source, base[0] if base else None, force, revision=revision)
    if base is not None:
        heads.check_sizes(base[0])
    own_model = found is not None and found.holds_model
    with new_folder(out) as folder:
        if own_model:
            assert found is not None
            _split(found, folder / "model")
        if base is not None and not force:
            heads.check_base(base[0])
        heads.save(folder / "heads" if own_model else folder)
    home = out / "heads" if own_model else out
    if base is None and own_model and probe:
        if any(next((out / "model").glob(pattern), None) for pattern in ("tokenizer*", "vocab*", "*.model")):
            base = loaded_model(str(out / "model"))
        else:
            warnings.warn(f"the heads were not tried out: {source} holds no tokenizer", stacklevel=1)
    accuracy = _try_out(heads, home, *base, force=force) if base is not None and probe else None
    report = _report(source, found, heads, out / "model" if own_model else None, home, accuracy)
    if as_json:
        print_json(report)
    else:
        _tell(report)


def _split(found: Found, folder: Path) -> None:
    from ladon.heads.formats.whole import split_model

    with progress_bar() as bar:
        split_model(found.checkpoint, found.parts.beside, folder, bar)


def _try_out(
    heads: Heads, home: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, force: bool
) -> float | None:
    """How often head 1 is right; if it is, the heads are known to be this model's, and that is saved with them."""
    from ladon.calibrate.recording import TOO_FEW, probe
    from ladon.heads import load_heads

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that their base cannot be verified was said before they were saved
        bound = load_heads(home, model, force)
    try:
        accuracy = probe(model, tokenizer, bound)
    except UnsupportedModelError as error:
        warnings.warn(f"the heads were not tried out: {error}", stacklevel=2)
        return None
    if accuracy < TOO_FEW:
        warnings.warn(
            f"the heads guess next to nothing right (head 1: {accuracy:.1%} of the tokens): wrong base, wrong layout, "
            "or biases lost",
            stacklevel=2,
        )
    elif not force:
        heads.remember_base(model)
        heads.save(home)
    return accuracy


def _report(
    source: str, found: Found | None, heads: Heads, model: Path | None, home: Path, accuracy: float | None
) -> dict[str, Any]:
    return {
        "source": source,
        "format": "ladon" if found is None else found.layout.name,
        "family": heads.family,
        "num_heads": heads.num_heads,
        "hidden_size": heads.hidden_size,
        "vocab_size": heads.vocab_size,
        "options": heads.options,
        "heads": str(home),
        "model": None if model is None else str(model),
        "base": heads.base_name,
        "head_1_accuracy": accuracy,
    }


def _tell(report: dict[str, Any]) -> None:
    say(
        f"{report['num_heads']} {report['family']} heads for hidden size {report['hidden_size']} and a vocabulary of "
        f"{report['vocab_size']}, from the format {report['format']}: {report['heads']}"
    )
    if report["model"] is not None:
        say(f"their model: {report['model']}")
    if report["head_1_accuracy"] is not None:
        say(f"head 1 is right on {report['head_1_accuracy']:.0%} of the tokens of a few short answers")
