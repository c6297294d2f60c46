"""`ladon export`: heads as other systems read them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ladon.cli import options
from ladon.cli.options import OUTPUT, READ, argument, option
from ladon.cli.output import print_json, say
from ladon.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ladon.trees.fixed_tree import FixedTree


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

    from ladon.cli.loading import load, source_of

    loaded = load(options.Target(model=name, device="cpu", trust_remote_code=trust_remote_code))
    config = AutoConfig.from_pretrained(source_of(name), trust_remote_code=trust_remote_code)
    stored = getattr(config.get_text_config(decoder=True), "dtype", None)
    return loaded.model.to(stored or loaded.model.dtype), loaded.tokenizer


def _rank_paths(path: Path) -> FixedTree:
    from ladon.trees.fixed_tree import FixedTree, read_tree

    tree = read_tree(path)
    if not isinstance(tree, FixedTree):
        raise InputError(f"--tree {path} gives the size of a tree that is grown anew; give rank paths")
    return tree
