"""The stages that are calls of the `ladon` command, with the settings of the bundled model."""

from __future__ import annotations

import json
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
    markov_rank: int = 64
    markov_steps: int = 1000
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
    arguments += ["--family-option", f"expansion={settings.expansion}", "--optimizer", "muon"]
    return Command(arguments=arguments + _shared(settings), folder=run)


def distill_command(settings: Commands, model: Path, run: Path) -> Command:
    """The model answers the prompts greedily, as it is measured."""
    arguments = ["distill", str(run / "prompts.jsonl"), "--model", str(model), "--out", str(run / "answers.jsonl")]
    arguments += ["--batch", str(settings.batch), "--max-new-tokens", str(settings.new_tokens), "--tree", "off"]
    return Command(arguments=arguments, folder=run)


def heads_command(settings: Commands, model: Path, first: Path, run: Path) -> Command:
    """The heads `first` trained further, on the frozen model's own answers and what it says of their prompts."""
    arguments = _on_answers(model, first, run, "own_heads")
    arguments += ["--steps", str(settings.heads_steps), "--learning-rate", "0.006", "--optimizer", "muon"]
    return Command(arguments=arguments + _shared(settings), folder=run)


def markov_command(settings: Commands, model: Path, first: Path, run: Path) -> Command:
    """A correction by the token before each guess, on the same answers, the heads frozen.

    It starts from the pairs in the answers, or goes on from the one that the heads `first` had already.
    """
    arguments = _on_answers(model, run / "own_heads", run, "heads")
    arguments += ["--markov-rank", str(settings.markov_rank), "--freeze-heads"]
    if "markov_rank" not in json.loads((first / "config.json").read_text(encoding="utf-8"))["options"]:
        arguments += ["--markov-start", "bigrams"]
    arguments += ["--steps", str(settings.markov_steps), "--learning-rate", "0.003", "--optimizer", "adamw"]
    return Command(arguments=arguments + _shared(settings), folder=run)


def calibrate_command(settings: Commands, model: Path, run: Path) -> Command:
    """Hit rates, temperatures and fixed trees, on modules that nothing was trained on."""
    arguments = ["calibrate", str(run / "calibration.jsonl"), "--model", str(model), "--heads", str(run / "heads")]
    arguments += ["--max-new-tokens", str(settings.new_tokens), "--batch", str(settings.batch)]
    return Command(arguments=arguments, folder=run)


def _on_answers(model: Path, first: Path, run: Path, out: str) -> list[str]:
    """A training that goes on with the heads `first`, on what the model says of its prompts and its answers."""
    arguments = ["train", str(run / "answers.jsonl"), "--model", str(model), "--out", str(run / out)]
    return [
        *(*arguments, "--init-heads", str(first)),
        *("--labels", "target", "--label-temperature", "0.5", "--learn", "all"),
    ]


def _shared(settings: Commands) -> list[str]:
    return ["--schedule", "linear", "--batch-size", str(settings.batch_size), "--length", str(settings.length)]
