"""`ladon verify`: does this model say the same with trees as without?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from typer import Exit

from ladon.cli import options
from ladon.cli.options import DRAFT, WHAT, option
from ladon.cli.output import OutConsole, print_json, progress_bar
from ladon.cli.prompts import asked_of
from ladon.errors import InputError
from ladon.util.files import finite

if TYPE_CHECKING:
    from ladon.bench.quality.verification import Distance, Verdict
    from ladon.sampling.lossy import Nucleus, Typical

_DIFFERENT = 1  # exit code
_SHOWN = 5  # differences of each way to choose tokens


@options.command(
    without=("accept", "joint"),
    temperature=option(WHAT, 1.0, "T", "Of the sampled answers, which are compared besides the greedy."),
)
def verify(
    *,
    target: options.Target,
    prompts: str | None = option(
        WHAT,
        None,
        "FILE",
        "JSONL or Parquet with `prompt` or `messages`, or a data set's name; the bundled model brings its own.",
    ),
    limit: int = option(WHAT, 20, "N", "Use only the first so many prompts.", min=1),
    batch: int = option(WHAT, 4, "N", "Prompts that trees answer together.", min=1),
    max_new_tokens: int = option(WHAT, 64, "N", "Tokens of each answer at most.", min=1),
    drafting: options.Drafting,
    sampling: options.Sampling,
    accept: list[str] | None = option(
        DRAFT,
        None,
        "RULE",
        "Also measure how far this lossy rule leaves the model's distribution: typical, nucleus, or with settings "
        "as typical:epsilon=0.2,delta=0.5; several: give it several times. It changes no exit code.",
    ),
    as_json: bool = options.JSON,
) -> None:
    """Prove on your own prompts that trees change nothing: greedy, sampled, and run to run.

    Plain decoding answers every prompt alone; trees answer them together, greedily and sampled with the same seeds. In
    float64 nothing may differ; else where two tokens are as good as equal (closer than rounding), either may win, and
    each such place is shown. Then two deterministic runs are compared step by step. The exit code is 1 if anything
    differs that rounding does not explain.

    With --accept the sampled answers are also written by rules that are lossy by name, and their distance from the
    model's distribution is reported: total variation per token, beside the acceptance length they gain.

    For example:

        ladon verify --limit 4 --max-new-tokens 24
        ladon verify --limit 4 --max-new-tokens 24 --temperature 0.7 --accept typical --accept nucleus
        ladon verify --model path/to/model --heads path/to/heads --prompts prompts.jsonl --dtype float32
    """
    for_decoder, rules = drafting.for_decoder(), _rules(accept or [])
    import torch

    from ladon.bench.quality.verification import Proof
    from ladon.cli.loading import dtype_name, load

    sampled = sampling.for_generate()
    if sampling.temperature == 0:
        raise InputError("--temperature is 0, which is greedy decoding, and that is compared anyway; give one above it")
    tree = {name: for_decoder[name] for name in ("tree", "budget", "prune", "ngrams")}
    loaded = load(target)
    loaded.require_heads(tree["tree"], drafting.ngrams)
    name, ids = asked_of(loaded, prompts, limit)
    sizes: dict[str, Any] = {"batch": batch, "max_new_tokens": max_new_tokens}
    asked = [torch.tensor(one, device=loaded.model.device) for one in ids]
    with progress_bar() as progress:
        proof = Proof(model=loaded.model, heads=loaded.heads, prompts=asked, tree=tree, progress=progress, **sizes)
        greedy, drawn = proof.verdict("greedy", {"do_sample": False}), proof.verdict("sampled", sampled)
        distances = [proof.distance(sampled, rule) for rule in rules]
    repeatable = proof.is_repeatable()
    _show((greedy, drawn), distances, is_repeatable=repeatable)
    if as_json:
        document = {"laws": [_json(greedy), _json(drawn)], "repeatable": repeatable, "prompts": name, **sizes}
        document |= {"lossy": [_distance_json(distance, drawn) for distance in distances], "sampling": sampled}
        print_json(document | {"dtype": dtype_name(loaded.model), "tree": tree | {"tree": drafting.tree}})
    if not (repeatable and greedy.is_exact and drawn.is_exact):
        raise Exit(_DIFFERENT)


def _rules(texts: Sequence[str]) -> list[Typical | Nucleus]:
    """The lossy rules that are named; `InputError` for what is none."""
    from ladon.sampling.lossy import parsed_rule

    rules = [parsed_rule(text) for text in texts]
    if None in rules:
        raise InputError("--accept exact is what is verified anyway; give typical or nucleus, or leave it out")
    return [rule for rule in rules if rule is not None]


def _show(verdicts: Sequence[Verdict], distances: Sequence[Distance], *, is_repeatable: bool) -> None:
    """The outcome, for people."""
    lines = [line for verdict in verdicts for line in _lines(verdict)]
    lines.append(f"deterministic: two runs {'took the same steps' if is_repeatable else 'DIFFER'}")
    for distance in distances:
        settings = ", ".join(f"{name} {value:g}" for name, value in distance.settings.items())
        lines.append(
            f"{distance.accept} ({settings}): NOT exact, total variation {distance.total_variation:.3f} per token, "
            f"{distance.acceptance_length:.2f} per step for {verdicts[-1].acceptance_length:.2f}"
        )
    console = OutConsole(highlight=False, soft_wrap=True)
    for line in lines:
        console.print(line, markup=False)


def _lines(verdict: Verdict) -> list[str]:
    """What came of greedy or of sampled answers."""
    same = verdict.prompts - len(verdict.differences)
    found = [
        f"{verdict.law}: {same} of {verdict.prompts} answers identical, {verdict.tokens} tokens, "
        f"{verdict.acceptance_length:.2f} per step with trees"
    ]
    for difference in verdict.differences[:_SHOWN]:
        kind = "a near-tie" if difference.is_near_tie else "A REAL DIFFERENCE"
        found.append(
            f"  prompt {difference.prompt + 1}, new token {difference.position + 1}: {kind} (the scores of the two "
            f"tokens and the best lie within {difference.margin:.2g}; rounding explains {difference.bound:.2g})"
        )
    if len(verdict.differences) > _SHOWN:
        found.append(f"  and {len(verdict.differences) - _SHOWN} more")
    return found


def _json(verdict: Verdict) -> dict[str, Any]:
    counts = {name: getattr(verdict, name) for name in ("law", "prompts", "tokens", "near_ties")}
    differences = [
        {"prompt": each.prompt, "position": each.position, "margin": finite(each.margin), "bound": each.bound}
        | {"near_tie": each.is_near_tie}
        for each in verdict.differences
    ]
    length = finite(verdict.acceptance_length)
    return counts | {"acceptance_length": length, "exact": verdict.is_exact, "differences": differences}


def _distance_json(distance: Distance, exact: Verdict) -> dict[str, Any]:
    lengths = {"acceptance_length": distance.acceptance_length, "exact_acceptance_length": exact.acceptance_length}
    return asdict(distance) | {name: finite(length) for name, length in lengths.items()}
