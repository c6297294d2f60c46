"""Files that commands write: whole or not there, at the place that was named, and nothing else touched."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest

from ladon.cli.main import run
from ladon.cli.output import check_writable, write_whole
from ladon.errors import InputError
from user_side import Tiny


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_new_file_has_ordinary_permissions_and_a_rewritten_one_its_own(tmp_path: Path, umask: int) -> None:
    place = tmp_path / "result.json"
    check_writable(place)
    assert names(tmp_path) == []
    write_whole(place, b"one")
    assert place.read_bytes() == b"one" and stat.S_IMODE(place.stat().st_mode) == 0o666 & ~umask
    place.chmod(0o640)
    check_writable(place)
    assert place.read_bytes() == b"one"
    write_whole(place, b"two")
    assert place.read_bytes() == b"two" and stat.S_IMODE(place.stat().st_mode) == 0o640
    assert names(tmp_path) == ["result.json"]


def test_a_link_stays_and_its_target_is_written(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    link = tmp_path / "link.json"
    link.symlink_to(tmp_path / "real" / "result.json")
    for data in (b"one", b"two"):  # the target is made, then written again
        check_writable(link)
        write_whole(link, data)
        assert link.is_symlink() and (tmp_path / "real" / "result.json").read_bytes() == data
    assert names(tmp_path / "real") == ["result.json"]
    nowhere = tmp_path / "nowhere.json"
    nowhere.symlink_to(tmp_path / "none" / "result.json")
    with pytest.raises(InputError, match="there is no folder"):
        check_writable(nowhere)


@pytest.mark.skipif(os.name == "nt", reason="pipes have no names in a folder there")
def test_a_pipe_and_a_device_are_written_to_and_stay(tmp_path: Path) -> None:
    check_writable(Path(os.devnull))
    write_whole(Path(os.devnull), b"data")
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    check_writable(pipe)
    reader.start()
    write_whole(pipe, b"data")
    reader.join(timeout=60)
    assert read == [b"data"] and stat.S_ISFIFO(pipe.stat().st_mode) and names(tmp_path) == ["pipe"]


def test_files_of_the_user_that_look_unfinished_stay(tmp_path: Path) -> None:
    (tmp_path / "result.json.partial").write_text("mine", encoding="utf-8")
    check_writable(tmp_path / "result.json")
    write_whole(tmp_path / "result.json", b"data")
    assert (tmp_path / "result.json.partial").read_text(encoding="utf-8") == "mine"
    assert names(tmp_path) == ["result.json", "result.json.partial"]


@pytest.mark.parametrize("name", ["x" * 300, "y" * 300 + "/t.html", "z/" * 3000])
def test_a_name_that_is_too_long_is_one_line(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=r"too long|there is no folder") as caught:
        check_writable(tmp_path / name)
    assert len(str(caught.value)) < 300 and names(tmp_path) == []


def break_replace(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """The file is written, but cannot take its place."""

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(os, "replace", fail)


def break_write(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Half the data reach the file."""

    def fail(path: Path, data: bytes) -> int:
        with path.open("wb") as file:
            file.write(data[: len(data) // 2])
        raise error

    monkeypatch.setattr(Path, "write_bytes", fail)


@pytest.mark.parametrize("old", [None, "old"])
@pytest.mark.parametrize("break_it", [break_replace, break_write])
@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (OSError(28, "No space left on device"), 2, "No space left on device; give another place"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (RuntimeError("a fault of ours"), 1, "internal error: RuntimeError: a fault of ours"),
    ],
)
def test_nothing_half_written_when_the_writing_itself_fails(
    tiny: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    message: str,
    break_it: object,
    old: str | None,
) -> None:
    page = tmp_path / "t.html"
    if old is not None:
        page.write_text(old, encoding="utf-8")
    options = ["trace", *tiny.arguments, "--prompt", "a", "--max-new-tokens", "4"]
    with monkeypatch.context() as patch:
        assert callable(break_it)
        break_it(patch, error)
        assert run([*options, "--html", str(page)]) == code
    captured = capsys.readouterr()
    assert message in captured.err and len(captured.err.splitlines()) == 1 and "wrote" not in captured.err
    assert names(tmp_path) == ([] if old is None else ["t.html"])
    assert old is None or page.read_text(encoding="utf-8") == old
    assert run([*options, "--html", str(page)]) == 0
    assert page.read_text(encoding="utf-8").endswith("</html>\n") and names(tmp_path) == ["t.html"]
