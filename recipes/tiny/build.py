"""Build a small language model with decoding heads from the running Python's standard library, offline, on a CPU.

    python recipes/tiny/build.py --arch llama --out my_model

Stages: corpus, tokenizer, base, heads, fixed trees, export. Each keeps its result in the run folder; killed and started
again with the same arguments, the command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from base import BaseConfig, train_base
from calibrate import calibrate
from corpus import CALIBRATION_MODULES, PROMPT_MODULES, held_out_files, provenance, training_files
from export import Bundle, export
from heads import HeadsTraining, train_heads
from tokens import cached_tokens, train_tokenizer
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ladon.bundled import module_prompts

ARCHITECTURES = ("llama", "gpt_neox", "qwen3")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that decides the result."""

    base: BaseConfig
    heads: HeadsTraining
    calibration_prompts: int = 120
    every_nth_file: int = 1  # train on every n-th file of the corpus only


def tiny_plan(arch: str) -> Plan:
    """A toy: minutes become seconds. It shows that the recipe runs; the model is useless."""
    base = BaseConfig(
        arch=arch, vocab_size=512, hidden_size=64, num_layers=2, num_heads=2, intermediate_size=128, max_positions=1024
    )
    return Plan(
        base=replace(base, steps=60, batch_tokens=2048, short_length=128, warmup_steps=10, save_every=30),
        heads=HeadsTraining(steps=40, batch_tokens=2048, length=128, warmup_steps=5, save_every=20),
        calibration_prompts=4,
        every_nth_file=40,
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", choices=ARCHITECTURES, default="llama")
    parser.add_argument("--out", type=Path, required=True, help="folder for the finished model, heads and card")
    parser.add_argument("--run", type=Path, help="folder for unfinished work (default: runs/ARCH beside this file)")
    parser.add_argument("--steps", type=int, help="training steps of the base")
    parser.add_argument("--heads-steps", type=int, help="training steps of the heads")
    parser.add_argument("--tiny", action="store_true", help="a toy model, in under a minute")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--compile", action="store_true", help="torch.compile the training; needs a C++ compiler")
    return parser.parse_args()


def make_plan(arguments: argparse.Namespace) -> Plan:
    """Defaults, or the toy's, changed by the arguments."""
    plan = tiny_plan(arguments.arch) if arguments.tiny else Plan(base=BaseConfig(), heads=HeadsTraining())
    steps = arguments.steps or plan.base.steps
    heads_steps = arguments.heads_steps or plan.heads.steps
    return replace(
        plan,
        base=replace(plan.base, arch=arguments.arch, steps=steps, compile=arguments.compile),
        heads=replace(plan.heads, steps=heads_steps, compile=arguments.compile),
    )


def check_same_plan(plan: Plan, run: Path) -> None:
    """A run folder belongs to one plan: going on with another would mix two trainings."""
    document = json.loads(json.dumps(asdict(plan)))
    path = run / "plan.json"
    if not path.exists():
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    elif json.loads(path.read_text(encoding="utf-8")) != document:
        raise SystemExit(f"{run} holds a run with other settings (see plan.json). Give them again or another --run")


def prepare_text(plan: Plan, run: Path) -> tuple[PreTrainedTokenizerBase, np.ndarray, np.ndarray, dict[str, object]]:
    """Tokenizer, training ids, held-out ids and the corpus record."""
    sources = list(training_files())[:: plan.every_nth_file]
    record = provenance(sources)
    if not (run / "tokenizer").exists():
        print(f"training the tokenizer on {record['files']} files", flush=True)
        train_tokenizer(sources, plan.base.vocab_size, plan.base.max_positions).save_pretrained(run / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(run / "tokenizer")
    tokens = cached_tokens(run / "train.npy", tokenizer, sources)
    held_out = cached_tokens(run / "held_out.npy", tokenizer, held_out_files([*CALIBRATION_MODULES, *PROMPT_MODULES]))
    print(f"corpus: {len(tokens)} tokens, held out: {len(held_out)}", flush=True)
    return tokenizer, tokens, held_out, record


def command_line(plan: Plan, tiny: bool) -> str:
    """What to type to get the same model again."""
    command = f"python recipes/tiny/build.py --arch {plan.base.arch} --steps {plan.base.steps}"
    return f"{command} --heads-steps {plan.heads.steps}" + (" --tiny" if tiny else "")


@torch.no_grad()
def round_weights(model: PreTrainedModel) -> None:
    """Round every parameter to bfloat16 in place: the heads learn on the weights that are exported.

    Buffers stay as they are: rotary frequencies must not be rounded.
    """
    for parameter in model.parameters():
        parameter.copy_(parameter.bfloat16())


def main() -> None:
    arguments = parse()
    plan = make_plan(arguments)
    default_run = Path(__file__).parent / "runs" / (arguments.arch + ("-tiny" if arguments.tiny else ""))
    run = arguments.run or default_run
    run.mkdir(parents=True, exist_ok=True)
    check_same_plan(plan, run)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    tokenizer, tokens, held_out, record = prepare_text(plan, run)
    model, base_record = train_base(plan.base, tokens, held_out, tokenizer.eos_token_id, run)
    round_weights(model)
    heads = train_heads(plan.heads, model, tokens, held_out, run)
    heads.base_name = f"the {plan.base.arch} model of recipes/tiny"
    trees = calibrate(model, tokenizer, heads, module_prompts(CALIBRATION_MODULES, plan.calibration_prompts))
    bundle = Bundle(
        model=model,
        tokenizer=tokenizer,
        heads=heads,
        corpus=record,
        fixed_trees=trees,
        base_record=base_record,
        command=command_line(plan, arguments.tiny),
    )
    export(bundle, arguments.out)


if __name__ == "__main__":
    main()
