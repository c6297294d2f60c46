"""The notations of trees: what each means, and what each can hold."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel

from ladon import Decoder, new_heads
from ladon.errors import TreeError
from ladon.trees.fixed_tree import FixedTree, TreeSize, parse_tree, read_tree, write_tree

SIZE = TreeSize(budget=16, num_candidates=4, depth=3)
PATHS = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=3), max_size=6).map(
    lambda paths: FixedTree(tuple({tuple(p[:n]): None for p in paths for n in range(1, len(p) + 1)}))
)


@pytest.mark.parametrize(
    ("text", "tree"),
    [
        ("[[0], [0, 0], [1]]", FixedTree(((0,), (0, 0), (1,)))),
        ("[(0,), (0, 0), (1,)]", FixedTree(((0,), (0, 0), (1,)))),
        ('{"medusa_choices": [[0], [1]]}', FixedTree(((0,), (1,)))),
        ('{"speculative_token_tree": "[(0,), (0, 0)]"}', FixedTree(((0,), (0, 0)))),
        ("[1, 2, 1]", FixedTree(((0,), (1,), (0, 0), (1, 0)))),
        ("[]", FixedTree(())),
        ('{"num_steps": 3, "eagle_topk": 4, "num_draft_tokens": 16}', SIZE),
        (
            '{"speculative_num_steps": 3, "speculative_eagle_topk": 4, "speculative_num_draft_tokens": 16}',
            SIZE,
        ),
        ('{"speculative-num-steps": 3, "speculative-eagle-topk": 4, "speculative-num-draft-tokens": 16}', SIZE),
        ('{"total_token": 16, "depth": 2, "top_k": 4}', SIZE),
    ],
)
def test_meaning(tmp_path: Path, text: str, tree: FixedTree | TreeSize) -> None:
    assert parse_tree(text) == tree
    (tmp_path / "tree.json").write_text(text, encoding="utf-8")
    assert read_tree(tmp_path / "tree.json") == tree


@given(PATHS)
def test_rank_paths_come_back(tree: FixedTree) -> None:
    assert parse_tree(write_tree(tree, "rank-paths")) == tree
    assert parse_tree(write_tree(tree, "vllm")) == tree


@given(PATHS)
def test_a_notation_holds_a_tree_exactly_or_refuses(tree: FixedTree) -> None:
    try:
        text = write_tree(tree, "dense")
    except TreeError:
        widths = [max(p[d] for p in tree.paths if len(p) > d) + 1 for d in range(tree.max_depth)]
        assert set(FixedTree.from_dense([1, *widths]).paths) != set(tree.paths)
    else:
        back = parse_tree(text)
        assert isinstance(back, FixedTree) and set(back.paths) == set(tree.paths)
    for name in ("sglang", "eagle"):
        if tree.paths and all(rank == 0 for path in tree.paths for rank in path):
            depth = tree.max_depth
            assert parse_tree(write_tree(tree, name)) == TreeSize(budget=depth + 1, num_candidates=1, depth=depth)
        else:
            with pytest.raises(TreeError, match="the chain alone"):
                write_tree(tree, name)


@given(st.integers(1, 99), st.integers(1, 9), st.integers(1, 9))
def test_sizes_come_back(budget: int, num_candidates: int, depth: int) -> None:
    size = TreeSize(budget=budget, num_candidates=num_candidates, depth=depth)
    for name in ("sglang", "eagle"):
        assert parse_tree(write_tree(size, name)) == size


def test_what_is_written() -> None:
    assert json.loads(write_tree(SIZE, "sglang")) == {"num_steps": 3, "eagle_topk": 4, "num_draft_tokens": 16}
    assert json.loads(write_tree(SIZE, "eagle")) == {"total_token": 16, "depth": 2, "top_k": 4}
    assert write_tree(FixedTree(((0,), (1,))), "vllm") == "[(0,), (1,)]"
    assert write_tree(FixedTree.from_dense([1, 7, 6]), "dense") == "[1, 7, 6]"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not a tree", "neither JSON nor a list of tuples"),
        ("__import__('os').getcwd()", "neither JSON nor a list of tuples"),
        ('"text"', "no list of rank paths"),
        ("7", "no list of rank paths"),
        ("[[0], 1.5]", "no list of rank paths"),
        ("[[0, 0]]", "lacks its parent"),
        ("[2, 3]", "the first entry is the root"),
        ('{"num_steps": 3}', "an object with the keys num_steps; give rank paths"),
        ("{}", "keys none"),
        ('{"num_steps": 3, "eagle_topk": 0, "num_draft_tokens": 16}', "num_candidates is 0"),
        ('{"total_token": true, "depth": 2, "top_k": 4}', "budget is True"),
        ('{"total_token": 9, "depth": "2", "top_k": 4}', "depth is '2'"),
    ],
)
def test_nonsense_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "tree.json").write_text(text, encoding="utf-8")
    with pytest.raises(TreeError) as caught:
        read_tree(tmp_path / "tree.json")
    assert message in str(caught.value) and "tree.json" in str(caught.value) and "\n" not in str(caught.value)


def test_sizes_and_paths_do_not_mix(tmp_path: Path) -> None:
    with pytest.raises(TreeError, match="names paths, and a size has none"):
        write_tree(SIZE, "rank-paths")
    with pytest.raises(TreeError, match="'newick' is unknown; known: rank-paths"):
        write_tree(SIZE, "newick")
    with pytest.raises(TreeError, match=r"missing\.json"):
        read_tree(tmp_path / "missing.json")


@pytest.mark.parametrize(
    ("size", "budget", "nodes"),
    [
        (SIZE, "auto", 16),
        (SIZE, 5, 5),
        (TreeSize(budget=9, num_candidates=2, depth=3), "auto", 9),
        (TreeSize(budget=9, num_candidates=1, depth=2), "auto", 3),
        (TreeSize(budget=2, num_candidates=1, depth=2), "auto", 2),
    ],
)
def test_a_decoder_takes_sizes(model: PreTrainedModel, size: TreeSize, budget: int | str, nodes: int) -> None:
    heads = new_heads(model, 3)
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    prompt = torch.randint(3, 97, (1, 5))
    expected = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False)
    decoder = Decoder(model, heads, tree=size, budget=budget)
    output = decoder.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False)
    assert torch.equal(output, expected)
    steps = list(decoder.trace(prompt, max_new_tokens=12))
    assert max(len(step.tokens) for step in steps) == nodes
    for step in steps:  # no node has more children than the size allows candidates
        kept = zip(step.parents, step.log_probs, strict=True)
        parents = [parent for parent, log_prob in kept if parent >= 0 and log_prob > -math.inf]
        assert max(map(parents.count, parents), default=0) <= size.num_candidates
