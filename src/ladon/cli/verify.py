"""`ladon verify`: does this model say the same with trees as without?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from typer import Exit, Option

from ladon.cli import options
from ladon.cli.output import OutConsole, print_json, progress_bar
from ladon.cli.prompts import asked_of
from ladon.config import DecoderOptions, SamplingOptions
from ladon.errors import InputError

if TYPE_CHECKING:
    from ladon.bench.quality.verification import Distance, Verdict
    from ladon.sampling.lossy import Nucleus, Typical

_DEFAULTS, _SAMPLING = DecoderOptions(), SamplingOptions()
_DIFFERENT = 1  # exit code
_SHOWN = 5  # differences of a law

_PromptsOption = Annotated[
    str | None,
    Option(
        "--prompts",
        metavar="FILE",
        help="JSONL or Parquet with `prompt` or `messages`, or a data set's name; the bundled model brings its own.",
    ),
]
_LimitOption = Annotated[int, Option("--limit", metavar="N", min=1, help="Use only the first so many prompts.")]
_BatchOption = Annotated[int, Option("--batch", metavar="N", min=1, help="Prompts that trees answer together.")]
_NewTokensOption = Annotated[int, Option("--max-new-tokens", metavar="N", min=1, help="Tokens of each answer at most.")]
_TemperatureOption = Annotated[
    float, Option("--temperature", metavar="T", help="Of the sampled answers, which are compared besides the greedy.")
]

_AcceptOption = Annotated[
    list[str] | None,
    Option(
        "--accept",
        metavar="RULE",
        help="Also measure how far this lossy rule leaves the model's law: typical, nucleus, or with settings as "
        "typical:epsilon=0.2,delta=0.5; several: give it several times. It changes no exit code.",
    ),
]


def verify(
    model: options.ModelOption = "demo",
    heads: options.HeadsOption = None,
    prompts: _PromptsOption = None,
    limit: _LimitOption = 20,
    batch: _BatchOption = 4,
    max_new_tokens: _NewTokensOption = 64,
    tree: options.TreeOption = _DEFAULTS.tree,
    budget: options.BudgetOption = str(_DEFAULTS.budget),
    prune: options.PruneOption = _DEFAULTS.prune,
    ngrams: options.NgramsOption = _DEFAULTS.ngrams,
    temperature: _TemperatureOption = 1.0,
    top_p: options.TopPOption = _SAMPLING.top_p,
    top_k: options.TopKOption = _SAMPLING.top_k,
    seed: options.SeedOption = _SAMPLING.seed,
    accept: _AcceptOption = None,
    dtype: options.DtypeOption = "auto",
    device: options.DeviceOption = "auto",
    threads: options.ThreadsOption = None,
    trust_remote_code: options.TrustOption = False,
    ignore_generation_config: options.IgnoreConfigOption = False,
    as_json: options.JsonOption = False,
) -> None:
    """Prove on your own prompts that trees change nothing: greedy, sampled, and run to run.

    Plain decoding answers every prompt alone; trees answer them together, greedily and sampled with the same seeds. In
    float64 nothing may differ; else where two tokens are as good as equal (closer than rounding), either may win, and
    each such place is shown. Then two deterministic runs are compared step by step. The exit code is 1 if anything
    differs that rounding does not explain.

    With --accept the sampled answers are also written by rules that are lossy by name, and their distance from the
    model's law is reported: total variation per token, beside the acceptance length they gain.

    For example:

        ladon verify --limit 4 --max-new-tokens 24
        ladon verify --limit 4 --max-new-tokens 24 --temperature 0.7 --accept typical --accept nucleus
        ladon verify --model path/to/model --heads path/to/heads --prompts prompts.jsonl --dtype float32
    """
    nodes, shape = options.parse_budget(budget), options.parse_tree(tree)
    rules = _rules(accept or [])
    import torch

    from ladon.bench.quality.verification import distance_of, is_repeatable, verify_law
    from ladon.cli.loading import dtype_name, load, require_heads

    drawn = options.sampling(temperature, top_k, top_p, seed)
    if temperature == 0:
        raise InputError("--temperature is 0, which is greedy decoding, and that is compared anyway; give one above it")
    loaded = load(
        model,
        heads,
        dtype=dtype,
        device=device,
        threads=threads,
        trust_remote_code=trust_remote_code,
        ignore_generation_config=ignore_generation_config,
    )
    require_heads(loaded, shape, ngrams)
    name, ids = asked_of(loaded, prompts, limit)
    asked = [torch.tensor(one, device=loaded.model.device) for one in ids]
    laws: dict[str, dict[str, Any]] = {"greedy": {"do_sample": False}, "sampled": drawn}
    common: dict[str, Any] = {"batch": batch, "max_new_tokens": max_new_tokens}
    common["tree"] = {"tree": shape, "budget": nodes, "prune": prune, "ngrams": ngrams}
    with progress_bar() as progress:
        verdicts = [
            verify_law(loaded.model, loaded.heads, asked, law, name=named, progress=progress, **common)
            for named, law in laws.items()
        ]
        distances = [
            distance_of(loaded.model, loaded.heads, asked, drawn, rule, progress=progress, **common) for rule in rules
        ]
    repeatable = is_repeatable(loaded.model, loaded.heads, asked, **common)
    console = OutConsole(highlight=False, soft_wrap=True)
    for line in (line for verdict in verdicts for line in _lines(verdict)):
        console.print(line, markup=False)
    console.print(f"deterministic: two runs {'took the same steps' if repeatable else 'DIFFER'}", markup=False)
    for distance in distances:
        console.print(_distance_line(distance, verdicts[-1]), markup=False)
    if as_json:
        document = {"laws": [_json(verdict) for verdict in verdicts], "repeatable": repeatable}
        document["lossy"] = [_distance_json(distance, verdicts[-1]) for distance in distances]
        print_json({**document, "prompts": name, "dtype": dtype_name(loaded.model), **common, "sampling": drawn})
    if not (repeatable and all(verdict.is_exact for verdict in verdicts)):
        raise Exit(_DIFFERENT)


def _lines(verdict: Verdict) -> list[str]:
    """A law's outcome for people."""
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


def _rules(texts: Sequence[str]) -> list[Typical | Nucleus]:
    """The lossy rules that are named; `InputError` for what is none."""
    from ladon.sampling.lossy import parsed_rule

    rules = [parsed_rule(text) for text in texts]
    if None in rules:
        raise InputError("--accept exact is what is verified anyway; give typical or nucleus, or leave it out")
    return [rule for rule in rules if rule is not None]


def _distance_line(distance: Distance, exact: Verdict) -> str:
    settings = ", ".join(f"{name} {value:g}" for name, value in distance.settings.items())
    return (
        f"{distance.accept} ({settings}): NOT exact, total variation {distance.total_variation:.3f} per token, "
        f"{distance.acceptance_length:.2f} per step for {exact.acceptance_length:.2f}"
    )


def _distance_json(distance: Distance, exact: Verdict) -> dict[str, Any]:
    from dataclasses import asdict

    from ladon.bench.report import finite

    lengths = {"acceptance_length": distance.acceptance_length, "exact_acceptance_length": exact.acceptance_length}
    return asdict(distance) | {name: finite(length) for name, length in lengths.items()}


def _json(verdict: Verdict) -> dict[str, Any]:
    from ladon.bench.report import finite

    return {
        "law": verdict.law,
        "prompts": verdict.prompts,
        "tokens": verdict.tokens,
        "acceptance_length": finite(verdict.acceptance_length),
        "exact": verdict.is_exact,
        "near_ties": verdict.near_ties,
        "differences": [
            {
                "prompt": difference.prompt,
                "position": difference.position,
                "margin": finite(difference.margin),
                "bound": difference.bound,
                "near_tie": difference.is_near_tie,
            }
            for difference in verdict.differences
        ],
    }
