"""Who is told which stage of a step runs."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

_NOTHING = nullcontext()


class Observer:
    """Told of each stage while it runs; does nothing. `ladon.engine.recorder` measures."""

    def stage(self, name: str) -> AbstractContextManager[object]:
        """The stage `name` runs while this lasts."""
        return _NOTHING


SILENT = Observer()
