"""n-grams in decoding: the same tokens, fewer forwards, and rows that keep their own texts."""

from __future__ import annotations

import pytest
import torch

import ladon
from drafts import TREES, RandomSizing, make_engine, make_proposer
from ladon import TreeError
from ladon.drafting.ngram_index import MOST_GUESSED
from ladon.drafting.ngram_lookup import NgramLookup, looks_up
from ladon.target.target import Target
from ladon.trees.token_tree import TokenTree, root_tree
from ladon.trees.transfer import flat, on_host, to_device

CODE = [11, 12, 13, 14, 15, 16, 17, 18]
REPETITIVE = torch.tensor([[*CODE, 3, 4, *CODE, 5, 6, *CODE[:4]]])


def tokens_of(tree: TokenTree, row: int) -> set[tuple[int, ...]]:
    """The paths of a row's tree."""
    paths: list[tuple[int, ...]] = [()]
    for node in range(1, tree.num_nodes):
        paths.append((*paths[int(tree.parents[row, node])], int(tree.tokens[row, node])))
    return {path for path, value in zip(paths, tree.log_probs[row].tolist(), strict=True) if value > -torch.inf}


def step(lookup: NgramLookup, tree: TokenTree, table: list[list[int]], prompts: list[torch.Tensor], room=lambda n: n):
    """What the engine does with it in one step."""
    lookup.follow(table, prompts)
    return lookup.extended(on_host(flat(tree).tolist(), tree), room)


def test_nothing_to_add():
    lookup = NgramLookup()
    assert step(lookup, root_tree(torch.tensor([7])), [[1, 7]], [torch.tensor([1, 2, 3])]) is None
    assert step(lookup, root_tree(torch.tensor([8])), [[1, 8]], []) is None


def test_rows_have_their_own_texts():
    lookup = NgramLookup()
    prompts = [torch.tensor([1, 2, 3, 4, 1]), torch.tensor([1, 2, 9, 4, 1]), torch.tensor([5, 6, 7])]
    tree = step(lookup, root_tree(torch.tensor([2, 2, 8])), [[1, 2], [1, 2], [1, 8]], prompts)
    assert tree is not None
    assert [(3,) in tokens_of(tree, row) for row in range(3)] == [True, False, False]
    assert [(9,) in tokens_of(tree, row) for row in range(3)] == [False, True, False]
    assert tokens_of(tree, 2) == {()} and tree.tokens[:, 0].tolist() == [2, 2, 8]
    lookup.keep([2, 1])
    tree = step(lookup, root_tree(torch.tensor([5, 4])), [[1, 5, 0], [2, 9, 4]], [])
    assert tree is not None
    assert tokens_of(tree, 0) == {()} and (1, 2, 9) in tokens_of(tree, 1)  # 9 4 came before 1 2 9


def test_heads_trees_are_kept_and_n_grams_added():
    lookup = NgramLookup()
    heads = TokenTree(
        tokens=torch.tensor([[2, 30, 3]]),
        parents=torch.tensor([[-1, 0, 0]]),
        log_probs=torch.tensor([[0.0, -0.5, -2.0]]),
        max_depth=1,
    )
    tree = step(lookup, heads, [[1, 2]], [torch.tensor([1, 2, 3, 4, 1])], room=lambda nodes: 64)
    assert tree is not None and tree.num_nodes == 64
    assert {(30,), (3,), (3, 4)} <= tokens_of(tree, 0)
    again = to_device(tree, torch.device("cpu"))
    assert again is tree


def test_where_n_grams_have_a_place():
    heads = torch.nn.Linear(1, 1)
    assert looks_up("dynamic", heads, "auto") and looks_up("dynamic", None, 4) and looks_up("chain", None, "auto")
    assert not any((looks_up("chain", heads, "auto"), looks_up("off", None, "auto"), looks_up("dynamic", None, 1)))
    assert not looks_up(TREES["fixed"], None, "auto")


@pytest.mark.parametrize(
    "options", [{"budget": 16}, {"budget": "auto"}, {"deterministic": True}, {"tree": "chain", "budget": 9}]
)
def test_alone_it_says_the_same_in_fewer_forwards(model, options):
    plain = ladon.Decoder(model, tree="off")
    expected = plain.generate(REPETITIVE, max_new_tokens=80, do_sample=False)
    decoder = ladon.Decoder(model, **options)
    assert torch.equal(decoder.generate(REPETITIVE, max_new_tokens=80, do_sample=False), expected)
    assert plain.stats.acceptance_length == 1.0
    if options.get("budget") != "auto":  # there a clock decides
        assert decoder.stats.acceptance_length > 1.5
    off = ladon.Decoder(model, **options, ngrams="off")
    assert torch.equal(off.generate(REPETITIVE, max_new_tokens=80, do_sample=False), expected)
    assert off.stats.nodes_verified == off.stats.row_steps


def test_merged_with_heads_more_is_accepted(decoder, model):
    """Random heads are right now and then; what repeats itself is not their affair."""
    both, alone = (ladon.Decoder(model, decoder.heads, budget=16, ngrams=name) for name in ("auto", "off"))
    outputs = [d.generate(REPETITIVE, max_new_tokens=80, do_sample=False) for d in (both, alone)]
    assert torch.equal(*outputs)
    assert both.stats.acceptance_length > 1.25 * alone.stats.acceptance_length


def test_sampled_text_is_the_same(model):
    options = {"max_new_tokens": 60, "do_sample": True, "temperature": 0.02, "seed": 3}  # cold: it repeats itself
    batch = REPETITIVE.repeat(3, 1)
    expected = ladon.Decoder(model, tree="off").generate(batch, **options)
    decoder = ladon.Decoder(model, budget=16)
    assert torch.equal(decoder.generate(batch, **options), expected)
    assert decoder.stats.nodes_verified > decoder.stats.row_steps


def test_deterministic_runs_take_the_same_steps(model):
    decoder = ladon.Decoder(model, deterministic=True)
    steps = []
    for _ in range(2):
        rows = decoder.rows([REPETITIVE[0], REPETITIVE[0, 5:]], max_new_tokens=60)
        steps.append([(s.emitted, None if s.tree is None else s.tree.num_nodes) for s in decoder.decode(rows)])
    assert steps[0] == steps[1] and any(nodes and nodes > 1 for _, nodes in steps[0])


def test_a_chain_has_one_path(model):
    rows = (decoder := ladon.Decoder(model, tree="chain", budget=8)).rows([REPETITIVE[0]], max_new_tokens=40)
    trees = [s.tree for s in decoder.decode(rows) if s.tree is not None]
    assert max(tree.num_nodes for tree in trees) > 2
    for tree in trees:  # near its end a row's tree is cut by padding
        depth = int((tree.log_probs > -torch.inf).sum())
        assert tree.parents[0, :depth].tolist() == list(range(-1, depth - 1))


def test_a_row_that_leaves_takes_its_text_along(model):
    decoder = ladon.Decoder(model, budget=8)
    engine = decoder.engine()
    rows = decoder.rows([REPETITIVE[0]] * 3, max_new_tokens=12)
    rows[1].max_new_tokens = 4
    for row in rows:
        engine.submit(row)
    while any(not row.finished for row in rows):
        before = sum(not row.finished for row in rows)
        engine.step()
        assert len(engine._host_merge._lookup._rows) == before
    assert engine.step() is None
    assert engine._host_merge._lookup._rows == [] and [len(row.tokens) for row in rows] == [12, 4, 12]


def test_sums_of_merged_trees_reach_the_sizing(model, decoder):
    """Depths beyond the heads' are summed, and steps that heads had no part in are told apart."""
    sizing, target = RandomSizing(2), Target(model)
    proposer = make_proposer("heads", "dynamic", [], 97, decoder.heads)
    for _ in range(4):
        engine = make_engine(target, proposer, budget=sizing, lookup=NgramLookup())
        for _ in engine.run(decoder.rows([REPETITIVE[0]], max_new_tokens=80)):
            pass
    depths = {len(sums) for sums in sizing.sums if sums is not None}
    assert max(depths) > 3 and max(depths) <= MOST_GUESSED
    for sums in sizing.sums:
        for masses in sums or ():
            assert masses == sorted(masses)
    assert {record.by_heads for record in sizing.records if record.nodes > 1} == {True, False}


def test_unknown_option(model):
    with pytest.raises(TreeError, match='ngrams is \'yes\'; give "auto", "on", "off"'):
        ladon.Decoder(model, ngrams="yes")
