"""Masks against a plain reading of the rules, node by node and slot by slot."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ladon.target.attention_masks import Locality, Sight, as_additive, causal_mask, localities, model_masks, tree_mask
from ladon.trees.token_tree import ancestor_mask, node_depths, position_ids
from random_trees import Drawn, draw

LOCALITIES = [Locality(), Locality(window=1), Locality(window=3), Locality(window=7), Locality(chunk=3)]


def sees(locality: Locality, query: int, key: int) -> bool:
    """The rule for one pair of positions."""
    if locality.window is not None:
        return query - locality.window < key
    return locality.chunk is None or key // locality.chunk == query // locality.chunk


def expected(drawn: Drawn, lengths: list[int], locality: Locality, row: int, node: int, slot: int) -> bool:
    """Whether a node may see a slot: committed tokens and its own path, as far as the locality lets it."""
    length = lengths[row]
    query = length + drawn.depth(row, node)
    if slot < length:
        return sees(locality, query, slot)
    own_path = drawn.path(row, node)
    return slot - length in own_path and sees(locality, query, length + drawn.depth(row, slot - length))


def sight_of(drawn: Drawn, lengths: list[int], *, shared: bool) -> Sight:
    """What the target makes for a verify call."""
    ancestors = ancestor_mask(drawn.tree.parents, drawn.tree.max_depth)
    depths, row_lengths = node_depths(ancestors), torch.tensor(lengths)
    reach = max(lengths) + drawn.tree.num_nodes
    visible = tree_mask(ancestors, row_lengths, lengths[0] if shared else None, reach)
    return Sight(visible=visible, queries=position_ids(depths, row_lengths), tree=(depths, row_lengths))


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**32),
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=4),
    num_nodes=st.integers(1, 9),
    locality=st.sampled_from(LOCALITIES),
    even=st.booleans(),
)
def test_tree_mask(seed: int, lengths: list[int], num_nodes: int, locality: Locality, even: bool) -> None:
    if even:
        lengths = [lengths[0]] * len(lengths)
    drawn = draw(random.Random(seed), [None] * len(lengths), num_nodes, 50)
    sight = sight_of(drawn, lengths, shared=even)
    mask = model_masks(sight, {"full_attention": locality}, None)
    assert isinstance(mask, torch.Tensor)
    assert mask.shape == (len(lengths), 1, num_nodes, max(lengths) + num_nodes)
    for row in range(len(lengths)):
        for node in range(num_nodes):
            slots = range(max(lengths) + num_nodes)
            wanted = [expected(drawn, lengths, locality, row, node, slot) for slot in slots]
            assert mask[row, 0, node].tolist() == wanted
    assert mask.any(-1).all()  # padding nodes too see something finite


@settings(deadline=None)
@given(start=st.integers(0, 9), count=st.integers(1, 9), anchored=st.booleans(), locality=st.sampled_from(LOCALITIES))
def test_prompt_mask(start: int, count: int, anchored: bool, locality: Locality) -> None:
    positions = [*range(start, start + count), *([start + count + 5] if anchored else [])]
    queries = torch.tensor(positions)[None]
    sight = Sight(visible=causal_mask(queries, start + len(positions)), queries=queries)
    mask = model_masks(sight, {"full_attention": locality}, None)
    for index in range(count):
        query = start + index
        wanted = [slot <= query and sees(locality, query, slot) for slot in range(start + len(positions))]
        assert mask[0, 0, index].tolist() == wanted


def test_one_mask_per_layer_type() -> None:
    drawn = draw(random.Random(0), [None, None], 6, 50)
    sight = sight_of(drawn, [9, 4], shared=False)
    config = SimpleNamespace(
        layer_types=["sliding_attention", "full_attention", "chunked_attention", "sliding_attention"],
        sliding_window=3,
        attention_chunk_size=4,
    )
    masks = model_masks(sight, localities(config), torch.float32)
    assert isinstance(masks, dict)
    for name, locality in (
        ("sliding_attention", Locality(window=3)),
        ("full_attention", Locality()),
        ("chunked_attention", Locality(chunk=4)),
    ):
        single = model_masks(sight, {name: locality}, torch.float32)
        assert torch.equal(masks[name], single)
    assert set(masks) == set(config.layer_types)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_additive_masks_are_finite(dtype: torch.dtype) -> None:
    mask = torch.tensor([[True, False], [False, False]])
    added = as_additive(mask, dtype)
    assert added.dtype == dtype
    assert added.isfinite().all()
    assert torch.equal(added == 0, mask)
    assert torch.equal(added[1], torch.full((2,), torch.finfo(dtype).min, dtype=dtype))


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, {"full_attention": Locality()}),
        ({"sliding_window": None}, {"full_attention": Locality()}),
        ({"sliding_window": 5}, {"full_attention": Locality(window=5)}),
        ({"sliding_window": 5, "layer_types": ["full_attention"] * 2}, {"full_attention": Locality()}),
        ({"sliding_window": 5, "layer_types": ["sliding_attention"]}, {"sliding_attention": Locality(window=5)}),
        ({"layer_types": ["indexed_attention"]}, {"indexed_attention": Locality()}),
    ],
)
def test_localities(options: dict[str, object], wanted: dict[str, Locality]) -> None:
    assert localities(SimpleNamespace(**options)) == wanted
