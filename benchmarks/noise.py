"""What drawing costs over greedy decoding, at the vocabulary of a real model: the noise, and all of it.

    python benchmarks/noise.py --output FILE

A random Llama (V = 32,000, H = 1,024) in float32, one thread, one row, four untrained heads; trees of 1, 8, 16 nodes.
A greedy and a sampled row (temperature 0.8) decode side by side on one model, step by step in turns, so that a slow
moment of the machine meets both. The last line is one JSON document. For each size:

- `greedy_ms`, `sampled_ms`: a step, the median;
- `share`: the median over pairs of steps of (sampled - greedy) / greedy: the noise, its sum with the scores, and the
  division by the temperature, which greedy decoding does not have;
- `noise_ms`, `noise_share`: making the noise and adding it alone, timed between the steps, and its share of a sampled
  step. The goal is below 0.03.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import ladon
from ladon.engine.sequence import Row
from ladon.engine.stats import DecodeStats
from ladon.engine.step import Step
from ladon.sampling.sampler import noisy
from ladon.sampling.sampling_params import GREEDY, Context, Nodes, TemperatureSampling
from ladon.trees.token_tree import TokenTree, ancestor_mask
from ladon.util.machine import environment, load

SIZES = (1, 8, 16)
GOAL = 0.03
WARM_UP = 3  # steps of each system that are not counted


def random_llama(num_layers: int, dtype: torch.dtype) -> PreTrainedModel:
    """Of a size that people run on a CPU: 0.16 billion parameters with 8 layers."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=num_layers,
        num_attention_heads=16,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


class System:
    """One row that decodes by a law, a step at a time."""

    def __init__(
        self, model: PreTrainedModel, heads: ladon.Heads, nodes: int, prompt: torch.Tensor, drawn: bool
    ) -> None:
        law = TemperatureSampling(temperature=0.8) if drawn else GREEDY
        row = Row(prompt=prompt, max_new_tokens=1500, is_stop=lambda token: False, seed=7, sampling_params=law)
        decoder = ladon.Decoder(model, heads, budget=nodes)
        self._steps: Iterator[Step] = decoder.decode([row])
        self._stats: DecodeStats = decoder.stats
        next(self._steps)  # the prompt is read

    def step_ms(self) -> float:
        """Take one decode step; how long it took."""
        before = self._stats.decode_seconds
        self.last = next(self._steps)
        return 1e3 * (self._stats.decode_seconds - before)


def noise_ms(tree: TokenTree, vocab_size: int) -> float:
    """Noise for one tree, made and added."""
    nodes = Nodes(tree=tree, ancestors=ancestor_mask(tree.parents, tree.max_depth))
    context = Context(rows=[], seeds=torch.tensor([7]), first=torch.tensor([50]))
    scores = torch.zeros(1, tree.num_nodes, vocab_size)
    started = time.perf_counter()
    noisy(scores, context, nodes)
    return 1e3 * (time.perf_counter() - started)


def measure(model: PreTrainedModel, heads: ladon.Heads, nodes: int, steps: int) -> dict[str, float]:
    """One size."""
    prompt = torch.randint(0, model.config.vocab_size, (32,), generator=torch.Generator().manual_seed(1))
    greedy, sampled = (System(model, heads, nodes, prompt, drawn) for drawn in (False, True))
    found: list[tuple[float, float, float]] = []
    for number in range(steps + WARM_UP):
        order = (greedy, sampled) if number % 2 else (sampled, greedy)
        times = {system: system.step_ms() for system in order}
        assert sampled.last.tree is not None
        noise = noise_ms(sampled.last.tree, model.config.vocab_size)
        if number >= WARM_UP:
            found.append((times[greedy], times[sampled], noise))
    greedy_ms, sampled_ms, made_ms = (median(column) for column in zip(*found, strict=True))
    return {
        "nodes": nodes,
        "steps": steps,
        "greedy_ms": greedy_ms,
        "sampled_ms": sampled_ms,
        "share": median((drawn - plain) / plain for plain, drawn, _ in found),
        "noise_ms": made_ms,
        "noise_share": median(noise / drawn for _, drawn, noise in found),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--steps", type=int, default=80, help="of each system and size")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--output", type=Path, help="also write the JSON document here")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    load_before = load()
    model = random_llama(arguments.layers, getattr(torch, arguments.dtype))
    heads = ladon.new_heads(model, num_heads=4)
    results = []
    for nodes in SIZES:
        results.append(measure(model, heads, nodes, arguments.steps))
        print(results[-1], flush=True)
    document = {
        "environment": environment(model.device) | {"load_before": load_before, "load_after": load()},
        "model": {"parameters": model.num_parameters(), "layers": arguments.layers, **_shape(model)},
        "dtype": arguments.dtype,
        "results": results,
        "goal": GOAL,
        "met": all(result["noise_share"] < GOAL for result in results),
    }
    if arguments.output:
        arguments.output.write_text(json.dumps(document, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    print(json.dumps(document, allow_nan=False))


def _shape(model: PreTrainedModel) -> dict[str, int]:
    return {"vocab_size": model.config.vocab_size, "hidden_size": model.config.hidden_size}


if __name__ == "__main__":
    main()
