"""The machine: its processor, and the folder where what was found out about it is kept."""

from __future__ import annotations

import os
import platform
from pathlib import Path

CACHE_VARIABLE = "LADON_CACHE"


def cache_folder() -> Path:
    """`$LADON_CACHE`, else `$XDG_CACHE_HOME/ladon`, else `~/.cache/ladon`."""
    own, shared = os.environ.get(CACHE_VARIABLE), os.environ.get("XDG_CACHE_HOME")
    return Path(os.path.expanduser(own or Path(shared or "~/.cache") / "ladon"))


def cpu_name() -> str:
    """The processor's name, as far as the system tells."""
    for line in _cpuinfo():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cpu_flags() -> set[str]:
    """The processor's instruction sets (Linux on x86; empty elsewhere)."""
    for line in _cpuinfo():
        if line.startswith("flags"):
            return set(line.partition(":")[2].split())
    return set()


def _cpuinfo() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
