"""torch's default device and dtype are the user's: nothing of ours follows them.

On the meta device every number is lost, so whatever lands there by default is found; under float16 a float32 of ours
that names no dtype loses range, under float64 two of them no longer fit together.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

import families
import ladon
from greedy import BATCH, MASK, PROMPT, plain
from ladon.target import self_test
from ladon.target.pruning.node_scores import CRITERIA
from toys import Residues, deep_llama

CALL: dict[str, Any] = {"attention_mask": MASK, "max_new_tokens": 14}
SAMPLED: dict[str, Any] = {**CALL, "do_sample": True, "seed": 7, "temperature": 0.7, "top_p": 0.9}


@contextmanager
def default_device() -> Iterator[None]:
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        with OnlyFloat32(dtype):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


class OnlyFloat32(TorchDispatchMode):
    """Numbers that have taken the default dtype without being told to are found where they are made.

    Integers that are divided give them too.
    """

    def __init__(self, default: torch.dtype) -> None:
        super().__init__()
        self._default = default

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        dtypes = {value.dtype for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)}
        is_asked = self._default in tree_leaves((args, kwargs)) or self._default in dtypes
        if isinstance(found, torch.Tensor) and found.dtype == self._default and not is_asked:
            frame: Any = sys._getframe(1)
            while "/torch/" in frame.f_code.co_filename:
                frame = frame.f_back
            where = f"{frame.f_code.co_filename}:{frame.f_lineno}"
            # modules are made in the default dtype, without numbers of their own, and converted
            is_made = func is torch.ops.aten.empty.memory_format or frame.f_code.co_name == "__init__"
            is_ours = "/ladon/" in where and not is_made
            assert not is_ours, f"{where}: {func} has taken the default dtype"
        return found


FOREIGN: dict[str, Callable[[], Any]] = {
    "set_default_device": default_device,
    "device as a context": lambda: torch.device("meta"),
    "float16": lambda: default_dtype(torch.float16),
    "float64": lambda: default_dtype(torch.float64),
}


@pytest.fixture(params=FOREIGN)
def foreign(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    """A foreign default, under which the self-test runs too."""
    monkeypatch.setattr(self_test, "_verdicts", {})
    monkeypatch.setattr(self_test, "_read", dict)
    return FOREIGN[request.param]


def randomised(heads: ladon.Heads) -> ladon.Heads:
    generator = torch.Generator("cpu").manual_seed(3)
    for parameter in heads.parameters():
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float32, device="cpu") * 0.3)
    return heads


def heads_of(model: PreTrainedModel, family: str = "shared", **options: int) -> ladon.Heads:
    """Made under the foreign default, bound to the model, in its dtype and on its device."""
    heads = ladon.new_heads(model, 3, family, **options)
    assert {(p.device.type, p.dtype) for p in heads.parameters()} == {("cpu", model.dtype)}
    return randomised(heads)


def check_greedy(model: PreTrainedModel, foreign: Callable[[], Any], **options: Any) -> None:
    expected = plain(model, BATCH, **CALL)
    with foreign():
        heads = heads_of(model)
        assert torch.equal(ladon.Decoder(model, heads, **options).generate(BATCH, **CALL), expected)


@pytest.mark.parametrize(
    "options",
    [{"tree": "dynamic", "budget": 16}, {"tree": "chain"}, {"budget": "auto"}, {"tree": "off"}, {"ngrams": "off"}],
    ids=str,
)
def test_greedy(model: PreTrainedModel, foreign: Callable[[], Any], options: dict[str, Any]) -> None:
    model.float()
    check_greedy(model, foreign, **options)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("shared", {"markov_rank": 4, "markov_successors": 2, "markov_gate": 1}),
        ("shared", {"hidden_correction": 4}),
        ("medusa", {"draft_vocab_size": 40}),
        ("hydra", {}),
        ("lowrank", {"rank": 4}),
    ],
)
def test_head_families(
    model: PreTrainedModel, foreign: Callable[[], Any], tmp_path: Path, family: str, options: dict[str, int]
) -> None:
    """Made, saved, loaded and run."""
    model.float()
    expected = plain(model, BATCH, **CALL)
    wanted = ladon.new_heads(model, 3, family, **options).state_dict()
    with foreign():
        made = ladon.new_heads(model, 3, family, **options)
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in made.state_dict().items())
        randomised(made).save(tmp_path)
        heads = ladon.load_heads(tmp_path, model)
        assert torch.equal(ladon.Decoder(model, heads, budget=16).generate(BATCH, **CALL), expected)


def test_sampled(model: PreTrainedModel, foreign: Callable[[], Any]) -> None:
    model.float()
    expected = ladon.Decoder(model, heads_of(model), budget=16).generate(BATCH, **SAMPLED)
    torch.manual_seed(5)
    drawn = ladon.Decoder(model, budget=16).generate(BATCH, **{**SAMPLED, "seed": None})
    with foreign():
        assert torch.equal(ladon.Decoder(model, heads_of(model), budget=16).generate(BATCH, **SAMPLED), expected)
        assert torch.equal(ladon.Decoder(model, tree="off").generate(BATCH, **SAMPLED), expected)
        torch.manual_seed(5)
        assert torch.equal(ladon.Decoder(model, budget=16).generate(BATCH, **{**SAMPLED, "seed": None}), drawn)


def test_processors_scores_and_kept_prefixes(model: PreTrainedModel, foreign: Callable[[], Any]) -> None:
    model.float()
    options = {**CALL, "repetition_penalty": 1.3, "no_repeat_ngram_size": 3}
    keeping = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    expected = plain(model, BATCH, **options, **keeping)
    further = plain(model, expected.sequences, max_new_tokens=4, attention_mask=(expected.sequences != 0).long())
    with foreign():
        decoder = ladon.Decoder(model, heads_of(model), budget=16)
        found = decoder.generate(BATCH, **options, **keeping)
        assert torch.equal(found.sequences, expected.sequences)
        for ours, theirs in zip(found.scores + found.logits, expected.scores + expected.logits, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
        mask = (expected.sequences != 0).long()
        call = {"attention_mask": mask, "max_new_tokens": 4, "past_key_values": found.past_key_values}
        assert torch.equal(decoder.generate(found.sequences, **call), further)
        assert decoder.stats.reused_tokens > 0


def test_ngrams_alone_and_constraints(model: PreTrainedModel, foreign: Callable[[], Any]) -> None:
    model.float()
    prompt = torch.tensor([[5, 6, 7, 8, 9, 5, 6, 7, 8]])
    expected = plain(model, prompt)
    toy = Residues(modulus=12, classes=2, ends=False)
    constrained = ladon.Decoder(model, tree="off").generate(BATCH, **CALL, constraint=toy)
    with foreign():
        assert torch.equal(ladon.Decoder(model, budget=16).generate(prompt, max_new_tokens=16), expected)
        for decoder in (ladon.Decoder(model, heads_of(model), budget=16), ladon.Decoder(model)):
            assert torch.equal(decoder.generate(BATCH, **CALL, constraint=toy), constrained)


@pytest.mark.parametrize("criterion", sorted(CRITERIA))
def test_pruning(foreign: Callable[[], Any], criterion: str) -> None:
    model = deep_llama().float()
    expected = plain(model)
    with foreign():
        pruning = ladon.Pruning(layer=2, keep=6, criterion=criterion)
        decoder = ladon.Decoder(model, heads_of(model), budget=16, prune=pruning)
        assert torch.equal(decoder.generate(PROMPT, max_new_tokens=16), expected)


def test_lossy_rules(model: PreTrainedModel, foreign: Callable[[], Any]) -> None:
    model.float()
    options = {**SAMPLED, "top_p": 1.0}
    expected = ladon.Decoder(model, heads_of(model), budget=16, accept="typical").generate(BATCH, **options)
    with foreign():
        found = ladon.Decoder(model, heads_of(model), budget=16, accept="typical").generate(BATCH, **options)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["bloom", "gpt_neo", "gemma2", "mistral", "llama4_text"])
def test_families_with_masks_of_their_own(foreign: Callable[[], Any], name: str) -> None:
    model = families.build(name, torch.float32)
    model.generation_config.eos_token_id = None
    try:
        check_greedy(model, foreign, budget=16)
    except ladon.UnsupportedModelError as error:
        if "is not on the expected device" not in str(error):
            raise
        pytest.skip("the forward of this model in the installed transformers makes tensors on the default device")


# torch's functions that make tensors, and those of them that would take the default dtype.
MAKERS = {
    "arange",
    "as_tensor",
    "empty",
    "eye",
    "full",
    "linspace",
    "ones",
    "rand",
    "randint",
    "randn",
    "tensor",
    "zeros",
}
FLOATING = {"empty", "eye", "linspace", "ones", "rand", "randn", "zeros"}
SOURCE = Path(ladon.__file__).parent


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_every_tensor_names_its_device_and_dtype(path: Path) -> None:
    """But for parameters in constructors, which follow the defaults as all modules' do."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and _is_of_torch(node.func)]
    makes = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "__init__"]
    of_modules = {inner for made in makes for inner in ast.walk(made)} if path.parent.name == "heads" else set()
    for call in calls:
        name, given = call.func.attr, {keyword.arg for keyword in call.keywords}  # type: ignore[attr-defined]
        if call in of_modules:
            continue
        where = f"{path.name}:{call.lineno}: torch.{name}"
        if name == "Generator":
            assert call.args or "device" in given, f"{where} names no device"
        elif name in MAKERS:
            assert "device" in given, f"{where} names no device"
            assert name not in FLOATING or "dtype" in given, f"{where} names no dtype"


def _is_of_torch(function: ast.expr) -> bool:
    return isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name) and function.value.id == "torch"
