"""The machine: its processor, the cache folder, and what a reader of measurements must know about it."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

CACHE_VARIABLE = "LADON_CACHE"
BUSY_LOAD = 0.5  # load average per core above which timings are not worth much


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


def environment(device: torch.device) -> dict[str, Any]:
    """Everything that a reader needs to judge the numbers; JSON values."""
    return {
        "cpu": cpu_name(),
        "cpu_count": os.cpu_count(),
        "cpu_bf16": sorted(cpu_flags() & {"avx512_bf16", "amx_bf16"}),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "memory_gib": memory_gib(),
        "system": system_name(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "ladon": ladon_version(),
        "commit": commit(),
    }


def load() -> dict[str, Any]:
    """How busy the machine is now: load averages over 1, 5 and 15 minutes, and tasks that run or want to."""
    averages = [round(value, 2) for value in os.getloadavg()] if hasattr(os, "getloadavg") else None
    try:
        running = int(Path("/proc/loadavg").read_text(encoding="ascii").split()[3].split("/")[0])
    except (OSError, ValueError, IndexError):
        running = None
    return {"load_average": averages, "running_tasks": running}


def is_busy(state: dict[str, Any]) -> bool:
    """Whether other work on the machine would blur timings."""
    averages = state["load_average"]
    return averages is not None and averages[0] > BUSY_LOAD * (os.cpu_count() or 1)


def memory_gib() -> float | None:
    """The machine's memory in GiB; None where the system does not tell."""
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return None


def system_name() -> str:
    """The operating system and its release, without what a build adds to that."""
    leading = re.match(r"[\d.]*\d", platform.release())
    return " ".join([platform.system(), *([leading[0]] if leading else [])])


def ladon_version() -> str:
    """Version of the installed package; "not installed" when it is run from its sources alone."""
    try:
        return version("ladon-llm")
    except PackageNotFoundError:
        return "not installed"


def commit() -> str | None:
    """Commit of the checkout that this package is run from, with `+changes` if it was edited; None elsewhere."""
    folder = Path(__file__).resolve().parents[3]
    if not (folder / ".git").exists():
        return None
    try:
        head = _git(folder, "rev-parse", "--short=12", "HEAD")
        changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{head}+changes" if changes else head


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()
