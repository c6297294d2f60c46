"""A run as a PNG file, and the drawings that a notebook shows (matplotlib, from the `bench` extra)."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from ladon.config import PICTURE_STEPS
from ladon.errors import InputError
from ladon.viz.record import BONUS, NO_STEP, Record, Step, clipped, origin_colour, rows_of, with_bonus

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Text

_MAX_LABEL = 12
_DPI = 150
_MAX_HEIGHT = 45_000  # pixels of a picture; a higher one is drawn with fewer dots per inch


def check_available() -> None:
    """Raise `InputError` unless matplotlib is installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise InputError(
            "PNG pictures need matplotlib, which is not installed; in Ladon's checkout: pip install '.[bench]'"
        ) from error


def draw_tree(axes: Axes, step: Step) -> None:
    """Draw one step's tree on `axes`: it grows to the right, the accepted path and the bonus token are in colour."""
    nodes = with_bonus(step)
    rows = rows_of(nodes)
    drawn: list[Text] = []
    for node in nodes:
        is_bonus = node is nodes[-1]
        colour = origin_colour(BONUS if is_bonus else node.depth) if node.accepted and node.depth else "#8a8f98"
        box = axes.text(
            node.depth,
            rows[node.index],
            f"{clipped(node.label, _MAX_LABEL)}  {node.value}".replace("$", r"\$"),
            fontsize=7,
            family="monospace",
            va="center",
            fontweight="bold" if node.accepted else "normal",
            bbox={"boxstyle": "round,pad=0.25", "fc": "white", "ec": colour, "lw": 1.4 if node.accepted else 0.6},
        )
        if node.parent >= 0:  # from the parent's right side to this one's left side
            line: dict[str, Any] = {"arrowstyle": "-", "color": colour, "shrinkA": 2, "shrinkB": 2}
            line |= {"lw": 2.0 if node.accepted else 0.8, "linestyle": "--" if is_bonus else "-"}
            ends: dict[str, Any] = {
                "xy": (1, 0.5),
                "xycoords": drawn[node.parent],
                "xytext": (0, 0.5),
                "textcoords": box,
            }
            axes.annotate("", **ends, arrowprops=line)
        drawn.append(box)
    axes.set(xlim=(-0.1, max(node.depth for node in nodes) + 0.75), ylim=(max(rows) + 0.8, -0.8))
    axes.axis("off")


def draw_mask(axes: Axes, step: Step) -> None:
    """Draw one step's attention mask on `axes`: row sees column; rows of the accepted path are in colour."""
    from matplotlib.colors import to_rgb

    image = [[(0.93, 0.94, 0.95)] * len(step.mask) for _ in step.mask]
    for row, seen in enumerate(step.mask):
        node = step.nodes[row]
        colour = to_rgb(origin_colour(node.depth) if node.accepted and node.depth else "#3c4048")
        for column, sees in enumerate(seen):
            if sees:
                image[row][column] = colour
    axes.imshow(image, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(f"mask: row sees column ({len(step.mask)} nodes)", fontsize=8)


def png(record: Record, max_steps: int = PICTURE_STEPS) -> bytes:
    """A picture of the first `max_steps` steps, one below the other: tree on the left, mask on the right."""
    from matplotlib.figure import Figure

    steps = record.steps[:max_steps]
    if not steps:
        raise InputError(f"there is no tree to draw: {NO_STEP}; allow more new tokens")
    heights = [max(2.2, 0.24 * (max(rows_of(with_bonus(step))) + 1)) for step in steps]
    depth = max(node.depth for step in steps for node in with_bonus(step))
    height = sum(heights) + 0.6 * len(steps) + 0.6
    figure = Figure(figsize=(1.9 * (depth + 1) + 4.0, height), layout="constrained")
    figure.suptitle(_heading(record, len(steps)), fontsize=10)
    grid = figure.subplots(
        len(steps), 2, squeeze=False, gridspec_kw={"width_ratios": [1.9 * (depth + 1), 3.4], "height_ratios": heights}
    )
    for step, (left, right) in zip(steps, grid, strict=True):
        draw_tree(left, step)
        emitted = "".join(piece for piece, _ in step.emitted)
        shown = repr(clipped(emitted, 60)).replace("$", r"\$")
        left.set_title(f"step {step.index} emits {len(step.emitted)}: {shown}", fontsize=8, loc="left")
        draw_mask(right, step)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=min(_DPI, _MAX_HEIGHT / height))
    return buffer.getvalue()


def _heading(record: Record, shown: int) -> str:
    whole = f"{record.title} · acceptance length {record.acceptance_length:.2f}"
    return whole if shown == len(record.steps) else f"{whole} · the first {shown} of {len(record.steps)} steps"
