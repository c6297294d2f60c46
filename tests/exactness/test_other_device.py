"""On a device that is not the CPU, and has no float64, the text is that of `generate`; see `other_device.py`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils import backend_registration


def test_a_device_that_is_not_the_cpu(root: Path) -> None:
    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip(f"torch {torch.__version__} has no devices that are written in Python")
    command = [sys.executable, str(root / "tests" / "other_device.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
