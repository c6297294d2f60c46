"""What the pictures draw: a decode run as plain Python values, with every token's text, origin and colour.

Colours are readable on light and dark grounds. Files have exact ones; a terminal has the user's own sixteen, which fit
its ground and which every kind has.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ladon.decoder.detokenizer import Detokenizer
from ladon.trees.token_tree import ancestor_mask

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ladon.decoder.trace import TraceStep

BONUS = 0  # the origin of a bonus token; a drafted token's origin is its depth, 1 or more
NO_STEP = "the answer ended with the prefill's token: no decode step"
_VISIBLE = str.maketrans({"\n": "⏎", "\t": "⇥", "\r": "␍", " ": "·"})
_DEPTHS = ("#2f9e77", "#2b8cbe", "#6a6fd1", "#a855b8", "#c2447f", "#b5563c", "#8a7a2b")
_BONUS = "#e07b00"
_ANSI_DEPTHS = ("green", "cyan", "blue", "magenta", "red", "bright_green", "bright_cyan")
_ANSI_BONUS = "yellow"


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """One node of a step's tree.

    Attributes:
        index: its place in the tree, and its row and column in the mask.
        label: the token as a short visible text.
        parent: index of its parent; -1 for the root.
        depth: 0 for the root.
        probability: of the path from the root to this node, as the heads see it, in [0, 1].
        accepted: whether the target said this token itself; the root always.
    """

    index: int
    label: str
    parent: int
    depth: int
    probability: float
    accepted: bool

    @property
    def value(self) -> str:
        """What stands beside the label: the probability, or what else the node is."""
        if self.depth == 0:
            return "root"
        return "bonus" if math.isnan(self.probability) else f"{self.probability:.3f}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One decode step.

    Attributes:
        index: 0 for the first step after prefill.
        length: tokens in the cache before the step.
        nodes: the tree, root first; padding slots left out.
        mask: who may attend to whom inside the tree; row i lists the nodes that node i sees.
        last: index of the last accepted node, from which the bonus token follows.
        bonus: label of the bonus token.
        emitted: (text, origin) of each token that the step added to the output.
    """

    index: int
    length: int
    nodes: list[Node]
    mask: list[list[bool]]
    last: int
    bonus: str
    emitted: list[tuple[str, int]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """A whole run of one prompt.

    Attributes:
        title: one line that names model and tree.
        prompt: the prompt's text.
        first: text of the token that prefill gave: the first root.
        steps: the decode steps in order.
    """

    title: str
    prompt: str
    first: str
    steps: list[Step]

    @property
    def tokens(self) -> int:
        """Tokens emitted by decode steps, bonus tokens included."""
        return sum(len(step.emitted) for step in self.steps)

    @property
    def acceptance_length(self) -> float:
        """Tokens emitted by decode steps over decode steps; NaN before the first step."""
        return self.tokens / len(self.steps) if self.steps else math.nan


def origins(step: TraceStep) -> list[tuple[int, int]]:
    """(token, origin) of each token that a step emitted; the one after all accepted nodes is the bonus."""
    drafted = len(step.path) - 1
    return [(token, place + 1 if place < drafted else BONUS) for place, token in enumerate(step.emitted)]


def moving_acceptance(counts: Sequence[int], window: int) -> list[float]:
    """Mean number of tokens per step over the last `window` steps, one value per step (fewer steps at the start)."""
    return [sum(part) / len(part) for end in range(len(counts)) if (part := counts[max(0, end + 1 - window) : end + 1])]


def record(
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Sequence[int],
    first: int,
    steps: Iterable[TraceStep],
    *,
    title: str,
) -> Record:
    """Make the record of a run from its prompt [T], the prefill's token and the decode steps (`Decoder.trace`)."""
    pieces = Detokenizer(tokenizer, prompt_ids)
    return Record(
        title=title,
        prompt=str(tokenizer.decode(list(prompt_ids), skip_special_tokens=False)),
        first=pieces.push(first),
        steps=[_step(tokenizer, step, pieces) for step in steps],
    )


def _step(tokenizer: PreTrainedTokenizerBase, step: TraceStep, pieces: Detokenizer) -> Step:
    kept = [slot for slot, value in enumerate(step.log_probs) if value > -math.inf]
    place = {slot: index for index, slot in enumerate(kept)}
    accepted = set(step.path)
    nodes = [
        Node(
            index=place[slot],
            label=label(tokenizer, step.tokens[slot]),
            parent=place[step.parents[slot]] if step.parents[slot] >= 0 else -1,
            depth=step.depths[slot],
            probability=math.exp(step.log_probs[slot]),
            accepted=slot in accepted,
        )
        for slot in kept
    ]
    parents = torch.tensor([[node.parent for node in nodes]], device="cpu")
    return Step(
        index=step.index,
        length=step.length,
        nodes=nodes,
        mask=ancestor_mask(parents, max(node.depth for node in nodes))[0].tolist(),
        last=place[step.path[-1]],
        bonus=label(tokenizer, step.bonus),
        emitted=[(pieces.push(token), origin) for token, origin in origins(step)],
    )


def with_bonus(step: Step) -> list[Node]:
    """The tree with the bonus token as one more node (the last in the list) below the last accepted node."""
    depth = step.nodes[step.last].depth + 1
    bonus = Node(
        index=len(step.nodes), label=step.bonus, parent=step.last, depth=depth, probability=math.nan, accepted=True
    )
    return [*step.nodes, bonus]


def children(nodes: Sequence[Node]) -> dict[int, list[Node]]:
    """Children of each node, most probable first; leaves are missing."""
    found: dict[int, list[Node]] = {}
    for node in nodes[1:]:
        found.setdefault(node.parent, []).append(node)
    return found


def rows_of(nodes: Sequence[Node]) -> list[float]:
    """Vertical place of each node for a drawing that grows to the right: leaves 0, 1, 2, ..., parents amid children."""
    below, places = children(nodes), [0.0] * len(nodes)
    leaves = iter(range(len(nodes)))

    def order(index: int) -> Iterator[int]:  # children before their parent
        for child in below.get(index, []):
            yield from order(child.index)
        yield index

    for index in order(0):
        inner = [places[child.index] for child in below.get(index, [])]
        places[index] = (inner[0] + inner[-1]) / 2 if inner else float(next(leaves))
    return places


def clipped(text: str, most: int) -> str:
    """A text of so many characters at most."""
    return text if len(text) <= most else text[: most - 1] + "…"


def label(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """One token as a short visible label: spaces and line ends become signs, repeats are counted."""
    text = str(tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False))
    if not text.strip("\N{REPLACEMENT CHARACTER}"):
        return f"<{token}>"
    text = re.sub(" {4,}", lambda run: f"·×{len(run[0])}", text).translate(_VISIBLE)
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)


def origin_colour(origin: int) -> str:
    """Colour (#rrggbb) of a token by its origin: the bonus token, or drafted at a depth of 1 or more."""
    return _BONUS if origin == BONUS else _DEPTHS[(origin - 1) % len(_DEPTHS)]


def ansi_colour(origin: int) -> str:
    """The same for a terminal: the name of one of its colours."""
    return _ANSI_BONUS if origin == BONUS else _ANSI_DEPTHS[(origin - 1) % len(_ANSI_DEPTHS)]


def origin_name(origin: int) -> str:
    """The origin in words."""
    return "bonus token" if origin == BONUS else f"drafted, depth {origin}"
