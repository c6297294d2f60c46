"""The cache against lists: after any sequence of trees and commits it holds what a plain run would hold."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from ladon.cache import TreeCache
from ladon.errors import InputError
from ladon.target import Target
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
