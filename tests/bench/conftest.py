"""A small benchmark that several files look at."""

from __future__ import annotations

import pytest

from bench_runs import silent, subject, workload
from ladon.bench.findings import Findings
from ladon.bench.runner import run_bench
from ladon.config import BenchOptions
from user_side import Tiny


@pytest.fixture(scope="session")
def findings(tiny: Tiny) -> Findings:
    options = BenchOptions(budgets=(4, 6), batches=(1, 2), max_new_tokens=20, repeats=2)
    return run_bench(subject(tiny), workload("a", "b", "b", "b"), options, silent)
