"""The cache against lists: after any sequence of trees and commits it holds what a plain run would hold."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from ladon.errors import InputError
from ladon.target.kv_cache import TreeCache
from ladon.target.target import Target
from random_trees import draw, pad_paths

HEADS = (2, 1)  # one layer each
WIDTHS = (3, 2)  # of keys and of values


def write(cache: TreeCache, states: Tensor, rows: list[int] | None = None) -> None:
    """Write N new tokens [b, N] to every layer, each entry telling its token, layer, head and kind apart."""
    places = list(range(cache.num_rows)) if rows is None else rows
    lengths = [cache.host_lengths[row] for row in places]
    slots = torch.tensor(lengths)[:, None] + torch.arange(states.shape[1]) if len(set(lengths)) > 1 else None
    side_by_side = places == list(range(places[0], places[-1] + 1))
    index = range(places[0], places[-1] + 1) if side_by_side else torch.tensor(places)
    cache.route.reserve(max(cache.host_lengths) + states.shape[1])
    cache.route.aim(max(lengths), states.shape[1], index, slots=slots)
    for layer, heads in enumerate(HEADS):
        keys, values = (entry(states, layer, heads, kind) for kind in (0, 1))
        seen_keys, seen_values = cache.update(keys, values, layer)
        assert seen_keys.shape == (len(lengths), heads, cache.route.reach, WIDTHS[0])
        assert seen_values.shape == (len(lengths), heads, cache.route.reach, WIDTHS[1])
        for row, length in enumerate(lengths):
            assert torch.equal(seen_keys[row, :, length : length + states.shape[1]], keys[row])
        indexed = cache.layers[layer].update_indexer(states[:, :, None].double())  # a step of newer models only
        assert indexed.shape == (len(lengths), cache.route.reach, 1)
    cache.record(states)


def entry(states: Tensor, layer: int, heads: int, kind: int) -> Tensor:
    """The entries [b, heads, N, D] that stand for tokens [b, N]."""
    head = torch.arange(heads)[:, None, None] * 1000
    column = torch.arange(WIDTHS[kind]) * 10_000
    return states[:, None, :, None].double() + head + column + (layer * 2 + kind) * 100_000


def check(cache: TreeCache, tokens: list[list[int]]) -> None:
    """Every layer holds the entries of these tokens, and nothing anywhere is infinite or NaN."""
    assert cache.host_lengths == cache.lengths.tolist() == [len(row) for row in tokens]
    for layer, heads in enumerate(HEADS):
        stored = cache.layers[layer]
        for kind, buffer in enumerate((stored.keys, stored.values)):
            assert buffer.isfinite().all()
            assert buffer.shape[0] >= len(tokens) and buffer.shape[1] == heads
            for row, row_tokens in enumerate(tokens):
                wanted = entry(torch.tensor([row_tokens]), layer, heads, kind)[0]
                assert torch.equal(buffer[row, :, : len(row_tokens)], wanted)
        for row, row_tokens in enumerate(tokens):
            assert stored.indexer_keys[row, 0, : len(row_tokens), 0].tolist() == row_tokens
    for row, row_tokens in enumerate(tokens):
        assert cache.tokens(len(row_tokens))[row].tolist() == row_tokens


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32),
    batch_size=st.integers(1, 4),
    prompt=st.integers(1, 70),
    even=st.booleans(),
    steps=st.lists(st.tuples(st.integers(1, 40), st.integers(0, 9)), max_size=8),
)
def test_any_sequence_of_trees(
    seed: int, batch_size: int, prompt: int, even: bool, steps: list[tuple[int, int]]
) -> None:
    rng = random.Random(seed)
    cache = TreeCache(len(HEADS), batch_size, torch.device("cpu"), keep_tokens=True)
    lengths = [prompt if even else rng.randint(1, prompt) for _ in range(batch_size)]
    prompts = [[rng.randrange(900) for _ in range(length)] for length in lengths]
    padded = torch.tensor([row + [999] * (max(lengths) - len(row)) for row in prompts])
    write(cache, padded)
    cache.set_lengths(lengths)
    tokens = prompts
    for num_nodes, action in steps:
        drawn = draw(rng, [None] * len(tokens), num_nodes, 900)
        if action == 0 and len(tokens) > 1:  # two calls for two groups of rows
            for group in ([0], list(range(1, len(tokens)))):
                write(cache, drawn.tree.tokens[group], group)
        else:
            write(cache, drawn.tree.tokens)
        paths = [drawn.path(row, rng.randrange(num_nodes)) for row in range(len(tokens))]
        path, count = pad_paths(paths)
        cache.commit(path, count)
        cache.mirror(count.tolist())
        tokens = [row + drawn.tokens(index, paths[index]) for index, row in enumerate(tokens)]
        check(cache, tokens)
        if action == 1:
            kept = rng.sample(range(len(tokens)), rng.randint(1, len(tokens)))
            cache.keep(kept)
            tokens = [tokens[row] for row in kept]
            check(cache, tokens)


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**32), events=st.lists(st.sampled_from(["join", "read", "step", "leave"]), max_size=30))
def test_rows_that_come_and_go(seed: int, events: list[str]) -> None:
    """Rows join behind the others and are read in parts, the first ones get trees, any may leave and change places."""
    rng = random.Random(seed)
    cache = TreeCache(len(HEADS), 0, torch.device("cpu"), keep_tokens=True)
    tokens: list[list[int]] = []
    for event in events:
        if event == "join":
            cache.append(1)
            tokens.append([])
        if not tokens:
            continue
        if event in ("join", "read"):  # the last row goes on; nothing may be asked of a row without tokens
            more = [rng.randrange(900) for _ in range(rng.randint(1, 50))]
            write(cache, torch.tensor([more]), [len(tokens) - 1])
            tokens[-1] = tokens[-1] + more
            cache.set_lengths([len(row) for row in tokens])
        elif event == "step":
            active = rng.randint(1, len(tokens))
            drawn = draw(rng, [None] * active, rng.randint(1, 20), 900)
            write(cache, drawn.tree.tokens, list(range(active)))
            paths = [drawn.path(row, rng.randrange(drawn.tree.num_nodes)) for row in range(active)]
            path, count = pad_paths(paths)
            cache.commit(path, count)
            cache.mirror(count.tolist())
            tokens[:active] = [row + drawn.tokens(index, paths[index]) for index, row in enumerate(tokens[:active])]
        else:
            kept = rng.sample(range(len(tokens)), rng.randint(0, len(tokens)))
            cache.keep(kept)
            tokens = [tokens[row] for row in kept]
        if tokens:
            check(cache, tokens)


def test_a_row_that_leaves_costs_the_copy_of_one_row() -> None:
    """The last row moves into the hole, as far as it is in use; all other rows and slots stay where they are."""
    cache = TreeCache(len(HEADS), 4, torch.device("cpu"))
    write(cache, torch.arange(4 * 9).view(4, 9))
    cache.set_lengths([9, 9, 9, 5])
    before = [(layer, name, store, store.clone()) for layer in cache.layers for name, store in layer.stores.items()]
    cache.keep([0, 3, 2])
    for layer, name, store, old in before:
        assert layer.stores[name] is store, "the buffers stay"
        old[:, 1, :, :5] = old[:, 3, :, :5]
        assert torch.equal(store, old)
    assert cache.host_lengths == cache.lengths.tolist() == [9, 5, 9]


def test_rows_grow_by_doubling_and_a_stretch_of_them_is_a_view() -> None:
    cache = TreeCache(len(HEADS), 0, torch.device("cpu"))
    capacities = []
    for number in range(9):
        cache.append(1)
        write(cache, torch.tensor([[number, 5]]), [number])
        capacities.append(cache.layers[0].keys.shape[0])
    assert capacities == [1, 2, 4, 4, 8, 8, 8, 8, 16]
    cache.route.aim(2, 1, range(3, 6))
    states = torch.zeros(3, HEADS[0], 1, WIDTHS[0])
    seen, _ = cache.update(states, states[..., : WIDTHS[1]], 0)
    assert seen.data_ptr() == cache.layers[0].keys[3].data_ptr() and seen.shape[0] == 3


def test_paths_wider_than_the_tree_are_cut() -> None:
    """A path padded beyond the nodes that were written must not reach into another row's slots."""
    cache = TreeCache(len(HEADS), 2, torch.device("cpu"), keep_tokens=True)
    write(cache, torch.tensor([[5] * 63, [6] * 63]))
    cache.set_lengths([63, 63])
    write(cache, torch.tensor([[7], [8]]))  # slot 63, the last of the first capacity
    cache.commit(torch.zeros(2, 4, dtype=torch.int64), torch.tensor([1, 1]))
    cache.mirror([1, 1])
    check(cache, [[5] * 63 + [7], [6] * 63 + [8]])


def test_growth_is_geometric_and_layer_by_layer() -> None:
    cache = TreeCache(len(HEADS), 1, torch.device("cpu"), keep_tokens=True)
    capacities = set()
    for length in range(0, 400, 8):
        cache.set_lengths([length])
        write(cache, torch.full((1, 8), 3))
        capacities.add(cache.layers[0].keys.shape[2])
    assert len(capacities) <= 4  # 64, 128, 256, 512: copies stay proportional to the tokens
    cache.route.aim(capacity := cache.route.capacity, 8, range(1))
    states = torch.zeros(1, HEADS[0], 8, WIDTHS[0])
    cache.update(states, states[..., : WIDTHS[1]], 0)
    assert cache.layers[0].keys.shape[2] == 2 * capacity
    assert cache.layers[1].keys.shape[2] == capacity  # not before the forward reaches it


def test_bytes() -> None:
    cache = TreeCache(len(HEADS), 2, torch.device("cpu"))
    assert cache.nbytes == 0
    write(cache, torch.tensor([[5, 6], [7, 8]]))
    per_slot = sum(heads * sum(WIDTHS) + 1 for heads in HEADS)  # and one number for the indexer
    assert cache.nbytes == 2 * cache.route.capacity * per_slot * 8


def test_layers_that_are_never_written_cost_nothing() -> None:
    """Layers that read another layer's keys (gemma3n, gemma4) stay empty through commits and dropped rows."""
    cache = TreeCache(len(HEADS) + 1, 2, torch.device("cpu"), keep_tokens=True)
    write(cache, torch.tensor([[5, 6], [7, 8]]))
    cache.commit(torch.tensor([[0, 1], [0, 0]]), torch.tensor([2, 1]))
    cache.mirror([2, 1])
    cache.keep([1])
    assert cache.layers[-1].keys is None
    assert cache.host_lengths == [1]


def test_tokens_need_asking_for() -> None:
    with pytest.raises(InputError, match="keep_tokens"):
        TreeCache(1, 1, torch.device("cpu")).tokens(3)


def test_equals_a_plain_run(tiny_llama: PreTrainedModel) -> None:
    """Keys and values after random trees are those of a plain forward over the accepted tokens."""
    rng = random.Random(0)
    target = Target(tiny_llama)
    tokens = [[rng.randrange(97) for _ in range(length)] for length in (5, 19, 2)]
    cache = target.new_cache(len(tokens))
    target.prefill([torch.tensor(row) for row in tokens], cache)
    for _ in range(6):
        drawn = draw(rng, [None] * len(tokens), 9, 97)
        target.verify(drawn.tree, cache)
        paths = [drawn.path(row, rng.randrange(9)) for row in range(len(tokens))]
        path, count = pad_paths(paths)
        cache.commit(path, count)
        cache.mirror(count.tolist())
        tokens = [row + drawn.tokens(index, paths[index]) for index, row in enumerate(tokens)]
    for row, row_tokens in enumerate(tokens):
        plain = DynamicCache(config=tiny_llama.config)
        with torch.no_grad():
            tiny_llama(torch.tensor([row_tokens]), past_key_values=plain)
        for ours, theirs in zip(cache.layers, plain.layers, strict=True):
            for name in ("keys", "values"):
                stored = getattr(ours, name)[row, :, : len(row_tokens)]
                torch.testing.assert_close(stored, getattr(theirs, name)[0], rtol=0, atol=1e-12)
