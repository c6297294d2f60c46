"""Stopping criteria of a batch get the calls that `generate` makes: all rows, padded, a token of each at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList
from transformers.generation.stopping_criteria import EosTokenCriteria

import ladon
from greedy import BATCH, MASK, PROMPT, one_character_per_token, plain
from ladon.target.prefix_cache import longest_past

STOPS = set(range(0, 97, 7))  # tokens that mean something to the criteria below


class Noting(StoppingCriteria):
    """Notes what it is shown."""

    def __init__(self) -> None:
        self.seen: list[list[list[int]]] = []

    def note(self, input_ids: torch.Tensor) -> list[int]:
        self.seen.append(input_ids.tolist())
        return input_ids[:, -1].tolist()


class Flags(Noting):
    """Keeps one flag for each row, and answers with all of them."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        last = self.note(input_ids)
        if len(self.seen) == 1:
            self.done = [False] * len(last)
        for row in range(len(self.done)):
            self.done[row] |= last[row] in STOPS
        return torch.tensor(self.done)


class Harness(Noting):
    """As `MultiTokenEOSCriteria` of an evaluation harness: a tracker of its own, and one answer for all rows."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> bool:
        self.note(input_ids)
        if len(self.seen) == 1:
            self.done_tracker, self.start = [False] * len(input_ids), input_ids.shape[1] - 1
        recent = input_ids[:, self.start :][:, -3:].tolist()
        for row, done in enumerate(self.done_tracker):
            if not done:
                self.done_tracker[row] = bool(STOPS.intersection(recent[row]))
        return False not in self.done_tracker


class AnyRow(Noting):
    """Ends all rows as soon as one has said enough."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.tensor(STOPS.intersection(self.note(input_ids)) != set())


class Counts(Noting):
    """Ends one row after another, by its calls alone."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.note(input_ids)
        return torch.arange(len(input_ids)) == (len(self.seen) - 3) // 2


class Unsure(Noting):
    """Ends a row where the likeliest token is not likely enough, as the scores have it."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.note(input_ids)
        assert len(scores) == len(self.seen) and scores[-1].shape == (len(input_ids), 97)
        return scores[-1].softmax(-1).amax(-1) < 0.0131


class Unread(Noting):
    """There are no scores unless they are asked for."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.tensor([token in STOPS and scores is None for token in self.note(input_ids)])


SCORES = {"output_scores": True, "return_dict_in_generate": True}
CASES: dict[str, tuple[type[Noting], dict[str, Any]]] = {
    "flags": (Flags, {}),
    "harness": (Harness, {}),
    "any row": (AnyRow, {}),
    "counts": (Counts, {}),
    "scores": (Unsure, SCORES),
    "no scores": (Unread, {"return_dict_in_generate": True}),
}
ENDS = {"ends": [5, 12, 44, 81], "no end": None}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rows", [1, 3])
def test_every_call_is_that_of_generate(decoder: ladon.Decoder, model: Any, rows: int, case: str, end: str) -> None:
    """The same calls and the same output: without end tokens rows go on until the last is done, as there."""
    kind, options = CASES[case]
    stopped = 0
    for shift in range(6):
        ids, mask = (BATCH + shift * (BATCH != 0), MASK) if rows == 3 else (PROMPT + shift, torch.ones_like(PROMPT))
        given = {"attention_mask": mask, "max_new_tokens": 16, "eos_token_id": ENDS[end], "pad_token_id": 0, **options}
        theirs = kind()
        expected = plain(model, ids, stopping_criteria=StoppingCriteriaList([theirs]), **given)
        for budget in (1, 8, 32):
            mine = kind()
            own = ladon.Decoder(model, decoder.heads, budget=budget)
            output = own.generate(ids, stopping_criteria=StoppingCriteriaList([mine]), **given)
            if options:
                assert torch.equal(output.sequences, expected.sequences)
            else:
                assert torch.equal(output, expected)
            assert mine.seen == theirs.seen
        stopped += len(theirs.seen) < 16
    assert stopped, "another threshold is needed"


@pytest.mark.parametrize("case", CASES)
def test_custom_generate_and_attach_too(decoder: ladon.Decoder, model: PreTrainedModel, case: str) -> None:
    kind, options = CASES[case]
    given = {"attention_mask": MASK, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, **options}

    def said(**more: Any) -> Any:
        output = model.generate(BATCH, stopping_criteria=StoppingCriteriaList([kind()]), **given, **more)
        return (output.sequences if options else output).tolist()

    expected = said()
    assert said(custom_generate=decoder) == expected
    ladon.attach(model, decoder.heads, budget=8)
    assert said() == expected


@pytest.mark.parametrize("budget", [1, 8])
def test_what_was_said_beyond_the_stop_is_counted_and_kept_nowhere(
    decoder: ladon.Decoder, model: PreTrainedModel, budget: int
) -> None:
    """A row that is ahead of the others when its end is found loses what it has beyond it."""
    own = ladon.Decoder(model, decoder.heads, budget=budget)
    given = {"attention_mask": MASK, "pad_token_id": 0, "max_new_tokens": 16, "eos_token_id": [5]}
    output = own.generate(
        BATCH,
        stopping_criteria=[Counts()],
        output_scores=True,
        output_logits=True,
        return_dict_in_generate=True,
        **given,
    )
    expected = plain(model, BATCH, stopping_criteria=StoppingCriteriaList([Counts()]), **given)
    assert torch.equal(output.sequences, expected)
    new = expected[:, 8:].tolist()
    lengths = [max(place for place, token in enumerate(row) if token != 0) + 1 for row in new]
    assert own.stats.tokens == sum(lengths) - 3 and own.stats.row_steps >= max(lengths) - 1 - 8 * (budget > 1)
    assert len(output.scores) == len(output.logits) == expected.shape[1] - 8
    for prompt, mask, row, length, past in zip(BATCH, MASK, new, lengths, output.past_key_values.rows, strict=True):
        ids = [*prompt[mask.bool()].tolist(), *row[:length]]
        assert list(past.token_ids) in (ids, ids[:-1])
        longer = torch.tensor([*ids, 33, 34])[None]
        assert longest_past([past], longer[0].tolist()) is not None
        again = own.generate(longer, max_new_tokens=6, past_key_values=output.past_key_values)
        assert torch.equal(again, plain(model, longer, max_new_tokens=6)) and own.stats.reused_tokens >= len(ids) - 1


def test_stop_strings_and_times_without_an_end_token_end_all_rows_together(model: Any, decoder: ladon.Decoder) -> None:
    """As in `generate`: a row that has its string goes on until the last row has one."""
    tokenizer = one_character_per_token()
    free = plain(model, BATCH, attention_mask=MASK)[:, 8:].tolist()
    stops = [tokenizer.decode(row[place]) for row, place in zip(free, (1, 5, 9), strict=True)]
    for end in ENDS.values():
        given = {"attention_mask": MASK, "stop_strings": stops, "tokenizer": tokenizer, "eos_token_id": end}
        expected = plain(model, BATCH, pad_token_id=0, **given)
        for budget in (1, 12):
            own = ladon.Decoder(model, decoder.heads, budget=budget)
            assert torch.equal(own.generate(BATCH, max_new_tokens=16, pad_token_id=0, **given), expected)


class Ends(StoppingCriteria):
    """Has an attribute that makes `generate` pad rows that have ended."""

    eos_token_id = 5

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.isin(input_ids[:, -1], torch.tensor(sorted(STOPS)))


@pytest.mark.parametrize("criterion", [Ends(), EosTokenCriteria(sorted(STOPS))])
def test_a_criterion_with_end_tokens_of_its_own(decoder: ladon.Decoder, model: Any, criterion: Any) -> None:
    expected = plain(
        model, BATCH, attention_mask=MASK, pad_token_id=0, stopping_criteria=StoppingCriteriaList([criterion])
    )
    output = decoder.generate(
        BATCH, attention_mask=MASK, pad_token_id=0, max_new_tokens=16, stopping_criteria=[criterion]
    )
    assert torch.equal(output, expected) and 0 in output[:, 8:]


@pytest.mark.parametrize("answer", [torch.zeros(2, dtype=torch.bool), torch.zeros(3, 1, dtype=torch.bool)])
def test_answers_that_are_none_are_refused(decoder: ladon.Decoder, answer: torch.Tensor) -> None:
    with pytest.raises((ladon.InputError, RuntimeError)) as caught:
        decoder.generate(BATCH, attention_mask=MASK, max_new_tokens=4, stopping_criteria=[lambda ids, scores: answer])
    assert "answer" in str(caught.value) or answer.shape == (2,), "torch itself cannot join 2 and 3"


def test_rows_of_an_engine_are_asked_about_one_by_one(decoder: ladon.Decoder) -> None:
    """They may come and go at any time; who counts on a batch there is told."""
    flags = Flags()
    rows = decoder.rows(list(BATCH[:2, 3:]), max_new_tokens=6, stopping_criteria=[flags], eos_token_id=[5])
    for _ in decoder.decode(rows):
        pass
    assert all(len(seen) == 1 for seen in flags.seen)
    with pytest.raises(ladon.InputError, match=r"answers of shape \[3\] about 1 row"):
        three = torch.zeros(3, dtype=torch.bool)
        rows = decoder.rows([PROMPT[0]], max_new_tokens=6, stopping_criteria=[lambda ids, scores: three])
        for _ in decoder.decode(rows):
            pass


def test_a_criterion_that_raises_ends_the_call(decoder: ladon.Decoder) -> None:
    def broken(ids: torch.Tensor, scores: Any) -> torch.Tensor:
        assert ids.shape[1] < 12
        return torch.zeros(len(ids), dtype=torch.bool)

    with pytest.raises(AssertionError):
        decoder.generate(BATCH, attention_mask=MASK, max_new_tokens=9, stopping_criteria=[broken])


def test_constraints_are_as_far_as_the_rows(decoder: ladon.Decoder, model: Any) -> None:
    """`complete` is about what is left of a row."""

    class Even:
        """Any text; whole after an even number of tokens."""

        problem = ""

        def __init__(self, count: int = 0) -> None:
            self.is_complete = count % 2 == 0
            self._count = count

        def start(self) -> Even:
            return self

        def allowed(self) -> bytes:
            return b"\xff" * 12 + b"\x01"

        def after(self, token: int) -> Even:
            return Even(self._count + 1)

    given = {"attention_mask": MASK, "pad_token_id": 0, "max_new_tokens": 16, "eos_token_id": [5]}
    for budget in (1, 8):
        own = ladon.Decoder(model, decoder.heads, budget=budget)
        output = own.generate(BATCH, stopping_criteria=[Counts()], constraint=Even(), **given)
        new = [[token for token in row if token not in (0, 5)] for row in output[:, 8:].tolist()]
        assert own.complete == [len(row) % 2 == 0 for row in new]
