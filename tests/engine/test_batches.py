"""Batches that live: whoever joins, leaves or is cancelled, and whenever, each row says what it says alone."""

from __future__ import annotations

import gc
import random
import threading
import time
from dataclasses import dataclass, field, replace
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ladon
from drafts import CANDIDATES, NUM_NODES, PROPOSERS, TREES, RandomSizing, decode, make_engine, make_proposer
from families import FAMILIES, VOCAB_SIZE, build
from ladon.drafting import merge_on_host
from ladon.drafting.ngram_lookup import NgramLookup
from ladon.drafting.proposer import RootProposer
from ladon.engine.engine import Engine
from ladon.engine.sequence import Row
from ladon.engine.stats import DecodeStats
from ladon.errors import InputError
from ladon.sampling.sampling_params import GREEDY, SamplingParams, TemperatureSampling
from ladon.target.kv_cache import TreeCache
from ladon.target.pruning.pruner import Pruning
from ladon.target.target import Target
from rope_cases import CASES

CHUNK = 7
MOST = 18  # tokens of a row
LENGTHS = (1, 3, 7, 8, 15, 16, 17, 30, 12, 5)  # below and beyond a chunk, a window, a switch
SAMPLER = TemperatureSampling(temperature=0.9, top_k=30)


class Case:
    """A model of a family with prompts, and what is said after each of them by the row alone."""

    def __init__(self, name: str) -> None:
        family, options = CASES.get(name, (name, {}))
        before = FAMILIES[family]
        FAMILIES[family] = replace(before, options={**before.options, **options})
        self.model = build(family)
        FAMILIES[family] = before
        self.target = Target(self.model, prefill_chunk=CHUNK)
        generator = torch.Generator().manual_seed(3)
        self.prompts = [torch.randint(3, VOCAB_SIZE, (n,), generator=generator) for n in LENGTHS]
        alone = Target(self.model)
        self.greedy = [decode(alone, RootProposer(), [prompt], MOST)[0][0] for prompt in self.prompts]
        self.sampled = [self._drawn(alone, index) for index in range(len(self.prompts))]
        self.heads = ladon.new_heads(self.model, num_heads=3)
        for parameter in self.heads.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        self.heads.bind(self.model)

    def _drawn(self, target: Target, index: int) -> list[int]:
        row = Row(prompt=self.prompts[index], max_new_tokens=MOST, is_stop=lambda _: False, seed=index)
        row.sampling_params = SAMPLER
        for _ in new_engine(target, RootProposer()).run([row]):
            pass
        return row.tokens

    def engine(self, kind: str = "root", tree: str = "dynamic", *, sampled: bool = False, **options) -> Engine:
        truth = self.sampled if sampled else self.greedy
        by_prompt = {tuple(p.tolist()): tokens for p, tokens in zip(self.prompts, truth, strict=True)}
        proposer = make_proposer(kind, TREES[tree], by_prompt, VOCAB_SIZE, self.heads)
        return new_engine(self.target, proposer, **options)


def new_engine(target: Target, proposer, **options) -> Engine:
    stats = DecodeStats()
    return make_engine(target, proposer, **{"budget": NUM_NODES, "stats": stats, **options})


case = cache(Case)


@dataclass
class Plan:
    """What happens to one row: it is submitted before step `at`, and cancelled before step `cancel`, if ever."""

    prompt: int
    limit: int
    at: int
    cancel: int | None
    stop: int | None
    events: list[list[int]] = field(default_factory=list)
    row: Row | None = None
    length_when_cancelled: int | None = None

    def expected(self, truth: list[list[int]]) -> list[int]:
        tokens = truth[self.prompt][: self.limit]
        return tokens if self.stop not in tokens else tokens[: tokens.index(self.stop) + 1]

    def make(self, sampling_params: SamplingParams = GREEDY) -> Row:
        self.row = Row(
            prompt=CASE_PROMPTS[self.prompt],
            max_new_tokens=self.limit,
            is_stop=lambda token: token == self.stop,
            seed=self.prompt,
            sampling_params=sampling_params,
        )
        return self.row


CASE_PROMPTS: list[torch.Tensor] = []

plans = st.lists(
    st.builds(
        Plan,
        prompt=st.integers(0, len(LENGTHS) - 1),
        limit=st.integers(1, MOST),
        at=st.integers(0, 12),
        cancel=st.one_of(st.none(), st.none(), st.integers(0, 16)),
        stop=st.one_of(st.none(), st.integers(3, VOCAB_SIZE - 1)),
    ),
    min_size=1,
    max_size=7,
)
schedules = st.fixed_dictionaries(
    {
        "plans": plans,
        "kind": st.sampled_from(PROPOSERS),
        "tree": st.sampled_from(list(TREES)),
        "max_rows": st.sampled_from([None, 1, 2, 3]),
        "sampled": st.booleans(),
        "sizes": st.one_of(st.none(), st.none(), st.integers(0, 9)),  # any size at any step, from this seed
        "keep": st.sampled_from([None, None, 3, "threshold"]),
        "ngrams": st.booleans(),
    }
)


def follow(name: str, schedule: dict) -> None:
    """Run a schedule, and compare every row with the row alone."""
    made = case(name)
    CASE_PROMPTS[:] = made.prompts
    truth = made.sampled if schedule["sampled"] else made.greedy
    todo: list[Plan] = [replace(plan, events=[]) for plan in schedule["plans"]]
    options = {"max_rows": schedule["max_rows"], "sampled": schedule["sampled"]}
    if schedule["sizes"] is not None:
        options["budget"] = RandomSizing(schedule["sizes"])
    if schedule["ngrams"]:
        options["lookup"] = NgramLookup()
    if schedule["keep"] is not None:
        options["pruning"] = Pruning(layer=1, keep=schedule["keep"], threshold=0.01)
    engine = made.engine(schedule["kind"], schedule["tree"], **options)
    plan_of: dict[Row, Plan] = {}
    number = 0
    while True:
        for plan in todo:
            if plan.at == number:
                plan_of[plan.make(SAMPLER if schedule["sampled"] else GREEDY)] = plan
                engine.submit(plan.row)
            if plan.cancel == number and plan.row is not None:
                engine.cancel(plan.row)
                plan.length_when_cancelled = len(plan.row.tokens)
        step = engine.step()
        number += 1
        if step is None and number > 16:
            break
        for row, emitted in zip(step.rows, step.emitted, strict=True) if step else ():
            plan_of[row].events.append(emitted)
            assert not row.cancelled or not emitted
    for row, plan in plan_of.items():
        said = [token for tokens in plan.events for token in tokens]
        assert row.finished and said == row.tokens
        if row.cancelled:
            assert row.tokens == plan.expected(truth)[: plan.length_when_cancelled]
        else:
            assert row.tokens == plan.expected(truth)
    assert engine.cache_bytes == 0
    total, parts = engine.observer.stats, [row.stats for row in plan_of]
    for name in ("prefill_tokens", "row_steps", "tokens", "nodes_verified", "accepted_nodes"):
        assert getattr(total, name) == sum(getattr(part, name) for part in parts)


@settings(deadline=None, max_examples=150)
@given(schedule=schedules)
def test_any_schedule(schedule):
    follow("llama", schedule)


FAST = ("bloom", "mistral", "indexer", "longrope recomputed")
MORE = ("gemma2", "gpt_neo", "longrope", "longrope in a window", "dynamic", "blocks", "mpt", "doge")


@pytest.mark.parametrize("name", [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)])
def test_any_schedule_of_other_families(name):
    """Positions that are a bias, windows, plain regimes, and rows whose cache is computed again, all in one batch."""

    @settings(deadline=None, max_examples=10)
    @given(schedule=schedules)
    def run(schedule):
        follow(name, schedule)

    run()


def a_row(made: Case, prompt: int, limit: int = MOST, is_stop=lambda _: False) -> Row:
    return Row(prompt=made.prompts[prompt], max_new_tokens=limit, is_stop=is_stop)


LONG = LENGTHS.index(30)  # five chunks


def test_a_long_prompt_does_not_stop_the_others():
    made = case("llama")
    engine = made.engine()
    first, long = a_row(made, 1), a_row(made, LONG, 3)
    engine.submit(first)
    engine.step()
    engine.submit(long)
    for reads in range(1, 6):
        before = len(first.tokens)
        step = engine.step()
        assert len(first.tokens) == before + 1 and long.stats.prefill_tokens == min(30, CHUNK * reads)
        assert step.joined == ([long] if reads == 5 else [])
    assert long.tokens == made.greedy[LONG][:1]


def test_a_short_prompt_need_not_wait_for_a_long_one_before_it():
    made = case("llama")
    engine = made.engine()
    long, short = a_row(made, LONG), a_row(made, 1)
    engine.submit(long)
    engine.step()
    engine.submit(short)
    assert engine.step().joined == [short]
    assert engine.step().joined == []


def test_rows_join_in_the_order_they_came_and_as_soon_as_there_is_room():
    made = case("llama")
    rows = [a_row(made, 1, limit) for limit in (9, 2, 4, 1, 6)]
    engine, in_flight, joined = made.engine(max_rows=2), [], []
    for step in engine.run(rows):
        joined += step.joined
        in_flight.append(len([row for row in rows if row.stats.joined is not None and not row.finished]))
        assert len(step.rows) <= 2
    assert joined == rows and in_flight[:3] == [2, 1, 2]


def test_cancelled_from_a_stop_rule():
    """Its own row, and another one that decodes in the same step."""
    made = case("llama")
    rows: list[Row] = []

    def rule(token: int) -> bool:
        if len(rows[0].tokens) == 4:
            rows[0].cancel()
            rows[1].cancel()
        return False

    rows += [a_row(made, 1, is_stop=rule), a_row(made, 2), a_row(made, 0)]
    for _ in made.engine("oracle").run(rows):
        pass
    assert [len(row.tokens) for row in rows] == [4, 1, MOST]
    assert [row.cancelled for row in rows] == [True, True, False]
    assert [row.tokens for row in rows] == [
        made.greedy[p][: len(r.tokens)] for p, r in zip((1, 2, 0), rows, strict=True)
    ]


def test_cancelled_between_verify_and_delivery(monkeypatch):
    made = case("llama")
    rows = [a_row(made, 1), a_row(made, 2)]
    engine, to_host = made.engine("oracle"), merge_on_host.to_host
    for row in rows:
        engine.submit(row)
    engine.step()

    def cancel_and_read(values):
        table = to_host(values)
        engine.cancel(rows[0])
        return table

    monkeypatch.setattr(merge_on_host, "to_host", cancel_and_read)
    step = engine.step()
    monkeypatch.undo()
    assert step.rows == rows and step.emitted[0] == [] and len(step.emitted[1]) > 1
    while engine.step() is not None:
        pass
    assert len(rows[0].tokens) == 1 and rows[1].tokens == made.greedy[2]


def test_cancelled_in_the_queue_and_in_the_middle_of_a_prompt():
    made = case("llama")
    long, waiting, last = a_row(made, LONG), a_row(made, 1), a_row(made, 3)
    engine = made.engine(max_rows=1)
    for row in (long, waiting, last):
        engine.submit(row)
    engine.step()
    engine.cancel(waiting)
    engine.step()
    assert long.stats.prefill_tokens == 2 * CHUNK
    engine.cancel(long)
    while engine.step() is not None:
        pass
    assert long.tokens == waiting.tokens == [] and last.tokens == made.greedy[3]
    assert waiting.stats.joined is None and long.cancelled and waiting.cancelled
    engine.cancel(last)
    assert not last.cancelled, "it had ended by itself"


def test_cancelled_from_other_threads():
    """When `cancel` has returned, nothing comes any more."""
    made, rng = case("llama"), random.Random(0)
    rows = [a_row(made, rng.randrange(len(LENGTHS))) for _ in range(40)]
    lengths: dict[Row, int] = {}
    engine = made.engine("oracle", max_rows=4)
    started = threading.Barrier(2)

    def cancel_some() -> None:
        started.wait()
        for row in rows[::3]:
            while row.stats.joined is None and not row.finished:
                time.sleep(1e-4)  # without it the engine's thread would hardly run
            engine.cancel(row)
            lengths[row] = len(row.tokens)

    thread = threading.Thread(target=cancel_some)
    thread.start()
    started.wait()
    for _ in engine.run(rows):
        pass
    thread.join()
    assert all(len(row.tokens) == length for row, length in lengths.items())
    assert all(row.finished for row in rows) and any(row.cancelled for row in rows)


def test_submitted_from_a_stop_rule_and_after_the_end():
    made = case("llama")
    engine, later = made.engine(), [a_row(made, 3), a_row(made, 5)]
    first = a_row(made, 1, is_stop=lambda _: len(first.tokens) == 2 and engine.submit(later[0]) is not None)
    for _ in engine.run([first]):
        pass
    assert later[0].tokens == made.greedy[3] and engine.step() is None
    for _ in engine.run(later[1:]):
        pass
    assert later[1].tokens == made.greedy[5] and first.tokens == made.greedy[1]


@pytest.mark.parametrize("steps", [0, 1, 3, 8])
def test_closing_the_iterator_leaves_the_engine_clean(steps):
    made = case("llama")
    engine = made.engine("oracle", max_rows=2)
    rows = [a_row(made, prompt) for prompt in (LONG, 1, 3)]
    run = engine.run(rows)
    for _ in range(steps):
        next(run)
    run.close()
    assert engine.cache_bytes == 0 and engine.step() is None
    assert all(row.finished for row in rows) == any(row.cancelled for row in rows) == (steps > 0)
    again = a_row(made, 5)
    for _ in engine.run([again]):
        pass
    assert again.tokens == made.greedy[5]


def test_a_step_that_raises_takes_only_the_rows_in_flight(monkeypatch):
    made = case("llama")
    engine = made.engine("oracle", max_rows=2)
    rows = [a_row(made, prompt) for prompt in (1, 3, 5)]
    for row in rows:
        engine.submit(row)
    engine.step()

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(TreeCache, "commit", fail)
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    monkeypatch.undo()
    assert engine.cache_bytes == 0 and [row.cancelled for row in rows] == [True, True, False]
    while engine.step() is not None:
        pass
    assert rows[2].tokens == made.greedy[5]


def test_a_stop_rule_that_raises_ends_its_own_row():
    made = case("llama")
    engine = made.engine("oracle")

    def broken(token: int) -> bool:
        raise ZeroDivisionError("a rule of the user's")

    good, bad = a_row(made, 1), a_row(made, 3, is_stop=broken)
    engine.submit(good)
    engine.submit(bad)
    while engine.step() is not None:
        pass
    assert good.tokens == made.greedy[1] and not good.cancelled and good.error is None
    assert bad.cancelled and len(bad.tokens) == 1 and isinstance(bad.error, ZeroDivisionError)
    others = [a_row(made, 1), a_row(made, 3, is_stop=broken)]
    with pytest.raises(ZeroDivisionError, match="a rule of the user's"):
        for _ in engine.run(others):
            pass
    assert all(row.cancelled for row in others) and engine.cache_bytes == 0


def test_rows_that_cannot_be_run_leave_nothing_behind():
    made = case("llama")
    engine, elsewhere = made.engine(), made.engine()
    good, used = a_row(made, 1), a_row(made, 3)
    elsewhere.submit(used)
    with pytest.raises(InputError, match="given to an engine before"):
        next(engine.run([good, used]))
    assert good.cancelled and not used.cancelled and engine.step() is None
    while elsewhere.step() is not None:
        pass
    assert used.tokens == made.greedy[3]


def test_cancelled_rows_have_an_end_too():
    made = case("llama")
    engine = made.engine(max_rows=1)
    flying, waiting = a_row(made, 1), a_row(made, 3)
    engine.submit(flying)
    engine.submit(waiting)
    engine.step()
    for row in (flying, waiting):
        assert row.stats.finished is None
        engine.cancel(row)
        ended = row.stats.finished
        row.cancel()
        assert row.stats.finished == ended >= row.stats.submitted


def random_events(engine: Engine, made: Case, rng: random.Random, count: int) -> tuple[int, int, int]:
    """That many joins, ends and cancels; the most rows and tokens that were in flight, and the most bytes."""
    events, most_rows, most_tokens, most_bytes = 0, 0, 0, 0
    alive: list[Row] = []
    while events < count:
        for _ in range(rng.randrange(3) if len(alive) < 6 else 0):
            alive.append(a_row(made, rng.randrange(len(LENGTHS)), rng.randint(1, MOST)))
            engine.submit(alive[-1])
            events += 1
        if alive and rng.random() < 0.1:
            engine.cancel(rng.choice(alive))
        engine.step()
        in_flight = [row for row in alive if row.stats.joined is not None]
        most_rows = max(most_rows, len(in_flight))
        most_tokens = max([most_tokens, *(len(row.prompt) + len(row.tokens) for row in in_flight)])
        most_bytes = max(most_bytes, engine.cache_bytes)
        events += sum(row.finished for row in alive)
        alive = [row for row in alive if not row.finished]
    while engine.step() is not None:
        pass
    return most_rows, most_tokens, most_bytes


def test_no_leak():
    """1,000 joins, ends and cancels, twice over: nothing grows but with the largest batch and the longest row."""
    made, rng = case("llama"), random.Random(1)
    engine = made.engine("random")
    config = made.model.config
    per_slot = 8 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    gc.collect()
    before = sum(type(thing) is TreeCache for thing in gc.get_objects())
    for _ in range(2):
        rows, tokens, most = random_events(engine, made, rng, 1000)
        assert 4 <= rows <= 9
        assert most <= 2 * rows * max(64, 2 * (tokens + NUM_NODES)) * per_slot
        assert engine.cache_bytes == 0 and engine.step() is None
        assert engine._scheduler.rows == engine._scheduler.drafted == [] and not engine._scheduler._waiting
    assert engine._tree is None and engine._proposer._place.numel() == 0
    gc.collect()
    assert sum(type(thing) is TreeCache for thing in gc.get_objects()) == before
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in made.model.modules())


def test_a_row_tells_what_became_of_it(monkeypatch):
    made = case("llama")
    ticks = iter(range(1000))
    clock = SimpleNamespace(perf_counter=lambda: float(next(ticks)))
    monkeypatch.setattr("ladon.engine.sequence.time", clock)
    monkeypatch.setattr("ladon.engine.scheduler.time", clock)
    row, other = a_row(made, LONG, 9), a_row(made, 1, 5)
    for _ in made.engine("oracle", "chain").run([row, other]):
        pass
    stats = row.stats
    assert stats.prefill_tokens == 30 and stats.tokens == 8 and stats.row_steps == 2
    assert stats.acceptance_length == 4.0 and stats.accepted_nodes == 6 and stats.tree_efficiency == 1.0
    assert stats.submitted < stats.joined < other.stats.first_token < stats.first_token < stats.finished


def test_what_cannot_be_decoded_is_refused():
    made = case("llama")
    engine = made.engine()
    row = a_row(made, 1, 2)
    for _ in engine.run([row]):
        pass
    with pytest.raises(InputError, match="given to an engine before"):
        engine.submit(row)
    with pytest.raises(InputError, match=r"prompt has shape \[0\]"):
        engine.submit(Row(prompt=torch.arange(0), max_new_tokens=3, is_stop=lambda _: False))
    with pytest.raises(InputError, match="max_new_tokens is 0; ask for 1"):
        engine.submit(a_row(made, 1, 0))
    with pytest.raises(InputError, match="max_rows is 0; give how many"):
        made.engine(max_rows=0)
    assert engine.step() is None


def test_rows_of_a_decoder_are_what_generate_decodes(model):
    decoder = ladon.Decoder(model, ladon.new_heads(model, num_heads=3))
    prompts = [torch.arange(3, 3 + length) for length in (9, 2, 20, 5)]
    rows = decoder.rows(prompts, max_new_tokens=11, eos_token_id=50)
    for _ in decoder.decode(rows, max_rows=2):
        pass
    for row, prompt in zip(rows, prompts, strict=True):
        alone = decoder.generate(prompt[None], max_new_tokens=11, eos_token_id=50)
        assert row.tokens == alone[0, len(prompt) :].tolist() and torch.equal(row.prompt, prompt)
    with pytest.raises(InputError, match="prompt is empty"):
        decoder.rows([torch.arange(0)], max_new_tokens=3)


def test_candidates_cover_a_wide_tree():
    """The random drafts above branch: otherwise the schedules would prove little."""
    assert CANDIDATES > 1 and any(
        step.tree is not None and step.tree.max_depth < step.tree.num_nodes - 1
        for step in case("llama").engine("random").run([a_row(case("llama"), 1)])
    )
