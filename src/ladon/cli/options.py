"""Options that several commands share, and the reading of their values."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from ladon.config import AUTO_BUDGET, BENCH_MODES, TREES, DecoderOptions, SamplingOptions, help_of
from ladon.errors import InputError

if TYPE_CHECKING:
    from ladon.trees.fixed_tree import FixedTree, TreeSize

ModelOption = Annotated[
    str,
    Option("--model", metavar="NAME", help="The bundled model (demo), a folder in transformers' format, or a hub id."),
]
HeadsOption = Annotated[
    str | None,
    Option(
        "--heads",
        metavar="NAME",
        help="Folder or hub id of the model's heads, or mtp for the MTP modules in it; the bundled model brings "
        "its own.",
    ),
]
DTYPES = ("float32", "bfloat16", "float16", "float64")
DtypeOption = Annotated[
    str,
    Option(
        "--dtype",
        help="auto (the checkpoint's; on a CPU float32 for float16, and for bfloat16 if the CPU lacks it), "
        f"{', '.join(DTYPES)}.",
    ),
]
DeviceOption = Annotated[str, Option("--device", metavar="NAME", help="auto (a GPU if there is one), cpu, cuda, ...")]
ThreadsOption = Annotated[
    int | None, Option("--threads", metavar="N", min=1, help="CPU threads of torch; its own choice if left out.")
]
OneThreadOption = Annotated[int, Option("--threads", metavar="N", min=1, help="CPU threads of torch.")]
TrustOption = Annotated[
    bool, Option("--trust-remote-code", help="Run Python code that comes with the model. Off unless asked for.")
]
IgnoreConfigOption = Annotated[
    bool,
    Option(
        "--ignore-generation-config",
        help="Decode without what the model's generation config asks for, such as repetition_penalty; its special "
        "tokens stay.",
    ),
]
PromptOption = Annotated[str | None, Option("--prompt", metavar="TEXT", help="The text to continue.")]
PromptFileOption = Annotated[
    Path | None, Option("--prompt-file", metavar="FILE", help="A UTF-8 file with the text to continue.")
]
TreeOption = Annotated[str, Option("--tree", metavar="TREE", help=f"{help_of(DecoderOptions, 'tree').capitalize()}.")]
BudgetOption = Annotated[
    str, Option("--budget", metavar="N", help=f"{help_of(DecoderOptions, 'budget').capitalize()}.")
]
PruneOption = Annotated[
    str, Option("--prune", metavar="NAME", help=f"{help_of(DecoderOptions, 'prune').capitalize()}.")
]
JointOption = Annotated[
    str, Option("--joint", metavar="NAME", help=f"{help_of(DecoderOptions, 'joint').capitalize()}.")
]
AcceptOption = Annotated[
    str,
    Option(
        "--accept",
        metavar="RULE",
        help=f"{help_of(DecoderOptions, 'accept').capitalize()}. Settings: typical:epsilon=0.09,delta=0.3 and "
        "nucleus:top_p=0.8.",
    ),
]
NgramsOption = Annotated[
    str, Option("--ngrams", metavar="NAME", help=f"{help_of(DecoderOptions, 'ngrams').capitalize()}.")
]
NewTokensOption = Annotated[int, Option("--max-new-tokens", metavar="N", min=1, help="Tokens to write at most.")]


def _sampling_help(name: str) -> str:
    return f"{help_of(SamplingOptions, name).capitalize()}."


TemperatureOption = Annotated[float, Option("--temperature", metavar="T", help=_sampling_help("temperature"))]
TopPOption = Annotated[float, Option("--top-p", metavar="P", help=_sampling_help("top_p"))]
TopKOption = Annotated[int, Option("--top-k", metavar="K", help=_sampling_help("top_k"))]
SeedOption = Annotated[int, Option("--seed", metavar="S", help=_sampling_help("seed"))]
JsonOption = Annotated[bool, Option("--json", help="Print one JSON document as the last line of standard output.")]


def sampling(temperature: float, top_k: int, top_p: float, seed: int) -> dict[str, Any]:
    """Options of `Decoder.generate` that say how tokens are picked; `InputError` for what is no law."""
    from ladon.sampling.gumbel import row_seeds
    from ladon.sampling.sampling_params import check_settings

    check_settings(temperature, top_k, top_p)
    row_seeds(seed, 1)
    if temperature == 0:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}


def parse_budget(text: str) -> int | str:
    """A number of nodes, or "auto"."""
    return text if text == "auto" else parse_counts("--budget", text, largest=1)[0]


def parse_budgets(text: str) -> tuple[int, ...]:
    """Numbers of nodes separated by commas; "auto" is the default budget."""
    return parse_counts("--budget", ",".join(str(AUTO_BUDGET) if part == "auto" else part for part in text.split(",")))


def parse_counts(option: str, text: str, largest: int | None = None) -> tuple[int, ...]:
    """Whole numbers of 1 or more separated by commas, at most `largest` of them."""
    try:
        counts = tuple(int(part) for part in text.split(","))
    except ValueError:
        counts = ()
    if not counts or min(counts) < 1 or (largest and len(counts) > largest):
        some = "a whole number of 1 or more" if largest == 1 else "whole numbers of 1 or more, separated by commas"
        raise InputError(f"{option} is {text!r}; give {some}")
    return counts


def parse_modes(text: str) -> tuple[str, ...]:
    """Mode names separated by commas."""
    modes = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    unknown = [mode for mode in modes if mode not in BENCH_MODES]
    if unknown:
        raise InputError(f"--modes has {unknown[0]!r}; give some of {', '.join(BENCH_MODES)}, separated by commas")
    return modes


def parse_tree(text: str) -> str | FixedTree | TreeSize:
    """A tree option's name, or the tree in a file, in any of the notations of `ladon.trees.fixed_tree`."""
    if text in TREES:
        return text
    if not os.path.isfile(text):  # also false for a name that is too long, such as the paths themselves
        raise InputError(f"--tree is {shortened(text)!r}; give {', '.join(TREES)}, or a file with a tree")
    from ladon.trees.fixed_tree import read_tree

    return read_tree(text)


def shortened(text: str) -> str:
    """A value for an error message, which is one line."""
    return text if len(text) <= 80 else text[:79] + "…"


def joined(values: Sequence[object]) -> str:
    """Values as an option's text."""
    return ",".join(str(value) for value in values)
