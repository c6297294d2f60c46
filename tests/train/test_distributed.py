"""Two processes that share the rows train as one with twice the batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from ladon.heads import load_heads
from training_runs import run

HERE = Path(__file__).resolve().parent
SCRIPT = """
import sys
from pathlib import Path

import torch

from test_distributed import train_small

torch.set_num_threads(1)
said, processes = train_small(Path(sys.argv[1]), batch_size=int(sys.argv[2]))
assert processes == torch.distributed.get_world_size() == 2
assert bool(said) == (torch.distributed.get_rank() == 0)
torch.distributed.destroy_process_group()
"""


def train_small(out: Path, batch_size: int) -> tuple[list[str], int]:
    """Train a small random model with its heads; what was said, and by how many processes."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    model = LlamaForCausalLM(config).eval()
    said: list[str] = []
    options = {"accumulation": 2, "steps": 3, "precision": "fp32", "early_exit": 1, "packing": "off"}
    report = run(model, out, said, batch_size=batch_size, joint="full", heads_warmup_steps=1, **options)
    return said, report["settings"]["processes"]


def test_two_processes_train_as_one_with_twice_the_batch(tmp_path: Path) -> None:
    """Both stages, accumulation, and rows with different numbers of learned positions in each process."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), *sys.path]), "PYTHONWARNINGS": "ignore"}
    one, two = tmp_path / "one", tmp_path / "two"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, str(script), str(two), "2"], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    train_small(one, batch_size=4)
    heads = [load_heads(folder / "heads").state_dict() for folder in (one, two)]
    assert heads[0]["down_weight"].abs().sum() > 0
    for name, tensor in heads[0].items():
        torch.testing.assert_close(tensor, heads[1][name], rtol=1e-4, atol=1e-5)
    models = [AutoModelForCausalLM.from_pretrained(folder / "model") for folder in (one, two)]
    for (name, first), second in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5, msg=name)
