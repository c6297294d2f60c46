"""Options that say what a text may be, and the reading of their values."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from ladon.cli.output import say
from ladon.errors import InputError

if TYPE_CHECKING:
    from ladon.constraints.state import Constraint

SchemaOption = Annotated[
    str | None,
    Option("--json-schema", metavar="SCHEMA", help="Write JSON that fits this schema: JSON text, or a file with it."),
]
RegexOption = Annotated[
    str | None, Option("--regex", metavar="PATTERN", help="Write what matches this regular expression as a whole.")
]
GrammarOption = Annotated[
    Path | None, Option("--grammar", metavar="FILE", help="Write what this grammar, in Lark's notation, allows.")
]
Make = Callable[[Any], "Constraint | None"]


def read_constraint(json_schema: str | None, regex: str | None, grammar: Path | None) -> Make:
    """What makes the constraint that was asked for, given the tokenizer; None if none was.

    Raises:
        InputError: several were asked for, or a file cannot be read.
    """
    given = {"--json-schema": json_schema, "--regex": regex, "--grammar": grammar}
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise InputError(f"{' and '.join(names)} were given; give one of them")
    from ladon.bench.workloads import read_text
    from ladon.constraints import llguidance_backend as structured

    if json_schema is not None:
        is_text = json_schema.lstrip()[:1] in ("", "{", "[", '"') or json_schema in ("true", "false")
        text = json_schema if is_text else read_text(Path(json_schema))
        return partial(structured.json_schema, text)
    if regex is not None:
        return partial(structured.regex, regex)
    if grammar is not None:
        return partial(structured.grammar, read_text(grammar))
    return lambda tokenizer: None


def say_if_cut(complete: list[bool | None]) -> None:
    """Tell on standard error how many texts their constraint does not call whole."""
    cut = complete.count(False)
    if cut:
        texts = "the text is" if len(complete) == 1 else f"{cut} of {len(complete)} texts are"
        say(f"{texts} not complete: cut at --max-new-tokens, or ended before")
