"""Step times on disk: kept per model and machine, and left aside with one line when they cannot be used."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from ladon import Decoder, InputError, new_heads
from ladon.tree_size.adaptive import AutoSizing
from ladon.tree_size.latency_model import LatencyModel, StepTime
from ladon.tree_size.profile_store import place_of, profile_path, read_profile, write_profile
from ladon.util.machine import cache_folder

TIMES = [
    StepTime(batch=1, nodes=1, context=64.0, drafts=False, seconds=0.004),
    StepTime(batch=1, nodes=8, context=64.0, drafts=True, seconds=0.007),
]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LADON_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def place(tiny_llama: PreTrainedModel) -> dict[str, Any]:
    return place_of(tiny_llama, new_heads(tiny_llama, 3))


def test_what_was_written_is_read(cache: Path, place: dict[str, Any]) -> None:
    assert read_profile(place) == []
    path = write_profile(place, TIMES)
    assert path.parent == cache and [file.name for file in cache.iterdir()] == [path.name]
    assert read_profile(place) == TIMES
    write_profile(place, TIMES[:1])
    assert read_profile(place) == TIMES[:1]


def test_where_it_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("LADON_CACHE", "~/mine")
    assert cache_folder() == Path.home() / "mine"
    monkeypatch.delenv("LADON_CACHE")
    assert cache_folder() == tmp_path / "ladon"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "ladon"


def test_places_differ(cache: Path, tiny_llama: PreTrainedModel, place: dict[str, Any]) -> None:
    """Another dtype, other heads, another model: another file."""
    path = profile_path(place)
    assert profile_path(place_of(tiny_llama, new_heads(tiny_llama, 2))) != path
    assert profile_path(place_of(tiny_llama.float(), new_heads(tiny_llama, 3))) != path
    with torch.no_grad():
        tiny_llama.get_input_embeddings().weight.add_(1.0)
    assert profile_path(place_of(tiny_llama.double(), new_heads(tiny_llama, 3))) != path


def damaged(place: dict[str, Any], kind: str) -> bytes:
    document: dict[str, Any] = json.loads(profile_path(place).read_text(encoding="utf-8"))
    first = document["times"][0]
    if kind == "truncated":
        return json.dumps(document).encode()[:100]
    if kind == "no text":
        return b"\xff\xfe\x00"
    if kind == "a list":
        return b"[]"
    if kind == "another version":
        document["version"] = 99
    elif kind == "another machine":
        document["place"]["cpu"] = "another"
    elif kind == "a field too many":
        first["colour"] = "red"
    elif kind == "no times":
        document["times"] = None
    else:
        field, value = kind.split("=")
        first[field] = json.loads(value)
    return json.dumps(document).encode()


KINDS = ("truncated", "no text", "a list", "another version", "another machine", "a field too many", "no times")
VALUES = ("seconds=0", "seconds=-1", "seconds=NaN", "seconds=Infinity", 'seconds="1"', "nodes=0", "batch=true",
          "batch=1.5", "drafts=1", "context=-1", "context=null", "seconds=1e-310", "seconds=1e5", "nodes=1e300",
          f"batch={10**400}", f"nodes={10**400}", f"context={10**400}", f"seconds={10**400}")  # fmt: skip


@pytest.mark.parametrize("kind", KINDS + VALUES, ids=lambda kind: kind[:24])
def test_one_that_cannot_be_used_is_left_aside(cache: Path, place: dict[str, Any], kind: str) -> None:
    path = write_profile(place, TIMES)
    path.write_bytes(damaged(place, kind))
    with pytest.warns(UserWarning, match="left aside") as caught:
        assert read_profile(place) == []
    assert len(caught) == 1 and "\n" not in str(caught[0].message)


@pytest.mark.parametrize("seconds", [1e-7, 1e4])
def test_what_is_read_can_be_reckoned_with(cache: Path, place: dict[str, Any], seconds: float) -> None:
    most = 10_000_000
    extreme = StepTime(batch=most, nodes=most, context=most, drafts=True, seconds=seconds)
    write_profile(place, [*TIMES, extreme])
    cost = LatencyModel(read_profile(place))
    assert len(cost) == 3 and 0 < cost.predict(most, most, most, drafts=True) < math.inf
    assert 0 < cost.predict(1, 1, 64.0, drafts=False) < math.inf


def test_output_does_not_depend_on_it(cache: Path, tiny_llama: PreTrainedModel, place: dict[str, Any]) -> None:
    prompt = torch.arange(3, 12)[None]
    heads = new_heads(tiny_llama, 3)
    plain = Decoder(tiny_llama).generate(prompt, max_new_tokens=20, do_sample=False)
    write_profile(place, TIMES).write_bytes(b"{")
    with pytest.warns(UserWarning, match="left aside"):
        decoder = Decoder(tiny_llama, heads)
    assert torch.equal(decoder.generate(prompt, max_new_tokens=20, do_sample=False), plain)
    write_profile(place, [StepTime(batch=1, nodes=n, context=8.0, drafts=n > 1, seconds=9.0 / n) for n in (1, 8, 16)])
    decoder = Decoder(tiny_llama, heads)
    assert isinstance(decoder.sizing, AutoSizing) and len(decoder.sizing.cost) > 0
    assert torch.equal(decoder.generate(prompt, max_new_tokens=20, do_sample=False), plain)


def test_a_folder_that_cannot_be_written(
    place: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LADON_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(InputError, match="LADON_CACHE"):
        write_profile(place, TIMES)
    with pytest.warns(UserWarning, match="left aside"):
        assert read_profile(place) == []
