"""What decoding holds in memory, measured: `python benchmarks/memory.py`.

Counts every allocation of torch's CPU allocator during the prefill and during one decode step of a random Llama, and
sets the peak beside the parts that are meant to make it up: cache, mask, logits; what is left is one layer's workspace.
Each case is run with L and with 2 L layers: only the cache may grow with the number of layers.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from typing import TypeVar

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

import ladon
from ladon.drafting.head_chaining import product
from ladon.drafting.proposer import HeadsProposer
from ladon.engine.engine import Engine
from ladon.engine.recorder import Recorder
from ladon.engine.sequence import Row
from ladon.engine.stats import DecodeStats
from ladon.target.target import Target
from ladon.tree_size.tree_sizes import TreeSizes
from ladon.trees.grow import grow_dynamic

MIB = 2**20
T = TypeVar("T")


def with_peak(work: Callable[[], T]) -> tuple[T, int]:
    """What `work` returns, and by how many bytes the live memory exceeded its start at the highest point."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        result = work()
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return result, max(itertools.accumulate(changes), default=0)


def small_llama(num_layers: int, vocab_size: int) -> LlamaForCausalLM:
    """A random model in float32 with grouped heads; its context never ends here."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=num_layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=2**16,
    )
    return LlamaForCausalLM(config).eval()


def measure(num_layers: int, vocab_size: int, batch: int, context: int, budget: int) -> dict[str, float]:
    """Peaks and parts of one case, in MiB."""
    torch.manual_seed(0)
    model = small_llama(num_layers, vocab_size)
    heads = ladon.new_heads(model, num_heads=4).bind(model)
    target = Target(model, self_test=False)
    stats = DecodeStats()
    sizes = TreeSizes(budget, target.device)
    recorder = Recorder(stats, sizes, model, target.device)
    engine = Engine(target, HeadsProposer(product(heads, 32), grow_dynamic), sizes, observer=recorder)
    prompts = torch.randint(0, vocab_size, (batch, context))
    rows = [Row(prompt=prompt, max_new_tokens=64, is_stop=lambda token: False) for prompt in prompts]
    steps = engine.run(rows)
    _, prefill = with_peak(lambda: next(step for step in steps if step.emitted))  # it comes in chunks
    next(steps)  # this one doubles the cache's capacity
    step, decode = with_peak(lambda: next(steps))
    assert step.tree is not None
    nodes = step.tree.num_nodes
    reach = context + stats.tokens // batch + nodes
    parts = {
        "cache": engine.cache_bytes,
        "mask": batch * nodes * reach,  # bool
        "logits": batch * nodes * vocab_size * 4,
    }
    rest = decode - parts["mask"] - parts["logits"]
    all_logits = batch * context * vocab_size * 4
    sizes = {"prefill": prefill, "prompt logits": all_logits, "step": decode, **parts, "rest": rest}
    return {name: size / MIB for name, size in sizes.items()}


def main() -> None:
    """Print one line per case, as a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4, help="L; every case is run with L and 2 L layers")
    parser.add_argument("--vocab", type=int, default=32000, help="V")
    options = parser.parse_args()
    cases = [(1, 512, 16), (1, 2048, 16), (1, 512, 64), (4, 512, 16)]
    names: list[str] = []
    for batch, context, budget in cases:
        for layers in (options.layers, 2 * options.layers):
            found = measure(layers, options.vocab, batch, context, budget)
            if not names:
                names = list(found)
                print("| B | context | N | layers |", " | ".join(f"{name}, MiB" for name in names), "|")
                print("|---" * (4 + len(names)) + "|")
            numbers = " | ".join(f"{size:.2f}" for size in found.values())
            print(f"| {batch} | {context} | {budget} | {layers} | {numbers} |", flush=True)


if __name__ == "__main__":
    main()
