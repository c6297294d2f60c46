"""Who is told what the engine's steps do: the stages while they run, and each step when it is done."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from ladon.engine.sequence import Row
from ladon.engine.step import Step
from ladon.util.observer import Observer

P = ParamSpec("P")
R = TypeVar("R")


class EngineObserver(Observer):
    """Does nothing; override what you want to know."""

    def verifies(self, rows: Sequence[Row], num_nodes: int) -> None:
        """So many nodes of the trees of these sequences are about to be verified."""

    def stepped(self, step: Step) -> None:
        """A step is done; the caller has not seen it yet."""


class _Observed(Protocol):
    observer: EngineObserver


S = TypeVar("S", bound=_Observed)


def stage(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """Let the observer of the method's object know while the method runs, by its name without the underscore."""
    name = method.__name__.lstrip("_")

    @wraps(method)
    def observed(self: S, *args: P.args, **kwargs: P.kwargs) -> R:
        with self.observer.stage(name):
            return method(self, *args, **kwargs)

    return observed  # type: ignore[return-value]  # wraps keeps the signature, which mypy does not see
