"""Build a small language model with decoding heads from the running Python's standard library, offline, on a CPU.

    python recipes/tiny/build.py --arch llama --out my_model

Stages: tokenizer; base; heads on the frozen base; both together; heads once more, on the base as it is then, frozen;
fixed trees; export. Each keeps its result in the run folder; killed and started again with the same arguments, the
command goes on where it stopped.
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
from corpus import (
    CALIBRATION_MODULES,
    PROMPT_MODULES,
    SourceFile,
    held_out_files,
    is_test,
    provenance,
    training_files,
    wheel_files,
)
from export import Bundle, export
from heads import HeadsTraining, narrowed, train_heads
from joint import JointTraining, train_jointly
from tokens import cached_tokens, train_tokenizer
from training import Schedule, Text
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ladon.bundled import module_prompts
from ladon.heads import new_heads

ARCHITECTURES = ("llama", "gpt_neox", "qwen3")
STAGES = ("base", "first_heads", "joint", "heads")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that decides the result."""

    base: BaseConfig
    first_heads: HeadsTraining
    joint: JointTraining
    heads: HeadsTraining
    num_heads: int = 4
    expansion: int = 2  # of the heads that are exported; they are twice as wide until the last stage
    library_share: float = 0.37  # of the text after the base's own stage; the wheels and the tests have the rest
    tests_share: float = 0.30
    calibration_prompts: int = 120
    every_nth_file: int = 1  # train on every n-th file of the corpus only


def full_plan(arch: str) -> Plan:
    """What the bundled model was made with."""
    return Plan(
        base=BaseConfig(arch=arch),
        first_heads=HeadsTraining(),
        joint=JointTraining(),
        heads=HeadsTraining(steps=400, matrix_lr=0.01, vector_lr=2e-3, decay_share=1.0, from_base=True),
    )


def tiny_plan(arch: str) -> Plan:
    """A toy: minutes become seconds. It shows that the recipe runs; the model is useless."""
    base = BaseConfig(
        arch=arch, vocab_size=512, hidden_size=64, num_layers=2, num_heads=2, intermediate_size=128, max_positions=1024
    )
    heads = HeadsTraining(steps=20, batch_tokens=2048, length=128, warmup_steps=5, save_every=10)
    joint = JointTraining(steps=20, batch_tokens=2048, short_length=128, long_length=1024, heads_positions=512)
    return Plan(
        base=replace(base, steps=60, batch_tokens=2048, short_length=128, warmup_steps=10, save_every=30),
        first_heads=heads,
        joint=replace(joint, warmup_steps=5, save_every=10),
        heads=replace(heads, from_base=True),
        calibration_prompts=4,
        every_nth_file=40,
    )


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is below 1")
    return number


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", choices=ARCHITECTURES, default="llama")
    parser.add_argument("--out", type=Path, required=True, help="folder for the finished model, heads and card")
    parser.add_argument("--run", type=Path, help="folder for unfinished work (default: runs/ARCH beside this file)")
    for name in STAGES:
        parser.add_argument(f"--{name.replace('_', '-')}-steps", type=_positive, help="training steps of this stage")
    parser.add_argument("--tiny", action="store_true", help="a toy model, in under a minute")
    parser.add_argument("--threads", type=_positive, help="CPU threads (default: torch's choice)")
    parser.add_argument("--compile", action="store_true", help="torch.compile the training; needs a C++ compiler")
    return parser.parse_args()


def make_plan(arguments: argparse.Namespace) -> Plan:
    """Defaults, or the toy's, changed by the arguments."""
    plan = tiny_plan(arguments.arch) if arguments.tiny else full_plan(arguments.arch)
    stages: dict[str, Schedule] = {}
    for name in STAGES:
        stage: Schedule = getattr(plan, name)
        stages[name] = replace(
            stage, steps=getattr(arguments, f"{name}_steps") or stage.steps, compile=arguments.compile
        )
    return replace(plan, **stages)


def check_same_plan(plan: Plan, corpus_sha256: object, run: Path) -> None:
    """A run folder belongs to one plan and one corpus: going on with another would mix two trainings."""
    document = json.loads(json.dumps({"corpus": corpus_sha256, **asdict(plan)}))
    path = run / "plan.json"
    if not path.exists():
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        partial.replace(path)
    elif json.loads(path.read_text(encoding="utf-8")) != document:
        raise SystemExit(
            f"{run} holds a run with other settings or another Python (see plan.json). Give them again or another --run"
        )


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """The text as the stages take it, its tokenizer and its record."""

    tokenizer: PreTrainedTokenizerBase
    library_only: Text
    everything: Text
    record: dict[str, object]


def prepare_corpus(plan: Plan, run: Path) -> Corpus:
    """Tokenizer, token ids and record; kept in the run folder."""
    library = list(training_files())[:: plan.every_nth_file]
    wheels = wheel_files()[:: plan.every_nth_file]
    record = provenance([*library, *wheels])
    check_same_plan(plan, record["sha256"], run)
    if not (run / "tokenizer").exists():
        print(f"training the tokenizer on {len(library)} files", flush=True)
        trained = train_tokenizer(library, plan.base.vocab_size, plan.base.max_positions)
        trained.save_pretrained(run / "tokenizer.partial")
        (run / "tokenizer.partial").rename(run / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(run / "tokenizer")

    def ids(name: str, sources: list[SourceFile]) -> np.ndarray:
        return cached_tokens(run / f"{name}.npy", tokenizer, sources)

    held_out = ids("held_out", held_out_files([*CALIBRATION_MODULES, *PROMPT_MODULES]))
    kinds = {
        "library": (ids("library", [s for s in library if not is_test(s)]), plan.library_share),
        "wheels": (ids("wheels", wheels), 1 - plan.library_share - plan.tests_share if wheels else 0.0),
        "tests": (ids("tests", [s for s in library if is_test(s)]), plan.tests_share),
    }
    sizes = {name: len(text) for name, (text, _) in kinds.items()}
    print(f"tokens: {sizes}, held out: {len(held_out)}", flush=True)
    texts, shares = zip(*((text, share) for text, share in kinds.values() if share), strict=True)
    return Corpus(
        tokenizer=tokenizer,
        library_only=Text(kinds=[ids("train", library)], shares=[1.0], held_out=held_out),
        everything=Text(kinds=texts, shares=[share / sum(shares) for share in shares], held_out=held_out),
        record=record,
    )


def command_line(plan: Plan, tiny: bool) -> str:
    """What to type to get the same model again."""
    steps = " ".join(f"--{name.replace('_', '-')}-steps {getattr(plan, name).steps}" for name in STAGES)
    return f"python recipes/tiny/build.py --arch {plan.base.arch} {steps}" + (" --tiny" if tiny else "")


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
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    corpus = prepare_corpus(plan, run)
    model, base_record = train_base(plan.base, corpus.library_only, corpus.tokenizer.eos_token_id, run / "base.pt")
    round_weights(model)
    heads = new_heads(model.requires_grad_(False), plan.num_heads, seed=plan.base.seed, expansion=2 * plan.expansion)
    train_heads(plan.first_heads, model, heads, corpus.library_only, run / "first_heads.pt")
    first_record = heads.training_record
    joint_record = train_jointly(plan.joint, model, heads, corpus.everything, run / "joint.pt")
    round_weights(model)
    heads = narrowed(heads, model, plan.expansion)
    train_heads(plan.heads, model, heads, corpus.everything, run / "heads.pt")
    heads.base_name = f"the {plan.base.arch} model of recipes/tiny"
    prompts = module_prompts(CALIBRATION_MODULES, plan.calibration_prompts)
    bundle = Bundle(
        model=model,
        tokenizer=corpus.tokenizer,
        heads=heads,
        corpus=corpus.record,
        fixed_trees=calibrate(model, corpus.tokenizer, heads, prompts),
        base_record=base_record,
        first_record=first_record,
        joint_record=joint_record,
        command=command_line(plan, arguments.tiny),
    )
    export(bundle, arguments.out)


if __name__ == "__main__":
    main()
