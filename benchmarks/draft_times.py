"""What a draft takes, by how the heads' guesses are joined: from hidden row to lattice, and from lattice to tree.

    python benchmarks/draft_times.py --dtype float32

Untrained heads of the bundled model's size (H = 256, V = 4096, K = 4) draft dynamic trees on one thread: shared heads,
those with a Markov or a hidden correction, and Hydra's. Joints take turns, and medians are given; beside them, what a
decode step of so many nodes takes with the bundled heads at a context of 256 tokens, draft included. The last line is
one JSON document.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from statistics import median

import torch

from ladon.calibrate.timing import measure_step_times
from ladon.config import DecoderOptions
from ladon.demo.bundled import demo_prompts, load_demo
from ladon.drafting.head_chaining import Chaining, make_chaining
from ladon.heads import Heads, new_heads
from ladon.trees.grow import grow_dynamic
from ladon.util.machine import environment, load

CONTEXT = 256
SHARED = {"num_heads": 4, "expansion": 2}


def heads_and_joints(model: torch.nn.Module) -> Iterator[tuple[str, Heads, str]]:
    """Name, heads and joint of everything that is timed."""
    markov, hidden = new_heads(model, markov_rank=64, **SHARED), new_heads(model, hidden_correction=256, **SHARED)
    hydra = new_heads(model, 4, "hydra")
    yield from (("shared", markov, "product"), ("shared", markov, "markov"), ("shared", hidden, "hidden"))
    yield from (("hydra", hydra, joint) for joint in ("product", *(f"paths:{rows}" for rows in (1, 4, 8, 16))))


def seconds(joint: Chaining, hidden: torch.Tensor, root: torch.Tensor, nodes: int) -> tuple[float, float]:
    """What the lattice took, and the tree grown from it."""
    started = time.perf_counter()
    lattice = joint(hidden, root)
    guessed = time.perf_counter()
    grow_dynamic(lattice, root, nodes)
    return guessed - started, time.perf_counter() - guessed


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--nodes", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--rounds", type=int, default=100)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    load_before = load()
    model, tokenizer, bundled = load_demo(getattr(torch, arguments.dtype))
    candidates = DecoderOptions().num_candidates
    timed = list(heads_and_joints(model))
    context = torch.tensor(tokenizer("\n".join(demo_prompts(4)))["input_ids"])[:CONTEXT]
    steps = measure_step_times(model, bundled, context, nodes=arguments.nodes)
    results = []
    for batch in (1, 8):
        for nodes in arguments.nodes:
            options = (candidates, candidates, "dynamic", nodes)
            joints = [make_chaining(heads, joint, *options) for _, heads, joint in timed]
            times: list[list[tuple[float, float]]] = [[] for _ in joints]
            for _ in range(arguments.rounds + 3):
                hidden = torch.randn(batch, bundled.hidden_size, dtype=model.dtype)
                root = torch.randint(bundled.vocab_size, (batch,))
                for joint, found in zip(joints, times, strict=True):
                    found.append(seconds(joint, hidden, root, nodes))
            for (name, _, joint), found in zip(timed, times, strict=True):
                lattice, growth = (1e3 * median(part) for part in zip(*found[3:], strict=True))
                row = {"heads": name, "joint": joint, "batch": batch, "nodes": nodes}
                results.append(row | {"lattice_ms": round(lattice, 3), "growth_ms": round(growth, 3)})
                print(results[-1], flush=True)
    print(
        json.dumps(
            {
                "environment": environment(model.device) | {"load_before": load_before, "load_after": load()},
                "dtype": arguments.dtype,
                "step": {"batch": 1, "context": CONTEXT, "nodes": steps.nodes, "ms": steps.ms},
                "results": results,
            }
        )
    )


if __name__ == "__main__":
    main()
