"""What a draft of heads that read the path so far takes, by the number of paths that are followed at each depth.

    python benchmarks/path_rows.py --dtype float32

Untrained Hydra heads of the bundled model (H = 256, V = 4096, K = 4) draft dynamic trees on one thread; the joints take
turns, and medians are given. "product" drafts along each head's best token alone. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import time
from statistics import median

import torch

from ladon.bundled import load_demo
from ladon.environment import environment, load
from ladon.heads import new_heads
from ladon.proposers import drafting
from ladon.stats import StageClock

JOINTS = ("product", *(f"paths:{rows}" for rows in (1, 4, 8, 16)))


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--nodes", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=40)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    load_before = load()
    model, _, _ = load_demo(getattr(torch, arguments.dtype))
    heads = new_heads(model, 4, "hydra")
    clock = StageClock({}, enabled=False, device=model.device)
    proposers = {joint: drafting(heads, "dynamic", 32, arguments.nodes, clock, joint) for joint in JOINTS}
    results = []
    for batch in (1, 8):
        times: dict[str, list[float]] = {joint: [] for joint in JOINTS}
        for _ in range(arguments.rounds + 3):
            hidden = torch.randn(batch, heads.hidden_size, dtype=model.dtype)
            root = torch.randint(heads.vocab_size, (batch,))
            for joint, proposer in proposers.items():
                started = time.perf_counter()
                proposer.propose(hidden, root, arguments.nodes)
                times[joint].append(time.perf_counter() - started)
        for joint in JOINTS:
            found = {"batch": batch, "joint": joint, "draft_ms": round(1e3 * median(times[joint][3:]), 3)}
            results.append(found)
            print(found, flush=True)
    about = environment(model.device) | {"load_before": load_before, "load_after": load()}
    print(json.dumps({"environment": about, "dtype": arguments.dtype, "nodes": arguments.nodes, "results": results}))


if __name__ == "__main__":
    main()
