"""`ladon trace`: look at the tree of every step."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from ladon.cli import options
from ladon.cli.options import OUTPUT, WHAT, option
from ladon.cli.output import check_writable, print_json, say, show, write_whole
from ladon.cli.prompts import encode, read_prompt
from ladon.config import PICTURE_STEPS

if TYPE_CHECKING:
    from ladon.viz.record import Record


@options.command(without=("prune", "accept", "joint"))
def trace(
    *,
    target: options.Target,
    prompt: str | None = option(WHAT, None, "TEXT", "The text to continue."),
    prompt_file: Path | None = options.PROMPT_FILE,
    max_new_tokens: int = options.new_tokens(32),
    drafting: options.Drafting,
    html: Path | None = option(OUTPUT, None, "FILE", "Write one self-contained web page instead."),
    png: Path | None = option(
        OUTPUT,
        None,
        "FILE",
        f"Write a picture instead, of {PICTURE_STEPS} steps at most; it says so if there are more.",
    ),
    png_steps: int = option(
        OUTPUT, PICTURE_STEPS, "N", "How many steps the picture shows at most.", min=1, max=PICTURE_STEPS
    ),
    as_json: bool = options.JSON,
) -> None:
    """Show every step's tree with its probabilities, the accepted path, the bonus token and the attention mask.

    In the terminal unless a file is asked for.

    For example:

        ladon trace --prompt "import os" --max-new-tokens 24
        ladon trace --prompt "for line in lines:" --budget 32 --html trace.html
    """
    text, for_decoder = read_prompt(prompt, prompt_file), drafting.for_decoder()
    check_writable(html)
    check_writable(png)
    from ladon.cli.loading import dtype_name, load
    from ladon.viz import png as picture
    from ladon.viz.record import record
    from ladon.viz.terminal import run_view

    if png is not None:
        picture.check_available()
    loaded = load(target)
    decoder = loaded.decoder(**for_decoder)
    ids = encode(loaded.tokenizer, text)
    found = decoder.trace(ids.to(loaded.model.device), max_new_tokens=max_new_tokens)
    steps = list(found)
    title = f"{loaded.name} · tree {drafting.tree} · budget {drafting.budget} · {dtype_name(loaded.model)}"
    run = record(loaded.tokenizer, ids.tolist(), found.first, steps, title=title)
    if html is not None or png is not None:
        _write_files(run, html, png, png_steps)
    elif not as_json:
        show(run_view(run))
    if as_json:
        length = run.acceptance_length if run.steps else None
        document = {"prompt": run.prompt, "first_token": found.first, "acceptance_length": length}
        print_json(document | {"steps": [_finite(asdict(step)) for step in steps]})


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


def _finite(step: dict[str, object]) -> dict[str, object]:
    """JSON has no -inf, the log-probability of padding slots: None there."""
    values = step["log_probs"]
    assert isinstance(values, list)
    return step | {"log_probs": [None if value == float("-inf") else value for value in values]}
