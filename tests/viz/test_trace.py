from __future__ import annotations

import io
import math
import re
import struct
from html import unescape
from html.parser import HTMLParser
from itertools import pairwise

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console

from ladon.config import PICTURE_STEPS
from ladon.decoder.decoder import Decoder
from ladon.decoder.trace import TraceStep
from ladon.errors import InputError
from ladon.viz import html, png
from ladon.viz.record import (
    BONUS,
    Record,
    label,
    moving_acceptance,
    origin_colour,
    origins,
    record,
    rows_of,
    with_bonus,
)
from ladon.viz.terminal import run_view
from user_side import Tiny


def some_step(**changes: object) -> TraceStep:
    """Root, two children, a grandchild under the second, one padding slot; the path 0-2-3 is accepted."""
    values: dict[str, object] = {
        "index": 0,
        "length": 5,
        "tokens": [40, 41, 42, 43, 44],
        "parents": [-1, 0, 0, 2, 0],
        "log_probs": [0.0, math.log(0.5), math.log(0.25), math.log(0.125), -math.inf],
        "depths": [0, 1, 1, 2, 1],
        "path": [0, 2, 3],
        "emitted": [42, 43, 50],
        "bonus": 50,
    }
    return TraceStep(**(values | changes))


@pytest.fixture(scope="module")
def run(tiny: Tiny) -> Record:
    """A real run of the tiny model, some of whose steps accept drafts."""
    prompt = tiny.tokenizer("def read")["input_ids"]
    trace = Decoder(tiny.model, tiny.heads, budget=12).trace(torch.tensor(prompt), max_new_tokens=40)
    steps = list(trace)
    assert any(len(step.path) > 1 for step in steps)
    return record(tiny.tokenizer, prompt, trace.first, steps, title="tiny & <small>")


def test_origins_tell_drafted_tokens_from_the_bonus() -> None:
    assert origins(some_step()) == [(42, 1), (43, 2), (50, BONUS)]
    assert origins(some_step(emitted=[42])) == [(42, 1)]  # the answer ended inside the accepted path
    assert origins(some_step(path=[0], emitted=[50])) == [(50, BONUS)]


def test_record_of_one_step(tiny: Tiny) -> None:
    step = record(tiny.tokenizer, [1, 2], 40, [some_step()], title="").steps[0]
    assert [node.parent for node in step.nodes] == [-1, 0, 0, 2]  # padding left out
    assert [node.accepted for node in step.nodes] == [True, False, True, True]
    assert [node.probability for node in step.nodes] == pytest.approx([1, 0.5, 0.25, 0.125])
    assert [[int(sees) for sees in row] for row in step.mask] == [
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [1, 0, 1, 0],
        [1, 0, 1, 1],
    ]
    bonus = with_bonus(step)[-1]
    assert (step.last, bonus.parent, bonus.depth, bonus.index) == (3, 3, 3, 4)


def test_padding_in_the_middle_renumbers_nodes(tiny: Tiny) -> None:
    step = some_step(
        parents=[-1, 0, 0, 0, 3], log_probs=[0.0, -1.0, -math.inf, -2.0, -3.0], depths=[0, 1, 1, 1, 2], path=[0, 3, 4]
    )
    found = record(tiny.tokenizer, [1], 40, [step], title="").steps[0]
    assert [(node.index, node.parent) for node in found.nodes] == [(0, -1), (1, 0), (2, 0), (3, 2)]
    assert found.last == 3


def greedy(tiny: Tiny, tokens: int) -> list[int]:
    """What transformers' greedy generate adds to "def read"."""
    ids = torch.tensor([tiny.tokenizer("def read")["input_ids"]])
    whole = tiny.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
    new: list[int] = whole[0, ids.shape[1] :].tolist()
    return new


@pytest.mark.parametrize("tokens", [1, 2, 20])
def test_a_trace_holds_every_token_of_the_answer(tiny: Tiny, tokens: int) -> None:
    ids = torch.tensor(tiny.tokenizer("def read")["input_ids"])
    trace = Decoder(tiny.model, tiny.heads).trace(ids, max_new_tokens=tokens)
    assert [trace.first, *(token for step in trace for token in step.emitted)] == greedy(tiny, tokens)
    assert next(trace, None) is None


def test_a_trace_ends_at_the_tokens_it_is_told(tiny: Tiny) -> None:
    ids = torch.tensor(tiny.tokenizer("def read")["input_ids"])
    answer = greedy(tiny, 20)
    decoder = Decoder(tiny.model, tiny.heads)
    assert list(decoder.trace(ids, max_new_tokens=20, eos_token_id=answer[0])) == []
    stop = next(token for token in answer if token != answer[0])
    trace = decoder.trace(ids, max_new_tokens=20, eos_token_id=[stop, 299])
    emitted = [trace.first, *(token for step in trace for token in step.emitted)]
    assert emitted == answer[: answer.index(stop) + 1]


def test_a_trace_refuses_what_generate_refuses(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.tensor([tiny.tokenizer("def read")["input_ids"]])
    decoder = Decoder(tiny.model, tiny.heads)
    mistakes: list[tuple[torch.Tensor, int, str]] = [
        (ids, 0, "max_new_tokens is 0"),
        (ids[:, :0], 4, "the prompt is empty"),
        (ids.new_full((1, 200), 5), 4, "context limit"),
    ]
    for prompt, tokens, message in mistakes:
        for ask in (decoder.trace, decoder.generate):
            with pytest.raises(InputError, match=message):
                ask(prompt, max_new_tokens=tokens)
    options = {"num_beams": (2, "beam_search")}
    options["output_attentions"] = (True, "output_attentions")
    for name, (value, message) in options.items():
        with monkeypatch.context() as patch:
            patch.setattr(tiny.model.generation_config, name, value)
            for ask in (decoder.trace, decoder.generate):
                with pytest.raises(InputError, match=message):
                    ask(ids, max_new_tokens=4)


def test_a_trace_is_greedy_whatever_the_model_samples_with(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = greedy(tiny, 20)
    for name, value in {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20}.items():
        monkeypatch.setattr(tiny.model.generation_config, name, value)
    trace = Decoder(tiny.model, tiny.heads).trace(
        torch.tensor(tiny.tokenizer("def read")["input_ids"]), max_new_tokens=20
    )
    assert [trace.first, *(token for step in trace for token in step.emitted)] == answer


def test_record_adds_up(run: Record, tiny: Tiny) -> None:
    assert run.tokens == 39  # the first of 40 is the prefill's
    assert run.acceptance_length == run.tokens / len(run.steps) > 1.0
    for step in run.steps:
        assert len(step.emitted) == len([node for node in step.nodes if node.accepted]) or step is run.steps[-1]
    ids = torch.tensor([tiny.tokenizer("def read")["input_ids"]])
    whole = tiny.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)
    shown = run.prompt + run.first + "".join(piece for step in run.steps for piece, _ in step.emitted)
    assert tiny.tokenizer.decode(whole[0]).startswith(shown)  # a character may be incomplete at the end
    assert len(shown) > len(run.prompt)


def test_rows_leave_room_for_every_leaf(run: Record) -> None:
    for step in run.steps:
        nodes = with_bonus(step)
        places = rows_of(nodes)
        for depth in {node.depth for node in nodes}:
            at = sorted(places[node.index] for node in nodes if node.depth == depth)
            assert all(below - above >= 1.0 for above, below in pairwise(at))


def test_moving_acceptance() -> None:
    assert moving_acceptance([1, 3, 2, 4], window=2) == [1.0, 2.0, 2.5, 3.0]
    assert moving_acceptance([], window=2) == []


def test_labels_are_visible_and_on_one_line(tiny: Tiny) -> None:
    for token in range(len(tiny.tokenizer)):
        shown = label(tiny.tokenizer, token)
        assert shown.strip() == shown and shown.isprintable() and shown
    newline = tiny.tokenizer("\n")["input_ids"][0]
    assert label(tiny.tokenizer, newline) == "⏎"


class Elements(HTMLParser):
    """Checks that tags nest, and keeps them."""

    VOID = frozenset({"meta", "br", "rect", "path"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def printed(run: Record) -> str:
    console = Console(file=io.StringIO(), width=120, color_system=None, highlight=False)
    for part in run_view(run):
        console.print(part)
    return str(console.file.getvalue())  # type: ignore[attr-defined]


def test_a_run_without_a_decode_step_shows_its_token(tiny: Tiny) -> None:
    first = tiny.tokenizer("return")["input_ids"][0]
    run = record(tiny.tokenizer, tiny.tokenizer("def read")["input_ids"], first, [], title="t")
    assert run.first == tiny.tokenizer.decode([first]) and run.first.strip()
    for shown in (printed(run), unescape(html.page(run))):
        assert run.first in shown and "ended with the prefill's token: no decode step" in shown
        assert "nan" not in shown and "bonus token" not in shown
    with pytest.raises(InputError, match=r"no tree to draw: .* no decode step"):
        png.png(run)


def test_page_is_whole_and_self_contained(run: Record) -> None:
    page = html.page(run)
    elements = Elements()
    elements.feed(page)
    assert elements.open == []
    names = [name for name, _ in elements.seen]
    assert not {"script", "link", "img", "iframe"} & set(names)
    assert not re.search(r"https?://|url\(|@import", page)
    assert names.count("section") == len(run.steps) + 1
    links = {attributes["href"] for name, attributes in elements.seen if name == "a"}
    targets = {f"#{attributes['id']}" for name, attributes in elements.seen if name == "section" and "id" in attributes}
    assert links <= targets and len(targets) == len(run.steps)
    assert "tiny &amp; &lt;small&gt;" in page


def test_page_shows_text_as_text(tiny: Tiny) -> None:
    ids = tiny.tokenizer("<script>&")["input_ids"]
    step = some_step(tokens=[*ids, 1, 1, 1, 1][:5], emitted=[*ids[:2], 50])
    page = html.page(record(tiny.tokenizer, ids, ids[0], [step], title="t"))
    assert "<script" not in page and "&lt;" in page


def test_drawings_show_every_node_and_every_visible_pair(run: Record) -> None:
    for step in run.steps:
        tree = html.tree_svg(step)
        assert tree.count("<rect") == len(step.nodes) + 1  # and the bonus token
        assert tree.count("bonus</text>") == 1
        mask = "".join(re.findall(r'<path class="row" d="([^"]*)"', html.mask_svg(step)))
        assert mask.count("M") == sum(map(sum, step.mask))
        for node in step.nodes[1:]:
            if node.accepted:
                assert origin_colour(node.depth) in tree


def test_terminal_shows_every_step(run: Record) -> None:
    text = printed(run)
    assert text.count("step ") == len(run.steps)
    assert text.count("✔") == sum(node.accepted for step in run.steps for node in step.nodes[1:])
    assert text.count(" bonus\n") + len(re.findall(" bonus +", text)) >= len(run.steps)
    assert f"acceptance length {run.acceptance_length:.2f}" in text
    blocks = {" ": 0, "▀": 1, "▄": 1, "█": 2}
    drawn = sum(blocks[char] for line in text.splitlines() for char in line if char in "▀▄█")
    assert drawn == sum(sum(map(sum, step.mask)) for step in run.steps)


def test_every_line_joins_a_node_to_its_parent(run: Record) -> None:
    step = max(run.steps, key=lambda step: max(node.depth for node in step.nodes))
    figure = Figure(figsize=(10, 5))
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots()
    png.draw_tree(axes, step)
    canvas.draw()
    boxes = [text for text in axes.texts if text.get_text()]
    lines = [text for text in axes.texts if not text.get_text()]
    nodes = with_bonus(step)
    assert [len(boxes), len(lines)] == [len(nodes), len(nodes) - 1]
    for node, line in zip(nodes[1:], lines, strict=True):
        line_ends = line.arrow_patch.get_window_extent()
        parent, child = (boxes[index].get_window_extent() for index in (node.parent, node.index))
        assert abs(line_ends.x0 - parent.x1) < 10 and abs(line_ends.x1 - child.x0) < 10
        ends = sorted([(parent.y0 + parent.y1) / 2, (child.y0 + child.y1) / 2])
        assert [line_ends.y0, line_ends.y1] == pytest.approx(ends, abs=10)


def picture_size(data: bytes) -> tuple[int, int]:
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", data[16:24])
    return width, height


@pytest.mark.parametrize("limit", [2, PICTURE_STEPS])
def test_png_shows_every_step_or_says_that_it_is_cut(run: Record, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn, headings = [], []
    monkeypatch.setattr(png, "draw_tree", lambda axes, step: drawn.append(step.index))
    monkeypatch.setattr(Figure, "suptitle", lambda self, text, **_: headings.append(text))
    width, height = picture_size(png.png(run, limit))
    assert width > 500 and height > 500
    assert 2 < len(run.steps) <= PICTURE_STEPS
    assert drawn == list(range(min(limit, len(run.steps))))
    assert [f"the first 2 of {len(run.steps)} steps" in heading for heading in headings] == [limit == 2]


def test_a_high_png_gets_coarser_not_impossible(run: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    width, height = picture_size(png.png(run, 2))
    monkeypatch.setattr(png, "_MAX_HEIGHT", height // 2)
    coarse_width, coarse_height = picture_size(png.png(run, 2))
    assert coarse_height == pytest.approx(height // 2, abs=1) and coarse_width == pytest.approx(width / 2, abs=2)


def test_png_without_matplotlib_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"pip install '\.\[bench\]'"):
        png.check_available()
