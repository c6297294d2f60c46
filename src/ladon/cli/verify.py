"""`ladon verify`: does this model say the same with trees as without?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from typer import Exit, Option

from ladon.cli import options
from ladon.cli.output import OutConsole, print_json, progress_bar
from ladon.cli.prompts import asked_of
from ladon.config import DecoderOptions, SamplingOptions
from ladon.errors import InputError

if TYPE_CHECKING:
    from ladon.bench.verification import Verdict

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

    For example:

        ladon verify --limit 4 --max-new-tokens 24
        ladon verify --model path/to/model --heads path/to/heads --prompts prompts.jsonl --dtype float32
    """
    nodes, shape = options.parse_budget(budget), options.parse_tree(tree)
    import torch

    from ladon.bench.verification import is_repeatable, verify_law
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
    repeatable = is_repeatable(loaded.model, loaded.heads, asked, **common)
    console = OutConsole(highlight=False, soft_wrap=True)
    for line in (line for verdict in verdicts for line in _lines(verdict)):
        console.print(line, markup=False)
    console.print(f"deterministic: two runs {'took the same steps' if repeatable else 'DIFFER'}", markup=False)
    if as_json:
        document = {"laws": [_json(verdict) for verdict in verdicts], "repeatable": repeatable}
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
