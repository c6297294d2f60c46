"""A run in the terminal: coloured text as it comes, and each step's tree with its mask beside it."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.rule import Rule
from rich.style import Style
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from ladon.decoder.detokenizer import Detokenizer
from ladon.decoder.trace import Trace
from ladon.viz.record import BONUS, NO_STEP, Node, Record, Step, ansi_colour, children, origin_name, origins, with_bonus

_HALF_BLOCKS = {(False, False): " ", (True, False): "▀", (False, True): "▄", (True, True): "█"}


def legend(depth: int) -> Text:
    """The colours in words, for drafts up to `depth`."""
    parts = [Text(origin_name(origin), Style(color=ansi_colour(origin))) for origin in [*range(1, depth + 1), BONUS]]
    return Text(" · ").join(parts)


def token_text(piece: str, origin: int) -> Text:
    """One emitted token in its colour; a bonus token is bold besides, so that colour is not the only sign."""
    return Text(piece, Style(color=ansi_colour(origin), bold=origin == BONUS))


def live(trace: Trace, pieces: Detokenizer) -> Iterator[Text]:
    """The text of a run while it is decoded, every token in the colour of its origin."""
    yield Text(pieces.push(trace.first))
    for step in trace:
        yield from (token_text(pieces.push(token), origin) for token, origin in origins(step))


def step_view(step: Step) -> RenderableType:
    """One step: heading, tree and mask side by side, and what was emitted."""
    emitted = Text("emitted  ", "dim")
    for piece, origin in step.emitted:
        emitted.append(repr(piece)[1:-1] or "…", Style(color=ansi_colour(origin), bold=origin == BONUS))
        emitted.append("│", "dim")
    view = Table.grid(padding=(0, 4))
    view.add_row(_tree(step), _mask(step))
    heading = (
        f"step {step.index} · {step.length} tokens cached · {len(step.nodes)} nodes · "
        f"{len(step.emitted)} token{'s' if len(step.emitted) != 1 else ''} emitted"
    )
    return Group(Rule(heading, align="left", style="dim"), Padding(view, (0, 0, 0, 1)), Padding(emitted, (0, 0, 1, 1)))


def summary(record: Record) -> Text:
    """The run's text with every token in its colour, and its acceptance length."""
    text = Text(record.prompt, "dim")
    text.append(record.first, "bold")
    for step in record.steps:
        for piece, origin in step.emitted:
            text.append_text(token_text(piece, origin))
    found = f"{record.tokens} tokens in {len(record.steps)} steps: acceptance length {record.acceptance_length:.2f}"
    return text.append(f"\n\n{found if record.steps else NO_STEP}", "bold")


def run_view(record: Record) -> Iterator[RenderableType]:
    """All steps in order, then the summary."""
    for step in record.steps:
        yield step_view(step)
    yield Rule("text so far", align="left", style="dim")
    yield summary(record)
    if record.steps:
        yield legend(max(node.depth for step in record.steps for node in step.nodes))


def _tree(step: Step) -> Tree:
    nodes = with_bonus(step)
    below = children(nodes)

    def grow(branch: Tree, node: Node) -> Tree:
        for child in below.get(node.index, []):
            grow(branch.add(_node_text(child), guide_style=_guide(child)), child)
        return branch

    return grow(Tree(_node_text(nodes[0]), guide_style=_guide(nodes[0])), nodes[0])


def _guide(node: Node) -> str:
    return "bold" if node.accepted else "dim"


def _node_text(node: Node) -> Text:
    if node.value == "bonus":
        colour = ansi_colour(BONUS)
        return Text(node.label, Style(color=colour, bold=True)).append(" bonus", Style(color=colour))
    text = Text(no_wrap=True)
    text.append(f"{node.index:<3}", "dim")
    if node.depth == 0:
        text.append(node.label, "bold")
        return text.append(" root", "dim")
    if node.accepted:
        text.append(node.label, Style(color=ansi_colour(node.depth), bold=True))
        text.append(f" {node.probability:.3f}")
        return text.append(" ✔", Style(color=ansi_colour(node.depth)))
    text.append(node.label)
    return text.append(f" {node.probability:.3f}", "dim")


def _mask(step: Step) -> Text:
    rows = [*step.mask, [False] * len(step.mask)][: len(step.mask) + len(step.mask) % 2]
    text = Text("mask: row sees column\n", "dim", no_wrap=True)
    for upper, lower in zip(rows[::2], rows[1::2], strict=True):
        text.append("".join(_HALF_BLOCKS[pair] for pair in zip(upper, lower, strict=True)) + "\n", "default")
    return text
