"""Options of the command line: declared once in groups, in the same panels everywhere, and quick to show."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, fields
from typing import Any

import pytest
import typer

from ladon.cli import options
from ladon.cli.main import app, run
from ladon.cli.options import MACHINE, OUTPUT, PANELS, WHAT
from ladon.config import DecoderOptions, SamplingOptions

GROUP: Any = typer.main.get_command(app)
COMMANDS: dict[str, Any] = GROUP.commands
DECODING = ("bench", "calibrate", "chat", "distill", "generate", "trace", "verify")  # what runs a model that is named
MACHINE_GROUP = {"dtype", "device", "threads", "trust_remote_code"}


def options_of(command: str) -> dict[str, Any]:
    """The options of a command by name, its arguments left out."""
    return {each.name: each for each in COMMANDS[command].params if hasattr(each, "is_flag")}


def test_all_commands_are_there() -> None:
    known = {*DECODING, "demo", "train", "import", "export", "inspect"}
    assert known <= set(COMMANDS)


@pytest.mark.parametrize("command", DECODING)
def test_what_runs_a_model_has_the_whole_group(command: str) -> None:
    found = options_of(command)
    assert {"model", "heads"} | MACHINE_GROUP <= set(found)
    assert {found[name].rich_help_panel for name in MACHINE_GROUP} == {MACHINE}
    assert (found["model"].default, found["dtype"].default, found["device"].default) == ("demo", "auto", "auto")
    assert found["threads"].default == (1 if command == "bench" else None)


def test_import_has_the_machine_group_and_train_all_but_the_dtype() -> None:
    """--precision says the dtype of a training; what is exported keeps the checkpoint's."""
    assert set(options_of("import")) >= MACHINE_GROUP
    assert set(options_of("train")) & (MACHINE_GROUP | {"model", "heads"}) == MACHINE_GROUP - {"dtype"} | {"model"}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_stands_in_a_panel_and_help_shows_the_panels_in_order(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    panels = [each.rich_help_panel for each in options_of(command).values()]
    assert set(panels) <= set(PANELS) and panels == sorted(panels, key=PANELS.index)
    assert run([command, "--help"]) == 0
    shown = [line.split()[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("╭─")]
    titles = [" ".join(word for word in words if "─" not in word) for words in shown]
    assert [title for title in titles if title != "Arguments"] == list(dict.fromkeys(panels)), "--help is in one too"
    assert OUTPUT in titles


def test_help_says_what_the_settings_say() -> None:
    generate, distill = options_of("generate"), options_of("distill")
    for name in ("tree", "budget", "prune", "accept", "ngrams", "joint"):
        assert generate[name].default == getattr(DecoderOptions, name)
        assert generate[name].help.lower().startswith(options.help_of(DecoderOptions, name).lower())
    for name in ("temperature", "top_p", "top_k", "seed"):
        assert distill[name].default == generate[name].default == getattr(SamplingOptions, name)


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A group for the test."""

    left: int = options.option(MACHINE, 1, "N", "The left one.")
    right: str | None = options.option(WHAT, None, "NAME", "The right one.")
    hidden: int = options.option(WHAT, 7, "N", "No option here.")


def test_a_group_is_spread_and_gathered() -> None:
    seen: list[Any] = []

    @options.command(without=("hidden",))
    def act(
        pair: Pair,
        loud: bool = options.flag(WHAT, "--loud", "Loudly."),
        name: str = options.argument("NAME", "Whom."),
        count: int = options.option(WHAT, 3, "N", "How often."),
    ) -> None:
        """Do it."""
        seen.append((pair, loud, name, count))

    assert list(inspect.signature(act).parameters) == ["name", "right", "count", "loud", "left"]
    assert act.__doc__ == "Do it."
    small = typer.Typer(add_completion=False)
    small.command()(act)
    assert small(args=["ann", "--left", "5", "--loud"], standalone_mode=False) is None
    assert small(args=["bob", "--right", "r", "--count", "2"], standalone_mode=False) is None
    assert seen == [(Pair(left=5), True, "ann", 3), (Pair(right="r"), False, "bob", 2)]
    assert [each.name for each in fields(Pair)] == ["left", "right", "hidden"]


def test_a_group_tells_of_values_that_are_none() -> None:
    with pytest.raises(options.InputError, match="--budget is 'many'"):
        options.Drafting(budget="many").for_decoder()
    with pytest.raises(options.InputError, match="top_p is 0"):
        options.Sampling(temperature=1.0, top_p=0.0).for_generate()
    assert options.Sampling(seed=3).for_generate() == {"do_sample": False}
    assert options.Drafting(budget="8").for_decoder()["budget"] == 8
