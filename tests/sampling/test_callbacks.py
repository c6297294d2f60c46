"""Callbacks that see prefixes are asked as plain decoding asks them: about what is said, and nothing after its end."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

import ladon
from drafts import SIZES, TREES, make_proposer, oracle_decoder
from greedy import BATCH, MASK, PROMPT, plain
from ladon.engine.sequence import Row
from ladon.sampling.logits_processors import ProcessedSampling, Processors

Ids = tuple[int, ...]


@pytest.fixture
def heads(tiny_llama: PreTrainedModel) -> ladon.Heads:
    heads = ladon.new_heads(tiny_llama, num_heads=3)
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return heads


class Trie:
    """Texts that may be said, and prefixes of them; a question about any other is an error, as in entity retrieval."""

    def __init__(self, *texts: Sequence[int]) -> None:
        self.next: dict[Ids, list[int]] = {}
        for text in texts:
            for place, token in enumerate(text):
                found = self.next.setdefault(tuple(text[:place]), [])
                found.extend([token] if token not in found else [])

    def __getitem__(self, said: Sequence[int]) -> list[int]:
        return self.next[tuple(said)]


class Asked:
    """A trie for each row; notes what is asked. `pads` answers for what transformers asks after a row's end."""

    def __init__(self, tries: Sequence[Trie], length: int, *, pads: bool = False) -> None:
        self.tries, self.length, self.pads = tries, length, pads
        self.seen: list[tuple[int, list[int]]] = []

    def __call__(self, number: int, ids: torch.Tensor) -> list[int]:
        said = ids[self.length :].tolist()
        if self.pads and tuple(said) not in self.tries[number].next:
            return [0]
        self.seen.append((number, said))
        return self.tries[number][said]


def test_a_trie_of_one_text() -> None:
    """The bundled heads guess what the trie forbids."""
    model, tokenizer, heads = ladon.load_demo(torch.float32)
    inputs = tokenizer("import os\n", return_tensors="pt")
    ids = tokenizer("import sys\nzebra = sys.argv\n").input_ids
    asked = Asked([Trie(ids)], inputs.input_ids.shape[1])
    output = ladon.Decoder(model, heads, budget=16).generate(
        **inputs, max_new_tokens=len(ids), prefix_allowed_tokens_fn=asked
    )
    assert output[0, inputs.input_ids.shape[1] :].tolist() == ids


END = 2
TEXTS = [
    [[5, 6, 7, 8, 9, 10, END], [5, 6, 9, END], [40, 41, 42, 43, END]],
    [[50, 51, END], [50, 52, 53, 54, 55, 56, 57, 58, END]],
    [[5, 7, 9, 11, 13, 15, 17, END], [60, 61, 62, 63, 64, END], [5, 61, END]],
]
TRIES = [Trie(*texts) for texts in TEXTS]


@pytest.mark.parametrize(("tree", "budget"), SIZES)
def test_the_questions_are_those_of_generate(tiny_llama: PreTrainedModel, tree: str, budget: int) -> None:
    """Of one prompt, question by question, with drafts that hold the truth."""
    for trie in TRIES:
        theirs, mine = Asked([trie], 12), Asked([trie], 12)
        expected = plain(tiny_llama, prefix_allowed_tokens_fn=theirs)
        decoder = oracle_decoder(tiny_llama, expected[0, 12:].tolist(), tree, budget)
        output = decoder.generate(PROMPT, max_new_tokens=16, prefix_allowed_tokens_fn=mine)
        assert torch.equal(output, expected) and mine.seen == theirs.seen
        assert budget == 1 or decoder.stats.acceptance_length > 1


@pytest.mark.parametrize("budget", [1, 8, 64])
def test_tries_of_a_batch(tiny_llama: PreTrainedModel, heads: ladon.Heads, budget: int) -> None:
    """Each row has its own, and ends at its own place."""
    theirs, mine = Asked(TRIES, 8, pads=True), Asked(TRIES, 8)
    expected = plain(tiny_llama, BATCH, attention_mask=MASK, prefix_allowed_tokens_fn=theirs)
    output = ladon.Decoder(tiny_llama, heads, budget=budget).generate(
        BATCH, attention_mask=MASK, max_new_tokens=16, prefix_allowed_tokens_fn=mine
    )
    assert torch.equal(output, expected)
    assert sorted(mine.seen) == sorted(seen for seen in theirs.seen if END not in seen[1])


@pytest.mark.parametrize("tree", ["chain", "dynamic"])
def test_sampled_questions_are_those_of_plain_decoding(
    tiny_llama: PreTrainedModel, heads: ladon.Heads, tree: str
) -> None:
    for seed in range(6):
        options = {"attention_mask": MASK, "max_new_tokens": 16, "do_sample": True, "seed": seed, "top_k": 0}
        alone, mine = Asked(TRIES, 8), Asked(TRIES, 8)
        expected = ladon.Decoder(tiny_llama, tree="off").generate(BATCH, prefix_allowed_tokens_fn=alone, **options)
        decoder = ladon.Decoder(tiny_llama, heads, tree=tree, budget=8)
        assert torch.equal(decoder.generate(BATCH, prefix_allowed_tokens_fn=mine, **options), expected)
        assert sorted(mine.seen) == sorted(alone.seen)


@pytest.mark.parametrize("accept", ["typical", "nucleus"])
def test_a_lossy_rule_asks_about_no_token_that_is_forbidden(
    tiny_llama: PreTrainedModel, heads: ladon.Heads, accept: str
) -> None:
    """Whatever is kept, the text is one of the trie's."""
    mine = Asked(TRIES, 8)
    decoder = ladon.Decoder(tiny_llama, heads, budget=32, accept=accept)
    output = decoder.generate(
        BATCH, attention_mask=MASK, max_new_tokens=16, do_sample=True, seed=3, prefix_allowed_tokens_fn=mine
    )
    for row, texts in zip(output[:, 8:].tolist(), TEXTS, strict=True):
        assert row[: row.index(END) + 1] in texts


class Shifted(LogitsProcessor):
    """Keeps nothing between calls, and looks at the whole prefix: forbids what was said, and favours by position."""

    stateless = True

    def __init__(self) -> None:
        self.seen: list[list[int]] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.seen += input_ids.tolist()
        scores = scores.scatter(1, input_ids, -torch.inf)
        scores[:, input_ids.shape[1] % 97] += 1.0
        return scores


@pytest.mark.parametrize("budget", [1, 8, 64])
def test_a_stateless_processor_sees_prefixes(model: PreTrainedModel, heads: ladon.Heads, budget: int) -> None:
    decoder = ladon.Decoder(model, heads, budget=budget)
    for ids, mask in ((PROMPT, torch.ones_like(PROMPT)), (BATCH, MASK)):
        mine, theirs = Shifted(), Shifted()
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            output = decoder.generate(
                ids, attention_mask=mask, max_new_tokens=16, logits_processor=LogitsProcessorList([mine])
            )
        expected = plain(model, ids, attention_mask=mask, logits_processor=LogitsProcessorList([theirs]))
        assert torch.equal(output, expected) and sorted(mine.seen) == sorted(theirs.seen)


class PerRow(LogitsProcessor):
    """Has a bias for each row of the batch, [B, V]: it cannot be asked about one row."""

    stateless = True

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores + torch.zeros(3, 97)


def test_a_processor_of_the_whole_batch_is_refused(model: PreTrainedModel) -> None:
    with pytest.raises(ladon.InputError, match=r"PerRow gave scores of shape \[3, 97\] for \[1, 97\]"):
        ladon.Decoder(model).generate(
            BATCH, attention_mask=MASK, max_new_tokens=4, logits_processor=LogitsProcessorList([PerRow()])
        )


@pytest.mark.parametrize("broken", [1, 3, 5])
def test_an_error_of_a_callback_is_raised_where_generate_raises_it(model: PreTrainedModel, broken: int) -> None:
    """After as many tokens, each of them handed out before."""
    truth = plain(model)[0, 12:].tolist()

    class Streamed(list[int]):
        def put(self, value: torch.Tensor) -> None:
            self.extend(value.flatten().tolist())

        def end(self) -> None:
            pass

    def allowed(number: int, ids: torch.Tensor) -> range:
        if ids.shape[0] == 12 + broken:
            raise LookupError("not in the table")
        return range(97)

    mine, theirs = Streamed(), Streamed()
    with pytest.raises(LookupError, match="not in the table"):
        plain(model, prefix_allowed_tokens_fn=allowed, streamer=theirs)
    with pytest.raises(LookupError, match="not in the table"):
        oracle_decoder(model, truth, "dynamic", 12).generate(
            PROMPT, max_new_tokens=16, prefix_allowed_tokens_fn=allowed, streamer=mine
        )
    assert mine == theirs


@pytest.mark.parametrize("place", range(8))
def test_an_error_after_the_end_is_none(model: PreTrainedModel, place: int) -> None:
    """A stopping criterion ends the text where the trie ends, which only the criterion knows."""
    truth = plain(model)[0, 12:].tolist()
    options: dict[str, Any] = {
        "prefix_allowed_tokens_fn": Asked([Trie(truth[: place + 1])], 12),
        "stopping_criteria": [lambda ids, scores, **kwargs: ids.shape[1] == 13 + place],
    }
    decoder = oracle_decoder(model, truth, "dynamic", 12)
    assert decoder.generate(PROMPT, max_new_tokens=16, **options)[0, 12:].tolist() == truth[: place + 1]


def test_a_row_whose_callback_fails_takes_no_other_with_it(model: PreTrainedModel) -> None:
    """In an engine, its error is its own."""

    def rows(fails: Callable[[int, torch.Tensor], Any]) -> list[Row]:
        from transformers.generation.logits_process import PrefixConstrainedLogitsProcessor

        params = ProcessedSampling(Processors([PrefixConstrainedLogitsProcessor(fails, 1)]), draws=False)
        options: dict[str, Any] = {"max_new_tokens": 9, "is_stop": lambda token: False}
        return [
            Row(prompt=PROMPT[0], sampling_params=params, number=0, **options),
            Row(prompt=PROMPT[0] + 1, number=1, **options),
        ]

    def fails(number: int, ids: torch.Tensor) -> range:
        assert ids.shape[0] < 15
        return range(97)

    broken, whole = rows(fails)
    engine = ladon.Decoder(model, budget=8).engine()
    engine.submit(broken)
    engine.submit(whole)
    while engine.step() is not None:
        pass
    assert isinstance(broken.error, AssertionError) and len(broken.tokens) == 3
    assert whole.error is None and whole.tokens == plain(model, PROMPT + 1, max_new_tokens=9)[0, 12:].tolist()


class Strict:
    """A constraint's state that takes no question about what it does not allow, nor any after the end."""

    def __init__(self, trie: Trie, said: Ids = ()) -> None:
        self._trie, self._said = trie, said

    @property
    def is_complete(self) -> bool:
        return END in self._trie[self._said]

    problem = ""

    def start(self) -> Strict:
        return self

    def allowed(self) -> bytes:
        bits = bytearray(13)
        for token in self._trie[self._said]:
            bits[token // 8] |= 1 << token % 8
        return bytes(bits)

    def after(self, token: int) -> Strict:
        assert token in self._trie[self._said] and token != END
        return Strict(self._trie, (*self._said, token))


@pytest.mark.parametrize("budget", [1, 8, 64])
def test_a_grammar_is_asked_about_what_it_allows(tiny_llama: PreTrainedModel, heads: ladon.Heads, budget: int) -> None:
    expected = plain(tiny_llama, BATCH, attention_mask=MASK, prefix_allowed_tokens_fn=Asked(TRIES, 8, pads=True))
    output = ladon.Decoder(tiny_llama, heads, budget=budget).generate(
        BATCH, attention_mask=MASK, max_new_tokens=16, constraint=[Strict(trie) for trie in TRIES]
    )
    assert torch.equal(output, expected)


def test_no_draft_is_asked_about_that_is_not_said(model: PreTrainedModel) -> None:
    """An adversary's drafts are never what is said: one question for each token."""
    truth = plain(model)[0, 12:].tolist()
    decoder = ladon.Decoder(model, budget=12)
    decoder._proposer = lambda observer: make_proposer("adversary", TREES["dynamic"], [truth], 97, None)
    asked: list[int] = []

    def allowed(number: int, ids: torch.Tensor) -> range:
        asked.append(len(ids))
        return range(97)

    output = decoder.generate(PROMPT, max_new_tokens=16, prefix_allowed_tokens_fn=allowed)
    assert output[0, 12:].tolist() == truth and asked == list(range(12, 28))
