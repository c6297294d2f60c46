"""A benchmark's document as pictures (matplotlib, from the `bench` extra).

Nothing is drawn that is not in the document, so that pictures of kept results can be made again.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DPI = 150
_MOST_COLUMNS = 3
_STYLES = ("-", "--", ":", "-.")  # of several budgets of one mode
_GRID = "#d8dbe0"
_EXPECTED = "#33373d"
_FIT_BEYOND = 2  # a fit is drawn up to so many times the largest size that was run: sizes beyond would hide the rest
_AREA, _LEAST_AREA = 120.0, 6.0  # square points of a dot that stands for all steps, and of one for hardly any
Row = Mapping[str, Any]
_MODES = {
    "plain": "#6b7280",
    "transformers": "#a3a9b3",
    "chain": "#2b8cbe",
    "fixed": "#b5563c",
    "dynamic": "#2f9e77",
    "auto": "#5b3fa8",
    "pruned": "#c2447f",
    "ngrams": "#8a6d1d",
    "dynamic+ngrams": "#1b6ca8",
    "auto+ngrams": "#241a52",
}


def pictures(document: Mapping[str, Any]) -> dict[str, bytes]:
    """PNG files by name: those for which the document of `ladon bench` has the numbers.

    - speedup.png: speed-up over plain decoding against the batch, a line per mode and budget.
    - tokens-per-step.png: expected and real tokens per row-step by the size chosen, for modes that choose.
    - step-times.png: time of a step against its nodes, measured and as predicted, for each batch.
    """
    results: Sequence[Row] = document["results"]
    found = {"speedup.png": _speedups(results, _title(document))}
    choosing = [result for result in results if not isinstance(result["budget"], int) and result["sizes"]]
    if any(size["expected_tokens"] is not None for result in choosing for size in result["sizes"]):
        found["tokens-per-step.png"] = _tokens(choosing, _title(document))
    if any(result["sizes"] for result in results):
        found["step-times.png"] = _step_times(results, _title(document))
    return {name: _png(figure) for name, figure in found.items()}


def _title(document: Mapping[str, Any]) -> str:
    """Model and machine in one line."""
    place = document["environment"]
    threads = f"{place['threads']} thread" + ("s" if place["threads"] != 1 else "")
    where = f"{place['cpu']}, {threads}" if place["device"] == "cpu" else place["device"]
    return f"{document['model']} · {document['dtype']} · {where}"


def _speedups(results: Sequence[Row], title: str) -> Figure:
    figure, (axes,) = _figure(1, f"Speed-up over plain decoding\n{title}", width=6.6)
    batches = sorted({result["batch"] for result in results})
    axes.axhline(1.0, color=mode_colour("plain"), lw=1.2)
    place: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "va": "center"}
    axes.annotate("plain", (1.0, 1.0), xytext=(4, 0), fontsize=8, color=mode_colour("plain"), **place)
    of_plain = {r["batch"]: r["speedup_vs_transformers"] for r in results if r["mode"] == "plain"}
    generate = [(batch, 1 / ratio) for batch, ratio in sorted(of_plain.items()) if ratio]
    _line(axes, generate, "transformers' generate", mode_colour("transformers"), ":")
    budgets: dict[str, list[Any]] = {}
    for result in results:
        if result["mode"] != "plain" and result["budget"] not in budgets.setdefault(result["mode"], []):
            budgets[result["mode"]].append(result["budget"])
    for mode, several in budgets.items():
        for number, budget in enumerate(several):
            chosen = [r for r in results if (r["mode"], r["budget"]) == (mode, budget)]
            points = [(r["batch"], r["speedup_vs_plain"]) for r in chosen if r["speedup_vs_plain"] is not None]
            name = f"{mode}, {budget} nodes" if isinstance(budget, int) else mode
            _line(axes, sorted(points), name, mode_colour(mode), _STYLES[number % len(_STYLES)])
    _powers(axes, batches, "rows decoded together (batch)")
    axes.set_ylabel("tokens per second, times plain")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8, frameon=False, loc="best", handlelength=3.5)
    return figure


def _line(axes: Axes, points: Sequence[tuple[float, float]], name: str, colour: str, style: str) -> None:
    if points:
        axes.plot(*zip(*points, strict=True), style, color=colour, marker="o", ms=4.5, lw=1.8, label=name)


def _tokens(choosing: Sequence[Row], title: str) -> Figure:
    figure, panels = _figure(len(choosing), f"Tokens per row and step by the size chosen\n{title}")
    for axes, result in zip(panels, choosing, strict=True):
        style: dict[str, Any] = {"color": _EXPECTED, "lw": 1.3, "marker": "_", "ms": 9}
        expected = _known(result["sizes"], "expected_tokens")
        axes.plot(*_columns(expected, "expected_tokens"), "--", label="expected by the heads", **style)
        axes.plot(*_columns(_known(result["sizes"], "tokens"), "tokens"), color=mode_colour(result["mode"]), lw=1.2)
        _dots(axes, result, "tokens", label="real (area: share of the steps)")
        steps = sum(size["steps"] for size in result["sizes"])
        axes.set_title(f"{result['mode']}, batch {result['batch']} ({steps} steps)", fontsize=9)
        _powers(axes, [size["nodes"] for size in result["sizes"]], "nodes verified per row")
        axes.set_ylim(bottom=0.8)
    _shared_labels(figure, panels, "tokens per row and step")
    return figure


def _step_times(results: Sequence[Row], title: str) -> Figure:
    batches = sorted({result["batch"] for result in results if result["sizes"]})
    figure, panels = _figure(len(batches), f"Time of a decode step by its nodes\n{title}")
    for axes, batch in zip(panels, batches, strict=True):
        nodes: set[int] = set()
        for result in results:
            if result["batch"] != batch or not result["sizes"]:
                continue
            most = _FIT_BEYOND * max(size["nodes"] for size in result["sizes"])
            fit = [size for size in result["fitted_step_ms"] if size["nodes"] <= most]
            style: dict[str, Any] = {"color": mode_colour(result["mode"]), "lw": 1.4}
            nodes |= {size["nodes"] for size in [*result["sizes"], *fit]}
            if isinstance(result["budget"], int):
                axes.plot(*_columns(result["sizes"], "step_ms"), "s", mfc="none", ms=8, label=result["mode"], **style)
            else:
                _dots(axes, result, "step_ms", label=f"{result['mode']} (area: share of the steps)")
            if fit:
                axes.plot(*_columns(fit, "ms"), label=f"{result['mode']}: fit", **style)
        axes.set_title(f"batch {batch}", fontsize=9)
        _powers(axes, sorted(nodes), "nodes verified per row")
        axes.set_ylim(bottom=0)
    _shared_labels(figure, panels, "milliseconds per step")
    return figure


def _known(sizes: Sequence[Row], value: str) -> list[Row]:
    """The sizes that have the value."""
    return [size for size in sizes if size[value] is not None]


def _columns(sizes: Sequence[Row], value: str) -> tuple[list[int], list[float]]:
    """Nodes and the value of each size."""
    return [size["nodes"] for size in sizes], [size[value] for size in sizes]


def _dots(axes: Axes, result: Row, value: str, label: str) -> None:
    """A dot for each size that a mode chose, as large as it was frequent."""
    steps = sum(size["steps"] for size in result["sizes"])
    known = _known(result["sizes"], value)
    areas = [_AREA * size["steps"] / steps + _LEAST_AREA for size in known]
    colour = mode_colour(result["mode"])
    axes.scatter(*_columns(known, value), s=areas, color=colour, alpha=0.85, label=label, zorder=3)


def _figure(panels: int, title: str, width: float = 3.6) -> tuple[Figure, list[Axes]]:
    """A figure with so many panels, and those."""
    from matplotlib.figure import Figure

    columns = min(panels, _MOST_COLUMNS)
    rows = math.ceil(panels / columns)
    figure = Figure(figsize=(max(width * columns, 5.2), 3.1 * rows + 1.1), layout="constrained")
    figure.suptitle(title, fontsize=10)
    grid = figure.subplots(rows, columns, squeeze=False)
    every = [axes for row in grid for axes in row]
    for axes in every[panels:]:
        axes.axis("off")
    for axes in every[:panels]:
        axes.grid(True, color=_GRID, lw=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    return figure, every[:panels]


def _powers(axes: Axes, values: Sequence[int], label: str) -> None:
    """A logarithmic horizontal axis with a tick at each value that has room for its number."""
    from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

    axes.set_xscale("log", base=2)
    shown = [value for place, value in enumerate(values) if place == 0 or value / values[place - 1] > 1.2]
    axes.xaxis.set_major_locator(FixedLocator(shown))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.set_xlim(min(values) / 1.3, max(values) * 1.3)
    axes.set_xlabel(label, fontsize=9)


def _shared_labels(figure: Figure, panels: Sequence[Axes], label: str) -> None:
    """One legend for all panels, and the vertical axes' label on the left ones."""
    for place, axes in enumerate(panels):
        if place % _MOST_COLUMNS == 0:
            axes.set_ylabel(label, fontsize=9)
    entries: dict[str, Any] = {}
    for axes in panels:
        handles, names = axes.get_legend_handles_labels()
        entries |= dict(zip(names, handles, strict=True))
    figure.legend(
        entries.values(),
        entries.keys(),
        loc="outside lower center",
        ncols=min(len(entries), 4),
        fontsize=8,
        frameon=False,
    )


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)
    return buffer.getvalue()


def mode_colour(mode: str) -> str:
    """Colour (#rrggbb) of a decoding mode in plots."""
    return _MODES[mode]
