"""Every default value of the library, once. The command line takes its defaults and help from here."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from ladon.errors import TreeError

AUTO_BUDGET = 16  # nodes where one number must stand for "auto": no clock may decide and there is no profile
MOST_NODES = 128  # nodes of the largest tree that budget="auto" chooses
MOST_NGRAM_NODES = 48  # nodes of the largest tree that n-grams alone draft
MTP_DEPTH = 3  # tokens that a model's MTP modules guess at least, the last module again and again
MTP = "mtp"  # what the command line names them by
PICTURE_STEPS = 64  # steps that one PNG picture of a run shows at most
TREES = {  # the tree options that have a name, and what each means
    "dynamic": "grown anew at each step",
    "chain": "each head's best token",
    "off": "plain decoding",
}
ACCEPT = {  # which drafted tokens are kept, and what each name means
    "exact": "those that the target says",
    "typical": "those that are likely enough by MEDUSA's rule",
    "nucleus": "those among the likeliest with a total probability",
}

NGRAMS = {  # the n-gram options, and what each means
    "auto": "what followed the last tokens where they stood before is guessed too, in dynamic trees and without heads",
    "on": "the same, and in the dynamic trees of your own proposer",
    "off": "heads alone guess",
}
PRODUCT, MARKOV, HIDDEN, PATHS = "product", "markov", "hidden", "paths"
JOINTS = ("auto", PRODUCT, MARKOV, HIDDEN, PATHS)
MARKOV_ROWS = 16  # candidates of a head whose children it knows; more change nothing up to 64 nodes
HIDDEN_ROWS = 8  # tokens of a depth after which a hidden correction guesses on; what follows others is not guessed
PATH_ROWS = 4  # partial paths per depth that joint="paths" follows in a dynamic tree
BENCH_MODES = ("plain", "chain", "fixed", "dynamic", "auto", "pruned", "ngrams", "dynamic+ngrams", "auto+ngrams")


def setting(default: Any, text: str, metavar: str | None = None) -> Any:
    """A field of options with its help."""
    return field(default=default, metadata={"help": text, "metavar": metavar})


def named(meanings: dict[str, str]) -> str:
    """Names and their meanings in a line."""
    return ", ".join(f"{name} ({meaning})" for name, meaning in meanings.items())


@dataclass(frozen=True, kw_only=True)
class DecoderOptions:
    """How a `Decoder` drafts and verifies. The field docs are the help of the command line."""

    tree: str = setting("dynamic", named(TREES) + ", or a file with a tree in MEDUSA's, SGLang's or EAGLE's notation")
    budget: int | str = setting(
        "auto",
        "nodes verified per step and sequence, root included; auto chooses at each step what pays, and is the size of "
        "a fixed tree",
    )
    num_candidates: int = setting(32, "candidates kept per head and step; ranks of a fixed tree must be below it")
    joint: str = setting(
        "auto",
        "how the heads' guesses are joined to paths: product (each head by itself), markov or hidden (corrected by the "
        "token before, as the heads were trained for), paths (each guess after the path so far, of heads that read it; "
        f"in dynamic trees after the {PATH_ROWS} best paths of each depth, or as many as paths:16 says), or auto (one "
        "of the latter three for heads that were made for it)",
    )
    prune: str = setting(
        "off",
        "drop unlikely nodes in the middle of the model's layers: off, auto (as `ladon calibrate --pruning` found to "
        "pay for these heads; off where it found nothing), or the layer after which it is done and the nodes that go "
        "on, such as 4:16",
    )
    accept: str = setting(
        "exact",
        f"which drafted tokens are kept: {named(ACCEPT)}; the last two are not exact where tokens are sampled: the "
        "text then leaves the model's distribution",
    )
    ngrams: str = setting("auto", "; ".join(f"{name}: {meaning}" for name, meaning in NGRAMS.items()))

    def __post_init__(self) -> None:
        """Raise `TreeError` for n-grams that are no option, or a number of candidates that is none of 1 or more."""
        if self.ngrams not in NGRAMS:
            names = ", ".join(f'"{name}"' for name in NGRAMS)
            raise TreeError(f"ngrams is {self.ngrams!r}; give {names}")
        count = self.num_candidates
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise TreeError(f"num_candidates is {count!r}; give how many candidates to keep per head, 1 or more")


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """What a benchmark runs. The field docs are the help of the command line."""

    modes: tuple[str, ...] = setting(
        ("plain", "chain", "fixed", "dynamic", "auto"),
        "some of plain, chain, fixed, dynamic (trees of --budget nodes), auto (a dynamic tree, its size chosen at each "
        "step), pruned (auto with early pruning), ngrams (auto without heads), dynamic+ngrams and auto+ngrams (n-grams "
        "merged in); plain always runs, for comparison",
    )
    budgets: tuple[int, ...] = setting((AUTO_BUDGET,), "nodes per step and sequence, root included; several: 8,16,32")
    batches: tuple[int, ...] = setting((1,), "prompts decoded together; several: 1,4")
    max_new_tokens: int = setting(128, "tokens per answer at most")
    repeats: int = setting(3, "timed runs of each prompt and mode; medians are reported")
    prune: str = setting(
        "auto", "how mode pruned prunes: auto, or a layer and the nodes that are kept after it, such as 4:16"
    )
    diagnose: bool = setting(
        False,
        "also decode once more, untimed, to see where tokens are lost: whether the truth is in the lattice and in the "
        "tree, whether it is accepted, and how true the heads' probabilities are; not with n-grams",
    )


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How tokens are drawn. The field docs are the help of the command line."""

    temperature: float = setting(0.0, "0 is greedy; above it, answers are sampled")
    top_p: float = setting(1.0, "sample from the likeliest tokens with this total probability")
    top_k: int = setting(0, "sample from this many likeliest tokens; 0 for no bound")
    seed: int = setting(0, "of the noise; each sequence gets one of its own, made from it")


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(SamplingOptions):
    """How prompts are answered on the command line. The field docs are its help."""

    batch: int = setting(8, "prompts answered together at most; the others wait for a place")


@dataclass(frozen=True, kw_only=True)
class ChatOptions(SamplingOptions):
    """How a chat is held on the command line. The field docs are its help."""

    max_new_tokens: int = setting(256, "tokens per answer at most")


@dataclass(frozen=True, kw_only=True)
class DistillOptions(SamplingOptions):
    """How answers are written for training. The field docs are the help of the command line."""

    batch: int = setting(16, "prompts answered together")
    max_new_tokens: int = setting(512, "tokens per answer at most")
    concurrency: int = setting(16, "requests to the endpoint at a time")


def help_of(options: type[Any], name: str) -> str:
    """The help text of one field."""
    return str({option.name: option.metadata["help"] for option in fields(options)}[name])
