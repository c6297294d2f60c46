"""The training text: the standard library's own sources and those in `ensurepip`'s wheels, with fixed modules held out.

Nearly every Python installation has this text, so anyone can repeat the recipe offline. The held-out modules (and their
tests) are never trained on; they are split in two so that whatever is calibrated never sees the prompts it is judged
on.
"""

from __future__ import annotations

import hashlib
import importlib.util
import platform
import sysconfig
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Present, as single pure-Python files, in every CPython from 3.10 to 3.14.
CALIBRATION_MODULES = (
    "bisect calendar cmd configparser csv filecmp glob gzip netrc plistlib random sched shlex textwrap"
).split()
PROMPT_MODULES = (
    "argparse ast contextlib difflib fractions heapq ipaddress mailbox queue statistics tempfile zipapp"
).split()
# Never trained on either, but other files hold pieces of them (aifc and sunau; distlib in pip's wheel): no measure.
OVERLAPPING_MODULES = ("tokenize", "wave")
HELD_OUT = frozenset((*CALIBRATION_MODULES, *PROMPT_MODULES, *OVERLAPPING_MODULES))

# Dependencies of Ladon and of torch, of several authors and styles.
PROMPT_PACKAGES = (
    "torch transformers numpy sympy networkx jinja2 huggingface_hub rich typer click fsspec tqdm filelock pygments "
    "mpmath"
).split()

# Tables and deliberately broken sources: text that teaches nothing about code.
SKIPPED_FOLDERS = ("site-packages", "encodings", "pydoc_data", "lib2to3/tests/data", "test/encoded_modules")
SKIPPED_IN_WHEELS = ("pip/_vendor/chardet", "pip/_vendor/idna", "setuptools/_distutils")  # tables; distutils again
MAX_FILE_BYTES = 400_000


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """One file of the corpus."""

    path: str  # relative to the standard library's folder
    text: str
    sha256: str


def library_root() -> Path:
    """Folder of the running Python's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def training_files() -> Iterator[SourceFile]:
    """Every file trained on, in a fixed order."""
    root = library_root()
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if not _is_skipped(relative) and not _is_held_out(relative):
            source = _read(path, relative)
            if source is not None:
                yield source


def wheel_files() -> list[SourceFile]:
    """The sources inside the wheels that `ensurepip` carries (pip, before 3.12 setuptools too), each text once.

    Some distributions take these wheels out of Python; then the list is empty.
    """
    sources: dict[str, SourceFile] = {}
    for wheel in sorted(library_root().glob("ensurepip/_bundled/*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            for name in sorted(archive.namelist()):
                relative = Path(name)
                if relative.suffix == ".py" and not name.startswith(SKIPPED_IN_WHEELS) and not _is_held_out(relative):
                    source = _source(archive.read(name), wheel.relative_to(library_root()) / name)
                    if source is not None:
                        sources.setdefault(source.sha256, source)
    return list(sources.values())


def package_files() -> list[list[SourceFile]]:
    """The sources of packages that are installed wherever Ladon is, package by package: what the model never saw.

    Its prompts come from them. Beginnings of files that it was trained on would not do: what it says after these, it
    half remembers, and heads that learn from it do worse on what it says after anything else.
    """
    packages = []
    for name in PROMPT_PACKAGES:
        spec = importlib.util.find_spec(name)
        roots = [Path(root) for root in (spec.submodule_search_locations or ())] if spec else []
        found = [
            _source(path.read_bytes(), path.relative_to(root.parent))
            for root in roots
            for path in sorted(root.rglob("*.py"))
        ]
        packages.append([source for source in found if source is not None])
    return [files for files in packages if files]


def is_test(source: SourceFile) -> bool:
    """Whether a file of the standard library tests it."""
    return any(part in ("test", "tests", "idle_test") for part in Path(source.path).parts)


def held_out_files(modules: list[str]) -> list[SourceFile]:
    """The named held-out modules, in the order given."""
    root = library_root()
    sources = [_read(root / f"{name}.py", Path(f"{name}.py")) for name in modules]
    return [source for source in sources if source is not None]


def provenance(sources: list[SourceFile]) -> dict[str, object]:
    """What the model was trained on: Python version, one hash per file and one over all of them."""
    joint = hashlib.sha256("".join(s.sha256 for s in sources).encode()).hexdigest()
    return {
        "python": platform.python_version(),
        "files": len(sources),
        "bytes": sum(len(s.text.encode()) for s in sources),
        "sha256": joint,
        "held_out": {"calibration": CALIBRATION_MODULES, "prompts": PROMPT_MODULES},
        "not_used": OVERLAPPING_MODULES,
        "file_sha256": {s.path: s.sha256 for s in sources},
    }


def _is_skipped(relative: Path) -> bool:
    return any(relative.as_posix().startswith(folder) for folder in SKIPPED_FOLDERS)


def _is_held_out(relative: Path) -> bool:
    """A held-out module or anything under a name that belongs to it (test_csv.py, argparse_data/...)."""
    for part in (*relative.parts[:-1], relative.stem):
        name = part.removeprefix("test_").removesuffix("_tests")
        if name in HELD_OUT or any(name.startswith(f"{module}_") for module in HELD_OUT):
            return True
    return False


def _read(path: Path, relative: Path) -> SourceFile | None:
    return _source(path.read_bytes(), relative)


def _source(data: bytes, relative: Path) -> SourceFile | None:
    if not 0 < len(data) <= MAX_FILE_BYTES:
        return None
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return None
    return SourceFile(path=relative.as_posix(), text=text, sha256=hashlib.sha256(data).hexdigest())
