"""Options that commands share, each declared once, and the reading of their values.

An option is declared as the default of a parameter, or of a field of a dataclass: a group of options, which a command
names as one parameter. `command` makes of them the signature that typer reads, and gathers the groups' values again
when the command runs.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Collection
from dataclasses import Field, dataclass, field, fields, is_dataclass
from functools import wraps
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

from typer import Argument, Option

from ladon.config import AUTO_BUDGET, BENCH_MODES, TREES, DecoderOptions, SamplingOptions, help_of
from ladon.errors import InputError

if TYPE_CHECKING:
    from ladon.trees.fixed_tree import FixedTree, TreeSize

MODEL = "The bundled model (demo), a folder in transformers' format, or a hub id."
DTYPES = ("float32", "bfloat16", "float16", "float64")
# The panels of --help, in their order; every command shows those that it has options for.
WHAT, DRAFT, READ, TRAIN, MEASURE, OUTPUT, MACHINE = PANELS = (
    "What to decode", "How to draft", "What to read", "How to train", "How to measure", "Output", "Machine",
)  # fmt: skip


def option(panel: str, default: Any, metavar: str | None, text: str, *names: str, **more: Any) -> Any:
    """An option in a panel of --help, required if `default` is `...`; it goes by its parameter's name or by `names`."""
    info = Option(*names, metavar=metavar, help=text, rich_help_panel=panel, **more)
    return field(default=default, metadata={"typer": info})


def flag(panel: str, name: str, text: str) -> Any:
    """An option without a value, which switches something on."""
    return option(panel, False, None, text, name)


def setting(panel: str, config: type[Any], name: str, metavar: str | None = None, **more: Any) -> Any:
    """An option whose default and help are those of a setting in `ladon.config`."""
    default = getattr(config, name)
    default = ",".join(map(str, default)) if isinstance(default, tuple) else default
    return option(panel, default, metavar, about(config, name), **more)


def argument(metavar: str, text: str, default: Any = ...) -> Any:
    """What a command is given without the name of an option."""
    return field(default=default, metadata={"typer": Argument(metavar=metavar, help=text, show_default=False)})


def about(config: type[Any], name: str) -> str:
    """The documentation of a setting, as the help of its option."""
    return _sentence(help_of(config, name))


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


DTYPE = option(
    MACHINE,
    "auto",
    None,
    "auto (the checkpoint's; on a CPU float32 for float16, and for bfloat16 if the CPU lacks it), "
    f"{', '.join(DTYPES)}.",
)
ONE_THREAD = option(MACHINE, 1, "N", "CPU threads of torch.", min=1)
TRUST = flag(MACHINE, "--trust-remote-code", "Run Python code that comes with the model. Off unless asked for.")
PROMPT_FILE = option(WHAT, None, "FILE", "A UTF-8 file with the text to continue.")
LIMIT = option(WHAT, None, "N", "Use only the first so many prompts.", min=1)
JSON = flag(OUTPUT, "--json", "Print one JSON document as the last line of standard output.")


def new_tokens(default: int) -> Any:
    """How much is written."""
    return option(WHAT, default, "N", "Tokens to write at most.", min=1)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where and how a model runs."""

    dtype: str = DTYPE
    device: str = option(MACHINE, "auto", "NAME", "auto (a GPU if there is one), cpu, cuda, ...")
    threads: int | None = option(MACHINE, None, "N", "CPU threads of torch; its own choice if left out.", min=1)
    trust_remote_code: bool = TRUST


@dataclass(frozen=True, kw_only=True)
class Target(Machine):
    """A model and its heads, and where they run: what `ladon.cli.loading.load` takes."""

    model: str = option(WHAT, "demo", "NAME", MODEL)
    heads: str | None = option(
        DRAFT,
        None,
        "NAME",
        "Folder or hub id of the model's heads, or mtp for the MTP modules in it; the bundled model brings its own.",
    )
    ignore_generation_config: bool = flag(
        WHAT,
        "--ignore-generation-config",
        "Decode without what the model's generation config asks for, such as repetition_penalty; its special "
        "tokens stay.",
    )


@dataclass(frozen=True, kw_only=True)
class Drafting:
    """How tokens are drafted, and which drafts are kept."""

    tree: str = setting(DRAFT, DecoderOptions, "tree", "TREE")
    budget: str = setting(DRAFT, DecoderOptions, "budget", "N")
    prune: str = setting(DRAFT, DecoderOptions, "prune", "NAME")
    accept: str = option(
        DRAFT,
        DecoderOptions.accept,
        "RULE",
        f"{about(DecoderOptions, 'accept')} Settings: typical:epsilon=0.09,delta=0.3 and nucleus:top_p=0.8.",
    )
    ngrams: str = setting(DRAFT, DecoderOptions, "ngrams", "NAME")
    joint: str = setting(DRAFT, DecoderOptions, "joint", "NAME")

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

    temperature: float = setting(WHAT, SamplingOptions, "temperature", "T")
    top_p: float = setting(WHAT, SamplingOptions, "top_p", "P")
    top_k: int = setting(WHAT, SamplingOptions, "top_k", "K")
    seed: int = setting(WHAT, SamplingOptions, "seed", "S")

    def for_generate(self) -> dict[str, Any]:
        """The arguments of `Decoder.generate` that these are; `InputError` for sampling parameters that are none."""
        from ladon.sampling.gumbel import row_seeds
        from ladon.sampling.sampling_params import check_settings

        check_settings(self.temperature, self.top_k, self.top_p)
        row_seeds(self.seed, 1)
        if self.temperature == 0:
            return {"do_sample": False}
        return {"do_sample": True} | {name: getattr(self, name) for name in ("temperature", "top_k", "top_p", "seed")}


Command = Callable[..., None]


def command(*, without: Collection[str] = (), **instead: Any) -> Callable[[Command], Command]:
    """Make a function a command: its groups become options, and all options stand in the order of their panels.

    Args:
        without: fields of the groups that are no options of this command; they keep their defaults.
        **instead: what this command declares in the place of a group's own options, by their names.
    """

    def decorate(function: Command) -> Command:
        hints = get_type_hints(function)
        groups: dict[str, list[str]] = {}
        shown: list[inspect.Parameter] = []
        for name, parameter in inspect.signature(function).parameters.items():
            if is_dataclass(hints[name]):
                types = get_type_hints(hints[name])
                found = [each for each in fields(hints[name]) if each.name not in without]
                groups[name] = [each.name for each in found]
                shown += [_parameter(each.name, types[each.name], instead.get(each.name, each)) for each in found]
            else:
                shown.append(_parameter(name, hints[name], parameter.default))

        @wraps(function)
        def run(**given: Any) -> None:
            for name, names in groups.items():
                given[name] = hints[name](**{each: given.pop(each) for each in names})
            function(**given)

        made: Any = run  # typer reads the signature and the annotations
        made.__signature__ = inspect.Signature(sorted(shown, key=_place))
        made.__annotations__ = {each.name: each.annotation for each in shown}
        return run

    return decorate


def _parameter(name: str, kind: Any, declared: Field[Any]) -> inspect.Parameter:
    """An option as typer reads it; a plain field of settings, which has a help only, is one of training."""
    about = declared.metadata
    info = about.get("typer") or Option(metavar=about["metavar"], help=_sentence(about["help"]), rich_help_panel=TRAIN)
    annotation = Annotated[kind, info]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=declared.default, annotation=annotation)


def _place(parameter: inspect.Parameter) -> tuple[int, bool]:
    """Where an option stands: arguments first, then by panel, and what only switches something on last in its own."""
    panel = parameter.annotation.__metadata__[0].rich_help_panel
    return PANELS.index(panel) if panel else -1, parameter.default is False


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
