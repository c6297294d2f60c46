"""Memory: what outputs keep is no more than what they hold, and one prompt that does not fit ends alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import families
import ladon
from drafts import make_engine, make_proposer
from greedy import BATCH, MASK, PROMPT, generate, plain
from ladon.drafting.proposer import RootProposer
from ladon.engine.sequence import Row
from ladon.target.target import Target
from ladon.trees.token_tree import TokenTree, ancestor_mask, node_depths
from ladon.util.devices import is_out_of_memory


def held(tensors: Iterable[Tensor]) -> int:
    """Bytes that stay in memory because of these tensors."""
    return sum({one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}.values())


@pytest.mark.parametrize("rows", [1, 3])
def test_outputs_hold_what_they_show(model: PreTrainedModel, decoder: ladon.Decoder, rows: int) -> None:
    """Once each token held the table of its step, with all rows and all nodes."""
    options = {"attention_mask": MASK[:rows], "max_new_tokens": 16, "return_dict_in_generate": True}
    options |= {"output_scores": True, "output_logits": True}
    decoder = ladon.Decoder(model, decoder.heads, budget=16)
    found, expected = decoder.generate(BATCH[:rows], **options), plain(model, BATCH[:rows], **options)
    assert decoder.stats.nodes_verified > 2 * decoder.stats.tokens
    for name in ("scores", "logits"):
        ours, theirs = getattr(found, name), getattr(expected, name)
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5)
        assert held(ours) == held(theirs) == 16 * rows * 97 * 4


def test_rows_hold_what_they_keep(decoder: ladon.Decoder) -> None:
    options: dict[str, Any] = {"return_dict_in_generate": True, "output_scores": True}
    prompts = [BATCH[1], BATCH[0][3:]]
    row, short = (
        decoder.rows([prompt], max_new_tokens=n, **options)[0] for prompt, n in zip(prompts, (16, 5), strict=True)
    )
    for _ in decoder.decode([row, short]):
        kept = [*row.kept.get("scores", []), *short.kept.get("scores", [])]
        assert held(kept) == len(kept) * 97 * 4
    assert (len(row.kept["scores"]), len(short.kept["scores"])) == (16, 5)


def test_capped_trees_have_their_own_depths() -> None:
    parents = torch.tensor([[-1, 0, 1, 2, 1], [-1, 0, 1, 2, 3]])
    depths = node_depths(ancestor_mask(parents, 4))
    tree = TokenTree(tokens=parents, parents=parents, log_probs=-depths.float(), max_depth=4, depths=depths)
    for caps in ([1, 3], [2, 1], [3, 3], [0, 2]):
        capped = tree.within(caps)
        assert capped.depths is not None
        assert torch.equal(capped.depths, node_depths(ancestor_mask(capped.parents, capped.max_depth)))


def too_long(model: PreTrainedModel, limit: int, error: Exception, total: int | None = None) -> list[tuple[int, ...]]:
    """Let the model run out of memory where a forward has more than `limit` tokens in a row, or `total` in all.

    It happens in the second layer: the cache of the first has grown by then. Returns the shapes that failed.
    """
    failed: list[tuple[int, ...]] = []

    def check(_: nn.Module, args: Any) -> None:
        rows, tokens = args[0].shape[:2]
        if tokens > limit or (total is not None and rows * tokens > total):
            failed.append((rows, tokens))
            raise error

    model.model.layers[1].register_forward_pre_hook(check)
    return failed


ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
    MemoryError(),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_a_prompt_that_does_not_fit_ends_alone(model: PreTrainedModel, error: Exception) -> None:
    """The others, those that decode, those that join with it and those that come later, say what they would alone."""
    prompts = [
        torch.arange(3, 9),
        torch.arange(40, 52),
        torch.arange(3, 93),
        torch.arange(20, 24),
        torch.arange(60, 70),
    ]
    expected = [generate(model, prompt, 14) for prompt in prompts]
    target = Target(model)
    truth = {tuple(prompt.tolist()): tokens for prompt, tokens in zip(prompts, expected, strict=True)}
    proposer = make_proposer("oracle", "dynamic", truth, 97, None)
    engine = make_engine(target, proposer)
    rows = [
        Row(prompt=prompt, max_new_tokens=14, is_stop=lambda _: False, keeps_past=True, number=number)
        for number, prompt in enumerate(prompts)
    ]
    target.new_cache(1)  # tests the model, while it can
    failed = too_long(model, 64, error)
    engine.submit(rows[0])
    for _ in range(2):
        engine.step()
    before = engine.cache_bytes
    for row in rows[1:4]:
        engine.submit(row)
    engine.step()
    assert failed == [(3, 90), (1, 90)], "together, and then alone"
    assert rows[2].finished and type(rows[2].error) is type(error) and rows[2].tokens == []
    assert rows[2].error.__traceback__ is None, "it would hold the forward's tensors"
    assert engine.cache_bytes <= 4 * before, "nobody holds room for what did not fit"
    assert [row.error for row in rows if row is not rows[2]] == [None] * 4
    engine.submit(rows[4])
    while engine.step() is not None:
        pass
    for row in (rows[0], rows[1], rows[3], rows[4]):
        assert row.tokens == expected[row.number] and row.error is None and row.past is not None
    assert rows[2].past is None


def test_prompts_that_do_not_fit_together_are_read_one_by_one(model: PreTrainedModel) -> None:
    prompts = [torch.arange(3, 40), torch.arange(40, 80), torch.arange(10, 50)]
    expected = [generate(model, prompt, 8) for prompt in prompts]
    target = Target(model)
    target.new_cache(1)
    failed = too_long(model, 64, torch.OutOfMemoryError("no"), total=60)
    rows = [Row(prompt=prompt, max_new_tokens=8, is_stop=lambda _: False) for prompt in prompts]
    for _ in make_engine(target, RootProposer()).run(rows):
        pass
    assert [row.tokens for row in rows] == expected and failed == [(3, 40)]


def test_a_later_chunk_that_does_not_fit(model: PreTrainedModel) -> None:
    """What was read of the prompt before stays in place for others until the row leaves."""
    prompts = [torch.arange(3, 63), torch.arange(40, 50)]
    (expected,) = [generate(model, prompts[1], 10)]
    target = Target(model, prefill_chunk=16)
    target.new_cache(1)

    def check(_: nn.Module, args: Any) -> None:
        seen.append(args[0].shape[1])
        if seen[-1] == 16 and seen.count(16) == 3:
            raise torch.OutOfMemoryError("no")

    seen: list[int] = []
    model.model.layers[1].register_forward_pre_hook(check)
    rows = [Row(prompt=prompt, max_new_tokens=10, is_stop=lambda _: False) for prompt in prompts]
    with pytest.raises(torch.OutOfMemoryError):
        for _ in make_engine(target, RootProposer()).run(rows):
            pass
    assert rows[1].tokens == expected and rows[1].error is None and not rows[1].cancelled
    assert rows[0].tokens == []


def test_a_call_raises_when_the_others_have_ended(model: PreTrainedModel, decoder: ladon.Decoder) -> None:
    expected = generate(model, PROMPT[0], 12)
    decoder.generate(PROMPT, max_new_tokens=1)
    too_long(model, 64, torch.OutOfMemoryError("CUDA out of memory"))
    rows = decoder.rows([torch.arange(3, 93), PROMPT[0]], max_new_tokens=12)
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        for _ in decoder.decode(rows):
            pass
    assert rows[1].tokens == expected
    with pytest.raises(torch.OutOfMemoryError):
        decoder.generate(torch.arange(3, 93)[None], max_new_tokens=12)


def test_a_kept_prefix_that_does_not_fit_is_read_anew(decoder: ladon.Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"max_new_tokens": 6, "return_dict_in_generate": True}
    first = decoder.generate(PROMPT, **options)
    expected = decoder.generate(first.sequences, **options).sequences
    from ladon.target.kv_cache import TreeCache

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(TreeCache, "write_row", fail)
    found = decoder.generate(first.sequences, past_key_values=first.past_key_values, **options)
    assert torch.equal(found.sequences, expected) and decoder.stats.reused_tokens == 0


def test_prompts_that_a_proposer_reads(model: PreTrainedModel) -> None:
    """Hidden states that are kept for it are those of one prompt alone, and go with a prompt that does not fit."""

    class Reader(RootProposer):
        reads_prompts = True

        def __init__(self) -> None:
            self.seen: list[tuple[int, int]] = []

        def join(self, prompts: Any, hidden: Tensor, states: Any = ()) -> None:
            self.seen += [(len(own), held([own])) for own in states]

    target, reader = Target(model), Reader()
    target.new_cache(1)
    too_long(model, 64, torch.OutOfMemoryError("no"))
    rows = [
        Row(prompt=prompt, max_new_tokens=3, is_stop=lambda _: False)
        for prompt in (torch.arange(3, 9), torch.arange(3, 93), torch.arange(40, 60))
    ]
    engine = make_engine(target, reader)
    for row in rows:
        engine.submit(row)
    engine.step()
    engine.step()
    assert reader.seen == [(6, 6 * 32 * 8), (20, 20 * 32 * 8)] and rows[1].states == []


def test_what_counts_as_out_of_memory() -> None:
    assert all(map(is_out_of_memory, ERRORS)) and is_out_of_memory(RuntimeError("MPS backend out of memory (MPS ...)"))
    assert not any(map(is_out_of_memory, (RuntimeError("shape"), ValueError("out of memory"), KeyboardInterrupt())))


@pytest.mark.parametrize("name", ["gemma3n_text", "deepseek_v3", "llama4_text"])
def test_families_with_caches_of_their_own(name: str) -> None:
    """Layers that share a cache, an indexer, prompts that go in one piece."""
    if name not in families.FAMILIES:
        pytest.skip(f"no family {name} here")
    model = families.build(name, torch.float64 if families.FAMILIES[name].float64 else torch.float32)
    model.generation_config.eos_token_id = None
    prompts = [torch.arange(3, 9), torch.arange(3, 60), torch.arange(40, 50)]
    expected = [generate(model, prompt, 8) for prompt in prompts]
    target = Target(model)
    target.new_cache(1)

    def check(_: nn.Module, args: Any) -> None:
        if args[0].shape[-2] > 20:
            raise torch.OutOfMemoryError("no")

    model.model.layers[1].register_forward_pre_hook(check)
    rows = [Row(prompt=prompt, max_new_tokens=8, is_stop=lambda _: False) for prompt in prompts]
    with pytest.raises(torch.OutOfMemoryError):
        for _ in make_engine(target, RootProposer()).run(rows):
            pass
    assert [row.tokens for row in rows] == [expected[0], [], expected[2]]
