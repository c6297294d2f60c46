"""Jobs that run at the same time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any


def together(jobs: list[Callable[[], Any]]) -> list[Any]:
    """Results of jobs that run at the same time, each in a thread; an error of any of them is raised."""
    found: dict[int, Any] = {}

    def run(place: int) -> None:
        try:
            found[place] = jobs[place]()
        except Exception as error:
            found[place] = error

    threads = [threading.Thread(target=run, args=(place,)) for place in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in found.values():
        if isinstance(result, Exception):
            raise result
    return [found[place] for place in range(len(jobs))]
