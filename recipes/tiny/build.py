"""Build a small language model with decoding heads from the running Python's standard library, offline, on a CPU.

    python recipes/tiny/build.py --out my_model

Tokenizer and base model are trained here; everything about the heads is a call of `ladon train`, `ladon distill` and
`ladon calibrate`, as for any other model. Each stage keeps its result in the run folder; killed and started again with
the same arguments, the command goes on where it stopped. `--model FOLDER` takes a finished model instead of training
one, and makes new heads for it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from base import BaseConfig, train_base
from commands import Commands, calibrate_command, distill_command, heads_command, joint_command, markov_command
from corpus import (
    CALIBRATION_MODULES,
    PROMPT_MODULES,
    SourceFile,
    held_out_files,
    is_test,
    package_files,
    provenance,
    wheel_files,
)
from corpus import training_files as library_files
from export import Bundle, StageRecord, export, read_stages
from prompts import draw_prompts, write_rows, write_texts
from tokens import cached_tokens, train_tokenizer
from training import Text
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ladon.demo.bundled import module_prompts

ARCHITECTURES = ("llama", "gpt_neox", "qwen3")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that decides the result."""

    base: BaseConfig
    commands: Commands = field(default_factory=Commands)
    prompts: int = 8_000  # from packages that the model never saw
    seen_prompts: int = 6_000  # from files that it was trained on
    calibration_prompts: int = 300  # as many as their modules hold, if fewer
    every_nth_file: int = 1  # use every n-th file of the corpus only


def full_plan(arch: str) -> Plan:
    """What the bundled model was made with."""
    return Plan(base=BaseConfig(arch=arch))


def tiny_plan(arch: str) -> Plan:
    """A toy: hours become a minute. It shows that the recipe runs; the model is useless."""
    base = BaseConfig(
        arch=arch, vocab_size=512, hidden_size=64, num_layers=2, num_heads=2, intermediate_size=128, max_positions=1024
    )
    return Plan(
        base=replace(base, steps=60, batch_tokens=2048, short_length=128, warmup_steps=10, save_every=30),
        commands=Commands(
            joint_steps=20,
            joint_heads_steps=10,
            heads_steps=20,
            markov_steps=10,
            batch_size=4,
            length=256,
            new_tokens=32,
            batch=8,
        ),
        prompts=24,
        seen_prompts=8,
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
    parser.add_argument("--model", type=Path, help="a folder that this recipe made: keep its model, make new heads")
    parser.add_argument("--base-steps", type=_positive, help="training steps of the base model")
    parser.add_argument("--joint-steps", type=_positive, help="steps of base and heads together")
    parser.add_argument("--heads-steps", type=_positive, help="steps of the final heads")
    parser.add_argument("--markov-steps", type=_positive, help="steps of their correction by the token before")
    parser.add_argument(
        "--prompts", type=_positive, help="prompts from unseen packages that the model answers for its heads"
    )
    parser.add_argument("--tiny", action="store_true", help="a toy model, in about a minute")
    parser.add_argument("--threads", type=_positive, help="CPU threads (default: torch's choice)")
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile the base's training; needs a C++ compiler"
    )
    return parser.parse_args()


def make_plan(arguments: argparse.Namespace) -> Plan:
    """Defaults, or the toy's, changed by the arguments."""
    plan = tiny_plan(arguments.arch) if arguments.tiny else full_plan(arguments.arch)
    base, commands = plan.base, plan.commands
    return replace(
        plan,
        base=replace(base, steps=arguments.base_steps or base.steps, compile=arguments.compile),
        commands=replace(
            commands,
            joint_steps=arguments.joint_steps or commands.joint_steps,
            heads_steps=arguments.heads_steps or commands.heads_steps,
            markov_steps=arguments.markov_steps or commands.markov_steps,
        ),
        prompts=arguments.prompts or plan.prompts,
    )


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
    """The files that are trained on: the library's, its tests among them, and the wheels'."""

    stdlib: Sequence[SourceFile]
    wheels: Sequence[SourceFile]

    @property
    def files(self) -> list[SourceFile]:
        """All of them, in a fixed order."""
        return [*self.stdlib, *self.wheels]

    @property
    def weighted(self) -> list[SourceFile]:
        """The same with every file that is no test twice: tests are more than half of the text."""
        return [*self.files, *(source for source in self.files if not is_test(source))]


def read_corpus(plan: Plan) -> Corpus:
    """The sources of the running Python's library and of the wheels in its `ensurepip`."""
    step = plan.every_nth_file
    return Corpus(stdlib=list(library_files())[::step], wheels=wheel_files()[::step])


def write_all_prompts(path: Path, plan: Plan, corpus: Corpus) -> None:
    """Prompts of the model's own kind, and from packages that it never saw: one counts with the root of its size."""
    seen = corpus.weighted
    packages = [files[:: plan.every_nth_file] for files in package_files()]
    sizes = [sum(len(source.text) for source in files) for files in packages]
    shares = [len(source.text) / size**0.5 for files, size in zip(packages, sizes, strict=True) for source in files]
    unseen = draw_prompts([source for files in packages for source in files], shares, plan.prompts, seed=1)
    write_rows(path, [*draw_prompts(seen, [len(source.text) for source in seen], plan.seen_prompts, seed=0), *unseen])


def base_model(plan: Plan, corpus: Corpus, run: Path) -> tuple[Path, StageRecord]:
    """Tokenizer and base model, trained on the library and saved as a folder of transformers."""
    folder, record = run / "base", run / "base.json"
    if record.exists():
        return folder, StageRecord(**json.loads(record.read_text(encoding="utf-8")))
    sources = corpus.stdlib
    if not (run / "tokenizer").exists():
        print(f"training the tokenizer on {len(sources)} files", flush=True)
        trained = train_tokenizer(sources, plan.base.vocab_size, plan.base.max_positions)
        trained.save_pretrained(run / "tokenizer.partial")
        (run / "tokenizer.partial").rename(run / "tokenizer")
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(run / "tokenizer")
    held_out = cached_tokens(run / "held_out.npy", tokenizer, held_out_files([*CALIBRATION_MODULES, *PROMPT_MODULES]))
    text = Text(kinds=[cached_tokens(run / "train.npy", tokenizer, sources)], shares=[1.0], held_out=held_out)
    model, found = train_base(plan.base, text, tokenizer.eos_token_id, run / "base.pt")
    round_weights(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    last = found["history"][-1]
    stage = StageRecord(
        name="base, on the standard library",
        steps=plan.base.steps,
        tokens=plan.base.steps * plan.base.batch_tokens,
        train_loss=last["train_loss"],
        held_out_loss=last["held_out_loss"],
    )
    record.write_text(json.dumps(asdict(stage)) + "\n", encoding="utf-8")
    return folder, stage


def joint_stage(settings: Commands) -> StageRecord:
    """The card's row of base and heads together; what it reached is in the log of `ladon train`."""
    return StageRecord(
        name="base and heads together, on all text",
        steps=settings.joint_steps,
        tokens=settings.joint_steps * settings.batch_size * settings.length,
    )


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
    run: Path = arguments.run or default_run
    run.mkdir(parents=True, exist_ok=True)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    corpus = read_corpus(plan)
    record = provenance(corpus.files)
    check_same_plan(plan, record["sha256"], run)
    if not (run / "prompts.jsonl").exists():
        write_texts(run / "text.jsonl", corpus.weighted)
        calibration = module_prompts(CALIBRATION_MODULES, plan.calibration_prompts)
        rows = [json.dumps({"prompt": prompt}) + "\n" for prompt in calibration]
        (run / "calibration.jsonl").write_text("".join(rows), encoding="utf-8")
        write_all_prompts(run / "prompts.jsonl", plan, corpus)
    if arguments.model:
        model, first, stages = arguments.model, arguments.model / "heads", read_stages(arguments.model)
    else:
        base, base_stage = base_model(plan, corpus, run)
        joint_command(plan.commands, base, run).run(arguments.threads)
        model, first = run / "joint" / "model", run / "joint" / "heads"
        stages = [base_stage, joint_stage(plan.commands)]
    commands = [
        distill_command(plan.commands, model, run),
        heads_command(plan.commands, model, first, run),
        markov_command(plan.commands, model, first, run),
        calibrate_command(plan.commands, model, run),
    ]
    for command in commands:
        command.run(arguments.threads)
    export(
        Bundle(
            model=model,
            heads=run / "heads",
            corpus=record,
            stages=stages,
            commands=[command.shown for command in commands],
        ),
        arguments.out,
    )


if __name__ == "__main__":
    main()
