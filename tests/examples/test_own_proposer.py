"""The example of a drafter of one's own runs, says what the target says, and is short; the guide shows it as it is."""

from __future__ import annotations

import ast
import runpy

import pytest

from user_side import ROOT

EXAMPLE = ROOT / "examples" / "own_proposer.py"


def test_it_drafts_and_changes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    lengths = runpy.run_path(str(EXAMPLE))["main"](num_prompts=2, max_new_tokens=40)
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed] == list(lengths) == ["plain", "bigrams", "n-grams", "heads"]
    assert all(line.endswith("the same output") for line in printed)
    assert lengths["plain"] == 1.0 and lengths["bigrams"] > 1.5


def test_it_is_short_and_the_guide_shows_it() -> None:
    text = EXAMPLE.read_text(encoding="utf-8")
    (drafter,) = (node for node in ast.parse(text).body if isinstance(node, ast.ClassDef))
    assert drafter.end_lineno - drafter.lineno + 1 <= 40
    shown = ast.get_source_segment(text, drafter)
    assert shown in (ROOT / "docs" / "guides" / "own-drafter.md").read_text(encoding="utf-8")
