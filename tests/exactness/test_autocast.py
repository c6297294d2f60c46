"""Under `torch.autocast`, and with float32 products of fewer bits, the text is that of `generate` under the same.

"Equal" as for half precision: a difference must be a near-tie of the dtype in which products are computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from transformers import PreTrainedModel

import ladon
from greedy import BATCH, MASK, plain
from ladon.bench.quality.identity import compare
from ladon.errors import InputError
from ladon.target import self_test
from ladon.target.kv_cache import TreeCache
from ladon.target.target import Target
from ladon.util.devices import working_dtype

CPU = torch.device("cpu")
BFLOAT16 = {"device_type": "cpu", "dtype": torch.bfloat16}


@pytest.fixture
def highest() -> Iterator[None]:
    """Leave the precision of float32 products as it was."""
    yield
    torch.set_float32_matmul_precision("highest")


def drafting(model: PreTrainedModel) -> ladon.Decoder:
    """A decoder whose random heads are right now and then."""
    heads = ladon.new_heads(model, num_heads=3)
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return ladon.Decoder(model, heads, budget=8)


def check_equal(model: PreTrainedModel, output: torch.Tensor, expected: torch.Tensor) -> None:
    """Rows [B, T] are equal but for near-ties."""
    width = BATCH.shape[1]
    for number, (prompt, ours, theirs) in enumerate(zip(BATCH, output.tolist(), expected.tolist(), strict=False)):
        found = compare(model, number, prompt[prompt != 0].tolist(), ours[width:], theirs[width:])
        assert found is None or found.is_near_tie, found


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("rows", [1, 3])
def test_autocast_gives_what_generate_gives(model: PreTrainedModel, attention: str, rows: int) -> None:
    model.float().set_attn_implementation(attention)
    ids, mask = BATCH[:rows], MASK[:rows]
    decoder = drafting(model)
    options = {"attention_mask": mask, "max_new_tokens": 16, "do_sample": False}
    for under in (torch.autocast(**BFLOAT16), nullcontext(), torch.autocast(**BFLOAT16)):
        with under:
            check_equal(model, decoder.generate(ids, **options), plain(model, ids, **options))


def test_autocast_in_mid_flight(model: PreTrainedModel) -> None:
    """Buffers that began narrow go wide, as the cache of transformers does; nothing crashes, rows stay apart."""
    model.float()
    decoder = drafting(model)
    engine, rows = decoder.engine(), decoder.rows([BATCH[1], BATCH[0][3:]], max_new_tokens=12)
    with torch.autocast(**BFLOAT16):
        engine.submit(rows[0])
        engine.step()
        engine.step()
    engine.submit(rows[1])
    while engine.step() is not None:
        pass
    assert [len(row.tokens) for row in rows] == [12, 12]


def test_keys_and_values_of_different_dtypes() -> None:
    """Each buffer has the dtype of what it is given first, and commits, moves and new rows keep it."""
    cache = TreeCache(1, 2, CPU)
    keys, values = torch.randn(2, 1, 3, 4), torch.randn(2, 1, 3, 4).bfloat16()
    cache.route.aim(0, 3, range(2))
    cache.update(keys, values, 0)
    cache.set_lengths([1, 3])
    layer = cache.layers[0]
    assert (layer.keys.dtype, layer.values.dtype) == (torch.float32, torch.bfloat16)

    slots = torch.tensor([[1, 2], [3, 4]])
    cache.route.aim(3, 2, range(2), slots=slots)
    seen = cache.update(keys[:, :, :2].bfloat16(), values[:, :, :2], 0)  # narrower than the buffer: nothing is lost
    assert [states.dtype for states in seen] == [torch.float32, torch.bfloat16]
    assert torch.equal(seen[0][0, :, 1:3], keys[0, :, :2].bfloat16().float())
    cache.commit(torch.tensor([[0, 1], [0, 0]]), torch.tensor([2, 1]))
    cache.mirror([2, 1])
    cache.append(1)
    cache.keep([1, 2])
    assert torch.equal(layer.keys[0, :, :3], keys[1]) and torch.equal(layer.values[0, :, :3], values[1])

    cache.route.aim(4, 1, range(1))
    _, seen_values = cache.update(keys[:1, :, :1], keys[:1, :, :1], 0)  # wider values: the buffer follows
    assert layer.values.dtype == seen_values.dtype == torch.float32
    assert torch.equal(seen_values[0, :, :3], values[1].float()) and torch.equal(seen_values[0, :, 4:], keys[0, :, :1])


def test_a_kept_prefix_is_of_its_arithmetic(model: PreTrainedModel) -> None:
    """What was read under autocast is no beginning for a call without it: transformers would read it in float32."""
    model.float()
    decoder = drafting(model)
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    with torch.autocast(**BFLOAT16):
        first = decoder.generate(BATCH[1:2], **options)
    with pytest.raises(InputError, match=r"arithmetic \(autocast, float32 precision\) has changed"):
        decoder.generate(first.sequences, past_key_values=first.past_key_values, **options)
    engine, (row,) = decoder.engine(), decoder.rows([first.sequences[0]], max_new_tokens=4, past=[])
    row.past = first.past_key_values.rows[0]
    with torch.autocast(**BFLOAT16):
        engine.submit(row)  # fits now, but is taken up in another arithmetic
    engine.step()
    assert row.stats.reused_tokens == 0


@pytest.mark.parametrize("setting", ["high", "medium"])
def test_the_self_test_knows_how_float32_is_computed(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, highest: None, setting: str
) -> None:
    monkeypatch.setattr(self_test, "_verdicts", {})
    target = Target(model.float())
    assert target.supports_trees and working_dtype(CPU, torch.float32) == torch.float32
    assert self_test.allowed_share(target) == 0.01
    torch.set_float32_matmul_precision(setting)
    assert working_dtype(CPU, torch.float32) == {"high": torch.float16, "medium": torch.bfloat16}[setting]
    assert working_dtype(torch.device("cuda"), torch.float32) == torch.float16  # there "medium" is TF32 too
    assert working_dtype(CPU, torch.float64) == torch.float64
    assert self_test.allowed_share(target) == 0.2
    assert target.supports_trees and len(self_test._verdicts) == 2, "tested again"
    check_equal(
        model,
        drafting(model).generate(BATCH, attention_mask=MASK, max_new_tokens=16),
        plain(model, BATCH, attention_mask=MASK),
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: autocast and TF32 as CUDA has them")
@pytest.mark.parametrize("way", ["autocast", "tf32"])
def test_on_a_gpu(model: PreTrainedModel, highest: None, way: str) -> None:
    model.float().cuda()
    if way == "tf32":
        torch.set_float32_matmul_precision("high")
    options = {"attention_mask": MASK.cuda(), "max_new_tokens": 16, "do_sample": False}
    with torch.autocast("cuda", torch.bfloat16) if way == "autocast" else nullcontext():
        check_equal(model, drafting(model).generate(BATCH.cuda(), **options), plain(model, BATCH.cuda(), **options))


def test_autocast_is_part_of_the_verdict(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_test, "_verdicts", {})
    target = Target(model.float())
    assert target.supports_trees
    with torch.autocast(**BFLOAT16):
        assert (
            working_dtype(CPU, torch.float32) == torch.bfloat16 and working_dtype(CPU, torch.float64) == torch.float64
        )
        assert target.supports_trees and len(self_test._verdicts) == 2
