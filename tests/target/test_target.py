"""The target against plain forwards of the same model: every family, every length, and what is refused."""

from __future__ import annotations

import inspect
import json
import random
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, T5Config, T5ForConditionalGeneration

from families import FAMILIES, FAST, LIMIT, REFUSED, VOCAB_SIZE, WORKABLE, build, skeleton
from ladon.errors import UnsupportedModelError
from ladon.heads.model_parts import output_projection
from ladon.target import self_test
from ladon.target import target as target_module
from ladon.target.target import Target
from random_trees import draw, pad_paths, plain_logits

TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4}  # many families compute softmax or routing in float32


def slow(name: str) -> Any:
    """A parameter that only the slow suite runs."""
    return pytest.param(name, marks=pytest.mark.slow)


SLOW = [slow(name) for name in WORKABLE if name not in FAST]


def run_trees(target: Target, lengths: list[int], *, steps: int = 2) -> tuple[float, float]:
    """Worst difference of tree logits to plain forwards over several steps, and the least that a chain mask gives.

    The control takes all nodes before a node as its context, as if the tree were a chain.
    """
    rng, model = random.Random(1), target.model
    width = output_projection(model).hidden_size
    tokens = [[rng.randrange(3, VOCAB_SIZE) for _ in range(length)] for length in lengths]
    cache = target.new_cache(len(tokens))
    _, logits = target.prefill([torch.tensor(row) for row in tokens], cache)
    worst = (logits - plain_logits(model, tokens)).abs().max().item()
    control = torch.inf
    for _ in range(steps):
        drawn = draw(rng, [target.depth_cap(length) for length in cache.host_lengths], 9, VOCAB_SIZE)
        out = target.verify(drawn.tree, cache)
        assert out.logits.shape == (len(tokens), 9, VOCAB_SIZE)
        assert out.hidden.shape == (len(tokens), 9, width)
        paths = []
        for row, prefix in enumerate(tokens):
            real = [node for node in range(9) if drawn.real[row][node]]
            plain = plain_logits(model, [prefix + drawn.tokens(row, drawn.path(row, node)) for node in real])
            worst = max(worst, (out.logits[row, real] - plain).abs().max().item())
            chain = plain_logits(model, [prefix + drawn.tokens(row, list(range(node + 1))) for node in real])
            if any(drawn.path(row, node) != list(range(node + 1)) for node in real):
                control = min(control, (chain - plain).abs().max().item())
            paths.append(drawn.path(row, rng.choice(real)))
        path, count = pad_paths(paths)
        cache.commit(path, count)
        cache.mirror(count.tolist())
        tokens = [row + drawn.tokens(index, paths[index]) for index, row in enumerate(tokens)]
    return worst, control


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", [*FAST, *SLOW])
def test_trees_equal_plain_forwards(name: str, dtype: torch.dtype) -> None:
    if dtype == torch.float64 and not FAMILIES[name].float64:
        pytest.skip(f"{name} cannot run in float64")
    worst, control = run_trees(Target(build(name, dtype), prefill_chunk=7), [5, 19, 2])
    assert worst < TOLERANCE[dtype] < control / 100, f"trees {worst:.1e}, control {control:.1e}"


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_eager_attention(name: str) -> None:
    """Additive masks where the default is bool; the hidden state is what the output projection reads."""
    model = build(name, torch.float32)
    model.set_attn_implementation("eager")
    worst, control = run_trees(Target(model), [5, 19, 2])
    assert worst < TOLERANCE[torch.float32] < control / 100


@pytest.mark.parametrize("name", FAST)
def test_prefill_in_chunks(name: str) -> None:
    model = build(name)
    rows = [torch.randint(3, VOCAB_SIZE, (length,)) for length in (1, 30, 17, 30)]
    whole = Target(model, prefill_chunk=512)
    hidden, logits = whole.prefill(rows, whole.new_cache(len(rows)))
    assert hidden.shape == (len(rows), 32)
    torch.testing.assert_close(logits, plain_logits(model, [row.tolist() for row in rows]), rtol=0, atol=1e-5)
    for chunk in (1, 3, 17):
        target = Target(model, prefill_chunk=chunk)
        parts_hidden, parts_logits = target.prefill(rows, target.new_cache(len(rows)))
        torch.testing.assert_close(parts_hidden, hidden, rtol=0, atol=1e-5)
        torch.testing.assert_close(parts_logits, logits, rtol=0, atol=1e-5)


TABLES = ["gpt_neo", "gptj", *(slow(name) for name in ("gpt2", "opt", "codegen", "ctrl", "biogpt", "xglm", "mpt"))]


@pytest.mark.parametrize("name", TABLES)
def test_to_the_last_position(name: str) -> None:
    """A tree beside a row at the end of its context: that row's padding must not leave the position table."""
    model = build(name, torch.float32)
    target = Target(model)
    tokens = [[3 + index % 90 for index in range(length)] for length in (LIMIT - 1, 5)]
    cache = target.new_cache(2)
    target.prefill([torch.tensor(row) for row in tokens], cache)
    drawn = draw(random.Random(0), [0, None], 9, VOCAB_SIZE)
    out = target.verify(drawn.tree, cache)
    for row, node in [(0, 0), *((1, node) for node in range(9) if drawn.real[1][node])]:
        plain = plain_logits(model, [tokens[row] + drawn.tokens(row, drawn.path(row, node))])
        torch.testing.assert_close(out.logits[row, node], plain[0], rtol=0, atol=1e-4)


def test_prefill_projects_one_position_per_row(tiny_llama: PreTrainedModel) -> None:
    """No logits of whole prompts: the output projection sees one position of each row, whatever the length."""
    target = Target(tiny_llama, prefill_chunk=8)
    assert target.supports_trees
    seen: list[torch.Size] = []

    def note(_: nn.Module, __: Any, output: Tensor) -> None:
        seen.append(output.shape)

    handle = tiny_llama.lm_head.register_forward_hook(note)
    rows = [torch.arange(3, 60), torch.arange(3, 10)]
    hidden, logits = target.prefill(rows, target.new_cache(2))
    handle.remove()
    assert len(seen) == 8
    assert {shape[1:] for shape in seen} == {(1, 97)}
    torch.testing.assert_close(tiny_llama.lm_head(hidden), logits)


def state_of(model: PreTrainedModel) -> dict[str, Any]:
    """Everything about a model that a call could leave changed."""
    state: dict[str, Any] = {"config": json.dumps(model.config.to_dict(), default=str), "training": model.training}
    for name, module in model.named_modules():
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks"):
            state[f"{name}.{kind}"] = len(getattr(module, kind))
        for key, buffer in module.named_buffers(recurse=False):
            state[f"{name}.{key}"] = (buffer.shape, buffer.stride(), buffer.double().sum().item())
        for key, value in vars(module).items():
            if isinstance(value, int | float | str | bool):
                state[f"{name}.{key}"] = value
    return state


def llama(**options: Any) -> PreTrainedModel:
    """A tiny float64 Llama with these options."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        **{"max_position_embeddings": 256, **options},
    )
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)
    return model.double().eval()


DYNAMIC = {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}, "max_position_embeddings": 16}


@pytest.mark.parametrize("name", [*FAST, "llama-dynamic"])
def test_the_model_is_left_as_it_was(name: str) -> None:
    model = llama(**DYNAMIC) if name == "llama-dynamic" else build(name)
    before, ids = state_of(model), torch.randint(3, VOCAB_SIZE, (2, 12))
    with torch.no_grad():
        logits = model(ids).logits
    target = Target(model)
    cache = target.new_cache(1)
    target.prefill([torch.randint(3, VOCAB_SIZE, (20,))], cache)
    target.verify(draw(random.Random(0), [target.depth_cap(20)], 5, VOCAB_SIZE).tree, cache)
    after = state_of(model)
    assert {key: after[key] for key in before} == before  # (transformers 5.0 adds one to a dynamic rotary embedding)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, logits)


@pytest.mark.parametrize("name", ["llama", "bloom", "gpt_neo"])
def test_the_model_is_left_as_it_was_after_an_error(name: str) -> None:
    model = build(name)
    target = Target(model, self_test=False)
    before, cache = state_of(model), target.new_cache(1)
    with pytest.raises(IndexError):
        target.prefill([torch.tensor([3, VOCAB_SIZE + 5])], cache)
    assert state_of(model) == before


@pytest.mark.parametrize("name", REFUSED)
def test_recurrent_and_unknown_layers_are_refused(name: str) -> None:
    with pytest.raises(UnsupportedModelError, match=r"recurrent layers|layers of type|no past_key_values"):
        Target(skeleton(name))


def test_encoder_decoders_are_refused() -> None:
    config = T5Config(vocab_size=40, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        Target(T5ForConditionalGeneration(config).eval())


def test_kernels_without_masks_are_refused(tiny_llama: PreTrainedModel) -> None:
    tiny_llama.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UnsupportedModelError, match=r"'flash_attention_2'.*set_attn_implementation\('sdpa'\)"):
        Target(tiny_llama)


def test_training_mode_is_refused(tiny_llama: PreTrainedModel) -> None:
    with pytest.raises(UnsupportedModelError, match=r"training mode.*model\.eval\(\)"):
        Target(tiny_llama.train())


def test_a_model_on_several_devices_is_refused(tiny_llama: PreTrainedModel) -> None:
    tiny_llama.hf_device_map = {"model": 0, "lm_head": "cpu"}  # offloaded: everything runs on one device
    Target(tiny_llama)
    tiny_llama.hf_device_map = {"model.layers.0": 0, "model.layers.1": 1, "lm_head": 1}
    with pytest.raises(UnsupportedModelError, match=r"several devices.*device_map"):
        Target(tiny_llama)


class Packed(nn.Module):
    """An output projection whose weight is packed, as quantised ones are."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self._plain = plain.in_features, plain.out_features, [plain]
        self.weight = nn.Parameter(torch.zeros(plain.weight.numel() // 2, 1, dtype=torch.uint8), requires_grad=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """The logits of the projection that was packed."""
        return self._plain[0](hidden)


def test_a_packed_projection(verdicts: Path) -> None:
    model = build("llama")
    model.lm_head = Packed(model.lm_head)
    target = Target(model)
    assert target.vocab_size == VOCAB_SIZE
    assert target.supports_trees


@pytest.mark.parametrize(
    ("name", "change"),
    [("mistral", "attention"), *product(("mistral", "bloom", "gpt_neo"), ("dtype", "projection"))],
)
def test_a_change_of_the_model_is_followed(verdicts: Path, name: str, change: str) -> None:
    """Between runs: masks, tables and hooks made for what the model was would be wrong without an error."""
    model = build(name)
    target = Target(model)
    run_trees(target, [5, 19], steps=1)
    if change == "attention":
        model.set_attn_implementation("eager")
    elif change == "dtype":
        model.float()
    else:
        model.set_output_embeddings(nn.Linear(32, VOCAB_SIZE, bias=False).double())
    worst, control = run_trees(target, [5, 19], steps=1)
    assert worst < TOLERANCE[model.dtype] < control / 100
    assert target.dtype == model.dtype
    if change != "projection":
        assert len(json.loads(verdicts.read_text(encoding="utf-8"))) == 2, "tested again"


def test_a_change_that_cannot_be_followed_is_refused(tiny_llama: PreTrainedModel) -> None:
    target = Target(tiny_llama)
    target.new_cache(1)
    tiny_llama.train()
    for _ in range(2):
        with pytest.raises(UnsupportedModelError, match="training mode"):
            target.new_cache(1)
    tiny_llama.eval()
    target.new_cache(1)
    tiny_llama.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UnsupportedModelError, match="flash_attention_2"):
        target.new_cache(1)


def test_facts(tiny_llama: PreTrainedModel) -> None:
    target = Target(tiny_llama)
    assert (target.vocab_size, target.context_limit) == (97, 256)
    assert (target.device, target.dtype) == (torch.device("cpu"), torch.float64)
    assert target.depth_cap(10_000) is None
    assert Target(build("bloom"), self_test=False).context_limit is None
    assert Target(llama(**DYNAMIC), self_test=False).context_limit == 64


class Calls:
    """Counts the forwards of a model."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.count = 0
        model.register_forward_pre_hook(self.note)

    def note(self, *_: Any) -> None:
        self.count += 1


@pytest.fixture
def verdicts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty place for verdicts, in memory and on disk."""
    monkeypatch.setenv("LADON_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(self_test, "_verdicts", {})
    return tmp_path / "cache" / "self_test.json"


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a new process knows."""
    monkeypatch.setattr(self_test, "_verdicts", {})


def test_the_self_test_runs_once(tiny_llama: PreTrainedModel, verdicts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(tiny_llama)
    assert Target(tiny_llama).depth_cap(3) is None
    assert calls.count == 0  # lazily
    assert Target(tiny_llama).supports_trees
    assert 0 < calls.count <= 12
    first = calls.count
    assert Target(tiny_llama).supports_trees
    forget(monkeypatch)
    assert Target(tiny_llama).supports_trees
    assert calls.count == first  # from memory, then from the file
    for content in ("{not json", '["a list"]', '{"key": 3}'):
        verdicts.write_text(content, encoding="utf-8")
        forget(monkeypatch)
        before = calls.count
        assert Target(tiny_llama).supports_trees
        assert calls.count > before  # a file that is not ours counts as none
    assert len(json.loads(verdicts.read_text(encoding="utf-8"))) == 1


def test_another_dtype_is_another_verdict(tiny_llama: PreTrainedModel, verdicts: Path) -> None:
    assert Target(tiny_llama).supports_trees
    assert Target(tiny_llama.float()).supports_trees
    assert len(json.loads(verdicts.read_text(encoding="utf-8"))) == 2


def test_nowhere_to_write(tiny_llama: PreTrainedModel, verdicts: Path) -> None:
    verdicts.parent.write_text("a file where the folder should be", encoding="utf-8")
    assert Target(tiny_llama).supports_trees


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_mixes_siblings_is_refused(verdicts: Path, dtype: torch.dtype) -> None:
    """A layer that sums over the tokens of the call looks fine from the outside and is wrong for trees and chains."""
    model = llama().to(dtype)
    model.model.layers[0].register_forward_pre_hook(lambda _, inputs: (inputs[0] + inputs[0].cumsum(1), *inputs[1:]))
    target = Target(model)
    with pytest.raises(UnsupportedModelError, match=r"tree differs by [\d.e-]+ \(a wrong mask .* a chain differs by"):
        target.new_cache(1)
    assert not verdicts.exists()


def test_a_model_that_masks_by_slot_gets_chains(verdicts: Path) -> None:
    """Where the layers make a chain of any mask, trees fail the test and chains pass it."""
    model = llama()

    def by_slot(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        mask = kwargs["attention_mask"]
        if mask is None or mask.shape[2] == mask.shape[3]:
            return args, kwargs
        last = mask[:, :, :1].sum(-1, keepdim=True) + torch.arange(mask.shape[2])[:, None]
        return args, {**kwargs, "attention_mask": torch.arange(mask.shape[3]) < last}

    for layer in model.model.layers:
        layer.register_forward_pre_hook(by_slot, with_kwargs=True)
    assert Target(model).supports_trees is False
    assert json.loads(verdicts.read_text(encoding="utf-8"))


def raises_on_masks(model: PreTrainedModel, *, of_chains: bool) -> PreTrainedModel:
    """The model with a forward that takes no 4-D mask, or none but those of chains."""

    def check(_: nn.Module, __: Any, kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        if mask is not None and (of_chains or not bool((mask[:, 0].sum(-1).diff(dim=1) == 1).all())):
            raise ValueError("the mask should be 2-D\nand this is a second line")

    model.register_forward_pre_hook(check, with_kwargs=True)
    return model


def test_a_forward_that_raises_on_trees_gets_chains(verdicts: Path) -> None:
    assert Target(raises_on_masks(llama(), of_chains=False)).supports_trees is False


def test_a_forward_that_raises_on_chains_too_is_refused(verdicts: Path) -> None:
    target = Target(raises_on_masks(llama(), of_chains=True))
    with pytest.raises(UnsupportedModelError, match=r"a chain fails with ValueError: the mask should be 2-D\. Use"):
        target.new_cache(1)
    assert not verdicts.exists()


def test_out_of_memory_says_nothing_about_trees(verdicts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(self_test, "measure", fail)
    with pytest.raises(torch.OutOfMemoryError):
        Target(llama()).new_cache(1)
    assert not verdicts.exists()


def test_a_projection_that_is_no_module_call_is_refused(verdicts: Path) -> None:
    """Nothing tells what such a projection receives."""
    model = llama()
    weight, bare = model.lm_head.weight, nn.Module()
    bare.weight, model.lm_head = weight, bare  # so that only its weight can be used
    forward = model.forward

    def functional(*, input_ids: Tensor, attention_mask: Any = None, position_ids: Any = None, **kwargs: Any) -> Any:
        kwargs.pop("return_dict")
        out = model.model(input_ids, attention_mask, position_ids, **kwargs)
        out["logits"] = nn.functional.linear(out.last_hidden_state, weight)
        return out

    functional.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    model.forward = functional
    with pytest.raises(UnsupportedModelError, match="its output projection is not called as a module"):
        Target(model).new_cache(1)


def test_an_interrupted_self_test_is_no_verdict(
    tiny_llama: PreTrainedModel, verdicts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> Any:
        raise KeyboardInterrupt

    target = Target(tiny_llama)
    monkeypatch.setattr(target_module, "tested", interrupt)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            target.new_cache(1)
