"""Trees without what a constraint forbids: which nodes stay, in which order, and what is added."""

from __future__ import annotations

import math
import random

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ladon.constraints.state import GrammarState
from ladon.drafting.constrained import Draft, constrained_tree, constrained_trees, drafts_of
from ladon.engine.recorder import Recorder
from ladon.engine.sequence import Row
from ladon.engine.stats import DecodeStats
from ladon.tree_size.tree_sizes import TreeSizes
from ladon.trees.check import check_tree
from ladon.trees.token_tree import TokenTree
from ladon.trees.transfer import flat, on_host
from toys import Residues, Script

VOCAB = 24


def random_draft(seed: int, num_nodes: int, padding: int) -> Draft:
    """A tree with its nodes best first, siblings distinct; a log-probability of exactly the parent's now and then."""
    rng = random.Random(seed)
    nodes = [(0.0, 0, -1)]
    taken: set[tuple[int, int]] = set()
    while len(nodes) < num_nodes:
        parent, token = rng.randrange(len(nodes)), rng.randrange(3, VOCAB)
        if (parent, token) not in taken:
            taken.add((parent, token))
            nodes.append((nodes[parent][0] - rng.choice([0.0, rng.random() * 3]), token, parent))
    order = sorted(range(num_nodes), key=lambda node: -nodes[node][0])  # stable: a parent stays before its child
    new = {old: place for place, old in enumerate(order)}
    return Draft(
        [nodes[old][1] for old in order] + [3] * padding,
        [new.get(nodes[old][2], -1) for old in order] + [0] * padding,
        [nodes[old][0] for old in order] + [-math.inf] * padding,
    )


def path(tree: Draft, node: int) -> tuple[int, ...]:
    return () if node == 0 else (*path(tree, tree.parents[node]), tree.tokens[node])


def is_legal(constraint: Residues, tokens: tuple[int, ...]) -> bool:
    for token in tokens:
        if token not in constraint.tokens():
            return False
        constraint = constraint.after(token)
    return True


def check_shape(tree: Draft, grammar: GrammarState, constraint: Residues) -> None:
    """Prefix-closed and best first, siblings distinct, every path legal, every place that of its path."""
    assert tree.parents[0] == -1 and all(0 <= parent < node for node, parent in enumerate(tree.parents) if node)
    assert all(tree.log_probs[i] >= tree.log_probs[i + 1] for i in range(len(tree.tokens) - 1))
    paths = [path(tree, node) for node in range(len(tree.tokens))]
    assert len(set(paths)) == len(paths) == len(grammar.nodes)
    for tokens, place in zip(paths, grammar.nodes, strict=True):
        state = constraint
        for token in tokens:
            state = state.after(token)  # asserts that it is legal
        assert place.allowed == state.allowed()


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32), st.integers(1, 40), st.integers(0, 3), st.integers(2, 7), st.integers(1, 50))
def test_exactly_the_legal_nodes_stay(seed: int, size: int, padding: int, modulus: int, most: int) -> None:
    """Where there is always a choice (or a dead end), nothing is added."""
    draft = random_draft(seed, size, padding)
    classes = random.Random(seed).choice([0, max(1, modulus // 2), modulus])
    constraint = Residues(modulus, classes, seed=seed % 97, vocab_size=VOCAB)
    grammar = GrammarState(constraint)
    tree = constrained_tree(draft, grammar, most)
    check_shape(tree, grammar, constraint)
    legal = {path(draft, slot) for slot in range(size) if is_legal(constraint, path(draft, slot))}
    found = {path(tree, node) for node in range(len(tree.tokens))}
    assert found <= legal and len(found) == min(most, len(legal))
    if most >= len(legal):
        illegal = [slot for slot in range(1, size) if path(draft, slot) not in legal]
        assert grammar.illegal == illegal and grammar.drafted == size
        for num_nodes in (1, size // 2 + 1, size, size + 9):
            assert grammar.looked_through(num_nodes) == (
                min(num_nodes, size) - 1, sum(slot < num_nodes for slot in illegal)
            )  # fmt: skip


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32), st.integers(1, 40), st.integers(8, 30), st.integers(1, 50))
def test_forced_tokens_are_drafted(seed: int, size: int, modulus: int, most: int) -> None:
    """Few tokens are legal, often one: every node that is not the last has the token that must follow it."""
    draft, constraint = random_draft(seed, size, 1), Residues(modulus, 1, seed=seed % 97, vocab_size=VOCAB)
    grammar = GrammarState(constraint)
    tree = constrained_tree(draft, grammar, most)
    check_shape(tree, grammar, constraint)
    drafted = {path(draft, slot) for slot in range(size)}
    paths = {path(tree, node): log_prob for node, log_prob in enumerate(tree.log_probs)}
    for node, place in enumerate(grammar.nodes):
        tokens = path(tree, node)
        if place.only is not None and (*tokens, place.only) in paths:
            assert paths[(*tokens, place.only)] == paths[tokens]
        elif place.only is not None:
            assert len(tree.tokens) == most
        if node and tokens not in drafted:
            assert grammar.nodes[tree.parents[node]].only == tokens[-1]


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32), st.integers(1, 40), st.integers(0, 3))
def test_what_allows_everything_changes_nothing(seed: int, size: int, padding: int) -> None:
    draft = random_draft(seed, size, padding)
    grammar = GrammarState(Residues(1, 1, vocab_size=VOCAB))
    assert constrained_tree(draft, grammar, 50) == draft.prefix(size)
    assert grammar.illegal == []


def test_what_follows_a_forced_token_is_as_probable_as_after_any_other() -> None:
    """The forced token was drafted with 0.25, its child with half of that; now they have 1 and 0.5."""
    draft = Draft([0, 5, 6, 7], [-1, 0, 0, 2], [0.0, math.log(0.5), math.log(0.25), math.log(0.125)])
    grammar = GrammarState(Script.of({6}, {7, 8}))
    tree = constrained_tree(draft, grammar, 9)
    assert tree.tokens == [0, 6, 7] and tree.parents == [-1, 0, 1]
    assert [round(math.exp(value), 6) for value in tree.log_probs] == [1.0, 1.0, 0.5]
    assert grammar.illegal == [1]


def test_nodes_without_a_probability_are_padding() -> None:
    draft = Draft([0, 5, 6], [-1, 0, 0], [0.0, math.nan, -math.inf])
    grammar = GrammarState(Residues(1, 1))
    assert constrained_tree(draft, grammar, 9).tokens == [0] and grammar.looked_through(9) == (0, 0)


def test_rows_without_a_constraint_keep_their_trees() -> None:
    """In one batch, padded to one width; what was sent to the host comes back as it was."""
    drafts = [random_draft(1, 10, 0), random_draft(2, 8, 2)]
    tree = TokenTree(
        tokens=torch.tensor([draft.tokens for draft in drafts]),
        parents=torch.tensor([draft.parents for draft in drafts]),
        log_probs=torch.tensor([draft.log_probs for draft in drafts]),
        max_depth=9,
    )
    values = flat(tree).tolist()
    assert all(isinstance(value, int) for value in values)
    received = on_host(values, tree)
    for name in ("tokens", "parents", "log_probs"):
        assert torch.equal(getattr(received, name), getattr(tree, name))
    assert [draft.tokens for draft in drafts_of(received)] == tree.tokens.tolist()
    rows = [Row(prompt=torch.arange(3), max_new_tokens=5, is_stop=lambda _: False) for _ in range(2)]
    rows[0].grammar = GrammarState(Residues(4, 1, vocab_size=VOCAB))
    found = constrained_trees(received, [row.grammar for row in rows], 6)
    check_tree(found)
    assert found.num_nodes == 6 and found.max_depth <= 5
    assert torch.equal(found.tokens[1], tree.tokens[1, :6]) and torch.equal(found.log_probs[1], tree.log_probs[1, :6])
    stats = DecodeStats()
    cpu = torch.device("cpu")
    Recorder(stats, TreeSizes(6, cpu), torch.nn.Identity(), cpu).verifies(rows, 6)
    assert (stats.drafts_checked, stats.drafts_illegal) == rows[0].grammar.looked_through(6) and rows[
        1
    ].stats.row_steps == 0
    assert stats.drafts_checked == rows[0].stats.drafts_checked == 5 and rows[1].stats.drafts_checked == 0
