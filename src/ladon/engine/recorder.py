"""The observer that measures: counts and times of an engine's steps, and what tree sizes learn from them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch
from torch import nn

from ladon.engine.observer import EngineObserver
from ladon.engine.sequence import Row
from ladon.engine.stats import DecodeStats
from ladon.engine.step import Step
from ladon.tree_size.tree_sizes import TreeSizes

# Stages that are reported, by the names that `DecodeStats.stage_seconds` has for them.
_REPORTED = {name: name for name in "verify accept commit heads growth transfer ngrams constraints".split()}
_REPORTED["sample"] = "pick"
_NEEDED = {"prefill", "verify", "callers"}  # what the time of a step is made from


class Recorder(EngineObserver):
    """Adds to the statistics of a run, and lets its tree sizes learn.

    Profiling waits for the device at both ends of every stage, so that what was given to it is timed where it belongs.

    Attributes:
        stats: what is added to.
    """

    def __init__(
        self, stats: DecodeStats, sizes: TreeSizes, model: nn.Module, device: torch.device, *, profile: bool = False
    ) -> None:
        """Record a run.

        Args:
            stats: added to.
            sizes: the engine's; they learn from each decode step.
            model: the target, whose forwards are timed.
            device: its device.
            profile: time every stage, and not the step alone.
        """
        self.stats = stats
        self._sizes, self._model, self._profile = sizes, model, profile
        self._waits = device.type != "cpu"
        self._stages: dict[str, float] = {}  # seconds of the step that runs, by stage
        self._prefill_from = self._decode_from = 0.0  # when these began in it
        self._callers = 0.0  # seconds of it that belong to the callers' stop rules

    def stage(self, name: str) -> AbstractContextManager[object]:
        """Time a stage, if its time is wanted."""
        is_wanted = name in _NEEDED or (self._profile and name in _REPORTED)
        return self._timed(name) if is_wanted else super().stage(name)

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        is_reported = self._profile and name in _REPORTED
        started = self._now() if is_reported else time.perf_counter()
        if name == "prefill":
            self._prefill_from = started
        elif name == "verify":
            self._decode_from = started
        with ExitStack() as stack:
            if is_reported and name == "verify":
                stack.enter_context(self._forwards())
            yield
        if is_reported:
            self._add(_REPORTED[name], started)
        elif name == "callers":
            self._callers = time.perf_counter() - started
        elif name == "prefill":
            self._wait()  # or it would be timed with what follows

    def verifies(self, rows: Sequence[Row], num_nodes: int) -> None:
        """Count the drafts that trees of so many nodes would have had in vain, had constraints not dropped them."""
        for row in rows:
            if row.grammar is not None:
                drafts, illegal = row.grammar.looked_through(num_nodes)
                for counts in (row.stats, self.stats):
                    counts.drafts_checked += drafts
                    counts.drafts_illegal += illegal

    def stepped(self, step: Step) -> None:
        """Count a step, and let the tree sizes learn from it if it decoded."""
        for row in step.admitted:
            self.stats.reused_tokens += row.stats.reused_tokens
        for row, count in step.read:
            row.stats.prefill_tokens += count
            self.stats.prefill_tokens += count
        if step.tree is None:
            self.stats.prefill_seconds += time.perf_counter() - self._prefill_from
        else:
            self._count(step, nodes=step.tree.num_nodes + step.num_dropped)
            self.stats.prefill_seconds += self._decode_from - self._prefill_from if step.read else 0.0
            self.stats.decode_seconds += time.perf_counter() - self._decode_from
            for name, seconds in self._stages.items():
                self.stats.stage_seconds[name] = self.stats.stage_seconds.get(name, 0.0) + seconds
        self.stats.sizing_seconds = self._sizes.seconds
        self._stages.clear()

    def _count(self, step: Step, nodes: int) -> None:
        seconds = time.perf_counter() - self._decode_from - self._callers
        pruned = step.num_dropped
        self.stats.forwards += 1
        for row, taken, count in zip(step.rows, step.emitted, step.counts, strict=False):
            for stats in (row.stats, self.stats):
                stats.add_step(emitted=len(taken), nodes=nodes, accepted=count - 1, pruned=pruned)
        predicted = self._sizes.learn(step.counts, nodes=nodes, pruned=pruned, grown=step.num_grown, seconds=seconds)
        self.stats.add_size(nodes, predicted=predicted, seconds=seconds)
        self.stats.probes = self._sizes.probes

    @contextmanager
    def _forwards(self) -> Iterator[None]:
        """While this lasts, time the forwards of the model in this thread as stage "forward"."""
        started, owner = 0.0, threading.get_ident()

        def before(*_: object) -> None:
            nonlocal started
            if threading.get_ident() == owner:
                started = self._now()

        def after(*_: object) -> None:
            if threading.get_ident() == owner:
                self._add("forward", started)

        handles = [self._model.register_forward_pre_hook(before), self._model.register_forward_hook(after)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _add(self, name: str, started: float) -> None:
        self._stages[name] = self._stages.get(name, 0.0) + self._now() - started

    def _now(self) -> float:
        self._wait()
        return time.perf_counter()

    def _wait(self) -> None:
        """Wait until the device has done all it was given."""
        if self._waits:
            torch.accelerator.synchronize()
