"""How the code is laid out: imports point one way, files stay short, importing ladon stays cheap."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "ladon"
BASE_INSTALL = {"torch", "transformers", "safetensors", "numpy", "typer", "rich"}

# The packages from the ground up: one may import those that stand before it, never one after it.
GROUND = ["errors", "config", "util"]
CORE = ["trees", "constraints", "heads", "sampling", "target", "tree_size", "drafting", "engine", "decoder", "demo"]
USER_SIDE = ["viz", "calibrate", "bench", "train", "cli"]
ORDER = GROUND + CORE + USER_SIDE

# What each side may import besides the standard library and ladon itself.
ALLOWED = [
    (GROUND, {"torch"}),
    (CORE, {"torch", "numpy", "safetensors", "transformers", "huggingface_hub", "llguidance"}),
    (["train"], BASE_INSTALL | {"accelerate", "datasets", "peft", "requests"}),
    (USER_SIDE, BASE_INSTALL | {"matplotlib"}),
]


def modules() -> dict[str, Path]:
    """Dotted name below `ladon` -> file; a package's `__init__` goes by the package's name."""
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name:  # the front door, ladon/__init__.py, may import everything
            found[name] = path
    return found


MODULES = modules()


def imported_names(path: Path) -> set[str]:
    """Every absolute dotted name that a file imports anywhere, inside functions and TYPE_CHECKING blocks too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; write `from ladon...`"
            assert all(alias.name != "*" for alias in node.names), f"{path}:{node.lineno}: import *"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def ladon_imports(name: str) -> set[str]:
    """The ladon modules that module `name` imports, as dotted names below `ladon`."""
    targets = set()
    for imported in imported_names(MODULES[name]):
        if imported.split(".")[0] != "ladon":
            continue
        dotted = imported.removeprefix("ladon").lstrip(".")
        while dotted and dotted not in MODULES:  # from ladon.trees.token_tree import TokenTree -> tree
            dotted = dotted.rpartition(".")[0]
        assert dotted or name.split(".")[0] in USER_SIDE, f"{name} imports the front door `ladon` itself"
        targets |= {dotted} - {"", name}
    return targets


def test_every_module_has_a_place() -> None:
    assert {name.split(".")[0] for name in MODULES} == set(ORDER)
    assert sum(path.is_file() for path in SOURCE.iterdir()) <= 4, "everything but the front door is in a package"


@pytest.mark.parametrize("folder", sorted({path.parent for path in MODULES.values()}), ids=lambda path: path.name)
def test_every_package_says_what_it_is(folder: Path) -> None:
    if folder != SOURCE:
        first = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8")))
        assert first is not None and first.splitlines()[0].endswith("."), f"{folder.name}: no first line"


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_down(name: str) -> None:
    own = name.split(".")[0]
    for target in ladon_imports(name):
        package = target.split(".")[0]
        assert package == own or ORDER.index(package) < ORDER.index(own), f"{name} imports {target}, from above it"


def test_no_import_cycles() -> None:
    TopologicalSorter({name: ladon_imports(name) for name in MODULES}).prepare()  # raises CycleError, naming the cycle


@pytest.mark.parametrize("name", MODULES)
def test_only_allowed_libraries(name: str) -> None:
    used = {imported.split(".")[0] for imported in imported_names(MODULES[name])}
    foreign = used - sys.stdlib_module_names - {"ladon", "typing_extensions"}  # the latter for types only
    allowed = next(libraries for side, libraries in ALLOWED if name.split(".")[0] in side)
    assert foreign <= allowed, f"{name} imports {sorted(foreign - allowed)}"


def test_import_is_cheap() -> None:
    """`import ladon` loads no model library; using the decoder loads no command line, drawing or benchmark code."""
    script = """
import sys, ladon
heavy = {"torch", "transformers", "typer", "rich", "matplotlib", "numpy"}
assert not heavy & set(sys.modules), sorted(heavy & set(sys.modules))
for name in ladon.__all__:
    getattr(ladon, name)
user_side = {"ladon.cli", "ladon.bench", "ladon.viz", "matplotlib", "uvicorn", "starlette", "fastapi"}
assert not user_side & set(sys.modules), sorted(user_side & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def python_files(*folders: str) -> list[Path]:
    files = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return [path for path in files if "runs" not in path.parts]


@pytest.mark.parametrize("path", python_files("src", "recipes"), ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_short(path: Path) -> None:
    """A file of at most 500 lines, a function's body under 60; signature and docstring may be as long as needed."""
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 500, f"{path.relative_to(ROOT)} has {text.count(chr(10))} lines; the bound is 500"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            length = (node.end_lineno or 0) - body[0].lineno + 1 if body else 0
            assert length < 60, f"{path.relative_to(ROOT)}:{node.lineno} {node.name} has {length} lines; bound 60"


def test_nothing_is_left_undone_or_tied_to_a_machine() -> None:
    unfinished = re.compile(r"\b(TO" r"DO|FIX" r"ME|XX" r"X)\b")
    machine = re.compile(r"(?<![\w.])/(work|root|home|opt)/")
    kinds = {".py", ".md", ".toml", ".txt", ".json", ".ipynb", ".html"}
    folders = ["src", "tests", "recipes", "docs", "examples", "benchmarks", ".ci"]
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if "runs" not in path.parts]
    files += list(ROOT.glob("*"))
    for path in files:
        if path.is_file() and (path.suffix in kinds or path.name in {"Makefile", "run"}):
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
                found = unfinished.search(line) or (path != Path(__file__).resolve() and machine.search(line))
                assert not found, f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"


def test_base_install_is_all_that_is_declared() -> None:
    """The sides' allowed libraries and pyproject's dependencies name the same things."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    declared = re.search(r"^dependencies = \[(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    assert declared is not None
    assert set(re.findall(r'"([a-z]+)', declared[1])) == BASE_INSTALL
