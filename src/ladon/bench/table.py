"""What people see of the results: the table, and the lines that belong to it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from ladon.bench.findings import Difference, Findings, Key
from ladon.bench.systems import Budget

Row = Mapping[str, Any]  # a result of the document, as `ladon.bench.report.results` defines it
_COLUMNS: tuple[str, ...] = ("nodes", "tokens\n/step", "not re-\npeated", "tokens\n/s", "vs\nplain", "trans-\nformers")
_COLUMNS += ("step\nms", "model\nms", "over-\nhead")
_STYLE: dict[str, Any] = {"header_style": "dim", "pad_edge": False, "box": None, "padding": (0, 1, 0, 0)}
_IDENTICAL = {True: "yes", False: "[bold red]NO[/]", None: "?"}


def parts(document: Mapping[str, Any], findings: Findings) -> Iterator[RenderableType]:
    """A measurement for people, part by part: a title, the tables, and what has to be said about them."""
    found, place, repeats = document["results"], document["environment"], document["repeats"]
    yield Text(
        f"{document['model']} · {document['dtype']} · {several(found[0]['prompts'], 'prompt')} of "
        f"{document['workload']['name']} · up to {document['max_new_tokens']} tokens · {several(repeats, 'repeat')} · "
        f"{several(place['threads'], 'thread')} · {place['cpu']}",
        "bold",
    )
    for batch in dict.fromkeys(result["batch"] for result in found):
        yield table(found, document["transformers"], batch)
    if findings.diagnoses:
        yield diagnosis_table(found)
    yield Text("\n".join([identity_line(found, findings.unchecked), *plain_lines(found)]), "bold")
    notes = [*diagnosis_lines(found), repetition_line(found), profile_line(found), *size_lines(found)]
    notes += [*filling_lines(found), *difference_lines(findings, document["dtype"])]
    yield Text("\n".join(notes), "dim")


def several(count: int, noun: str) -> str:
    """A number of things in words."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def table(results: Sequence[Row], baselines: Sequence[dict[str, Any]], batch: int) -> Table:
    """The comparison at one batch size, for people: 78 columns wide, transformers first, the fastest in bold."""
    view = Table(**_STYLE)
    view.add_column("mode" if batch == 1 else f"mode\n(batch {batch})", no_wrap=True)
    for name in _COLUMNS:
        view.add_column(name, justify="right", no_wrap=True)
    view.add_column("iden-\ntical", no_wrap=True)
    chosen = [result for result in results if result["batch"] == batch]
    base = next(base for base in baselines if base["batch"] == batch)
    plain = next(result for result in chosen if result["mode"] == "plain")
    ratio = None if plain["speedup_vs_transformers"] is None else 1 / plain["speedup_vs_transformers"]
    speed, step_ms = _number(base["tokens_per_second"], 1), _number(base["step_ms"], 2)
    view.add_row("transformers", "1", "1.00", "", speed, _times(ratio), "1.00x", step_ms, style="dim")
    best = max(chosen, key=lambda result: result["tokens_per_second"] or 0.0)
    for result in chosen:
        view.add_row(
            result["mode"],
            _nodes(result),
            _number(result["acceptance_length"], 2),
            _number(result["acceptance_length_non_repeated"], 2),
            _number(result["tokens_per_second"], 1),
            _times(result["speedup_vs_plain"]),
            _times(result["speedup_vs_transformers"]),
            _number(result["step_ms"], 2),
            _number(result["forward_ms"], 2),
            "" if result["overhead"] is None else f"{result['overhead']:.1%}",
            _IDENTICAL[result["identical"]],
            style="bold" if result is best else "",
        )
    return view


def diagnosis_table(results: Sequence[Row]) -> Table:
    """Where each mode loses tokens, per row-step, for those that were looked at."""
    view = Table(**_STYLE)
    view.title, view.title_justify = "where tokens are lost (drafts per row-step)", "left"
    view.add_column("mode", no_wrap=True)
    names = ("known", "oracle", "selected", "accepted", "top")
    for name in ("batch", "nodes", *names[:-1], "top-1", "calibration error\nby depth, best"):
        view.add_column(name, justify="right", no_wrap=True)
    for result in results:
        found = result["diagnosis"]
        if found is not None:
            errors = " ".join("-" if error is None else f"{100 * error:.1f}" for error in found["error"]["top"])
            means = (_number(found[name]["mean"], 2) for name in names)
            view.add_row(result["mode"], str(result["batch"]), _nodes(result), *means, f"{errors} %" if errors else "")
    return view


def diagnosis_lines(results: Sequence[Row]) -> list[str]:
    """What the differences between its columns mean; none if nothing was looked at."""
    found = [result["diagnosis"] for result in results if result["diagnosis"] is not None]
    if not found:
        return []
    undrafted = sum(diagnosis["undrafted"] for diagnosis in found)
    left_out = f"; {undrafted} row-steps without a tree are left out" if undrafted else ""
    return [
        "known - oracle: the truth is no candidate (coverage); oracle - selected: it is outside the tree (ranking); "
        f"selected - accepted: the tree was cut or pruned; top-1: the chain{left_out}"
    ]


def identity_line(results: Sequence[Row], unchecked: str | None) -> str:
    """Whether every mode wrote what transformers writes; `unchecked` is why that may be unknown."""
    wrong = ", ".join(_named(result["mode"], result["budget"]) for result in results if result["identical"] is False)
    if wrong:
        return f"identical: NO ({wrong} left transformers' generate in float32)"
    if unchecked is not None:
        return f"identical: not known, the check in float32 could not be made ({unchecked})"
    ties = sum(result["float32_near_ties"] or 0 for result in results)
    aside = f", {ties} near-ties aside" if ties else ""
    prompts = several(results[0]["prompts"], "prompt")
    return f"identical: yes (each mode against transformers' generate, float32, {prompts}{aside})"


def plain_lines(results: Sequence[Row]) -> list[str]:
    """How plain decoding, which the others are compared with, compares with transformers' `generate`: one line."""
    ratios = {
        result["batch"]: result["speedup_vs_transformers"]
        for result in results
        if result["mode"] == "plain" and result["speedup_vs_transformers"] is not None
    }
    if not ratios:
        return []
    shown = [f"{ratio:.2f}" + (f" at batch {batch}" if len(ratios) > 1 else "") for batch, ratio in ratios.items()]
    return [f"plain decoding runs at {', '.join(shown)} of the speed of transformers' generate"]


def difference_lines(findings: Findings, dtype: str) -> list[str]:
    """One line per output that left its reference: plain decoding in the timed dtype, `generate` in float32."""
    return [
        *_difference_lines(findings.differences, dtype, "plain decoding"),
        *_difference_lines(findings.float32_differences, "float32", "transformers"),
    ]


def _difference_lines(differences: Mapping[Key, Sequence[Difference]], dtype: str, reference: str) -> list[str]:
    return [
        f"{dtype}, {_named(mode, budget)}, batch {batch}: output {found.prompt} leaves {reference} at token "
        f"{found.position}: margin {found.margin:.1e}, {_explained(found)}"
        for (mode, budget, batch), several in differences.items()
        for found in several
    ]


def _named(mode: str, budget: Budget) -> str:
    """A system in words; "auto" says its budget already."""
    return f"{mode} {budget}" if isinstance(budget, int) else mode


def _explained(found: Difference) -> str:
    logits = "" if found.deviation is None else f"logits differ by {found.deviation:.1e}, "
    return f"{logits}{'near-tie' if found.is_near_tie else 'NOT a near-tie'} (bound {found.bound:.1e})"


def profile_line(results: Sequence[Row]) -> str:
    """Which of the columns are of other runs than the rest, and how far those runs are from the timed ones."""
    ratios = [
        result["profiled_step_ms"] / result["step_ms"]
        for result in results
        if result["profiled_step_ms"] and result["step_ms"]
    ]
    text = "`model ms` and `overhead` are of profiled runs, in turns with the timed ones"
    return f"{text}; their steps took {min(ratios):.2f} to {max(ratios):.2f} times as long" if ratios else text


def size_lines(results: Sequence[Row]) -> list[str]:
    """Of each mode that chooses its sizes: which ones it chose how often, and how well it knew their times."""
    return [_size_line(result) for result in results if not isinstance(result["budget"], int) and result["sizes"]]


def _size_line(result: Row) -> str:
    steps = sum(size["steps"] for size in result["sizes"])
    shares = ", ".join(f"{size['nodes']} ({size['steps'] / steps:.0%})" for size in result["sizes"])
    error = result["prediction_error"]
    off = "" if error is None else f"; its steps took {error:.1%} more or less than predicted"
    return f"{result['mode']}, batch {result['batch']}, nodes per step: {shares}{off}"


def filling_lines(results: Sequence[Row]) -> list[str]:
    """Which batch sizes were not full all the time: one line, or none."""
    plain = {result["batch"]: result["rows_per_step"] for result in results if result["mode"] == "plain"}
    short = [f"batch {batch} had {rows:.1f}" for batch, rows in plain.items() if rows is not None and rows < batch]
    if not short:
        return []
    why = "groups hold one category's prompts, and answers end apart"
    return [f"rows in a plain step, on average: {', '.join(short)} ({why})"]


def repetition_line(results: Sequence[Row]) -> str:
    """What share of the text repeats itself, and what the middle column of the table is."""
    plain = next(result for result in results if result["mode"] == "plain")
    if plain["repeated_share"] is None:
        return "not repeated: needs batch 1 and outputs of 8 tokens or more"
    return (
        f"{plain['repeated_share']:.0%} of the 8-grams written occurred before in the same answer; the column `not "
        "repeated` counts only steps without such"
    )


def _nodes(result: Row) -> str:
    return str(result["budget"]) if isinstance(result["budget"], int) else _number(result["nodes_per_step"], 1)


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"
