"""A run as one self-contained HTML file: no scripts, no fonts, no requests; trees and masks are inline SVG."""

from __future__ import annotations

from html import escape
from pathlib import Path

from ladon.viz.record import (
    BONUS,
    NO_STEP,
    Node,
    Record,
    Step,
    clipped,
    origin_colour,
    origin_name,
    rows_of,
    with_bonus,
)

_COLUMN, _ROW, _BOX_WIDTH, _BOX_HEIGHT = 178, 25, 148, 20  # pixels of the tree drawing
_PREFIX = 76  # pixels of the mask drawing's bar that stands for the cached tokens
_TAIL = 600  # characters of earlier text shown at each step

_STYLE = Path(__file__).with_name("trace.css")


def page(record: Record) -> str:
    """The whole document."""
    steps = "\n".join(_section(record, place) for place in range(len(record.steps)))
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Ladon trace</title>\n<style>\n{_STYLE.read_text(encoding='utf-8')}</style>\n</head>\n<body>\n<main>\n"
        f'<h1>Ladon trace</h1>\n<p class="soft">{escape(record.title)}</p>\n{_overview(record)}\n'
        f'<section><h2>The text <span class="soft">each coloured token links to the step that gave it</span></h2>'
        f"<pre>{_text(record)}</pre></section>\n{steps}\n</main>\n</body>\n</html>\n"
    )


def _overview(record: Record) -> str:
    """The run's numbers, and what the colours mean."""
    if not record.steps:
        return f"<p>{escape(NO_STEP)}</p>"
    depth = max(node.depth for step in record.steps for node in step.nodes)
    swatches = "".join(
        f'<span><i style="background:{origin_colour(origin)}"></i>{origin_name(origin)}</span>'
        for origin in [*range(1, depth + 1), BONUS]
    )
    nodes = sum(len(step.nodes) for step in record.steps)
    numbers = [
        (f"{record.acceptance_length:.2f}", "tokens per step (acceptance length)"),
        (str(record.tokens), "tokens emitted by decode steps"),
        (str(len(record.steps)), "decode steps, one forward each"),
        (f"{nodes / len(record.steps):.1f}", "nodes verified per step"),
    ]
    cells = "".join(f"<div><b>{value}</b><span class='soft'>{escape(name)}</span></div>" for value, name in numbers)
    return f'<div class="numbers">{cells}</div>\n<div class="legend">{swatches}</div>'


def _text(record: Record) -> str:
    parts = [f'<span class="prompt">{escape(record.prompt)}</span>{escape(record.first)}']
    for step in record.steps:
        for piece, origin in step.emitted:
            name = f"step {step.index}: {origin_name(origin)}"
            style = f"color:{origin_colour(origin)}"
            parts.append(f'<a href="#step-{step.index}" title="{name}" style="{style}">{escape(piece)}</a>')
    return "".join(parts)


def _section(record: Record, place: int) -> str:
    step = record.steps[place]
    emitted = "".join(
        f'<span class="new" style="color:{origin_colour(origin)}">{escape(piece)}</span>'
        for piece, origin in step.emitted
    )
    count = len(step.emitted)
    heading = (
        f'Step {step.index} <span class="soft">{step.length} tokens cached, {len(step.nodes)} nodes verified, '
        f"{count} token{'s' if count != 1 else ''} emitted</span>"
    )
    return (
        f'<section id="step-{step.index}"><h2>{heading}</h2>\n<div class="pair">\n'
        f'<figure class="scroll">{tree_svg(step)}</figure>\n'
        f'<figure class="scroll">{mask_svg(step)}<figcaption>attention mask: row sees column; every node sees all '
        f"cached tokens;<br>coloured rows are the accepted path</figcaption></figure>\n</div>\n"
        f'<pre><span class="prompt">{_tail(record, place)}</span>{emitted}</pre></section>'
    )


def _tail(record: Record, place: int) -> str:
    before = "".join(piece for step in record.steps[:place] for piece, _ in step.emitted)
    text = record.prompt + record.first + before
    return escape(text if len(text) <= _TAIL else "… " + text[-_TAIL:])


def tree_svg(step: Step) -> str:
    """The tree, growing to the right; probabilities are those of the whole path; the accepted path is in colour."""
    nodes = with_bonus(step)
    rows = rows_of(nodes)
    width = (max(node.depth for node in nodes)) * _COLUMN + _BOX_WIDTH + 4
    height = (max(rows) + 1) * _ROW + 4
    parts = [f'<svg width="{width}" height="{height:.0f}" viewBox="0 0 {width} {height:.0f}" role="img">']
    for node in sorted(nodes[1:], key=lambda node: node.accepted):  # accepted edges on top
        parts.append(_edge(node, rows[node.parent], rows[node.index], is_bonus=node is nodes[-1]))
    for node in nodes:
        parts.append(_box(node, rows[node.index], is_bonus=node is nodes[-1]))
    return "".join([*parts, "</svg>"])


def _edge(node: Node, parent_row: float, row: float, *, is_bonus: bool) -> str:
    start, end = (node.depth - 1) * _COLUMN + _BOX_WIDTH + 1, node.depth * _COLUMN + 1
    top, bottom = parent_row * _ROW + _BOX_HEIGHT / 2 + 2, row * _ROW + _BOX_HEIGHT / 2 + 2
    middle = (start + end) / 2
    curve = f"M{start} {top:.1f}C{middle} {top:.1f} {middle} {bottom:.1f} {end} {bottom:.1f}"
    if not node.accepted:
        return f'<path class="edge" d="{curve}"/>'
    colour = origin_colour(BONUS if is_bonus else node.depth)
    dash = ' stroke-dasharray="4 3"' if is_bonus else ""
    return f'<path d="{curve}" fill="none" stroke="{colour}" stroke-width="2.4"{dash}/>'


def _box(node: Node, row: float, *, is_bonus: bool) -> str:
    left, top = node.depth * _COLUMN + 1, row * _ROW + 2
    baseline = top + _BOX_HEIGHT / 2 + 4
    colour = origin_colour(BONUS if is_bonus or node.depth == 0 else node.depth)
    shape = f'<rect x="{left}" y="{top:.1f}" width="{_BOX_WIDTH}" height="{_BOX_HEIGHT}" rx="5" '
    if node.depth == 0:
        shape += 'class="box" style="stroke:var(--ink)"/>'
    elif node.accepted:
        dash = ' stroke-dasharray="4 3"' if is_bonus else ""
        shape += f'fill="{colour}" fill-opacity="0.16" stroke="{colour}" stroke-width="1.6"{dash}/>'
    else:
        shape += 'class="box"/>'
    weight = ' font-weight="700"' if node.accepted else ""
    tip = f"node {node.index}: {node.label}" if not is_bonus else f"bonus: {node.label}"
    return (
        f"<g><title>{escape(tip)}</title>{shape}"
        f'<text x="{left + 7}" y="{baseline:.1f}"{weight}>{escape(clipped(node.label, 13))}</text>'
        f'<text x="{left + _BOX_WIDTH - 6}" y="{baseline:.1f}" text-anchor="end" class="soft small">{node.value}</text>'
        "</g>"
    )


def mask_svg(step: Step) -> str:
    """The attention mask: a bar for the cached tokens, which every node sees, then one cell per pair of nodes."""
    size = len(step.nodes)
    cell = 14 if size <= 24 else 9 if size <= 48 else 7
    side = size * cell
    path = {node.index: node for node in step.nodes if node.accepted}
    parts = [
        f'<svg width="{_PREFIX + max(side, 60)}" height="{side + 18}" role="img">',
        f'<text x="0" y="11" class="soft small">{step.length} cached</text>',
        f'<text x="{_PREFIX}" y="11" class="soft small">{size} nodes</text>',
        f'<rect class="bar" x="0" y="16" width="{_PREFIX - 6}" height="{side}"/>',
        f'<rect class="grid" x="{_PREFIX}" y="16" width="{side}" height="{side}"/>',
    ]
    for row, seen in enumerate(step.mask):
        node = path.get(row)
        fill = "var(--ink)" if node is None or node.depth == 0 else origin_colour(node.depth)
        cells = "".join(
            f"M{_PREFIX + column * cell} {16 + row * cell}h{cell - 1}v{cell - 1}h-{cell - 1}z"
            for column, sees in enumerate(seen)
            if sees
        )
        parts.append(f'<path class="row" d="{cells}" fill="{fill}"/>')
    return "".join([*parts, "</svg>"])
