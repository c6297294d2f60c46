"""Ladon's modes and transformers behind one method: what is counted and timed."""

from __future__ import annotations

import pytest

from bench_runs import TEXTS
from ladon.bench.systems import LadonSystem, TransformersSystem, cut, merged
from ladon.engine.stats import DecodeStats
from user_side import Tiny


def test_cut_ends_with_the_first_stop() -> None:
    assert cut([5, 6, 0, 7, 0], frozenset([0])) == [5, 6, 0]
    assert cut([5, 6], frozenset([0])) == [5, 6]
    assert cut([5, 6], frozenset()) == [5, 6]


def test_merged_adds_counts_and_stages() -> None:
    one = DecodeStats(tokens=3, row_steps=2, forwards=2, decode_seconds=0.5, stage_seconds={"forward": 0.4})
    two = DecodeStats(
        tokens=5, row_steps=2, forwards=1, decode_seconds=0.5, stage_seconds={"forward": 0.1, "pick": 0.2}
    )
    total = merged([one, two])
    assert (total.tokens, total.row_steps, total.forwards, total.decode_seconds) == (8, 4, 3, 1.0)
    assert total.stage_seconds == {"forward": 0.5, "pick": 0.2}
    assert total.acceptance_length == 2.0 and total.tokens_per_second == 8.0


def test_generate_is_timed_without_prefill(tiny: Tiny) -> None:
    prompts = [tiny.tokenizer(text)["input_ids"] for text in TEXTS[:2]]
    run = TransformersSystem(tiny.model).run(prompts, 12)
    stats = run.stats
    assert [len(output) for output in run.outputs] == [12, 12]
    assert (stats.tokens, stats.row_steps, stats.forwards) == (22, 22, 11)
    assert stats.prefill_tokens == sum(map(len, prompts))
    assert 0 < stats.prefill_seconds < run.seconds and 0 < stats.decode_seconds < run.seconds
    assert stats.prefill_seconds + stats.decode_seconds <= run.seconds


@pytest.mark.parametrize("batch", [1, 2])
def test_first_tokens_are_timed_from_the_call(tiny: Tiny, batch: int) -> None:
    prompts = [tiny.tokenizer(text)["input_ids"] for text in TEXTS[:batch]]
    system = LadonSystem(tiny.model, tiny.heads, mode="dynamic", budget=6)
    run = system.run(prompts, 12)
    assert run.stats.prefill_seconds < run.first_token_seconds  # before it, transformers prepares the inputs
    assert run.first_token_seconds + run.stats.decode_seconds == pytest.approx(run.seconds)
    run = TransformersSystem(tiny.model).run(prompts, 12)
    assert run.first_token_seconds == run.stats.prefill_seconds


def test_steps_of_single_rows_are_recorded(tiny: Tiny) -> None:
    system = LadonSystem(tiny.model, tiny.heads, mode="dynamic", budget=6, profile=True)
    prompts = [tiny.tokenizer(text)["input_ids"] for text in TEXTS[:2]]
    run = system.run(prompts[:1], 20)
    assert sum(run.step_counts) == run.stats.tokens == len(run.outputs[0]) - 1
    assert len(run.step_counts) == run.stats.row_steps
    assert system.run(prompts, 20).step_counts == []
