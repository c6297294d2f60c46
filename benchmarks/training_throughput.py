"""Where the time of a training step goes, and whether any of it is wasted.

The bound that a step is held against: one plain forward of the model over the batch, and the heads' own products,
forward and twice again backward, on the positions that are learned. Run it on an idle machine:

    OMP_NUM_THREADS=1 python benchmarks/training_throughput.py --threads 1
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from ladon.demo.bundled import load_demo
from ladon.heads import SharedHeads
from ladon.train.config import TrainOptions
from ladon.train.data.batches import Collator
from ladon.train.data.rows import Document
from ladon.train.modules import HeadsModule, hidden_states
from ladon.train.optimizer import make_optimizer
from ladon.train.run import make_module


def milliseconds(rounds: int, functions: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Medians; the functions take turns, so that a slow moment of the machine meets all of them.

    With one thread it is the process's own time, which others on the machine change little.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(rounds + 1):
        for name, function in functions.items():
            start = clock()
            function()
            if turn:  # the first warms up
                times[name].append(1e3 * (clock() - start))
    return {name: median(values) for name, values in times.items()}


def products(heads: SharedHeads, rows: int, is_soft: bool) -> Callable[[], None]:
    """The matrix products of shared heads on so many rows, forward and backward, in bfloat16, and nothing else.

    Backward takes a product for the gradient of the weight where it is trained (the projection is not), and one for
    that of what comes in, where it is needed (the hidden states are the frozen model's). With soft labels the model's
    own projection of every position belongs to it.
    """
    width, count, inner = heads.hidden_size, heads.num_heads, heads.up_weight.shape[1]
    sizes = [  # rows, in, out, is its weight trained, is the gradient of what comes in needed
        *[(rows, width, inner, True, False), (rows, heads.down_weight.shape[1], width, True, True)] * count,
        (rows * count, width, heads.vocab_size, False, True),
        *[(rows, width, heads.vocab_size, False, False)] * is_soft,
    ]
    made: dict[tuple[int, int], torch.Tensor] = {}

    def matrix(*shape: int) -> torch.Tensor:
        if shape not in made:
            made[shape] = torch.randn(*shape, dtype=torch.bfloat16)
        return made[shape]

    def run() -> None:
        for n, before, after, is_trained, is_passed_on in sizes:
            inputs, weight, slope = matrix(n, before), matrix(before, after), matrix(n, after)
            inputs @ weight
            if is_passed_on:
                slope @ weight.T
            if is_trained:
                inputs.T @ slope

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--labels", default="text", choices=("text", "target"))
    parser.add_argument("--optimizer", default="adamw", choices=("adamw", "muon"))
    parser.add_argument("--chunk-rows", type=int, default=0)
    parser.add_argument("--profile", action="store_true", help="print the operators of some steps")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    model, _, _ = load_demo(torch.bfloat16)
    options = TrainOptions(labels=given.labels, optimizer=given.optimizer, chunk_rows=given.chunk_rows)
    module = make_module(model, options)
    batch = random_batch(module, given.batch, given.length)
    optimizer = make_optimizer(module.groups(heads=1e-3, base=0.0), given.optimizer, vocab_size=4096)

    def losses() -> None:
        module(**batch).backward()

    def step() -> None:
        losses()
        optimizer.step()
        optimizer.zero_grad()

    @torch.no_grad()
    def plain() -> None:
        hidden_states(model, batch, packed=False)

    rows = len(batch["rows"])
    times = milliseconds(
        given.rounds,
        {
            "forward": plain,
            "products": products(module.heads, rows, given.labels == "target"),
            "losses": losses,
            "step": step,
        },
    )
    bound = times["forward"] + times["products"]
    report = {
        "batch": given.batch,
        "length": given.length,
        "learned_rows": rows,
        "threads": given.threads,
        "labels": given.labels,
        "optimizer": given.optimizer,
        "ms": {name: round(value, 1) for name, value in times.items()},
        "tokens_per_second": round(1e3 * given.batch * given.length / times["step"]),
        "share_of_bound": round(bound / times["step"], 3),
        "share_of_bound_without_optimizer": round(bound / times["losses"], 3),
    }
    if given.profile:
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            step()
        print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=20, max_name_column_width=40))
    print(json.dumps(report))


def random_batch(module: HeadsModule, batch: int, length: int) -> dict[str, torch.Tensor]:
    """Rows of one document each, all of it learned."""
    generator, vocab_size = np.random.default_rng(0), module.heads.vocab_size
    documents = [
        Document(str(i), generator.integers(vocab_size, size=length).astype(np.int32), np.ones(length, dtype=np.bool_))
        for i in range(batch)
    ]
    return Collator(module.heads.num_heads, vocab_size)([[document] for document in documents])


if __name__ == "__main__":
    main()
