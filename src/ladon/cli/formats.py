"""`ladon import`, `ladon export` and `ladon inspect`: files of heads, in our format and in those of other systems."""

from __future__ import annotations

import warnings
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ladon.cli import options
from ladon.cli.options import OUTPUT, READ, argument, flag, option
from ladon.cli.output import print_json, progress_bar, say, show
from ladon.config import AUTO_BUDGET
from ladon.errors import InputError, UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ladon.cli.loading import Loaded
    from ladon.heads import Heads
    from ladon.heads.formats.detect import Found
    from ladon.trees.fixed_tree import FixedTree, TreeSize


@options.command()
def import_heads(
    machine: options.Machine,
    source: str = argument("SRC", "Folder, file or hub id of the heads, or of a model with heads."),
    out: Path = option(OUTPUT, ..., "DIR", "A new folder for them."),
    model: str | None = option(READ, None, "NAME", "Their model: checked, and tried out."),
    force: bool = flag(READ, "--force", "Accept a model other than the one that the files tell of."),
    revision: str | None = option(READ, None, "NAME", "Branch, tag or commit on the hub."),
    probe: bool = option(READ, True, None, "Decode a few words with the heads afterwards."),
    as_json: bool = options.JSON,
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
    from ladon.heads.formats.files import open_checkpoint

    def loaded(name: str) -> Loaded:
        return load(options.Target(model=name, **asdict(machine)))

    place = find_heads(source, revision)
    found = None if is_own(place) else detect(open_checkpoint(place, source))
    base = None if model is None else loaded(model)
    heads = read_heads(source, base.model if base else None, force, revision=revision)
    own_model, home = _write(out, found, heads, base, force=force)
    if base is None and own_model is not None and probe:
        if any(next(own_model.glob(pattern), None) for pattern in ("tokenizer*", "vocab*", "*.model")):
            base = loaded(str(own_model))
        else:
            warnings.warn(f"the heads were not tried out: {source} holds no tokenizer", stacklevel=1)
    accuracy = _try_out(heads, home, base, force=force) if base is not None and probe else None
    sizes = {name: getattr(heads, name) for name in ("family", "num_heads", "hidden_size", "vocab_size", "options")}
    report = {
        "source": source,
        "format": "ladon" if found is None else found.layout.name,
        **sizes,
        "heads": str(home),
        "model": None if own_model is None else str(own_model),
        "base": heads.base_name,
        "head_1_accuracy": accuracy,
    }
    if as_json:
        print_json(report)
    else:
        _tell(report)


def _write(
    out: Path, found: Found | None, heads: Heads, base: Loaded | None, *, force: bool
) -> tuple[Path | None, Path]:
    """Write the heads to a new folder, and beside them the model that they came in, if they did; where each is."""
    from ladon.heads.formats.files import new_folder
    from ladon.heads.formats.whole import split_model

    if base is not None:
        heads.check_sizes(base.model)
    with new_folder(out) as folder:
        place = folder
        if found is not None and found.holds_model:
            with progress_bar() as bar:
                split_model(found.checkpoint, found.parts.beside, folder / "model", bar)
            place = folder / "heads"
        if base is not None and not force:
            heads.check_base(base.model)
        heads.save(place)
    return (None, out) if place == folder else (out / "model", out / "heads")


def _try_out(heads: Heads, home: Path, base: Loaded, *, force: bool) -> float | None:
    """How often head 1 is right; if it is, the heads are known to be this model's, and that is saved with them."""
    from ladon.calibrate.lattice_trace import TOO_FEW, probe
    from ladon.heads import load_heads

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that their base cannot be verified was said before they were saved
        bound = load_heads(home, base.model, force)
    try:
        accuracy = probe(base.model, base.tokenizer, bound)
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
        heads.remember_base(base.model)
        heads.save(home)
    return accuracy


def _tell(report: dict[str, Any]) -> None:
    say(
        f"{report['num_heads']} {report['family']} heads for hidden size {report['hidden_size']} and a vocabulary of "
        f"{report['vocab_size']}, from the format {report['format']}: {report['heads']}"
    )
    if report["model"] is not None:
        say(f"their model: {report['model']}")
    if report["head_1_accuracy"] is not None:
        say(f"head 1 is right on {report['head_1_accuracy']:.0%} of the tokens of a few short answers")


@options.command()
def export(
    heads: str = argument("HEADS", "Folder, file or hub id of the heads, in any format."),
    format: str = option(OUTPUT, ..., "NAME", "medusa, medusa-v2, tgi, vllm, tensorrt-llm, modelopt or own."),
    out: Path = option(OUTPUT, ..., "DIR", "A new folder for them."),
    model: str | None = option(READ, None, "NAME", "Their model, where the format holds weights of it."),
    tree: Path | None = option(
        READ, None, "FILE", "Rank paths for tensorrt-llm; the best calibrated tree if left out."
    ),
    trust_remote_code: bool = options.TRUST,
    as_json: bool = options.JSON,
) -> None:
    """Write heads in another system's format, exactly as they are; what a format cannot hold is refused.

    Formats other than own hold MEDUSA's blocks alone: train heads of the family medusa for them. A correction by the
    token before is left out, and the heads guess each by itself there. Some hold a copy of
    the model's output projection for each head, or the whole model, and need --model then.

    For example:

        ladon export heads --format vllm --model path/to/model --out heads-vllm
        ladon export heads --format tensorrt-llm --tree tree.json --out heads-trt
    """
    from ladon.heads.factory import read_heads
    from ladon.heads.formats.export import export_heads

    base, tokenizer = (None, None) if model is None else _stored(model, trust_remote_code)
    shape = None if tree is None else _rank_paths(tree)
    found = read_heads(heads, base)
    files = export_heads(found, format, out, model=base, tree=shape)
    if tokenizer is not None and format == "modelopt":
        tokenizer.save_pretrained(out)  # a model's folder is of no use without one
    if as_json:
        print_json({"heads": heads, "format": format, "out": str(out), "files": files})
    else:
        say(f"{found.num_heads} {found.family} heads as {format}: {out} ({', '.join(files)})")


def _stored(name: str, trust_remote_code: bool) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Tokenizer and model, this in the dtype of its checkpoint, whatever is fast here: its weights go into files."""
    from transformers import AutoConfig

    from ladon.cli.adapters import adapter_base
    from ladon.cli.loading import load, source_of

    loaded = load(options.Target(model=name, device="cpu", trust_remote_code=trust_remote_code))
    source = source_of(name)
    config = AutoConfig.from_pretrained(adapter_base(source) or source, trust_remote_code=trust_remote_code)
    stored = getattr(config.get_text_config(decoder=True), "dtype", None)
    return loaded.model.to(stored or loaded.model.dtype), loaded.tokenizer


def _rank_paths(path: Path) -> FixedTree:
    from ladon.trees.fixed_tree import FixedTree, read_tree

    tree = read_tree(path)
    if not isinstance(tree, FixedTree):
        raise InputError(f"--tree {path} gives the size of a tree that is grown anew; give rank paths")
    return tree


@options.command()
def inspect(
    path: str | None = argument(
        "PATH",
        "Folder, file or hub id of heads in any format that Ladon reads, or of a model; demo: the bundled heads.",
        None,
    ),
    model: str | None = option(
        READ, None, "NAME", "Also say whether the heads are this model's (demo, a folder or a hub id)."
    ),
    nodes: int = option(OUTPUT, AUTO_BUDGET, "N", "Size of the best fixed tree that is drawn, root included.", min=1),
    tree: Path | None = option(
        READ, None, "FILE", "Draw the tree in this file, in any notation of trees; it needs no PATH."
    ),
    dtype: str = options.DTYPE,
    trust_remote_code: bool = options.TRUST,
    as_json: bool = options.JSON,
) -> None:
    """Say what a checkpoint of heads is: format, sizes, memory, training, calibration, and its best fixed tree.

    For example:

        ladon inspect demo
        ladon inspect path/to/heads --model path/to/model --nodes 32
        ladon inspect --tree tree.json
    """
    if path is None and tree is None:
        raise InputError("nothing to inspect; give PATH, a folder of heads or of a model, or --tree FILE")
    if path is None and model is not None:
        raise InputError("--model is the model of heads; give PATH, their folder, too")
    shape = None if tree is None else _read_tree(tree)
    about: dict[str, Any] = {"kind": "tree"}
    from ladon.cli.loading import heads_place, load
    from ladon.heads.description import describe
    from ladon.viz.heads import parts, tree_facts

    if path is not None:
        target = options.Target(model=model or "", dtype=dtype, device="cpu", trust_remote_code=trust_remote_code)
        about = describe(str(heads_place(path)), path, load(target).model if model is not None else None)
    about["tree"] = tree_facts(shape, (about.get("calibration") or {}).get("hit_rates", ()), nodes)
    if as_json:
        print_json(about)
    else:
        show(parts(about))


def _read_tree(path: Path) -> FixedTree | TreeSize:
    from ladon.trees.fixed_tree import read_tree

    if not path.is_file():
        raise InputError(f"there is no tree file {options.shortened(str(path))}; give a JSON file of rank paths")
    return read_tree(path)
