"""Drafters of the user's own: the output stays the target's, whatever they draft, and nonsense is named."""

from __future__ import annotations

import gc
import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import ladon
from greedy import PROMPTS, generate
from ladon import Accepted, InputError, Proposer, TokenTree, TreeError
from ladon.engine.sequence import Row
from ladon.sampling.sampling_params import GREEDY, TemperatureSampling
from ladon.target import target as target_module
from ladon.target.self_test import Verdict
from ladon.target.target import Target
from ladon.tree_size.adaptive import AutoSizing
from ladon.tree_size.policy import EDGES, FixedSizing
from sizing_machines import linear
from toys import Residues

VOCAB, DEPTH = 97, 4
KINDS = ("right", "wrong", "random")
Truth = dict[tuple[int, ...], list[int]]


class Knowing(Proposer):
    """Knows what is said after each prompt, and drafts that, anything but that, or anything.

    `drafts` counts the calls of `propose`. What it is told is compared with what it knows.
    """

    def __init__(self, truth: Truth, kind: str = "right", shape: str = "tree", *, knows_text: bool = True) -> None:
        self.truth, self.kind, self.shape, self.knows_text = truth, kind, shape, knows_text
        self.texts: list[list[int]] = []
        self.said: list[int] = []  # tokens of each text that the target has said
        self.drafts = 0
        self.newest: Tensor | None = None  # hidden states that the next roots follow
        self.counts: list[int] = []
        self.dice = random.Random(3)

    def join(self, prompts, hidden, states=()):
        assert all(prompt.dtype == torch.int64 for prompt in prompts) and hidden.shape == (len(prompts), 32)
        self.texts += [self.truth[tuple(prompt.tolist())] for prompt in prompts]
        self.said += [1] * len(prompts)
        self.newest = hidden if self.newest is None else torch.cat([self.newest, hidden])

    def propose(self, hidden, root, max_nodes):
        assert max_nodes >= 2 and torch.equal(hidden, self.newest) and root.dtype == torch.int64
        if self.knows_text:
            ends = [text[said - 1] for text, said in zip(self.texts, self.said, strict=True) if said <= len(text)]
            assert [token for token, said, text in zip(root.tolist(), self.said, self.texts, strict=True)
                    if said <= len(text)] == ends  # fmt: skip
        self.drafts += 1
        if self.shape == "chain":
            tokens = torch.tensor([self.path(place) for place in range(len(root))])
            return TokenTree.chain(root, tokens).prefix(max_nodes)
        paths = [[[(token, 0.8) for token in self.path(place)], [(self.dice.randrange(VOCAB), 0.1)]]
                 for place in range(len(root))]  # fmt: skip
        return TokenTree.from_paths(root, paths, max_nodes)

    def path(self, place: int) -> list[int]:
        truth = self.texts[place][self.said[place] : self.said[place] + DEPTH]
        truth = [*truth, *[0] * (DEPTH - len(truth))]
        wrong = {"wrong": lambda _: 1, "random": self.dice.randrange}.get(self.kind, lambda _: 0)
        return [(token + wrong(VOCAB)) % VOCAB for token in truth]

    def observe(self, accepted: Accepted, hidden):
        counts, tokens = accepted.count.tolist(), accepted.tokens.tolist()
        assert len(counts) == len(self.texts) == hidden.shape[0] and accepted.tokens.min() >= 0
        for place, (count, found, root) in enumerate(zip(counts, tokens, accepted.root.tolist(), strict=True)):
            known = self.texts[place][self.said[place] - 1 : self.said[place] + count]
            assert not self.knows_text or [root, *found[:count]][: len(known)] == known
            self.said[place] += count
        self.newest, self.counts = hidden[torch.arange(len(counts)), accepted.last], counts

    def mirror(self, counts):
        assert list(counts) == self.counts[: len(counts)] and len(counts) in (0, len(self.counts))

    def keep(self, rows):
        if not rows:
            self.texts, self.said, self.newest, self.counts = [], [], None, []
            return
        self.texts, self.said = [self.texts[row] for row in rows], [self.said[row] for row in rows]
        self.newest = self.newest[list(rows)]


def key(prompt: Tensor) -> tuple[int, ...]:
    return tuple(prompt.tolist())


def padded(prompts: list[Tensor]) -> dict[str, Tensor]:
    width = max(map(len, prompts))
    ids = torch.stack([torch.cat([torch.zeros(width - len(p), dtype=torch.long), p]) for p in prompts])
    mask = torch.stack([torch.cat([torch.zeros(width - len(p)), torch.ones(len(p))]).long() for p in prompts])
    return {"input_ids": ids, "attention_mask": mask}


SAMPLED = {"do_sample": True, "temperature": 0.9, "seed": [5, 6, 7]}


def said_plainly(model, prompts, **options) -> Truth:
    """What plain decoding says."""
    batch = padded(prompts)
    output = ladon.Decoder(model, tree="off").generate(**batch, **options)
    width = batch["input_ids"].shape[1]
    return {key(prompt): tokens for prompt, tokens in zip(prompts, output[:, width:].tolist(), strict=True)}


@pytest.mark.parametrize(("shape", "budget"), [("tree", 6), ("tree", "auto"), ("chain", 6), ("chain", 2)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["greedy", "sampled"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_output_is_that_of_plain_decoding(model, batch_size, how, kind, shape, budget):
    prompts = PROMPTS[:batch_size]
    options = {"max_new_tokens": 24, **(SAMPLED if how == "sampled" else {"do_sample": False})}
    if how == "sampled":
        options["seed"] = SAMPLED["seed"][:batch_size]
    truth = said_plainly(model, prompts, **options)
    if how == "greedy":
        assert truth == {key(prompt): generate(model, prompt, 24) for prompt in prompts}
    drafter = Knowing(truth, kind, shape)
    decoder = ladon.Decoder(model, proposer=drafter, budget=budget)
    for _ in range(2):  # one instance, one engine after the other
        output = decoder.generate(**padded(prompts), **options)
        assert output[:, -24:].tolist() == list(truth.values())
        assert not drafter.texts, "all were forgotten"
    assert drafter.drafts > 0
    if budget == 6:
        length = decoder.stats.acceptance_length
        assert length > 3 if kind == "right" else length < 1.5


@pytest.mark.parametrize("how", ["greedy", "sampled"])
@pytest.mark.parametrize("kind", KINDS)
def test_sequences_join_and_leave(model, kind, how):
    """Any step; prompts read by chunks; one is cancelled. The drafter itself compares each root with its text."""
    prompts = [torch.arange(3, 3 + length) for length in (6, 1, 23, 2, 11)]
    params = GREEDY if how == "greedy" else TemperatureSampling(temperature=0.9)

    def rows() -> list[Row]:
        limits = (30, 3, 19, 12, 14)
        return [
            Row(prompt=p, max_new_tokens=n, is_stop=lambda _: False, seed=n, sampling_params=params)
            for p, n in zip(prompts, limits, strict=True)
        ]

    truth = {}
    for row in rows():
        for _ in ladon.Decoder(model, tree="off").decode([row]):
            pass
        truth[key(row.prompt)] = row.tokens
    drafter = Knowing(truth, kind)
    decoder = ladon.Decoder(model, proposer=drafter, budget=5)
    decoder._target.prefill_chunk = 5
    engine, made = decoder.engine(max_rows=3), rows()
    for number in range(200):
        if number % 3 == 0 and number < 15:
            engine.submit(made[number // 3])
        if number == 8:
            engine.cancel(made[2])
        if engine.step() is None and number >= 15:
            break
    assert all(row.finished for row in made) and [row.cancelled for row in made].count(True) == 1
    for row in made:
        whole = truth[key(row.prompt)]
        assert row.tokens == whole[: len(row.tokens)] and (row.cancelled or len(row.tokens) == len(whole))
    assert drafter.drafts > 5 and not drafter.texts


def ways() -> dict[str, tuple[dict, dict]]:
    """Options of the decoder, and of the call."""
    return {
        "constraint": ({}, {"constraint": Residues(7, 3, ends=False)}),
        "n-grams": ({"ngrams": "on"}, {}),
        "pruning": ({"prune": ladon.Pruning(layer=1, keep=3)}, {}),
        "processors": ({}, {"repetition_penalty": 1.3}),
        "stop tokens": ({}, {"eos_token_id": [5, 11, 23, 31, 47, 60, 71, 83]}),
        "plain": ({"tree": "off"}, {}),
        "deterministic": ({"budget": "auto", "deterministic": True}, {}),
    }


@pytest.mark.parametrize("kind", ["right", "random"])
@pytest.mark.parametrize("how", ["greedy", "sampled"])
@pytest.mark.parametrize("way", ways())
def test_everything_else_works_with_it(model, way, how, kind):
    of_decoder, of_call = ways()[way]
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, **of_call}
    options |= SAMPLED if how == "sampled" else {}
    truth = said_plainly(model, PROMPTS, **options)
    drafter = Knowing(truth, kind, knows_text=way != "stop tokens")
    decoder = ladon.Decoder(model, **{"proposer": drafter, "budget": 6, **of_decoder})
    output = decoder.generate(**padded(PROMPTS), **options)
    assert output[:, 20:].tolist() == list(truth.values())
    assert (drafter.drafts > 0) == (way != "plain")
    assert (decoder.stats.nodes_pruned > 0) == (way == "pruning")
    if kind == "right" and way not in ("plain", "pruning", "stop tokens"):
        assert decoder.stats.acceptance_length > 2


def test_attach(model):
    truth = said_plainly(model, PROMPTS[:1], max_new_tokens=12, do_sample=False)
    decoder = ladon.attach(model, proposer=lambda: Knowing(truth), budget=6)
    output = model.generate(PROMPTS[0][None], max_new_tokens=12, do_sample=False)
    assert output[0, len(PROMPTS[0]) :].tolist() == truth[key(PROMPTS[0])] and decoder.stats.forwards == 3
    ladon.detach(model)


def test_prompts_are_read_for_who_asks(model):
    class Reading(Knowing):
        reads_prompts = True

        def join(self, prompts, hidden, states=()):
            assert [state.shape for state in states] == [(len(prompt), 32) for prompt in prompts]
            assert torch.equal(torch.stack([state[-1] for state in states]), hidden)
            super().join(prompts, hidden)

    truth = said_plainly(model, PROMPTS, max_new_tokens=12, do_sample=False)
    decoder = ladon.Decoder(model, proposer=Reading(truth), budget=6)
    assert decoder.generate(**padded(PROMPTS), max_new_tokens=12, do_sample=False)[:, 20:].tolist() == [*truth.values()]


def test_sequences_without_a_next_token_show_a_token_of_the_vocabulary(model):
    """NaN logits end one sequence; what is said of it meanwhile must be safe to learn from."""
    seen = []

    class Watching(Proposer):
        def observe(self, accepted, hidden):
            seen.append(int(torch.cat([accepted.tokens, accepted.bonus[:, None]], dim=1).min()))

        def propose(self, hidden, root, max_nodes):
            seen.append(int(root.min()))
            return TokenTree.chain(root, root[:, None])

    decoder = ladon.Decoder(model, proposer=Watching, budget=4)
    forwards = iter(range(100))
    with torch.no_grad():
        hook = model.lm_head.register_forward_hook(lambda *args: args[2] * (torch.nan if next(forwards) > 3 else 1.0))
    decoder._target.check()
    with pytest.raises(ladon.LogitsError):
        decoder.generate(PROMPTS[0][None], max_new_tokens=20, do_sample=False)
    hook.remove()
    assert seen and min(seen) >= 0


# Nonsense


class Bad(Proposer):
    """Drafts a chain of two tokens after each root, spoilt in the sequence 1 (or the only one) at one call."""

    def __init__(self, spoil, at: int = 2) -> None:
        self.spoil, self.calls, self.at = spoil, 0, at

    def propose(self, hidden, root, max_nodes):
        self.calls += 1
        tree = TokenTree.chain(root, torch.full((len(root), 2), 9))
        return self.spoil(tree) if self.calls == self.at else tree


def put(name: str, node: int, value: float):
    def spoil(tree: TokenTree) -> TokenTree:
        values = getattr(tree, name).clone()
        values[-1, node] = value
        return replace(tree, **{name: values})

    return spoil


NAN, INF = float("nan"), float("inf")
NONSENSE = {
    "no tree": (lambda tree: [1, 2], r"it is a list; give a ladon.TokenTree"),
    "none at all": (lambda tree: None, r"it is a NoneType; give a ladon.TokenTree"),
    "no tensor": (lambda tree: replace(tree, tokens=[[1]]), r"tokens is a list; give a tensor"),
    "one sequence too few": (
        lambda tree: replace(tree, tokens=tree.tokens[:-1]), r"tokens has shape \[\d, 3\], there are \d sequences",
    ),
    "one axis": (lambda tree: replace(tree, parents=tree.parents[0]), r"parents has shape \[3\]"),
    "no nodes": (lambda tree: tree.prefix(0), r"tokens has shape \[\d, 0\]"),
    "other widths": (lambda tree: replace(tree, log_probs=tree.log_probs[:, :2]), r"log_probs has shape \[\d, 2\]"),
    "int32": (lambda tree: replace(tree, tokens=tree.tokens.int()), r"tokens is torch.int32 on cpu; give torch.int64"),
    "float64": (
        lambda tree: replace(tree, log_probs=tree.log_probs.double()),
        r"log_probs is torch.float64 on cpu; give torch.float32 on cpu",
    ),
    "another device": (
        lambda tree: replace(tree, parents=tree.parents.to("meta")), r"parents is torch.int64 on meta; .* on cpu",
    ),
    "too many nodes": (
        lambda tree: TokenTree.chain(tree.tokens[:, 0], torch.ones(tree.batch_size, 9, dtype=torch.long)),
        r"it has 10 nodes per sequence, root included, but max_nodes is 6",
    ),
    "depth is none": (lambda tree: replace(tree, max_depth=2.0), r"max_depth is 2.0; give an int"),
    "another root": (put("tokens", 0, 96), r"sequence \d: node 0 has token 96, but the root that was given is \d+"),
    "root with a parent": (put("parents", 0, 0), r"sequence \d: node 0 has parent 0, but the root's parent must be -1"),
    "root with a probability": (put("log_probs", 0, -1.0), r"node 0 has log-probability -1, but the root's must be 0"),
    "parent after its child": (put("parents", 1, 2), r"sequence \d, node 1 has parent 2, but a parent must come"),
    "parent out of range": (put("parents", 2, 77), r"sequence \d, node 2 has parent 77"),
    "two roots": (put("parents", 2, -1), r"sequence \d, node 2 has parent -1"),
    "token too great": (put("tokens", 1, 97), r"sequence \d, node 1 has token 97, but the vocabulary has 0 to 96"),
    "token below 0": (put("tokens", 2, -1), r"sequence \d, node 2 has token -1, but the vocabulary has 0 to 96"),
    "twins": (put("parents", 2, 0), r"sequence \d, node 2 has token 9 as its sibling 1 does; siblings must differ"),
    "above its parent": (put("log_probs", 2, -0.1), r"sequence \d, node 2 has log-probability -0.1, above its"),
    "positive": (put("log_probs", 1, 0.5), r"sequence \d, node 1 has log-probability 0.5, above its parent's 0;"),
    "infinite": (put("log_probs", 1, INF), r"sequence \d, node 1 has log-probability inf, above its parent's 0;"),
    "NaN": (put("log_probs", 2, NAN), r"sequence \d, node 2 has log-probability NaN"),
    "deeper than it says": (
        lambda tree: replace(tree, max_depth=1), r"sequence \d, node 2 is at depth 2, but max_depth is 1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("name", NONSENSE)
def test_nonsense_is_named(model, name, batch_size):
    """One clear line, and no sequence has a wrong token by then; other engines go on, and so does this one."""
    spoil, message = NONSENSE[name]
    prompts = PROMPTS[:batch_size]
    decoder = ladon.Decoder(model, proposer=lambda: Bad(spoil), budget=6)
    rows = decoder.rows(prompts, max_new_tokens=12)
    engine = decoder.engine()
    with pytest.raises(TreeError, match=message) as caught:
        list(engine.run(rows))
    text = str(caught.value)
    assert "\n" not in text and text.startswith("what Bad.propose has returned cannot be verified: ")
    if spoil.__name__ == "spoil":
        assert f"sequence {batch_size - 1}" in text or "sequence" not in message
    for row in rows:
        truth = generate(model, row.prompt, 12)
        assert row.cancelled and 0 < len(row.tokens) < 12 and row.tokens == truth[: len(row.tokens)]
    again = decoder.rows(prompts, max_new_tokens=1)  # the same engine, whose second draft was spoilt
    list(engine.run(again))
    assert [row.tokens for row in again] == [generate(model, row.prompt, 1) for row in again]


def test_what_is_right_passes(model):
    """Padding of any place and parent, loose bounds of depth, expanded tensors, wrong `depths`, which nobody reads."""

    class Loose(Proposer):
        def propose(self, hidden, root, max_nodes):
            batch = len(root)
            return TokenTree(
                tokens=torch.cat([root[:, None], torch.tensor([[9, 9, 5, 0]]).expand(batch, -1)], dim=1),
                parents=torch.tensor([[-1, 0, 0, 1, 2]]).expand(batch, -1),
                log_probs=torch.tensor([[0.0, -1.0, -INF, -2.0, -INF]]).expand(batch, -1),
                max_depth=50,
                depths=torch.full((batch, 5), 77),
            )

    for options in ({"budget": 5}, {"budget": "auto"}, {"budget": 6, "ngrams": "on"}):
        decoder = ladon.Decoder(model, proposer=Loose, **options)
        output = decoder.generate(**padded(PROMPTS), max_new_tokens=12, do_sample=False)
        assert output[:, 20:].tolist() == [generate(model, prompt, 12) for prompt in PROMPTS]


def test_checks_can_be_turned_off(model):
    class Proven(Bad):
        is_checked = False

    decoder = ladon.Decoder(model, proposer=lambda: Proven(put("log_probs", 2, 0.0)), budget=6)
    output = decoder.generate(PROMPTS[0][None], max_new_tokens=8, do_sample=False)  # a slip that changes no token
    assert output[0, len(PROMPTS[0]) :].tolist() == generate(model, PROMPTS[0], 8)
    decoder = ladon.Decoder(model, proposer=lambda: Proven(lambda tree: None), budget=6)
    with pytest.raises(TreeError, match="it is a NoneType"):  # what costs nothing is looked at in any case
        decoder.generate(PROMPTS[0][None], max_new_tokens=8, do_sample=False)


# Who may serve whom


def test_a_class_and_a_function_make_one_for_each_engine(model):
    made = []

    class Own(Knowing):
        def __init__(self) -> None:
            super().__init__(truth)
            made.append(self)

    truth = said_plainly(model, PROMPTS[:1], max_new_tokens=12, do_sample=False)
    for proposer in (Own, lambda: Own()):
        made.clear()
        decoder = ladon.Decoder(model, proposer=proposer, budget=6)
        first, second = decoder.rows(PROMPTS[:1], max_new_tokens=12), decoder.rows(PROMPTS[:1], max_new_tokens=12)
        for _ in zip(decoder.decode(first), decoder.decode(second), strict=True):
            pass
        assert first[0].tokens == second[0].tokens == truth[key(PROMPTS[0])]
        assert len(made) == 2 and made[0] is not made[1]


@pytest.mark.parametrize("starts", ["as it is made", "as it joins"])
def test_an_instance_serves_one_engine_at_a_time(model, starts):
    truth = said_plainly(model, PROMPTS, max_new_tokens=12, do_sample=False)
    drafter = Knowing(truth)
    decoders = [ladon.Decoder(model, proposer=drafter, budget=6) for _ in range(2)]
    late = None if starts == "as it is made" else decoders[1].engine()
    rows = decoders[0].rows(PROMPTS[:2], max_new_tokens=12)
    running = decoders[0].decode(rows)
    next(running)
    with pytest.raises(InputError, match=r"this Knowing has sequences .* give the class, proposer=Knowing"):
        list((late or decoders[1].engine()).run(decoders[1].rows(PROMPTS[2:], max_new_tokens=12)))
    assert len(list(running)) > 1  # the first is not disturbed
    assert [row.tokens for row in rows] == [truth[key(row.prompt)] for row in rows]
    again = decoders[1].rows(PROMPTS[2:], max_new_tokens=12)
    list(decoders[1].decode(again))
    assert again[0].tokens == truth[key(PROMPTS[2])]


@pytest.mark.parametrize("how", ["closed", "dropped"])
def test_an_engine_that_is_left_frees_its_drafter(model, how):
    truth = said_plainly(model, PROMPTS[:1], max_new_tokens=12, do_sample=False)
    decoder = ladon.Decoder(model, proposer=Knowing(truth), budget=6)
    engine, (row,) = decoder.engine(), decoder.rows(PROMPTS[:1], max_new_tokens=12)
    if how == "closed":
        running = engine.run([row])
        next(running)
        running.close()
    else:
        engine.submit(row)
        engine.step()
        del engine
        gc.collect()
    output = decoder.generate(PROMPTS[0][None], max_new_tokens=12, do_sample=False)
    assert output[0, len(PROMPTS[0]) :].tolist() == truth[key(PROMPTS[0])]


class Duck:
    """No base class: only what is called."""

    def join(self, prompts, hidden, states=()):
        pass

    def propose(self, hidden, root, max_nodes):
        return TokenTree.chain(root, torch.stack([root, root + 1], dim=1) % VOCAB)

    def observe(self, accepted, hidden):
        pass

    def mirror(self, counts):
        pass

    def keep(self, rows):
        pass


@pytest.mark.parametrize("proposer", [Duck(), Duck, lambda: Duck()])
def test_no_base_class_is_needed(model, proposer):
    decoder = ladon.Decoder(model, proposer=proposer, budget=3)
    output = decoder.generate(PROMPTS[0][None], max_new_tokens=12, do_sample=False)
    assert output[0, len(PROMPTS[0]) :].tolist() == generate(model, PROMPTS[0], 12)


def test_missing_methods_are_named(model):
    class Half:
        def propose(self, hidden, root, max_nodes):
            raise AssertionError

        def keep(self, rows):
            raise AssertionError

    class Lazy(Proposer):
        pass

    message = r"the proposer Half has no join, observe, mirror; a class derived from ladon.Proposer needs propose alone"
    for proposer in (Half, Half()):
        with pytest.raises(InputError, match=message):
            ladon.Decoder(model, proposer=proposer)
    for proposer in (Lazy, Lazy()):
        with pytest.raises(InputError, match="the proposer Lazy has no propose;"):
            ladon.Decoder(model, proposer=proposer)
    with pytest.raises(InputError, match="the proposer int has no propose, join"):
        ladon.Decoder(model, proposer=3)
    for maker, what in ((Half, "Half has no join"), (lambda: lambda: 1, "returned a function, which has no propose")):
        with pytest.raises(InputError, match=what):
            ladon.Decoder(model, proposer=lambda maker=maker: maker()).engine()


def test_what_does_not_go_together(model):
    heads = ladon.new_heads(model)
    with pytest.raises(InputError, match="both heads and a proposer"):
        ladon.Decoder(model, heads, proposer=Duck())
    with pytest.raises(TreeError, match="tree is a FixedTree, but a proposer of your own decides"):
        ladon.Decoder(model, proposer=Duck(), tree=ladon.FixedTree(((0,),)))
    with pytest.raises(TreeError, match="tree is a TreeSize"):
        ladon.Decoder(model, proposer=Duck(), tree=ladon.TreeSize(budget=8, num_candidates=2, depth=3))
    with pytest.raises(TreeError, match="budget is 0"):
        ladon.Decoder(model, proposer=Duck(), budget=0)
    with pytest.raises(TreeError, match="tree is 'bush'"):
        ladon.Decoder(model, proposer=Duck(), tree="bush")


def test_ngrams_join_only_when_they_are_asked(model):
    for ngrams, there in (("auto", False), ("off", False), ("on", True)):
        decoder = ladon.Decoder(model, proposer=Duck, ngrams=ngrams)
        assert (decoder._plan.lookup(decoder._target) is not None) == there
    heads = ladon.new_heads(model)
    for drafting in (heads, None):
        assert ladon.Decoder(model, drafting, ngrams="on")._plan == ladon.Decoder(model, drafting)._plan


# Chains


@pytest.mark.parametrize("why", ["the model", "the option"])
def test_where_only_chains_may_be_drafted_branches_are_refused(model, why, monkeypatch):
    if why == "the model":
        monkeypatch.setattr(target_module, "tested", lambda _: Verdict(trees=False))

    class Branching(Duck):
        is_checked = False  # this is looked at in any case

        def propose(self, hidden, root, max_nodes):
            return TokenTree.from_paths(root, [[[(1, 0.5)], [(2, 0.5)]]] * len(root), max_nodes)

    options = {"budget": 6} if why == "the model" else {"budget": 6, "tree": "chain"}
    truth = said_plainly(model, PROMPTS, max_new_tokens=12, do_sample=False)
    decoder = ladon.Decoder(model, proposer=Knowing(truth, shape="chain"), ngrams="on", **options)
    output = decoder.generate(**padded(PROMPTS), max_new_tokens=12, do_sample=False)
    assert output[:, 20:].tolist() == list(truth.values()) and decoder.stats.acceptance_length > 3
    decoder = ladon.Decoder(model, proposer=Branching(), **options)
    message = (
        "Branching.propose .*sequence 0, node 2 has parent 0, not 1: it branches, but only chains may be drafted here"
    )
    with pytest.raises(TreeError, match=message):
        decoder.generate(**padded(PROMPTS), max_new_tokens=12, do_sample=False)


# Sizes


def test_sizes(model, monkeypatch):
    assert ladon.Decoder(model, proposer=Duck()).sizing.edges == EDGES
    assert isinstance(ladon.Decoder(model, proposer=Duck()).sizing, AutoSizing)
    for options, nodes in (({"budget": 7}, 7), ({"tree": "off"}, 1), ({"deterministic": True}, 16)):
        sizing = ladon.Decoder(model, proposer=Duck(), **options).sizing
        assert isinstance(sizing, FixedSizing) and sizing.reach(1, 9.0) == nodes


class Clock:
    """Seconds that pass only where a simulated machine says so."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Costly(Knowing):
    """Takes 1.5 simulated milliseconds per draft, where a plain step takes 2.1.

    A silent one drafts nothing in that time, one that dries up nothing after 30 drafts.
    """

    clock: Clock

    def propose(self, hidden, root, max_nodes):
        self.clock.now += 0.0015
        if self.kind == "silent" or (self.kind == "drying up" and self.drafts > 30):
            self.drafts += 1
            return TokenTree.from_paths(root, [[]] * len(root), max_nodes)
        return super().propose(hidden, root, max_nodes)


@pytest.mark.parametrize(
    ("kind", "batch_size"),
    [("right", 1), ("right", 3), ("wrong", 1), ("random", 3), ("silent", 1), ("silent", 3), ("drying up", 1)],
)
def test_automatic_sizes_draft_only_while_it_pays(model, monkeypatch, kind, batch_size):
    """On a simulated machine: never much slower than plain decoding, and faster where drafts are right."""
    clock, verify, times = Clock(), Target.verify, {}

    def verify_and_pass(self, tree, cache, pruning=None):
        clock.now += 1e-3 * linear(tree.batch_size, tree.num_nodes, 64.0, 1)
        return verify(self, tree, cache, pruning)

    monkeypatch.setattr("ladon.engine.recorder.time", clock)
    monkeypatch.setattr(Target, "verify", verify_and_pass)
    prompts = [torch.arange(3 + n, 12 + n) for n in range(batch_size)]
    truth = said_plainly(model, prompts, max_new_tokens=200, do_sample=False)
    drafter = Costly(truth, kind)
    drafter.clock = clock
    for name, options in {"plain": {"tree": "off"}, "auto": {"proposer": drafter}}.items():
        decoder, started, steps = ladon.Decoder(model, **options), clock.now, 0
        for _ in range(2):
            output = decoder.generate(**padded(prompts), max_new_tokens=200, do_sample=False)
            steps += decoder.stats.forwards
            assert output[:, 9:].tolist() == list(truth.values())
        times[name] = clock.now - started
    if kind == "right":
        assert times["auto"] < 0.75 * times["plain"]
    else:
        assert times["auto"] < 1.05 * times["plain"]
        assert drafter.drafts < (0.2 * steps + 30 if kind == "drying up" else 0.1 * steps)
