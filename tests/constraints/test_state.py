"""Constraints in rows, with toys that need no library: places, masks at nodes, ends, dead ends; and exactness."""

from __future__ import annotations

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

import ladon
from drafts import FIXED, RandomSizing
from ladon.constraints.bitmask import TokenBitmask
from ladon.constraints.state import GrammarState, Place, row_constraints
from ladon.engine.sequence import Row
from ladon.errors import ConstraintError, InputError
from toys import VOCAB, Residues, Script

EOS = 2
PROMPTS = [torch.arange(3, 15), torch.arange(5, 9), torch.arange(20, 50)]


def make(prompt, constraint=None, end_ids=frozenset({EOS}), limit=20, **options):
    grammar = None if constraint is None else GrammarState(constraint, end_ids)
    return Row(prompt=prompt, max_new_tokens=limit, is_stop=end_ids.__contains__, grammar=grammar, **options)


def check_legal(tokens, constraint, end_ids=frozenset({EOS})):
    """Every token is one that the constraint allows after those before it."""
    state = constraint.start()
    for token in tokens:
        if token in end_ids:
            assert state.is_complete and token == tokens[-1]
            return
        assert token in state.tokens()
        state = state.after(token)


def test_ends_are_allowed_where_the_text_may_end():
    """Even an end-of-sequence token that the state itself would allow is not, as long as the text is not complete."""
    open_, done = Residues(7, 2, seed=1), Residues(7, 2, seed=3)
    ends = frozenset({EOS, 90, sorted(open_.tokens())[0]})
    assert not any(Place(open_, ends).allows(token) for token in ends)
    assert all(Place(done, ends).allows(token) for token in ends)
    assert {token for token in range(VOCAB) if Place(open_, ends).allows(token)} == open_.tokens() - ends
    ended = Place(done, ends).after(EOS)
    assert ended.is_complete and ended.allows_nothing and not ended.allows(EOS) and ended.only is None


def test_the_only_token():
    assert Place(Script.of({5}), frozenset()).only == 5
    assert Place(Script.of({5, 6}), frozenset()).only is None
    assert Place(Script.of(set()), frozenset()).only is None
    assert Place(Script.of(), frozenset({EOS})).only == EOS


def test_masks_at_the_nodes_of_rows():
    """Rows with and without a constraint, before and after pruning; a vocabulary wider or narrower than the masks."""
    first, second = GrammarState(Residues(5, 2, seed=4)), GrammarState(Residues(7, 1, seed=9))
    for grammar in (first, second):
        token = min(grammar.here._state.tokens())
        grammar.nodes = [
            grammar.here,
            grammar.here.after(token),
            grammar.here.after(token).after(min_after(grammar, token)),
        ]
    first.nodes = first.nodes[:2]  # its third slot is padding
    grammars = [first, None, second]
    for vocab_size in (VOCAB, 131, 40):
        masks, logits = TokenBitmask(grammars, 3, torch.device("cpu")), torch.randn(3, 3, vocab_size)
        for kept in (None, torch.tensor([[0, 1], [0, 2], [0, 2]])):
            given = logits if kept is None else logits[:, :2]
            found = masks.on(given, kept)
            for row, grammar in enumerate(grammars):
                for place in range(given.shape[1]):
                    node = place if kept is None else int(kept[row, place])
                    expected = given[row, place].clone()
                    if grammar is not None and node < len(grammar.nodes):
                        illegal = [t for t in range(vocab_size) if t not in grammar.nodes[node]._state.tokens()]
                        expected[illegal] = -torch.inf
                    assert torch.equal(found[row, place], expected)


def min_after(grammar, token):
    return min(grammar.here.after(token)._state.tokens())


class Reference(LogitsProcessor):
    """The constraint in transformers' own generate, one row, one token at a time."""

    def __init__(self, constraint, prompt_length):
        self._constraint, self._length = constraint, prompt_length

    def __call__(self, input_ids, scores):
        (ids,) = input_ids.tolist()
        state = self._constraint.start()
        for token in ids[self._length :]:
            state = state.after(token)
        allowed = state.tokens() | ({EOS} if state.is_complete else set())
        illegal = [token for token in range(scores.shape[-1]) if token not in allowed]
        scores = scores.clone()
        scores[:, illegal] = -torch.inf
        return scores


def reference(model, prompt, constraint, limit=20, **options):
    processors = LogitsProcessorList([Reference(constraint, len(prompt))] if constraint else [])
    ids = prompt[None]
    output = type(model).generate(
        model, ids, attention_mask=torch.ones_like(ids), max_new_tokens=limit, do_sample=False,
        logits_processor=processors, **options,
    )  # fmt: skip
    return output[0, len(prompt) :].tolist()


CONSTRAINTS = [Residues(7, 2, seed=5), None, Residues(11, 1, seed=8)]
TREES = [dict(budget=1), dict(budget=8), dict(budget=64), dict(tree="chain", budget=8), dict(tree=FIXED)]


@pytest.mark.parametrize("options", TREES, ids=["1", "8", "64", "chain", "fixed"])
def test_greedy_rows_equal_generate(tiny_llama, options):
    heads = ladon.new_heads(tiny_llama, num_heads=3)
    decoder = ladon.Decoder(tiny_llama, heads, **options)
    rows = [make(*pair) for pair in zip(PROMPTS, CONSTRAINTS, strict=True)]
    for _ in decoder.decode(rows):
        pass
    for row, prompt, constraint in zip(rows, PROMPTS, CONSTRAINTS, strict=True):
        assert row.tokens == reference(tiny_llama, prompt, constraint)
        if constraint is not None:
            check_legal(row.tokens, constraint)
    assert (decoder.stats.drafts_checked > 0) == (options != dict(budget=1))
    assert rows[1].stats.drafts_checked == 0 and rows[1].complete is None


@pytest.mark.parametrize("options", TREES[1:4], ids=["8", "64", "chain"])
def test_processors_come_after_the_mask(tiny_llama, options):
    decoder = ladon.Decoder(tiny_llama, ladon.new_heads(tiny_llama, num_heads=3), **options)
    law = dict(repetition_penalty=1.7, no_repeat_ngram_size=2)
    for prompt, constraint in zip(PROMPTS, CONSTRAINTS, strict=True):
        output = decoder.generate(prompt[None], max_new_tokens=20, do_sample=False, constraint=constraint, **law)
        assert output[0, len(prompt) :].tolist() == reference(tiny_llama, prompt, constraint, **law)


def test_sampled_rows_equal_plain_ones_and_outside_rows_do_not_matter(decoder):
    """In one batch whose sizes change at random, with rows that join late: each row is as it is alone and plain."""
    law = dict(do_sample=True, temperature=1.3, top_p=0.9, seed=[11, 12, 13], max_new_tokens=24)
    plain = ladon.Decoder(decoder.model, tree="off")
    expected = [plain.rows([p], **{**law, "seed": [s]}, constraint=c)[0] for p, c, s in
                zip(PROMPTS, CONSTRAINTS, law["seed"], strict=True)]  # fmt: skip
    for row in expected:
        list(plain.decode([row]))
    for seed in range(3):
        decoder.sizing = RandomSizing(seed)
        rows = decoder.rows(PROMPTS, **law, constraint=CONSTRAINTS)
        list(decoder.decode(rows, max_rows=2))
        assert [row.tokens for row in rows] == [row.tokens for row in expected]
        assert len({record.nodes for record in decoder.sizing.records}) > 2
    check_legal(rows[0].tokens, CONSTRAINTS[0], frozenset())


@pytest.mark.parametrize("keep", [2, 5])
def test_pruned_trees_are_masked_by_their_survivors(tiny_llama, keep):
    decoder = ladon.Decoder(
        tiny_llama, ladon.new_heads(tiny_llama, num_heads=3), budget=16, prune=ladon.Pruning(layer=1, keep=keep)
    )
    rows = [make(*pair) for pair in zip(PROMPTS, CONSTRAINTS, strict=True)]
    list(decoder.decode(rows))
    assert decoder.stats.nodes_pruned > 0
    for row, prompt, constraint in zip(rows, PROMPTS, CONSTRAINTS, strict=True):
        assert row.tokens == reference(tiny_llama, prompt, constraint)


def test_forced_tokens_take_no_forward_each(tiny_llama):
    """Twelve tokens without a choice are drafted whatever the heads say, and come in one step."""
    script = Script.of({7, 8}, *[{token} for token in range(30, 42)], {9, 10})
    row = make(PROMPTS[0], script)
    decoder = ladon.Decoder(tiny_llama, ladon.new_heads(tiny_llama, num_heads=3), budget=16)
    list(decoder.decode([row]))
    assert row.tokens[1:13] == list(range(30, 42)) and row.tokens[-1] == EOS and row.complete
    assert row.stats.row_steps <= 3 < len(row.tokens)


def test_a_text_without_an_end_token_ends_with_its_constraint(decoder):
    row = make(PROMPTS[0], Script.of({7, 8}, {9}, {10, 11}), end_ids=frozenset())
    list(decoder.decode([row]))
    assert len(row.tokens) == 3 and row.finished and row.complete and row.error is None and not row.cancelled


@pytest.mark.parametrize("budget", [1, 16])
def test_a_dead_end_ends_its_row_alone(decoder, budget):
    decoder = ladon.Decoder(decoder.model, decoder.heads, budget=budget)
    alone = make(PROMPTS[1])
    list(decoder.decode([alone]))
    bad = make(PROMPTS[0], Script.of({7, 8}, {9}, set(), {3}))
    hopeless, other = make(PROMPTS[2], Script.of(set())), make(PROMPTS[1])
    list(decoder.decode([bad, other, hopeless]))
    assert len(bad.tokens) == 2 and bad.cancelled and not bad.complete and hopeless.tokens == []
    for row in (bad, hopeless):
        assert isinstance(row.error, ConstraintError) and "\n" not in str(row.error)
    assert "allows no token here" in str(bad.error)
    assert other.tokens == alone.tokens and other.error is None and len(other.tokens) == 20


def test_generate_returns_what_was_written_before_a_dead_end(decoder):
    with pytest.warns(UserWarning, match="row 0 ended after 2 tokens: the constraint allows no token here"):
        output = decoder.generate(
            torch.stack([PROMPTS[0][:4], PROMPTS[1]]), max_new_tokens=6, pad_token_id=0, do_sample=False,
            constraint=[Script.of({7, 8}, {9}, set(), {3}), Script.of({7}, {8})], return_dict_in_generate=True,
        )  # fmt: skip
    assert output.sequences[:, 4:].tolist()[1] == [7, 8] and output.sequences[0, 5] == 9
    assert decoder.complete == [False, True] and output.complete == [False, True]


def test_a_law_that_leaves_nothing_legal_ends_the_row(decoder):
    """min_new_tokens forbids the end, the constraint everything else."""
    decoder.model.generation_config.eos_token_id = EOS
    rows = decoder.rows(
        [PROMPTS[0]], max_new_tokens=9, min_new_tokens=5, constraint=Script.of({7}, {8}), eos_token_id=EOS
    )
    list(decoder.decode(rows))
    assert rows[0].tokens == [7, 8] and rows[0].complete and "min_new_tokens" in str(rows[0].error)


@pytest.mark.parametrize("law", [{}, {"do_sample": True, "seed": 1}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("suppressed", [0, 11])
def test_a_law_that_leaves_nothing_legal_ends_no_other_row(decoder, law, suppressed):
    """Token 0, too, which stands first where all scores are -inf."""
    script = Script.of({10}, {suppressed})
    prompts = [torch.tensor([5, 6, 7])] * 2
    options = {"max_new_tokens": 8, "suppress_tokens": [suppressed], "eos_token_id": 96, **law}
    rows = decoder.rows(prompts, constraint=[script, None], **options)
    for _ in decoder.decode(rows):
        pass
    assert rows[0].tokens == [10] and isinstance(rows[0].error, ConstraintError)
    assert rows[1].error is None and not rows[1].cancelled and len(rows[1].tokens) > 1


def test_plain_decoding_drafts_no_forced_tokens(tiny_llama):
    script = Script.of(*[{10 + place} for place in range(20)])
    prompt = torch.tensor([[5, 6, 7]])
    plain = ladon.Decoder(tiny_llama, tree="off", budget=16)
    expected = plain.generate(prompt, max_new_tokens=20, constraint=script)
    assert plain.stats.acceptance_length == 1.0
    drafting = ladon.Decoder(tiny_llama, budget=16)
    assert torch.equal(drafting.generate(prompt, max_new_tokens=20, constraint=script), expected)
    assert drafting.stats.acceptance_length > 5


def test_n_grams_of_constrained_rows_are_not_taken_for_heads(tiny_llama):
    """Steps that n-grams alone have drafted say nothing of heads, constrained or not."""
    prompt = torch.tensor([5, 6, 7, 8, 9] * 8)
    for heads in (None, ladon.new_heads(tiny_llama, num_heads=3)):
        decoder = ladon.Decoder(tiny_llama, heads)
        decoder.sizing = sizing = RandomSizing(3)
        rows = decoder.rows([prompt], max_new_tokens=40, constraint=Residues(1, 1, ends=False))
        for _ in decoder.decode(rows):
            pass
        drafted = [record for record in sizing.records if record.nodes > 1]
        assert drafted and (heads is not None or not any(record.by_heads for record in drafted))
        assert all(len(sums) <= 3 for sums in sizing.of_heads if sums is not None)


def test_one_constraint_or_one_for_each_row():
    one = Residues(5, 2)
    assert row_constraints(None, 2) == [None, None] and row_constraints(one, 2) == [one, one]
    assert row_constraints([one, None], 2) == [one, None]
    for wrong, what in (([one], "1 constraints for 2 rows"), ("{}", "is str"), ([one, 3], "is int"), ({}, "is dict")):
        with pytest.raises(InputError, match=what):
            row_constraints(wrong, 2)
