"""What README and docs show is run: code blocks, commands, links, the list of packages, and the generated pages.

A fenced block is run unless the line above it is a comment of one of these forms (invisible on the rendered page):

    <!-- not run: the reason -->        shown only
    <!-- slow -->                       run in the slow tests
    <!-- continues -->                  a Python block that goes on from the Python block above it

Blocks run in an empty folder that holds a model and heads under the names that the pages use: `path/to/model`,
`path/to/heads`, `prompts.jsonl` and `prompt.txt`.
"""

from __future__ import annotations

import json
import os
import pkgutil
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "benchmarks" / "README.md"])
FENCE = re.compile(
    r"^(?:<!-- (?P<note>[^\n]*?) -->\n)?```(?P<language>[a-z]*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    page: Path
    line: int
    language: str
    note: str
    code: str

    @property
    def name(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(page, text[: match.start()].count("\n") + 1, match["language"], match["note"] or "", match["code"])
        for match in FENCE.finditer(text)
    ]


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def runnable(language: str) -> list[pytest.ParameterSet]:
    """The blocks of a language that are run, slow ones marked."""
    chosen = [block for block in BLOCKS if block.language == language and not block.note.startswith("not run: ")]
    return [
        pytest.param(block, id=block.name, marks=[pytest.mark.slow] if block.note == "slow" else []) for block in chosen
    ]


def test_notes_are_known() -> None:
    for block in BLOCKS:
        assert re.fullmatch(r"(not run: .+|slow|continues|)", block.note), f"{block.name}: unknown note {block.note!r}"
        assert block.language in {"bash", "python", "pycon", "json", "text", ""}, f"{block.name}: {block.language}"


@pytest.fixture(scope="session")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reader's folder: the bundled model and heads under the names that the pages use."""
    import ladon

    folder = tmp_path_factory.mktemp("reader")
    model, tokenizer, heads = ladon.load_demo()
    model.save_pretrained(folder / "path/to/model")
    tokenizer.save_pretrained(folder / "path/to/model")
    heads.save(folder / "path/to/heads")
    prompts = [{"prompt": "import os\n"}, {"prompt": "def main(argv):\n    "}]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts), encoding="utf-8")
    (folder / "prompt.txt").write_text("def main(argv):\n    ", encoding="utf-8")
    return folder


@pytest.mark.parametrize("block", runnable("bash"))
def test_commands(block: Block, reader: Path) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.code],
        cwd=reader,
        env=os.environ | {"PATH": path},
        capture_output=True,
        text=True,
        timeout=3600,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, f"{block.code}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


def chapters() -> list[pytest.ParameterSet]:
    """Python blocks that share their names: one that stands alone, and those that go on from it."""
    found: list[list[Block]] = []
    for (block,) in (parameter.values for parameter in runnable("python")):
        if block.note == "continues":
            assert found and found[-1][0].page == block.page, f"{block.name}: nothing to go on from"
            found[-1].append(block)
        else:
            found.append([block])
    return [pytest.param(blocks, id=blocks[0].name) for blocks in found]


@pytest.mark.parametrize("blocks", chapters())
def test_python(blocks: list[Block], reader: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(reader)
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block.code, block.name, "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{page.name} links to {target}, which is not there"
        if anchor.startswith("ladon."):  # of the API reference: a public name, or the full name of an object
            assert re.search(r"^::: ", file.read_text(encoding="utf-8"), flags=re.MULTILINE), f"{page.name}: {target}"
            pkgutil.resolve_name(anchor)
        elif anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in anchors, f"{page.name} links to {target}, but {file.name} has no such heading"


def test_code_names_pages_that_are_there() -> None:
    for folder in ("src", "tests", "benchmarks", "recipes", "examples"):
        for file in (ROOT / folder).rglob("*.py"):
            for page in re.findall(r"\bdocs/[\w/-]+\.md\b", file.read_text(encoding="utf-8")):
                assert (ROOT / page).exists(), f"{file.relative_to(ROOT)} names {page}, which is not there"


def test_families_are_those_that_are_tested() -> None:
    import families

    page = (ROOT / "docs" / "reference" / "supported-models.md").read_text(encoding="utf-8")
    table = page.split("## Families")[1].split("## Where")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
    listed = [name for row in rows for name in row.split("|")[2].replace(" ", "").split(",")]
    assert sorted(listed) == sorted(families.WORKABLE)
    refused = page.split("## Refused")[1].strip().split(":")[0]
    assert sorted("".join(refused.split()).split(",")) == sorted(families.REFUSED)


def test_every_doc_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:\n")[1].split("\n\n")[0]
    named = re.findall(r": (\S+\.md)$", navigation, flags=re.MULTILINE)
    assert sorted(named) == sorted(str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md"))


def test_pages_are_short() -> None:
    generated = {ROOT / "docs" / "reference" / "command-line.md"}
    for page in set(PAGES) - generated:
        lines = page.read_text(encoding="utf-8").count("\n")
        assert lines <= (150 if page.name == "README.md" else 250), f"{page.name} has {lines} lines"


def test_where_things_are_names_what_is_there() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = readme.split("## Where things are\n")[1].split("\n## ")[0]
    listed = [name.rstrip("/") for name in re.findall(r"^\| `([\w./]+)` \|", section, flags=re.MULTILINE)]
    source = ROOT / "src" / "ladon"
    there = {path.name for path in source.iterdir()} - {"__init__.py", "__pycache__", "py.typed"}
    assert sorted(name for name in listed if "/" not in name) == sorted(there)
    assert all((source / name).exists() for name in listed)
    for folder in re.findall(r"`([\w/]+)/`", section.split("\n\n")[-1]):
        assert (ROOT / folder).is_dir(), f"the README names {folder}, which is not there"


def test_make_targets_run_what_the_readme_promises() -> None:
    plan = subprocess.run(["make", "--dry-run", "demo", "test"], cwd=ROOT, capture_output=True, text=True)
    assert plan.returncode == 0, plan.stderr
    assert ".venv/bin/ladon demo" in plan.stdout and "pytest" in plan.stdout


def test_ci_installs_and_tests_as_the_readme_says() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    install, test = "pip install -c constraints.txt -e '.[dev]'", "pytest -n auto"
    assert f"{install}\n{test}\n" in readme
    assert "-c constraints.txt -e '.[dev]'" in ci and ci.rstrip().endswith(test)


def test_pages_made_from_the_program_are_current() -> None:
    """The command line reference and every worked example print what they show."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "refresh.py"), "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
