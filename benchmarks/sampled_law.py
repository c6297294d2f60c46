"""Total variation between what trees write over many seeds and the target's law, on the bundled model. No timing.

    python benchmarks/sampled_law.py --draws 4000

One prompt is answered with many seeds, by trees. How often each beginning of `--length` new tokens occurs is set beside
its probability, which comes from the model's own forwards over every beginning and transformers' warpers, without
Ladon. Beginnings less likely than 1 in `--draws` count as one.

A finite sample is never at distance 0. The same number of draws from the exact law, by torch's own generator, repeated,
shows what noise alone comes to. The last line is one JSON document: `total_variation`, `noise_mean` and
`noise_greatest` of `repeats`, `cells` compared and their share of all probability, `acceptance_length` of the trees.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel, TemperatureLogitsWarper, TopKLogitsWarper

from ladon import Decoder, load_demo
from ladon.bench.workloads import demo_workload, prompt_ids
from ladon.sampling.gumbel import mix
from ladon.util.machine import environment

REPEATS = 50
CHUNK = 256  # beginnings that the model reads at a time
Text = tuple[int, ...]


def exact_law(
    model: PreTrainedModel, prompt: Tensor, length: int, least: float, warpers: LogitsProcessorList
) -> dict[Text, float]:
    """The probability of every beginning of this length that is not below `least`."""
    law: dict[Text, float] = {(): 1.0}
    for _ in range(length):
        texts, longer = list(law), {}
        for start in range(0, len(texts), CHUNK):
            part = texts[start : start + CHUNK]
            ids = torch.cat(
                [prompt.expand(len(part), -1), torch.tensor(part, dtype=torch.int64).view(len(part), -1)], 1
            )
            with torch.no_grad():
                after = warpers(ids, model(ids, logits_to_keep=1).logits[:, -1].double()).softmax(-1)
            chances = after * torch.tensor([law[text] for text in part], dtype=torch.float64)[:, None]
            for row, token in (chances >= least).nonzero().tolist():
                longer[(*part[row], token)] = float(chances[row, token])
        law = longer
    return law


def distance(counts: Counter[Text], law: dict[Text, float]) -> float:
    """Total variation between frequencies and the law, what is not in the law together."""
    num = counts.total()
    apart = sum(abs(counts[text] / num - p) for text, p in law.items())
    rest = sum(count for text, count in counts.items() if text not in law) / num
    return 0.5 * (apart + abs(rest - (1 - sum(law.values()))))


def noise_alone(law: dict[Text, float], num: int) -> list[float]:
    """Distances of samples of the law itself."""
    texts: list[Text] = [*law, ()]  # the last stands for all the others
    chances = torch.tensor([*law.values(), max(0.0, 1 - sum(law.values()))], dtype=torch.float64)
    draws = torch.multinomial(chances, num * REPEATS, replacement=True, generator=torch.Generator().manual_seed(0))
    return [distance(Counter(texts[cell] for cell in part), law) for part in draws.view(REPEATS, num).tolist()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=4000)
    parser.add_argument("--length", type=int, default=3, help="new tokens compared; trees are from the second on")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--budget", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=0, help="number of the prompt, of the bundled ones")
    parser.add_argument("--accept", default="exact", help="a lossy rule shows what a real distance looks like")
    parser.add_argument("--output", type=Path, help="also write the JSON document here")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer, heads = load_demo(torch.float32)
    model.generation_config.eos_token_id = None
    question = demo_workload(arguments.prompt + 1).questions[-1]
    prompt = torch.tensor(prompt_ids(tokenizer, question, [])[-32:])
    warpers = LogitsProcessorList([TemperatureLogitsWarper(arguments.temperature)])
    warpers += [TopKLogitsWarper(arguments.top_k)] if arguments.top_k else []
    law = exact_law(model, prompt, arguments.length, 1 / arguments.draws, warpers)
    decoder = Decoder(model, heads, budget=arguments.budget, accept=arguments.accept)
    options = {"do_sample": True, "temperature": arguments.temperature, "top_k": arguments.top_k}
    seeds = [mix(1, index) for index in range(arguments.draws)]
    # four more tokens than are compared: trees are as deep as they are in the middle of a text
    rows = decoder.rows([prompt] * arguments.draws, max_new_tokens=arguments.length + 4, seed=seeds, **options)
    for _ in decoder.decode(rows, max_rows=CHUNK):
        pass
    counts = Counter(tuple(row.tokens[: arguments.length]) for row in rows)
    noise = noise_alone(law, arguments.draws)
    document = {
        "environment": environment(model.device),
        "options": {name: value for name, value in vars(arguments).items() if name != "output"},
        "total_variation": distance(counts, law),
        "noise_mean": mean(noise),
        "noise_greatest": max(noise),
        "repeats": REPEATS,
        "cells": len(law),
        "cells_share": sum(law.values()),
        "acceptance_length": decoder.stats.acceptance_length,
    }
    if arguments.output:
        arguments.output.write_text(json.dumps(document, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    print(json.dumps(document, allow_nan=False))


if __name__ == "__main__":
    main()
