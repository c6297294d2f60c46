"""What a decode step takes by nodes, batch and context, on a model of random weights, and what that allows.

    python benchmarks/step_times.py --output benchmarks/results/NAME.json --plot benchmarks/results/NAME.png
    python benchmarks/step_times.py --shape small --device cpu --batches 1,4 --contexts 64 --nodes 1,2,4,8
    python benchmarks/step_times.py --from benchmarks/results/NAME.json --plot NAME.png

The default shape is that of Vicuna-7B (Llama, 32 layers of 4096) in bfloat16, which needs a GPU of 80 GB for all of its
table; combinations that do not fit into memory are left out and listed. A step is whole: verify, pick, accept, commit,
draft the next tree with four untrained heads, transfer. The second part of the document is a prediction
(`predicted_speedup.py`): what Vicuna's published head accuracies would give at these times. `--from` draws and predicts
again from a kept file. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from predicted_speedup import predict
from step_times_plot import step_time_picture
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from ladon.calibrate.timing import measure_step_times
from ladon.heads import Heads, new_heads
from ladon.tree_size.policy import EDGES
from ladon.util.machine import environment, load

NUM_HEADS = 4
SHAPES = {  # hidden width, intermediate width, layers, attention heads, vocabulary
    "7b": (4096, 11008, 32, 32, 32000),
    "1b": (2048, 5632, 22, 32, 32000),
    "small": (256, 704, 4, 4, 4096),
}
BATCHES, CONTEXTS = (1, 2, 4, 8, 16, 32), (512, 4096)


def random_model(shape: str, device: torch.device, dtype: torch.dtype, context: int) -> tuple[PreTrainedModel, Heads]:
    """A Llama of a shape with random weights, made where it will run, and untrained heads for it."""
    hidden, intermediate, layers, attention_heads, vocabulary = SHAPES[shape]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=attention_heads,
        vocab_size=vocabulary,
        max_position_embeddings=context + max(EDGES),
    )
    config.dtype = dtype
    torch.manual_seed(0)
    with device:
        model = LlamaForCausalLM._from_config(config, dtype=dtype).eval()
    return model, new_heads(model, num_heads=NUM_HEADS)


def measure(
    model: PreTrainedModel, heads: Heads, batches: Sequence[int], contexts: Sequence[int], nodes: Sequence[int]
) -> tuple[list[dict[str, Any]], list[dict[str, int]]]:
    """Step times of every batch at every context, and the combinations that did not fit into memory."""
    measured, left_out = [], []
    for context in contexts:
        text = torch.randint(3, model.config.vocab_size, (context,), generator=torch.Generator().manual_seed(0))
        for batch in batches:
            try:
                found = measure_step_times(model, heads, text.to(model.device), batch=batch, nodes=nodes)
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                left_out.append({"batch": batch, "context": context})
                continue
            measured.append(asdict(found))
            print(f"batch {batch:2d}, context {context}: {_shown(measured[-1])}", flush=True)
    return measured, left_out


def _shown(found: dict[str, Any]) -> str:
    times = zip(found["nodes"], found["ms"], strict=True)
    return ", ".join(f"{nodes}: {ms:.2f}" for nodes, ms in times) + f" ms; drafting {found['drafting_ms']:.2f} ms"


def show(predicted: Sequence[dict[str, Any]]) -> None:
    """The predicted table for people."""
    print("\npredicted:")
    print(f"{'model':12} {'batch':>5} {'context':>7} {'nodes':>5} {'tokens':>6} {'x plain':>8} {'64 nodes':>8}")
    for row in predicted:
        medusa = "-" if row["medusa_speedup"] is None else f"{row['medusa_speedup']:.2f}"
        print(
            f"{row['model']:12} {row['batch']:5d} {row['context']:7d} {row['nodes']:5d} {row['tokens']:6.2f} "
            f"{row['speedup']:8.2f} {medusa:>8}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--device", default="cuda", help="cuda or cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--batches", type=_numbers, default=BATCHES, help="rows decoded together, such as 1,2,4")
    parser.add_argument(
        "--contexts", type=_numbers, default=CONTEXTS, help="cached tokens of each row, such as 512,4096"
    )
    parser.add_argument("--nodes", type=_numbers, default=EDGES, help="sizes of trees, root included")
    parser.add_argument("--from", dest="kept", type=Path, help="measure nothing; take the times of this document")
    parser.add_argument("--output", type=Path, help="also write the JSON document here")
    parser.add_argument("--plot", type=Path, help="draw the times here (PNG)")
    arguments = parser.parse_args()
    document = json.loads(arguments.kept.read_text(encoding="utf-8")) if arguments.kept else _measured(arguments)
    document["predicted"] = predict(document["measured"])
    show(document["predicted"])
    if arguments.output:
        arguments.output.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    if arguments.plot:
        arguments.plot.write_bytes(step_time_picture(document))
    print(json.dumps(document, allow_nan=False))


def _measured(arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device here; give --device cpu and a smaller --shape, or --from FILE")
    device = torch.device(arguments.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    before = load()
    dtype = getattr(torch, arguments.dtype)
    model, heads = random_model(arguments.shape, device, dtype, max(arguments.contexts))
    measured, left_out = measure(model, heads, arguments.batches, arguments.contexts, arguments.nodes)
    return {
        "environment": environment(device) | {"load_before": before, "load_after": load()},
        "model": f"{arguments.shape}, random weights",
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": arguments.dtype,
        "measured": measured,
        "left_out": left_out,
    }


def _numbers(text: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers of 1 or more, such as 1,2,4")
    return numbers


if __name__ == "__main__":
    main()
