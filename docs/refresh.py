"""Write what the pages take from the program: the command line reference, the refused options, the list of public
names that the API reference is made of, the output of worked examples, and the tables of result files.

python docs/refresh.py           write the pages
python docs/refresh.py --check   change nothing; exit with 1 if a page differs from what the program says
"""

from __future__ import annotations

import contextlib
import difflib
import doctest
import io
import re
import sys
from pathlib import Path

import click
import torch
import typer
from tables import with_tables

DOCS = Path(__file__).resolve().parent
REFERENCE = DOCS / "reference"
# The API reference: file name, title, first sentence, the packages whose public names it shows, and what else it shows.
API = [
    (
        "decoding",
        "Decoding",
        "`Decoder` is the front door; [the guide](../../guides/use.md) shows how to use it.",
        ("decoder", "engine", "demo"),
        ("ladon.decoder.detokenizer",),
    ),
    (
        "heads",
        "Heads",
        "Decoding heads: loading, making and saving them; [the guide](../../guides/train.md) trains them.",
        ("heads",),
        (),
    ),
    (
        "drafters",
        "Drafters",
        "What a drafter of your own must have; [the guide](../../guides/own-drafter.md) has an example.",
        ("drafting",),
        (),
    ),
    (
        "trees",
        "Trees",
        "The trees that are verified, trees of a fixed shape, and files of those; [how a tree "
        "works](../../how-it-works.md).",
        ("trees",),
        (),
    ),
    (
        "options",
        "Sampling and pruning",
        "Settings of [sampling](../../guides/sampling.md#different-parameters-per-sequence), of "
        "[lossy acceptance](../../guides/sampling.md#lossy-acceptance) and of "
        "[early pruning](../../how-it-works/pruning.md).",
        ("sampling", "target"),
        ("ladon.sampling.sampling_params.TemperatureSampling",),
    ),
    (
        "constraints",
        "Structured output",
        "Constraints, and the protocols for one of your own; [the guide](../../guides/structured-output.md).",
        ("constraints",),
        ("ladon.constraints.state.Constraint", "ladon.constraints.state.State"),
    ),
    ("errors", "Errors", "Every mistake of a user raises one of these; the message has one line.", ("errors",), ()),
]
FIRST = ("Decoder", "attach", "detach", "load_demo", "Row", "load_heads", "LadonError")  # of their pages, in this order
STEP = ("admit", "verify", "sample", "accept", "commit", "draft", "deliver")  # the calls of the engine's loop, in order
EXAMPLES = re.compile(r"^```pycon\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def worked_examples(page: str) -> str:
    """The page with the output below every `>>>` line replaced by what the line prints."""
    names: dict[str, object] = {}

    def run_block(match: re.Match[str]) -> str:
        return "```pycon\n" + "\n".join(_run(match[1], names)) + "\n```"

    with torch.no_grad():
        return EXAMPLES.sub(run_block, page)


def _run(block: str, names: dict[str, object]) -> list[str]:
    lines = []
    for example in doctest.DocTestParser().get_examples(block):
        first, *more = example.source.rstrip("\n").split("\n")
        lines += [f">>> {first}", *(f"... {line}".rstrip() for line in more)]
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(example.source, "<example>", "single"), names)
        output = [line.rstrip() for line in printed.getvalue().splitlines()]
        lines += output + [""] * bool(output)
    return lines[:-1] if lines and not lines[-1] else lines


def command_line() -> str:
    """The command line reference, from the same declarations that `--help` prints."""
    from ladon.cli import app

    group = typer.main.get_command(app)
    parts = ["# Command line", "Made from `ladon --help` by `make docs`.", _paragraphs(group.help)]
    for name, command in sorted(group.commands.items()):
        context = click.Context(command, info_name=f"ladon {name}")
        usage = " ".join(["ladon", name, *command.collect_usage_pieces(context)])
        parts += [f"## ladon {name}", f"```text\n{usage}\n```", _paragraphs(command.help)]
        parts += _options(command, context)
    return "\n\n".join(part for part in parts if part) + "\n"


def api_pages() -> dict[Path, str]:
    """The pages of the API reference: each names what mkdocstrings shows there from the docstrings.

    Raises:
        SystemExit: a public name lives in a package that no page shows.
    """
    import ladon

    homes = {name: getattr(ladon, name).__module__.split(".")[1] for name in ladon.__all__}
    if missing := sorted(set(homes.values()) - {package for *_, packages, _ in API for package in packages}):
        raise SystemExit(f"API in {Path(__file__).name} has no page for the public names of {', '.join(missing)}")
    order = sorted(homes, key=lambda name: (FIRST.index(name) if name in FIRST else len(FIRST), name))
    pages = {}
    for file, title, intro, packages, others in API:
        names = [f"ladon.{name}" for name in order if homes[name] in packages]
        parts = [f"# {title}", intro, *(f"::: {name}" for name in [*names, *others])]
        pages[REFERENCE / "api" / f"{file}.md"] = "\n\n".join(parts) + "\n"
    return pages | {REFERENCE / "api" / "loop.md": _loop()}


def _loop() -> str:
    members = ", ".join(["step", "_step", *(f"_{name}" for name in STEP)])
    options = [f"members: [{members}]", "filters: []", "show_source: true", "show_if_no_docstring: true"]
    options += ["merge_init_into_class: false"]
    shown = "\n".join(["    options:", *(f"      {option}" for option in options)]) + "\n"
    text = "One decode step is these calls, in this order. [How it works](../../how-it-works.md) walks through them."
    return f"# The loop\n\n{text}\n\n::: ladon.engine.engine.Engine\n{shown}"


def refused_options() -> str:
    """The page of options that calls are checked by."""
    from ladon.decoder.refused import REFUSED, WITHOUT_EFFECT

    refused = [f"| `{one.option}` | {_value(one.values)} | {_cell(one.reason)} |" for one in REFUSED]
    idle = [f"| `{name}` | {_cell(reason)} |" for name, reason in WITHOUT_EFFECT.items()]
    parts = [
        "# Refused options",
        "Made from the program by `make docs`. Every other option of a `GenerationConfig` gives the tokens that "
        "`generate` of `transformers` gives; a test goes through all of them, alone and in "
        "pairs: `tests/exactness/test_generation_options.py`.",
        "\n".join(["| option | values | why it is refused |", "|---|---|---|", *refused]),
        "A refused option raises an `InputError` that names it before anything is decoded.",
        "## Accepted without effect",
        "These say how `transformers` computes, not what. The text is the same, and Ladon computes in its own way.",
        "\n".join(["| option | what happens instead |", "|---|---|", *idle]),
    ]
    return "\n\n".join(parts) + "\n"


def _value(values: str) -> str:
    return (
        f"`{values[1:]}`" if values.startswith("=") and " " not in values else values.removeprefix("=").strip() or "all"
    )


def _paragraphs(text: str | None) -> str:
    """Help text as Markdown; its indented lines are example commands, which the slow tests run."""
    lines = [line.rstrip() for line in (text or "").replace("\b", "").splitlines()]
    prose = "\n".join(line for line in lines if not line.startswith("    ")).strip()
    examples = [line[4:] for line in lines if line.startswith("    ")]
    parts = re.split(r"\n{2,}", prose)
    if examples:
        far = any("org/" in line or "http:" in line for line in examples)
        mark = "not run: needs the hub and a server" if far else "slow"
        parts.append(f"<!-- {mark} -->\n```bash\n" + "\n".join(examples) + "\n```")
    return "\n\n".join(parts)


def _options(command: click.Command, context: click.Context) -> list[str]:
    """A table for each panel of `--help`, in the order of the panels there; its title is the first cell."""
    panels: dict[str, list[str]] = {}
    for parameter in command.params:
        panel = getattr(parameter, "rich_help_panel", None) or "Option"
        panels.setdefault(panel, []).extend(_row(parameter, context))
    return [
        "\n".join([f"| {panel.lower()} | what it does |", "|---|---|", *rows]) for panel, rows in panels.items() if rows
    ]


def _row(parameter: click.Parameter, context: click.Context) -> list[str]:
    if getattr(parameter, "hidden", False):
        return []
    names, text = parameter.get_help_record(context) or (parameter.make_metavar(context), "")
    return [f"| `{_cell(names)}` | {_cell(text)} |"]


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def main() -> int:
    """Write or check every page; the number of pages that differ decides the exit code."""
    pages = {
        REFERENCE / "command-line.md": command_line(),
        REFERENCE / "refused-options.md": refused_options(),
        **api_pages(),
    }
    for path in sorted(DOCS.rglob("*.md")):
        text = path.read_text(encoding="utf-8")
        if path not in pages:
            pages[path] = with_tables(worked_examples(text))
    readme = DOCS.parent / "README.md"
    pages[readme] = with_tables(readme.read_text(encoding="utf-8"))
    stale = 0
    for path, new in pages.items():
        old = path.read_text(encoding="utf-8") if path.exists() else ""
        if "--check" not in sys.argv:
            path.parent.mkdir(exist_ok=True)
            path.write_text(new, encoding="utf-8")
        elif old != new:
            stale += 1
            difference = difflib.unified_diff(old.splitlines(), new.splitlines(), path.name, "program", n=1)
            print("\n".join(difference))
            print(f"{path.name} differs from the program; run `make docs` and read the change")
    return int(stale > 0)


if __name__ == "__main__":
    sys.exit(main())
