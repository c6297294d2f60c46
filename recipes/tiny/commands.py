"""The stages that are calls of the `ladon` command, with the settings of the bundled model."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Commands:
    """Settings of the commands."""

    joint_heads_steps: int = 1000
    joint_steps: int = 3200  # the heads' own steps at the start included
    heads_steps: int = 1200
    expansion: int = 2
    batch_size: int = 8
    length: int = 512
    new_tokens: int = 128
    batch: int = 64


@dataclass(frozen=True, kw_only=True)
class Command:
    """One call of `ladon`.

    Attributes:
        arguments: what stands after `ladon`.
        run: folder of the run; its name is left out where the command is shown.
    """

    arguments: list[str]
    folder: Path

    @property
    def shown(self) -> str:
        """As it would be typed in the run folder."""
        return " ".join(["ladon", *(text.replace(f"{self.folder}{os.sep}", "") for text in self.arguments)])

    def run(self, threads: int | None) -> None:
        """Run it, or go on with it; its failure ends the recipe."""
        print(f"$ {self.shown}", flush=True)
        more = [] if threads is None else ["--threads", str(threads)]
        done = subprocess.run([sys.executable, "-m", "ladon.cli", *self.arguments, *more], check=False)
        if done.returncode:
            raise SystemExit(f"`{self.shown}` ended with {done.returncode}")


def joint_command(settings: Commands, base: Path, run: Path) -> Command:
    """Base and heads together (MEDUSA-2), on the corpus itself: this stage still teaches the base."""
    arguments = ["train", str(run / "text.jsonl"), "--model", str(base), "--out", str(run / "joint")]
    arguments += ["--joint", "full", "--heads-warmup-steps", str(settings.joint_heads_steps)]
    arguments += ["--steps", str(settings.joint_steps), "--base-learning-rate", "0.012"]
    arguments += ["--family-option", f"expansion={settings.expansion}"]
    return Command(arguments=arguments + _shared(settings), folder=run)


def distill_command(settings: Commands, model: Path, run: Path) -> Command:
    """The model answers the prompts greedily, as it is measured."""
    arguments = ["distill", str(run / "prompts.jsonl"), "--model", str(model), "--out", str(run / "answers.jsonl")]
    arguments += ["--batch", str(settings.batch), "--max-new-tokens", str(settings.new_tokens), "--tree", "off"]
    return Command(arguments=arguments, folder=run)


def heads_command(settings: Commands, model: Path, first: Path, run: Path) -> Command:
    """The heads `first` trained further, on the frozen model's own answers and what it says of their prompts."""
    arguments = ["train", str(run / "answers.jsonl"), "--model", str(model), "--out", str(run / "heads")]
    arguments += ["--init-heads", str(first), "--labels", "target", "--label-temperature", "0.5", "--learn", "all"]
    arguments += ["--steps", str(settings.heads_steps), "--learning-rate", "0.006"]
    return Command(arguments=arguments + _shared(settings), folder=run)


def calibrate_command(settings: Commands, model: Path, run: Path) -> Command:
    """Hit rates, temperatures and fixed trees, on modules that nothing was trained on."""
    arguments = ["calibrate", str(run / "calibration.jsonl"), "--model", str(model), "--heads", str(run / "heads")]
    arguments += ["--max-new-tokens", str(settings.new_tokens), "--batch", str(settings.batch)]
    return Command(arguments=arguments, folder=run)


def _shared(settings: Commands) -> list[str]:
    return [
        *("--optimizer", "muon", "--schedule", "linear"),
        *("--batch-size", str(settings.batch_size), "--length", str(settings.length)),
    ]
