"""Lossy acceptance against a slow reference: which nodes are likely enough, which path is kept, what is drawn."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
import torch
from torch import Tensor

import ladon
from drafts import TableProposer, make_engine
from ladon.bench.quality.verification import Proof, step_distance
from ladon.cli.main import run
from ladon.engine.sequence import Row
from ladon.engine.stats import DecodeStats
from ladon.sampling.acceptance import longest_admitted
from ladon.sampling.gumbel import mix
from ladon.sampling.lossy import Nucleus, Rule, Typical, admitted, admitted_by_picks, rule_of
from ladon.sampling.sampling_params import TemperatureSampling
from ladon.target.target import Target
from ladon.trees.token_tree import TokenTree, ancestor_mask
from small_vocabulary import p_value, tiny_vocabulary

RULES = [Typical(), Typical(epsilon=0.3, delta=2.0), Typical(epsilon=0.0), Nucleus(), Nucleus(top_p=0.3)]


def is_likely_enough(rule: Rule, law: list[float], token: int) -> bool:
    """By the definitions, one token at a time."""
    if law[token] == 0.0:
        return False
    if isinstance(rule, Typical):
        entropy = -sum(p * math.log(p) for p in law if p > 0)
        return law[token] > min(rule.epsilon, rule.delta * math.exp(-entropy))
    assert isinstance(rule, Nucleus)
    mass = 0.0
    for other in sorted(range(len(law)), key=lambda one: (-law[one], one)):
        if other == token:
            return mass < rule.top_p
        mass += law[other]
    raise AssertionError


@dataclass
class Toy:
    """One row's tree, node by node."""

    tokens: list[int]
    parents: list[int]
    padding: list[bool]
    laws: list[list[float]]

    @classmethod
    def drawn(cls, dice: random.Random, parents: list[int], vocab_size: int) -> Toy:
        tokens, padding = [dice.randrange(vocab_size)], [False]
        for node, parent in enumerate(parents[1:], start=1):
            taken = {tokens[other] for other in range(1, node) if parents[other] == parent}
            tokens.append(dice.choice([t for t in range(vocab_size) if t not in taken]))
            padding.append(padding[parent] or dice.random() < 0.1)
        laws = []
        for _ in parents:
            weights = [0.0 if dice.random() < 0.2 else math.exp(2 * dice.gauss(0, 1)) for _ in range(vocab_size)]
            weights[dice.randrange(vocab_size)] += 0.5
            laws.append([weight / sum(weights) for weight in weights])
        return cls(tokens, parents, padding, laws)

    def kept(self, rule: Rule) -> list[int]:
        """The path from the root: the longest, then the likeliest, then the first."""
        best: tuple[int, float] = (0, 0.0)
        path = [0]
        for node in range(1, len(self.tokens)):
            up, likelihood, fine = [node], 0.0, True
            while up[-1] != 0:
                here = up[-1]
                p = self.laws[self.parents[here]][self.tokens[here]]
                fine &= not self.padding[here]
                fine &= is_likely_enough(rule, self.laws[self.parents[here]], self.tokens[here])
                likelihood += math.log(p) if p > 0 else -math.inf
                up.append(self.parents[here])
            length = len(up) - 1
            if fine and (length > best[0] or (length == best[0] and likelihood > best[1] + 1e-12)):
                best, path = (length, likelihood), up[::-1]
        return path


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_equals_the_definition_on_toy_trees(rule: Rule) -> None:
    dice, lengths = random.Random(5), Counter[int]()
    for _ in range(120):
        parents = [-1, *(dice.randrange(node) for node in range(1, dice.randint(2, 9)))]
        toys = [Toy.drawn(dice, parents, 6) for _ in range(3)]
        tree = TokenTree(
            tokens=torch.tensor([toy.tokens for toy in toys]),
            parents=torch.tensor([parents] * 3),
            log_probs=torch.tensor([[-torch.inf if p else -0.1 for p in toy.padding] for toy in toys]),
            max_depth=len(parents) - 1,
        )
        scores = torch.tensor([toy.laws for toy in toys], dtype=torch.float64).log()
        picks = torch.tensor([[dice.randrange(6) for _ in parents] for _ in toys])
        mask = ancestor_mask(tree.parents, tree.max_depth)
        found = longest_admitted(tree, picks, admitted(rule, scores, tree), mask)
        for row, toy in enumerate(toys):
            path = toy.kept(rule)
            count = len(path)
            lengths[count] += 1
            assert found.count[row] == count and found.path[row, :count].tolist() == path
            assert (found.path[row, count:] == path[-1]).all()
            said = [toy.tokens[node] for node in path[1:]] + [int(picks[row, path[-1]])]
            assert found.tokens[row, :count].tolist() == said
            assert found.last[row] == path[-1] and found.bonus[row] == said[-1]
    assert all(lengths[count] > 5 for count in (1, 2, 3)), lengths


def root_with_children(law: list[float], tokens: list[int]) -> tuple[TokenTree, Tensor]:
    size = len(tokens) + 1
    tree = TokenTree(
        tokens=torch.tensor([[0, *tokens]]),
        parents=torch.tensor([[-1] + [0] * len(tokens)]),
        log_probs=torch.zeros(1, size),
        max_depth=1,
    )
    return tree, torch.tensor([[law] * size], dtype=torch.float64).log()


def kept_children(rule: Rule, law: list[float], tokens: list[int]) -> list[bool]:
    tree, scores = root_with_children(law, tokens)
    found: list[bool] = admitted(rule, scores, tree).nodes[0, 1:].tolist()
    return found


def test_edges_of_the_settings() -> None:
    law = [0.5, 0.25, 0.25, 0.0]
    assert kept_children(Typical(epsilon=0.25, delta=9.0), law, [0, 1, 3]) == [True, False, False], "more than epsilon"
    assert kept_children(Typical(epsilon=0.0), law, [0, 1, 3]) == [True, True, False], "but nothing that is excluded"
    assert kept_children(Typical(epsilon=1.0, delta=0.0), law, [0, 1, 3]) == [True, True, False]
    assert kept_children(Typical(epsilon=1.0, delta=1.0), law, [0, 1]) == [True, False], "exp(-entropy) is 0.354"
    assert kept_children(Nucleus(top_p=0.5), law, [0, 1, 2]) == [True, False, False]
    assert kept_children(Nucleus(top_p=0.6), law, [0, 1, 2]) == [True, True, False], "the first of a tie"
    assert kept_children(Nucleus(top_p=1.0), law, [0, 1, 2, 3]) == [True, True, True, False]
    assert kept_children(Nucleus(top_p=1e-6), law, [0, 1, 2]) == [True, False, False], "the likeliest always"


def test_of_paths_that_tie_in_length_the_likelier_is_kept() -> None:
    tree, scores = root_with_children([0.2, 0.3, 0.4, 0.1], [1, 2, 3])
    mask, picks = ancestor_mask(tree.parents, 1), torch.tensor([[1, 0, 3, 2]])
    found = longest_admitted(tree, picks, admitted(Typical(), scores, tree), mask)
    assert found.path.tolist() == [[0, 2]] and found.tokens.tolist() == [[2, 3]]
    tree, scores = root_with_children([0.2, 0.3, 0.3, 0.2], [1, 2, 3])
    found = longest_admitted(tree, picks, admitted(Typical(), scores, tree), mask)
    assert found.path.tolist() == [[0, 1]], "the first, if they are equally likely"


def test_rows_that_draw_nothing_are_exact() -> None:
    tree, _ = root_with_children([0.9, 0.1], [1, 0])
    found = admitted_by_picks(tree, torch.tensor([[1, 0, 0]]))
    assert found.nodes[0, 1:].tolist() == [True, False]


@pytest.mark.parametrize("accept", ["typical", "nucleus", Typical(epsilon=0.0), Nucleus(top_p=1.0)])
def test_greedy_text_is_the_same_by_every_rule(model, decoder, accept) -> None:
    prompts = torch.randint(3, 90, (3, 7))
    expected = decoder.generate(prompts, max_new_tokens=24)
    lossy = ladon.Decoder(model, decoder.heads, accept=accept, budget=12)
    assert torch.equal(lossy.generate(prompts, max_new_tokens=24), expected)
    assert lossy.stats.accepted_nodes > 0


def test_greedy_rows_stay_exact_beside_sampled_ones(model, decoder) -> None:
    prompt = torch.arange(5, 12)
    expected = decoder.generate(prompt[None], max_new_tokens=20)[0, 7:].tolist()
    lossy = ladon.Decoder(model, decoder.heads, accept="typical", budget=12)
    (greedy,) = lossy.rows([prompt], max_new_tokens=20)
    sampled = lossy.rows([prompt], max_new_tokens=20, do_sample=True, temperature=0.3, top_k=0, seed=1)
    for _ in lossy.decode([*sampled, greedy]):
        pass
    assert greedy.tokens == expected and len(sampled[0].tokens) == 20


def test_plain_decoding_has_nothing_to_accept(model, decoder) -> None:
    options = {"max_new_tokens": 20, "do_sample": True, "top_k": 0, "seed": 3}
    prompts = torch.randint(3, 90, (2, 7))
    expected = decoder.generate(prompts, **options)
    assert torch.equal(ladon.Decoder(model, accept="nucleus").generate(prompts, **options), expected)


def test_one_seed_is_one_text_for_the_same_trees(model, decoder) -> None:
    lossy = ladon.Decoder(model, decoder.heads, accept="nucleus", budget=8)
    prompts, options = torch.randint(3, 90, (3, 7)), {"max_new_tokens": 30, "do_sample": True, "top_k": 0}
    first = lossy.generate(prompts, seed=4, **options)
    assert torch.equal(lossy.generate(prompts, seed=4, **options), first)
    assert not torch.equal(lossy.generate(prompts, seed=5, **options), first), "something is drawn"


def test_scores_are_those_of_the_nodes_that_were_kept(model, decoder) -> None:
    """`output_scores` goes with the path, though no pick led along it."""
    lossy = ladon.Decoder(model, decoder.heads, accept=Typical(epsilon=0.0), budget=12)
    prompt = torch.arange(5, 12)[None]
    options = {"do_sample": True, "temperature": 0.8, "top_k": 0, "seed": 5, "max_new_tokens": 16}
    output = lossy.generate(prompt, **options, output_scores=True, return_dict_in_generate=True)
    assert lossy.stats.accepted_nodes > 0
    logits = model(output.sequences).logits[0, 6:-1] / 0.8
    assert torch.allclose(torch.cat(output.scores), logits, atol=1e-9)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: rule_of("foo"), 'accept is \'foo\'; give "exact", "typical", "nucleus"'),
        (lambda: rule_of(None), "accept is None"),
        (lambda: rule_of(["typical"]), "accept is"),
        (lambda: Typical(epsilon=-0.1), "epsilon is -0.1"),
        (lambda: Typical(epsilon=math.nan), "epsilon is nan"),
        (lambda: Typical(delta=-1), "delta is -1"),
        (lambda: Typical(delta=math.inf), "delta is inf"),
        (lambda: Nucleus(top_p=0.0), "top_p is 0.0"),
        (lambda: Nucleus(top_p=1.5), "top_p is 1.5"),
        (lambda: Nucleus(top_p=math.nan), "top_p is nan"),
    ],
)
def test_what_is_no_rule_is_one_line(make, words) -> None:
    with pytest.raises(ladon.InputError) as error:
        make()
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_decoder_refuses_an_unknown_rule(model) -> None:
    with pytest.raises(ladon.InputError, match="accept is 'foo'"):
        ladon.Decoder(model, accept="foo")


# -- the law of what a lossy rule says, enumerated over a vocabulary of five tokens

PARENTS = [-1, 0, 0, 1, 1]
PROMPT = torch.tensor([1, 3, 2])
LENGTH, NUM = 4, 6000


@dataclass
class Enumerated:
    """All texts that a rule can write after a prompt, by the definitions, with the model asked one text at a time."""

    model: torch.nn.Module
    table: list[list[int]]
    rule: Rule
    law: dict[tuple[int, ...], float] = field(default_factory=dict)
    distances: float = 0.0
    accepted: float = 0.0

    def after(self, text: tuple[int, ...]) -> list[float]:
        ids = torch.cat([PROMPT, torch.tensor(text, dtype=torch.int64)])
        found: list[float] = (self.model(ids[None]).logits[0, -1] / 0.7).softmax(-1).tolist()
        return found

    def walk(self, text: tuple[int, ...], chance: float) -> None:
        """One step after another, from a text whose last token is a root."""
        if len(text) == LENGTH:
            self.law[text] = self.law.get(text, 0.0) + chance
            return
        if text:
            text = self.step(text, chance)
        if len(text) == LENGTH:
            self.walk(text, chance)
            return
        for token, p in enumerate(self.after(text)):
            self.walk((*text, token), chance * p)

    def step(self, text: tuple[int, ...], chance: float) -> tuple[int, ...]:
        """The text with the accepted path; a path is no deeper than what is left, less the bonus token."""
        tokens, left = self.table[text[-1]], LENGTH - len(text)
        depth = [0, 1, 1, 2, 2]
        toy = Toy(tokens, PARENTS, [d > left - 1 for d in depth], [[]] * 5)
        for node in range(5):
            up = [node]
            while up[-1] != 0:
                up.append(PARENTS[up[-1]])
            toy.laws[node] = self.after((*text, *(tokens[n] for n in up[-2::-1])))
        path = toy.kept(self.rule)
        for parent, node in pairwise(path):
            law = toy.laws[parent]
            said = [float(token == tokens[node]) for token in range(len(law))]
            self.distances += chance * 0.5 * sum(abs(p - q) for p, q in zip(law, said, strict=True))
            self.accepted += chance
        return (*text, *(tokens[node] for node in path[1:]))


@pytest.fixture(scope="module", params=[Typical(), Nucleus(top_p=0.5)], ids=["typical", "nucleus"])
def written(request) -> tuple[Enumerated, list[tuple[int, ...]], float, int]:
    """The enumeration, the texts of many seeds, the sum of their measured distances, and their accepted nodes."""
    model = tiny_vocabulary(5)
    proposer = TableProposer.random(5, PARENTS, seed=2)
    exact = Enumerated(model, proposer.tokens.tolist(), request.param)
    with torch.no_grad():
        exact.walk((), 1.0)
    never = frozenset[int]().__contains__
    law, keeps = TemperatureSampling(temperature=0.7), frozenset({"scores"})
    rows = [
        Row(prompt=PROMPT, max_new_tokens=LENGTH, is_stop=never, seed=mix(9, i), sampling_params=law, keeps=keeps)
        for i in range(NUM)
    ]
    stats = DecodeStats()
    engine = make_engine(Target(model), proposer, budget=5, stats=stats, rule=request.param)
    total = sum(step_distance(step) for step in engine.run(rows))
    return exact, [tuple(row.tokens) for row in rows], total, stats.accepted_nodes


def test_texts_follow_the_enumerated_law(written) -> None:
    """What is drawn is drawn by the target's law, the root included: a root that is an argmax would fail here."""
    exact, texts, _, _ = written
    assert sum(exact.law.values()) == pytest.approx(1.0) and len(exact.law) < 5**LENGTH
    assert set(texts) <= set(exact.law)
    assert p_value(Counter(texts), exact.law) > 1e-4
    firsts = Counter(text[:1] for text in texts)
    law = {(token,): p for token, p in enumerate(exact.after(()))}
    assert p_value(firsts, law) > 1e-4 and max(law.values()) < 0.9


def test_measured_distance_is_the_enumerated_one(written) -> None:
    exact, texts, total, accepted = written
    assert exact.accepted > 0.5 and exact.distances > 0.1
    assert accepted / len(texts) == pytest.approx(exact.accepted, rel=0.03)
    assert total / len(texts) == pytest.approx(exact.distances, rel=0.03)


def test_distances_add_up_to_a_bound_on_that_of_whole_texts(written) -> None:
    exact, _, _, _ = written
    target: dict[tuple[int, ...], float] = {(): 1.0}
    with torch.no_grad():
        for _ in range(LENGTH):
            target = {(*t, token): c * p for t, c in target.items() for token, p in enumerate(exact.after(t))}
    apart = 0.5 * sum(abs(p - exact.law.get(text, 0.0)) for text, p in target.items())
    assert 0.05 < apart <= exact.distances + 1e-9


def test_the_distance_of_a_rule_that_accepts_nothing_is_zero(model, decoder) -> None:
    prompts = [torch.arange(5, 12), torch.arange(9, 12)]
    law = {"do_sample": True, "temperature": 0.8, "top_k": 0, "seed": 2}
    common = {"batch": 2, "max_new_tokens": 12, "tree": {"budget": 8}}
    proof = Proof(model=model, heads=decoder.heads, prompts=prompts, **common)
    strict = proof.distance(law, Typical(epsilon=1.0, delta=1e9))
    assert (strict.accept, strict.tokens, strict.acceptance_length, strict.total_variation) == ("typical", 22, 1.0, 0.0)
    loose = proof.distance(law, Typical(epsilon=0.0))
    assert loose.tokens == 22 and loose.acceptance_length > 1.5 and 0.3 < loose.total_variation < 1
    greedy = proof.distance({"do_sample": False}, Nucleus())
    assert greedy.total_variation == 0.0 and greedy.settings == {"top_p": 0.8}


def test_generate_by_a_rule_on_the_command_line(tiny, monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    options = ["generate", *tiny.arguments, "--prompt", "def read", "--max-new-tokens", "24", "--budget", "8"]
    options += ["--temperature", "0.7", "--stats", "--json"]
    lengths = {}
    for accept in ("exact", "typical", "nucleus:top_p=0.001", "typical:epsilon=0,delta=0"):
        assert run([*options, "--accept", accept]) == 0
        lengths[accept] = json.loads(capsys.readouterr().out.splitlines()[-1])["stats"]["acceptance_length"]
    assert lengths["typical:epsilon=0,delta=0"] > lengths["exact"]
    for accept, words in {"foo": "accept is 'foo'", "typical:epsilon=2": "epsilon is 2"}.items():
        assert run([*options, "--accept", accept]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and words in lines[0]
