"""`ladon inspect`: what a checkpoint of heads is, what it fits, what it costs, and what is known about it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ladon.cli import options
from ladon.cli.options import OUTPUT, READ, argument, option
from ladon.cli.output import print_json, show
from ladon.config import AUTO_BUDGET
from ladon.errors import InputError

if TYPE_CHECKING:
    from ladon.trees.fixed_tree import FixedTree, TreeSize


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
