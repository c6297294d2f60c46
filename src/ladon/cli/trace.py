"""`ladon trace`: look at the tree of every step."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from ladon.cli import options
from ladon.cli.output import OutConsole, check_writable, print_json, say, write_whole
from ladon.cli.prompts import encode, read_prompt
from ladon.config import PICTURE_STEPS, DecoderOptions

if TYPE_CHECKING:
    from ladon.viz.record import Record

_DEFAULTS = DecoderOptions()
_HtmlOption = Annotated[
    Path | None, Option("--html", metavar="FILE", help="Write one self-contained web page instead.")
]
_PngOption = Annotated[
    Path | None,
    Option(
        "--png",
        metavar="FILE",
        help=f"Write a picture instead, of {PICTURE_STEPS} steps at most; it says so if there are more.",
    ),
]
_PngStepsOption = Annotated[
    int,
    Option("--png-steps", metavar="N", min=1, max=PICTURE_STEPS, help="How many steps the picture shows at most."),
]


def trace(
    prompt: options.PromptOption = None,
    prompt_file: options.PromptFileOption = None,
    model: options.ModelOption = "demo",
    heads: options.HeadsOption = None,
    max_new_tokens: options.NewTokensOption = 32,
    tree: options.TreeOption = _DEFAULTS.tree,
    budget: options.BudgetOption = str(_DEFAULTS.budget),
    ngrams: options.NgramsOption = _DEFAULTS.ngrams,
    html: _HtmlOption = None,
    png: _PngOption = None,
    png_steps: _PngStepsOption = PICTURE_STEPS,
    dtype: options.DtypeOption = "auto",
    device: options.DeviceOption = "auto",
    threads: options.ThreadsOption = None,
    trust_remote_code: options.TrustOption = False,
    ignore_generation_config: options.IgnoreConfigOption = False,
    as_json: options.JsonOption = False,
) -> None:
    """Show every step's tree with its probabilities, the accepted path, the bonus token and the attention mask.

    In the terminal unless a file is asked for.

    For example:

        ladon trace --prompt "import os" --max-new-tokens 24
        ladon trace --prompt "for line in lines:" --budget 32 --html trace.html
    """
    text, nodes, shape = read_prompt(prompt, prompt_file), options.parse_budget(budget), options.parse_tree(tree)
    check_writable(html)
    check_writable(png)
    from ladon.cli.loading import dtype_name, load, require_heads
    from ladon.decoder.decoder import Decoder
    from ladon.viz import png as picture
    from ladon.viz.record import record

    if png is not None:
        picture.check_available()
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
    decoder = Decoder(loaded.model, loaded.heads, tree=shape, budget=nodes, ngrams=ngrams)
    ids = encode(loaded.tokenizer, text)
    found = decoder.trace(ids.to(loaded.model.device), max_new_tokens=max_new_tokens)
    steps = list(found)
    title = f"{loaded.name} · tree {tree} · budget {budget} · {dtype_name(loaded.model)}"
    run = record(loaded.tokenizer, ids.tolist(), found.first, steps, title=title)
    if html is not None or png is not None:
        _write_files(run, html, png, png_steps)
    elif not as_json:
        _print_steps(run)
    if as_json:
        print_json(
            {
                "prompt": run.prompt,
                "first_token": found.first,
                "acceptance_length": run.acceptance_length if run.steps else None,
                "steps": [_finite(asdict(step)) for step in steps],
            }
        )


def _write_files(run: Record, html: Path | None, png: Path | None, png_steps: int) -> None:
    """The page and the picture that were asked for; both are made before one is written."""
    from ladon.viz import html as web
    from ladon.viz import png as picture

    files: list[tuple[Path, bytes, int]] = []
    if html is not None:
        files.append((html, web.page(run).encode(), len(run.steps)))
    if png is not None:
        files.append((png, picture.png(run, png_steps), min(png_steps, len(run.steps))))
    for path, data, shown in files:
        write_whole(path, data)
        say(f"wrote {path}: {shown} of {len(run.steps)} steps")


def _print_steps(run: Record) -> None:
    from ladon.viz.terminal import run_view

    console = OutConsole(highlight=False)
    for part in run_view(run):
        console.print(part)


def _finite(step: dict[str, object]) -> dict[str, object]:
    """JSON has no -inf, the log-probability of padding slots: None there."""
    values = step["log_probs"]
    assert isinstance(values, list)
    return step | {"log_probs": [None if value == float("-inf") else value for value in values]}
