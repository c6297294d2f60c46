"""Options that commands share, each declared once, and the reading of their values.

A group of options is a dataclass; a command names it as one parameter. `with_groups` spreads the groups into the options
that typer reads from a command's signature, and gathers their values again when the command runs.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_origin, get_type_hints

from typer import Option

from ladon.config import AUTO_BUDGET, BENCH_MODES, TREES, DecoderOptions, SamplingOptions, help_of
from ladon.errors import InputError

if TYPE_CHECKING:
    from ladon.trees.fixed_tree import FixedTree, TreeSize

DTYPES = ("float32", "bfloat16", "float16", "float64")
# The panels of --help, in their order; every command shows those that it has options for.
WHAT, DRAFT, READ, TRAIN, MEASURE, OUTPUT, MACHINE = PANELS = (
    "What to decode", "How to draft", "What to read", "How to train", "How to measure", "Output", "Machine",
)  # fmt: skip


def option(panel: str, metavar: str | None, text: str, *names: str, **more: Any) -> Any:
    """An option in a panel of --help; it goes by its parameter's name, unless `names` are given."""
    return Option(*names, metavar=metavar, help=text, rich_help_panel=panel, **more)


def about(config: type[Any], name: str) -> str:
    """The documentation of a setting in `ladon.config`, as the help of its option."""
    text = help_of(config, name)
    return f"{text[0].upper()}{text[1:]}."


DtypeOption = Annotated[
    str,
    option(
        MACHINE,
        None,
        "auto (the checkpoint's; on a CPU float32 for float16, and for bfloat16 if the CPU lacks it), "
        f"{', '.join(DTYPES)}.",
    ),
]
OneThreadOption = Annotated[int | None, option(MACHINE, "N", "CPU threads of torch.", min=1)]
TrustOption = Annotated[
    bool,
    option(MACHINE, None, "Run Python code that comes with the model. Off unless asked for.", "--trust-remote-code"),
]
PromptFileOption = Annotated[Path | None, option(WHAT, "FILE", "A UTF-8 file with the text to continue.")]
LimitOption = Annotated[int | None, option(WHAT, "N", "Use only the first so many prompts.", min=1)]
NewTokensOption = Annotated[int, option(WHAT, "N", "Tokens to write at most.", min=1)]
JsonOption = Annotated[
    bool, option(OUTPUT, None, "Print one JSON document as the last line of standard output.", "--json")
]


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where and how a model runs."""

    dtype: DtypeOption = "auto"
    device: Annotated[str, option(MACHINE, "NAME", "auto (a GPU if there is one), cpu, cuda, ...")] = "auto"
    threads: Annotated[int | None, option(MACHINE, "N", "CPU threads of torch; its own choice if left out.", min=1)] = (
        None
    )
    trust_remote_code: TrustOption = False


@dataclass(frozen=True, kw_only=True)
class Target(Machine):
    """A model and its heads, and where they run: what `ladon.cli.loading.load` takes."""

    model: Annotated[
        str, option(WHAT, "NAME", "The bundled model (demo), a folder in transformers' format, or a hub id.")
    ] = "demo"
    heads: Annotated[
        str | None,
        option(
            DRAFT,
            "NAME",
            "Folder or hub id of the model's heads, or mtp for the MTP modules in it; the bundled model brings its own.",
        ),
    ] = None
    ignore_generation_config: Annotated[
        bool,
        option(
            WHAT,
            None,
            "Decode without what the model's generation config asks for, such as repetition_penalty; its special "
            "tokens stay.",
            "--ignore-generation-config",
        ),
    ] = False


@dataclass(frozen=True, kw_only=True)
class Drafting:
    """How tokens are drafted, and which drafts are kept."""

    tree: Annotated[str, option(DRAFT, "TREE", about(DecoderOptions, "tree"))] = DecoderOptions.tree
    budget: Annotated[str, option(DRAFT, "N", about(DecoderOptions, "budget"))] = str(DecoderOptions.budget)
    prune: Annotated[str, option(DRAFT, "NAME", about(DecoderOptions, "prune"))] = DecoderOptions.prune
    accept: Annotated[
        str,
        option(
            DRAFT,
            "RULE",
            f"{about(DecoderOptions, 'accept')} Settings: typical:epsilon=0.09,delta=0.3 and nucleus:top_p=0.8.",
        ),
    ] = DecoderOptions.accept
    ngrams: Annotated[str, option(DRAFT, "NAME", about(DecoderOptions, "ngrams"))] = DecoderOptions.ngrams
    joint: Annotated[str, option(DRAFT, "NAME", about(DecoderOptions, "joint"))] = DecoderOptions.joint

    def for_decoder(self) -> dict[str, Any]:
        """The arguments of `Decoder` that these are; `InputError` for a value that is none."""
        budget, tree = parse_budget(self.budget), parse_tree(self.tree)
        from ladon.sampling.lossy import parsed_rule

        accept = parsed_rule(self.accept) or DecoderOptions.accept
        given = {"tree": tree, "budget": budget, "prune": self.prune, "accept": accept}
        return given | {"ngrams": self.ngrams, "joint": self.joint}


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are sampled."""

    temperature: Annotated[float, option(WHAT, "T", about(SamplingOptions, "temperature"))] = (
        SamplingOptions.temperature
    )
    top_p: Annotated[float, option(WHAT, "P", about(SamplingOptions, "top_p"))] = SamplingOptions.top_p
    top_k: Annotated[int, option(WHAT, "K", about(SamplingOptions, "top_k"))] = SamplingOptions.top_k
    seed: Annotated[int, option(WHAT, "S", about(SamplingOptions, "seed"))] = SamplingOptions.seed

    def for_generate(self) -> dict[str, Any]:
        """The arguments of `Decoder.generate` that these are; `InputError` for sampling parameters that are none."""
        from ladon.sampling.gumbel import row_seeds
        from ladon.sampling.sampler import check_settings

        check_settings(self.temperature, self.top_k, self.top_p)
        row_seeds(self.seed, 1)
        if self.temperature == 0:
            return {"do_sample": False}
        return {"do_sample": True} | {name: getattr(self, name) for name in ("temperature", "top_k", "top_p", "seed")}


Command = Callable[..., None]


def with_groups(*, without: Collection[str] = ()) -> Callable[[Command], Command]:
    """Spread a command's groups into options, sorted by panel.

    Args:
        without: fields of the groups that are no options of this command; they keep their defaults.
    """

    def spread(command: Command) -> Command:
        hints = get_type_hints(command, include_extras=True)
        groups: dict[str, tuple[type[Any], list[str]]] = {}
        shown: list[inspect.Parameter] = []
        for name, parameter in inspect.signature(command).parameters.items():
            if is_dataclass(hints[name]):
                options = [each for each in _options_of(hints[name]) if each.name not in without]
                groups[name] = hints[name], [each.name for each in options]
                shown += options
            else:
                shown.append(_keyword(name, hints[name], parameter.default))
        shown.sort(key=_panel)

        @wraps(command)
        def run(**given: Any) -> None:
            for name, (group, names) in groups.items():
                given[name] = group(**{each: given.pop(each) for each in names})
            command(**given)

        found: Any = run  # typer reads the signature and the annotations
        found.__signature__ = inspect.Signature(shown)
        found.__annotations__ = {each.name: each.annotation for each in shown}
        return run

    return spread


def _options_of(group: type[Any]) -> list[inspect.Parameter]:
    """The fields of a group: options as they are annotated, or as the `help` of a plain field of settings says."""
    hints = get_type_hints(group, include_extras=True)
    found = []
    for field in fields(group):
        hint = hints[field.name]
        if get_origin(hint) is not Annotated:
            hint = Annotated[hint, option(TRAIN, field.metadata.get("metavar"), about(group, field.name))]
        found.append(_keyword(field.name, hint, field.default))
    return found


def _keyword(name: str, hint: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=hint, default=default)


def _panel(parameter: inspect.Parameter) -> int:
    panel = parameter.annotation.__metadata__[0].rich_help_panel
    return PANELS.index(panel) if panel else -1  # arguments come first


def parse_budget(text: str) -> int | str:
    """A number of nodes, or "auto"."""
    return text if text == "auto" else parse_counts("--budget", text, largest=1)[0]


def parse_budgets(text: str) -> tuple[int, ...]:
    """Numbers of nodes separated by commas; "auto" is the default budget."""
    return parse_counts("--budget", ",".join(str(AUTO_BUDGET) if part == "auto" else part for part in text.split(",")))


def parse_counts(name: str, text: str, largest: int | None = None) -> tuple[int, ...]:
    """Whole numbers of 1 or more separated by commas, each once, at most `largest` of them."""
    try:
        counts = tuple(int(part) for part in text.split(","))
    except ValueError:
        counts = ()
    if not counts or min(counts) < 1 or (largest and len(counts) > largest):
        some = "a whole number of 1 or more" if largest == 1 else "whole numbers of 1 or more, separated by commas"
        raise InputError(f"{name} is {text!r}; give {some}")
    return tuple(dict.fromkeys(counts))


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
