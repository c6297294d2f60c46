"""The bundled model: a small Llama trained on Python's own sources, its heads, fixed trees and prompts.

Made by `recipes/tiny`; the model card is `model/README.md`. Everything here works offline.
"""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ladon.errors import InputError
from ladon.heads import Heads, load_heads
from ladon.heads.calibration import read_calibration
from ladon.trees.fixed_tree import FixedTree, best_fixed_tree

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROMPT_CHARS = 900  # about 250 tokens of the bundled model
GOLDEN = 0.6180339887498949
FALLBACK_MARK = "# ----\n"


def demo_path() -> Path:
    """Folder of the bundled model: a transformers checkpoint, with the heads in `heads/` below it."""
    return Path(__file__).parent / "model"


def load_demo(dtype: torch.dtype | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Heads]:
    """The bundled model, its tokenizer and its heads, on the CPU and in evaluation mode.

    Args:
        dtype: dtype of model and heads; None is float32. The weights are stored in bfloat16.

    Returns:
        (model, tokenizer, heads); the heads are bound to the model.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = demo_path()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype or torch.float32, local_files_only=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    return model, tokenizer, load_heads(path / "heads", model).eval()


def demo_fixed_tree(num_nodes: int) -> FixedTree:
    """The best fixed tree of `num_nodes` nodes (root included) for the bundled heads.

    From their hit rates on greedy continuations of the calibration split, which shares no module with the prompts.

    Raises:
        TreeError: `num_nodes` < 1.
    """
    calibration = read_calibration(demo_path() / "heads")
    assert calibration is not None  # it comes with the heads
    return best_fixed_tree(calibration.hit_rates, num_nodes)


def demo_prompts(count: int, split: str = "prompts") -> list[str]:
    """Beginnings to complete, from standard library modules that the bundled model was never trained on.

    Args:
        count: how many at most.
        split: "prompts", or "calibration" for modules that share no text with those.

    Returns:
        Pieces of about 900 characters (250 tokens) of the running Python's own sources. Each starts at the start of
        a line, ends at the end of one, and overlaps no other; neighbours in the list come from different modules.
        Without sources (a Python installed without them), a few texts that come with this package.

    Raises:
        InputError: an unknown split, or `count` < 1.
    """
    if count < 1:
        raise InputError(f"count is {count}; ask for 1 prompt or more")
    modules: dict[str, list[str]] = _read_json("corpus.json")["held_out"]
    if split not in modules:
        raise InputError(f"split {split!r} is unknown; splits: {', '.join(modules)}")
    return module_prompts(modules[split], count) or fallback_prompts(count, split)


def module_prompts(modules: Sequence[str], count: int) -> list[str]:
    """At most `count` prompts from the running Python's sources of the named modules; none if there are no sources."""
    return list(islice(_alternate([_spread(_pieces(_source(name))) for name in modules]), count))


def fallback_prompts(count: int, split: str) -> list[str]:
    """At most `count` of the texts that come with this package; the splits share none."""
    texts = (demo_path() / "fallback_prompts.txt").read_text(encoding="utf-8").split(FALLBACK_MARK)
    pieces = [text.strip("\n") for text in texts]
    half = len(pieces) // 2
    return (pieces[:half] if split == "prompts" else pieces[half:])[:count]


def _source(module: str) -> str:
    path = Path(sysconfig.get_paths()["stdlib"]) / f"{module}.py"
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):  # no sources here; other prompts will do
        return ""


def _pieces(text: str) -> list[str]:
    """Consecutive pieces of whole lines, `PROMPT_CHARS` or a little more each, without the last line break.

    The break is left out because the tokenizer joins it with the indentation after it: a prompt that ends in a bare
    break would ask the model for an unindented line.
    """
    pieces, lines, size = [], [], 0
    for line in text.splitlines(keepends=True):
        lines.append(line)
        size += len(line)
        if size >= PROMPT_CHARS and line.strip():
            pieces.append("".join(lines).rstrip("\n"))
            lines, size = [], 0
    return pieces


def _spread(pieces: Sequence[str]) -> list[str]:
    """The pieces in an order whose every beginning is spread over the whole."""
    return [pieces[i] for i in sorted(range(len(pieces)), key=lambda i: i * GOLDEN % 1)]


def _alternate(groups: Sequence[Sequence[str]]) -> Iterator[str]:
    """First of each group, second of each, and so on."""
    for i in range(max(map(len, groups), default=0)):
        yield from (group[i] for group in groups if i < len(group))


def _read_json(name: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((demo_path() / name).read_text(encoding="utf-8"))
    return document
