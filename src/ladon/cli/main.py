"""The `ladon` command: its subcommands, and what becomes of errors.

Nothing here imports torch: `ladon --help` is quick, and each command loads what it needs.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Sequence
from inspect import cleandoc
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from ladon import __version__
from ladon.cli.bench import bench
from ladon.cli.calibrate import calibrate
from ladon.cli.chat import chat
from ladon.cli.demo import demo
from ladon.cli.distill import distill
from ladon.cli.formats import export, import_heads, inspect
from ladon.cli.generate import generate
from ladon.cli.options import OUTPUT
from ladon.cli.trace import trace
from ladon.cli.train import train
from ladon.cli.verify import verify
from ladon.errors import LadonError


class _Command(TyperCommand):
    """A command whose own option, --help, stands in a panel too."""

    def get_help_option(self, ctx: Any) -> Any:
        """The option, as click makes it."""
        found: Any = super().get_help_option(ctx)
        if found is not None:
            found.rich_help_panel = OUTPUT
        return found


_USAGE = 2
_INTERRUPTED = 130
_UsageError: type[Exception] = typer.BadParameter.__bases__[0]  # of whichever click this typer builds on


def _unwrapped(command: Callable[..., None]) -> str:
    """A docstring as help: a paragraph is one line, which the terminal wraps; examples stay as they are."""
    paragraphs = cleandoc(command.__doc__ or "").split("\n\n")
    return "\n\n".join(text if text.startswith(" ") else " ".join(text.split()) for text in paragraphs)


app = typer.Typer(
    name="ladon",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (demo, generate, chat, verify, bench, distill, train, calibrate, export, inspect, trace):
    app.command(cls=_Command, help=_unwrapped(command))(command)
app.command("import", cls=_Command, help=_unwrapped(import_heads))(import_heads)  # the word is taken in Python


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ladon {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Several tokens per forward pass of a causal language model, without changing what it says.

    For example:

        ladon demo
    """
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main() -> None:
    """Run the command line and exit with its code."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run one command.

    Returns:
        0; 2 after a mistake of the user's, which one line on standard error explains; 130 after Ctrl-C; 1 after an
        error of ours, whose traceback is shown if LADON_DEBUG is set.
    """
    warnings.showwarning = _show_warning
    try:
        code = app(args=list(arguments), prog_name="ladon", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted", _INTERRUPTED)
    except LadonError as error:
        return _fail(str(error), _USAGE)
    except _UsageError as error:
        return _fail(f"{_usage_message(error)} See --help", _USAGE)
    except BrokenPipeError:  # the reader of our output has gone, as in `ladon trace | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if os.environ.get("LADON_DEBUG"):
            raise
        return _fail(f"internal error: {type(error).__name__}: {error} (LADON_DEBUG=1 shows where)", 1)
    if code == _INTERRUPTED:  # newer typers turn Ctrl-C into this code, older ones into Abort
        return _fail("interrupted", _INTERRUPTED)
    return code if isinstance(code, int) else 0


def _fail(message: str, code: int) -> int:
    print(f"ladon: {' '.join(message.split())}", file=sys.stderr)
    return code


def _usage_message(error: Any) -> str:
    return str(error.format_message()).rstrip(".") + "."


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"ladon: warning: {' '.join(str(message).split())}", file=sys.stderr)
