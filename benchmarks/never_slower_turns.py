"""How `never_slower.py` measures systems against each other: they decode side by side, step by step.

A machine that others share changes its speed by a tenth from second to second, so that runs one after the other say
little about a hundredth. Here whoever has the fewest tokens takes the next step: a slow moment meets all systems at the
same place of the text, for as long as each would have stayed there.

`Settings` says how long to measure.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ladon.bench.systems import LadonSystem, Run

Make = Callable[[], LadonSystem]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How long to measure; cells of other settings are measured anew.

    Attributes:
        max_new_tokens: of each row.
        sweep_tokens: of each row in the sweep of fixed sizes and against MEDUSA's tree.
        groups: of prompts, which repeats use in turn: how well one prompt is guessed is a matter of luck.
        most_repeats: of the systems that take turns.
        second_seconds: after so long there is no second repeat.
        further_seconds: after so long there is no further one.
    """

    max_new_tokens: int = 256
    sweep_tokens: int = 32
    groups: int = 4
    most_repeats: int = 8
    second_seconds: float = 60.0
    further_seconds: float = 40.0


QUICK = Settings(max_new_tokens=48, sweep_tokens=16, groups=1, most_repeats=1)


class Racer:
    """A system in the middle of decoding.

    Attributes:
        steps: how many it has taken, those that only read prompts included.
    """

    def __init__(self, system: LadonSystem, prompts: Sequence[list[int]], max_new_tokens: int, **law: Any) -> None:
        """`law` are `generate`'s options that say how tokens are picked; greedily if there are none."""
        decoder = system.decoder
        self._system = system
        self._rows = decoder.rows([torch.tensor(prompt) for prompt in prompts], max_new_tokens=max_new_tokens, **law)
        self._steps = decoder.decode(self._rows)
        self._stats = decoder.stats
        self.steps = 0

    @property
    def tokens(self) -> int:
        """Decoded so far."""
        return self._stats.tokens

    def step(self) -> bool:
        """Take a step; False if there was none left to take."""
        self.steps += 1
        return next(self._steps, None) is not None

    def run(self) -> Run:
        """What it did."""
        stats = self._stats
        return Run(
            outputs=[row.tokens for row in self._rows],
            stats=stats,
            seconds=stats.prefill_seconds + stats.decode_seconds,
            first_token_seconds=stats.prefill_seconds,
            steps=self._system.taken_steps(),
        )


def race(racers: Sequence[Racer]) -> None:
    """Whoever has the fewest tokens, and among these the fewest steps, takes the next one, until all are done."""
    left = list(racers)
    while left:
        behind = min(left, key=lambda racer: (racer.tokens, racer.steps))
        if not behind.step():
            left.remove(behind)


def take_turns(
    makers: Mapping[str, Make], groups: Sequence[Sequence[list[int]]], tokens: int, settings: Settings, **law: Any
) -> dict[str, list[Run]]:
    """Runs by system and repeat, as many repeats as there is time for; in each one all systems race.

    Each repeat takes the next group of prompts. `law` are `generate`'s options that say how tokens are picked.
    """
    runs: dict[str, list[Run]] = {name: [] for name in makers}
    names, started = list(makers), time.perf_counter()
    for repeat in range(settings.most_repeats):
        bound = {0: math.inf, 1: settings.second_seconds}.get(repeat, settings.further_seconds)
        if time.perf_counter() - started > bound:
            break
        first, prompts = repeat % len(names), groups[repeat % len(groups)]
        racers = {name: Racer(makers[name](), prompts, tokens, **law) for name in names[first:] + names[:first]}
        race(list(racers.values()))
        for name, racer in racers.items():
            runs[name].append(racer.run())
    return runs
