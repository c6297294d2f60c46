from __future__ import annotations

import json

import nbformat
import pytest
from matplotlib import pyplot
from matplotlib.figure import Figure

from user_side import ROOT

NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebook_is_stored_without_outputs(path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None
    assert json.loads(path.read_text(encoding="utf-8"))["nbformat_minor"] >= 5


def test_dynamic_trees(capsys: pytest.CaptureFixture[str]) -> None:
    """Every cell runs; the trees, masks and curves of both prompts are drawn; the texts are those of generate."""
    names: dict[str, object] = {}
    notebook = nbformat.read(ROOT / "examples" / "dynamic_trees.ipynb", as_version=4)
    try:
        for cell in notebook.cells:
            if cell.cell_type == "code":
                exec(compile(cell.source, f"<{cell.id}>", "exec"), names)
        figures = [names[name] for name in ("trees", "masks", "curves")]
        assert all(isinstance(figure, Figure) for figure in figures)
        trees, _, curves = figures
        assert [len(figure.axes) for figure in figures] == [4, 4, 2]
        for step, panel in zip([step for steps in names["shown"] for step in steps.values()], trees.axes, strict=True):
            assert len([text for text in panel.texts if text.get_text()]) == len(step.nodes) + 1
            assert len(step.nodes) <= names["NODES"]
        for figure in figures:
            figure.canvas.draw()
        for place, panel in enumerate(curves.axes):
            for kind, line in zip(("fixed", "dynamic"), panel.lines, strict=True):
                assert len(line.get_ydata()) == len(names["runs"][place, kind].steps)
    finally:
        pyplot.close("all")
    for place, prompt in enumerate(names["prompts"]):
        inputs = names["tokenizer"](prompt, return_tensors="pt")
        tokens = names["NEW_TOKENS"]
        whole = names["model"].generate(
            inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=tokens, do_sample=False
        )
        assert names["tokenizer"].decode(whole[0]).startswith(prompt + names["text"](names["runs"][place, "dynamic"]))
    assert "dynamic: 95 tokens in" in capsys.readouterr().out
