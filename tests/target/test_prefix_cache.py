"""A later call goes on from what an earlier one has read and said: the same tokens as a fresh run, less to read."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, PreTrainedModel

import ladon
from drafts import TREES, make_engine, make_proposer
from families import FAST, VOCAB_SIZE, build
from greedy import BATCH, MASK, PROMPT, plain
from ladon.engine.sequence import Row
from ladon.engine.stats import DecodeStats
from ladon.errors import InputError
from ladon.target.prefix_cache import KeptCache, longest_past
from ladon.target.rope_regimes import RopeRegimes
from ladon.target.target import Target
from rope_cases import CASES, SWITCH, case
from toys import looking

KEEP = {"return_dict_in_generate": True}
FAMILIES = {"gpt2", "mixtral", *FAST}


def decoder_of(model: PreTrainedModel, **options) -> ladon.Decoder:
    """A decoder with random heads, some of whose guesses are right."""
    torch.manual_seed(0)
    heads = ladon.new_heads(model, num_heads=3)
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.generation_config.eos_token_id = None
    return ladon.Decoder(model, heads, **{"budget": 8, **options})


def next_turn(sequences, mask, *, tokens=4):
    """Everything so far, and new tokens after it; the mask grows with it."""
    new = torch.randint(3, VOCAB_SIZE, (len(sequences), tokens))
    ids = torch.cat([sequences, new], 1)
    return ids, torch.cat([mask, mask.new_ones(len(ids), ids.shape[1] - mask.shape[1])], 1)


@pytest.mark.parametrize("name", sorted(FAMILIES))
@pytest.mark.parametrize("law", [{}, {"do_sample": True, "seed": 7, "temperature": 0.9}], ids=["greedy", "sampled"])
def test_every_turn_equals_a_fresh_run(name, law):
    """Three turns of a left-padded batch, across the windows of the models that have some."""
    decoder = decoder_of(build(name))
    ids, mask, past, known = BATCH, MASK, None, 0
    for _ in range(3):
        options = {"attention_mask": mask, "max_new_tokens": 6, **KEEP, **law}
        fresh = decoder.generate(ids, **options)
        assert decoder.stats.prefill_tokens == mask.sum() and decoder.stats.reused_tokens == 0
        output = decoder.generate(ids, past_key_values=past, **options)
        assert torch.equal(output.sequences, fresh.sequences)
        assert decoder.stats.reused_tokens == known and decoder.stats.prefill_tokens == mask.sum() - known
        past, known = output.past_key_values, int(mask.sum()) + 3 * 5  # the last token of each row is not in the cache
        assert [len(row) for row in past.rows] == (mask.sum(1) + 5).tolist()
        ids, mask = next_turn(output.sequences, mask)


def test_it_equals_transformers_and_reads_only_what_is_new(model, decoder, monkeypatch):
    """The model itself is given the new tokens and nothing else."""
    first = decoder.generate(PROMPT, max_new_tokens=8, **KEEP)
    ids, _ = next_turn(first.sequences, torch.ones_like(PROMPT))
    expected, widths = plain(model, ids, max_new_tokens=1), []
    model.register_forward_pre_hook(
        looking(lambda module, args, kwargs: widths.append(kwargs["input_ids"].shape[1])), with_kwargs=True
    )
    output = decoder.generate(ids, max_new_tokens=1, past_key_values=first.past_key_values)
    assert torch.equal(output, expected) and widths == [5]  # four, and the last token that was said


def test_the_copy_holds_what_a_prefill_would_hold_and_nothing_besides(model, decoder):
    output = decoder.generate(PROMPT, max_new_tokens=9, **KEEP)
    (row,) = output.past_key_values.rows
    assert list(row.token_ids) == output.sequences[0, :-1].tolist() and len(row.stores) == 2
    with torch.no_grad():
        cache = model(output.sequences[:, :-1], past_key_values=DynamicCache()).past_key_values
    for layer, expected in zip(row.stores, cache.layers, strict=True):
        torch.testing.assert_close(layer["both"][0][None], expected.keys, rtol=0, atol=1e-12)
        torch.testing.assert_close(layer["both"][1][None], expected.values, rtol=0, atol=1e-12)
    assert row.nbytes == 2 * 2 * 2 * 20 * 8 * 8  # layers, parts, heads, tokens, width, bytes
    assert output.past_key_values.nbytes == row.nbytes
    assert all(s.untyped_storage().nbytes() == s.nbytes for layer in row.stores for s in layer.values())


def test_what_is_kept_never_changes(decoder):
    """Not by the calls that go on from it, in different directions."""
    kept = decoder.generate(PROMPT, max_new_tokens=6, **KEEP).past_key_values
    before = copy.deepcopy([dict(layer) for layer in kept.rows[0].stores])
    for tail in (31, 32):
        ids = torch.cat([PROMPT, torch.tensor([[tail, 5, 6]])], 1)
        fresh = decoder.generate(ids, max_new_tokens=6)
        assert torch.equal(decoder.generate(ids, max_new_tokens=6, past_key_values=kept), fresh)
        assert decoder.stats.reused_tokens == 12
    for layer, expected in zip(kept.rows[0].stores, before, strict=True):
        assert all(torch.equal(layer[name], expected[name]) for name in expected)


def test_the_longest_beginning_is_used_whatever_the_order(decoder):
    """Other rows, other batch sizes, copies, a prompt that is all known, and one that shares nothing."""
    kept = decoder.generate(BATCH, attention_mask=MASK, max_new_tokens=4, **KEEP).past_key_values
    ids, mask = BATCH[[2, 1]], MASK[[2, 1]]
    fresh = decoder.generate(ids, attention_mask=mask, max_new_tokens=4)
    assert torch.equal(decoder.generate(ids, attention_mask=mask, max_new_tokens=4, past_key_values=kept), fresh)
    assert decoder.stats.prefill_tokens == 2, "what is said after a prompt has to be asked with its last token"
    copies = decoder.generate(
        BATCH[1:2], max_new_tokens=4, num_return_sequences=3, past_key_values=kept, do_sample=True, seed=1
    )
    assert decoder.stats.prefill_tokens == 3 and copies.shape == (3, 12)
    other = torch.tensor([[90, 91, 92]])
    assert torch.equal(
        decoder.generate(other, max_new_tokens=4, past_key_values=kept), decoder.generate(other, max_new_tokens=4)
    )
    assert decoder.stats.reused_tokens == 0
    assert longest_past([], [1, 2]) is None and longest_past(kept.rows, [11]) is None


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("stop_at", range(7))
def test_a_stop_inside_an_accepted_path_cuts_the_cache_too(model, tree, stop_at):
    truth = plain(model)[0, 12:].tolist()
    assert len(set(truth[:8])) == 8, "another seed is needed"
    target, stats = Target(model), DecodeStats()
    row = Row(prompt=PROMPT[0], max_new_tokens=16, is_stop=lambda token: token == truth[stop_at], keeps_past=True)
    proposer = make_proposer("oracle", TREES[tree], [truth], 97, None)
    for _ in make_engine(target, proposer, budget=12, stats=stats).run([row]):
        pass
    said = [*PROMPT[0].tolist(), *truth[: stop_at + 1]]
    assert row.tokens == truth[: stop_at + 1] and row.past is not None
    # In the cache are whole paths, cut to what was said: the last token is there if it was a draft that was accepted.
    assert list(row.past.token_ids) in (said, said[:-1])
    if tree == "chain":
        assert len(row.past) == len(said) - (stop_at % 4 == 0)
    ids = torch.tensor([[*said, 33, 34]])
    decoder = decoder_of(model)
    fresh = decoder.generate(ids, max_new_tokens=6)
    assert torch.equal(decoder.generate(ids, max_new_tokens=6, past_key_values=KeptCache([row.past])), fresh)
    assert decoder.stats.reused_tokens == len(row.past)


def test_custom_generate_and_attach_take_it(model, decoder):
    first = model.generate(PROMPT, custom_generate=decoder, max_new_tokens=6, do_sample=False, **KEEP)
    ids, _ = next_turn(first.sequences, torch.ones_like(PROMPT))
    expected = plain(model, ids, max_new_tokens=6)
    options = {"max_new_tokens": 6, "past_key_values": first.past_key_values, "do_sample": False}
    assert torch.equal(model.generate(ids, custom_generate=decoder, **options), expected)
    assert decoder.stats.reused_tokens == 17
    ladon.attach(model, decoder.heads)
    assert torch.equal(model.generate(ids, **options), expected)
    ladon.detach(model)
    assert decoder.generate(PROMPT, max_new_tokens=2, use_cache=False, **KEEP).past_key_values is None
    assert isinstance(decoder.generate(PROMPT, max_new_tokens=2), torch.Tensor)


def one_line(decoder: ladon.Decoder, cache: object, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        decoder.generate(PROMPT, max_new_tokens=2, past_key_values=cache)
    assert "\n" not in str(error.value)


def test_caches_of_other_kinds_are_refused(model, decoder):
    one_line(decoder, model(PROMPT).past_key_values, "past_key_values is a DynamicCache; give what an earlier call")
    one_line(decoder, DynamicCache(), "past_key_values is a DynamicCache")
    one_line(decoder, 7, "past_key_values is a int")
    with pytest.raises(InputError, match="past_key_values is a DynamicCache"):
        model.generate(PROMPT, custom_generate=decoder, max_new_tokens=2, past_key_values=model(PROMPT).past_key_values)


def change_in_place(model: PreTrainedModel) -> None:
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)


def change_by_data(model: PreTrainedModel) -> None:
    model.lm_head.weight.data = model.lm_head.weight.data * 1.5


def change_by_loading(model: PreTrainedModel) -> None:
    model.load_state_dict({name: values * 1.5 for name, values in model.state_dict().items()})


def change_dtype(model: PreTrainedModel) -> None:
    model.float()


@pytest.mark.parametrize("change", [change_in_place, change_by_data, change_by_loading, change_dtype])
def test_another_model_and_changed_weights_are_refused(
    model: PreTrainedModel, decoder: ladon.Decoder, change: Callable[[PreTrainedModel], None]
) -> None:
    kept = decoder.generate(PROMPT, max_new_tokens=4, **KEEP).past_key_values
    one_line(ladon.Decoder(copy.deepcopy(model)), kept, "another model object")
    ladon.Decoder(model, tree="off").generate(PROMPT, max_new_tokens=2, past_key_values=kept)  # the same model
    change(model)
    one_line(ladon.Decoder(model), kept, "weights have changed since")


def test_a_row_must_begin_with_its_past(model, decoder):
    (row,) = decoder.rows([PROMPT[0]], max_new_tokens=4, **KEEP)
    for _ in decoder.decode([row]):
        pass
    assert row.past is not None and len(row.past) == 15
    engine = decoder.engine()
    for prompt in (PROMPT[0], PROMPT[0].flip(0), torch.tensor(row.past.token_ids)):
        with pytest.raises(InputError, match="15 tokens that its prompt does not begin with") as error:
            engine.submit(Row(prompt=prompt, max_new_tokens=2, is_stop=lambda token: False, past=row.past))
        assert "\n" not in str(error.value)


def test_rows_join_from_their_past_while_others_decode(model, decoder):
    """In any order, with other rows in front of them and behind."""
    prompts = [BATCH[1], BATCH[2][1:], BATCH[0][3:], PROMPT[0]]
    first = decoder.rows(prompts[:2], max_new_tokens=5, **KEEP)
    for _ in decoder.decode(first):
        pass
    pasts = [row.past for row in first]
    longer = [torch.tensor([*row.prompt.tolist(), *row.tokens, 40, 41, 42]) for row in first]
    expected = [plain(model, p[None], max_new_tokens=7)[0, len(p) :].tolist() for p in (*longer, *prompts[2:])]
    for order in ([0, 2, 1, 3], [2, 3, 1, 0], [3, 0, 2, 1]):
        rows = decoder.rows([(*longer, *prompts[2:])[i] for i in order], past=pasts, max_new_tokens=7, **KEEP)
        for _ in decoder.decode(rows, max_rows=2):
            pass
        assert [row.tokens for row in rows] == [expected[i] for i in order]
        assert [row.stats.reused_tokens for row in rows] == [len(pasts[i]) if i < 2 else 0 for i in order]
        assert all(len(row.past) == len(row.prompt) + 6 for row in rows)


def test_cancelled_rows_keep_what_they_have(model, decoder):
    """Between two steps; while the prompt is read; before it joined."""
    decoder._target.prefill_chunk = 5
    rows = decoder.rows([PROMPT[0], torch.arange(20, 50)], max_new_tokens=30, **KEEP)
    waiting = decoder.rows([PROMPT[0]], max_new_tokens=30, **KEEP)[0]
    steps = decoder.decode([*rows, waiting], max_rows=2)
    while not rows[0].tokens:
        next(steps)
    next(steps)
    steps.close()
    said = [*PROMPT[0].tolist(), *rows[0].tokens]
    assert list(rows[0].past.token_ids) == said[:-1] and len(rows[0].tokens) >= 2
    assert list(rows[1].past.token_ids) == list(range(20, 40)) and rows[1].tokens == []
    assert waiting.past is None
    again = decoder.rows([torch.arange(20, 50)], max_new_tokens=3, past=[rows[1].past])
    for _ in decoder.decode(again):
        pass
    assert again[0].tokens == plain(model, torch.arange(20, 50)[None], max_new_tokens=3)[0, 30:].tolist()
    assert decoder.stats.prefill_tokens == 10


@pytest.mark.parametrize("case", [case(name) for name in CASES])
@pytest.mark.parametrize(("length", "said", "more"), [(6, 4, 3), (10, 4, 6), (12, 8, 4), (18, 4, 4), (20, 4, -12)])
def test_lengths_at_which_a_model_changes_its_ways(make, length, said, more):
    """Below a switch, across it in the answer, across it in the next prompt, beyond it, and back."""
    model = make()
    decoder = decoder_of(model)
    ids = torch.randint(3, VOCAB_SIZE, (1, length))
    output = decoder.generate(ids, max_new_tokens=said, **KEEP)
    ids = next_turn(output.sequences, torch.ones_like(ids), tokens=more)[0] if more > 0 else output.sequences[:, :more]
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6}
    fresh = decoder.generate(ids, **options)
    assert torch.equal(decoder.generate(ids, past_key_values=output.past_key_values, **options), fresh)
    if length + said + max(more, 0) <= SWITCH:
        assert decoder.stats.reused_tokens == length + said - 1


def test_regimes(monkeypatch):
    regimes = RopeRegimes(build("llama"))
    assert regimes.number_at(3) == regimes.number_at(10_000) == regimes.kept_number(3, 10_000) == 0
    regimes._switches = [16, 32]
    assert [regimes.number_at(length) for length in (15, 16, 17, 32, 33)] == [0, 0, 1, 1, 2]
    assert [regimes.kept_number(10, length) for length in (16, 17)] == [0, None] and regimes.kept_number(17, 32) == 1
    assert regimes.kept_number(17, 10) == 1, "half a prompt is read as the whole one asks"
    regimes.recomputed_at = regimes._switches
    assert regimes.kept_number(10, 17) == 1, "the cache was computed again at the switch"
    regimes._sparse_from = 20
    assert [regimes.number_at(length) for length in (20, 21)] == [1, None] and regimes.kept_number(21, 21) is None


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_history_of_edits_equals_fresh_runs(model, data):
    """Turns that go on, go back, or start anew; kept rows of several turns at once."""
    torch.manual_seed(0)
    decoder = ladon.Decoder(model, ladon.new_heads(model, num_heads=2), budget=4)
    kept, texts = [], [[5, 6, 7]]
    for _ in range(data.draw(st.integers(2, 4))):
        base = data.draw(st.sampled_from(texts))
        tail = data.draw(st.lists(st.integers(3, 96), min_size=1, max_size=4))
        ids = torch.tensor([[*base[: data.draw(st.integers(0, len(base)))], *tail]])
        options = {"max_new_tokens": data.draw(st.integers(1, 6)), **KEEP}
        fresh = decoder.generate(ids, **options).sequences
        output = decoder.generate(ids, past_key_values=KeptCache(kept), **options)
        assert torch.equal(output.sequences, fresh)
        shared = max((row.shared(ids[0, :-1].tolist()) for row in kept), default=0)
        assert decoder.stats.prefill_tokens == ids.shape[1] - shared
        kept += output.past_key_values.rows
        texts.append(output.sequences[0].tolist())
