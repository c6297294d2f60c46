"""A call's results belong to the call; its streamer is ended however it ends."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AsyncTextIteratorStreamer, TextGenerationPipeline, TextIteratorStreamer, pipeline

import ladon
from greedy import BATCH, MASK, PROMPT, plain
from threads import together
from user_side import Tiny


def test_results_of_two_threads_are_their_own(decoder: ladon.Decoder) -> None:
    """Each sees what its own last call took, and so does each output, though the calls overlap."""
    barrier = threading.Barrier(2)

    class Meets:
        """Lets the other call begin before this one goes on, and end after it."""

        def put(self, value: torch.Tensor) -> None:
            if value.ndim == 2:
                barrier.wait(30)

        def end(self) -> None:
            barrier.wait(30)

    def job(seed: int, new: int) -> Callable[[], Any]:
        def call() -> Any:
            output = decoder.generate(
                PROMPT, do_sample=True, seed=[seed], max_new_tokens=new, return_dict_in_generate=True, streamer=Meets()
            )
            return output, decoder.stats, decoder.seeds, decoder.complete

        return call

    found = together([job(5, 9), job(6, 14)])
    for (output, stats, seeds, complete), seed, new in zip(found, (5, 6), (9, 14), strict=True):
        assert stats is output.stats and stats.tokens == new - 1 and stats.prefill_tokens == 12
        assert list(output.seeds) == seeds == [seed] and list(output.complete) == complete == [None]
        alone = decoder.generate(PROMPT, do_sample=True, seed=[seed], max_new_tokens=new)
        assert torch.equal(output.sequences, alone)


def test_a_thread_without_a_call_of_its_own_sees_the_last_one(decoder: ladon.Decoder) -> None:
    """As after a call in another thread whose text this one has read."""
    together([lambda: decoder.generate(PROMPT, max_new_tokens=7)])
    assert decoder.stats.tokens == 6 and decoder.seeds == [0]
    decoder.generate(PROMPT, max_new_tokens=4)
    together([lambda: decoder.generate(PROMPT, max_new_tokens=7)])
    assert decoder.stats.tokens == 3


class Fails:
    """A stopping criterion that raises after a number of tokens."""

    def __init__(self, error: BaseException) -> None:
        self.error, self.left = error, 3

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.left -= 1
        if not self.left:
            raise self.error
        return torch.zeros(len(input_ids), dtype=torch.bool)


REFUSED: dict[str, Callable[[], tuple[tuple[Any, ...], dict[str, Any], type[BaseException]]]] = {
    "prompt": lambda: ((PROMPT[:, :0],), {}, ladon.InputError),
    "limit": lambda: ((PROMPT,), {"max_new_tokens": 0}, ladon.InputError),
    "option": lambda: ((PROMPT,), {"num_beams": 2}, ladon.InputError),
    "unknown": lambda: ((PROMPT,), {"no_such_option": 2}, ladon.InputError),
    "rows": lambda: ((BATCH,), {"attention_mask": MASK}, ladon.InputError),
    "twice": lambda: ((PROMPT,), {"input_ids": PROMPT}, TypeError),
    "middle": lambda: ((PROMPT,), {"stopping_criteria": [Fails(ZeroDivisionError())]}, ZeroDivisionError),
    "interrupt": lambda: ((PROMPT,), {"stopping_criteria": [Fails(KeyboardInterrupt())]}, KeyboardInterrupt),
}


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("case", REFUSED)
def test_an_iterator_streamer_ends_with_the_error(tiny: Tiny, case: str, attached: bool) -> None:
    """Whoever reads gets what was said and the end; who called gets the error."""
    given, options, kind = REFUSED[case]()
    decoder = ladon.Decoder(tiny.model, tiny.heads)
    streamer = TextIteratorStreamer(tiny.tokenizer, timeout=5)
    options = {"max_new_tokens": 8, "streamer": streamer, **options}
    if attached:
        ladon.attach(tiny.model, tiny.heads)
    try:
        with pytest.raises(kind):
            (tiny.model if attached else decoder).generate(*given, **options)
    finally:
        ladon.detach(tiny.model)
    list(streamer)
    assert streamer.text_queue.empty(), "it has ended once"


@pytest.mark.parametrize("case", ["limit", "middle"])
def test_an_asynchronous_streamer_ends_with_the_error(tiny: Tiny, case: str) -> None:
    given, options, kind = REFUSED[case]()
    decoder = ladon.Decoder(tiny.model, tiny.heads)

    async def read() -> list[BaseException]:
        errors: list[BaseException] = []
        streamer = AsyncTextIteratorStreamer(tiny.tokenizer, timeout=5)

        def call() -> None:
            try:
                decoder.generate(*given, **{"max_new_tokens": 8, "streamer": streamer, **options})
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=call)
        thread.start()
        async for _ in streamer:
            pass
        thread.join()
        return errors

    (error,) = asyncio.run(read())
    assert isinstance(error, kind)


def test_a_streamer_that_cannot_decode_what_it_holds_still_ends(tiny: Tiny) -> None:
    """The end of transformers' own decodes first."""
    streamer = TextIteratorStreamer(tiny.tokenizer, timeout=5)

    class Broken:
        def decode(self, *args: Any, **kwargs: Any) -> str:
            raise OverflowError("no such token")

    streamer.tokenizer = Broken()
    with pytest.raises(OverflowError):
        ladon.Decoder(tiny.model, tiny.heads).generate(PROMPT, max_new_tokens=8, streamer=streamer)
    assert list(streamer) == [""]


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("more", [{}, {"output_scores": True, "output_logits": True}], ids=["ids", "scores"])
def test_a_pipeline_of_dictionaries(tiny: Tiny, rows: int, more: dict[str, Any]) -> None:
    """The records of an attached model are those of the model itself, scores to rounding."""
    if rows > 1 and "additional_outputs" in inspect.getsource(TextGenerationPipeline._forward):
        pytest.skip("pipelines of the installed transformers cannot split a batch of outputs with more than sequences")
    pipe = pipeline("text-generation", model=tiny.model, tokenizer=tiny.tokenizer)
    options = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "batch_size": rows, **more}
    prompts = ["the cat", "a dog and", "the"][:rows]
    expected = pipe(prompts, **options)
    ladon.attach(tiny.model, tiny.heads)
    try:
        found = pipe(prompts, **options)
    finally:
        ladon.detach(tiny.model)
    for (mine,), (theirs,) in zip(found, expected, strict=True):
        assert mine.keys() == theirs.keys() and mine["generated_text"] == theirs["generated_text"]
        for name in theirs.keys() - {"generated_text"}:
            assert torch.tensor(mine[name]).shape == torch.tensor(theirs[name]).shape


@pytest.mark.parametrize("copies", [1, 2])
def test_a_pipeline_of_sampled_dictionaries(tiny: Tiny, copies: int) -> None:
    pipe = pipeline("text-generation", model=tiny.model, tokenizer=tiny.tokenizer)
    ladon.attach(tiny.model, tiny.heads)
    try:
        (found,) = pipe(
            ["the cat"], max_new_tokens=6, do_sample=True, return_dict_in_generate=True, num_return_sequences=copies
        )
    finally:
        ladon.detach(tiny.model)
    assert len(found) == copies and all("generated_text" in record for record in found)


def test_a_dictionary_still_has_what_belongs_to_the_call(decoder: ladon.Decoder, model: Any) -> None:
    output = decoder.generate(BATCH, attention_mask=MASK, max_new_tokens=5, return_dict_in_generate=True)
    assert torch.equal(output.sequences, plain(model, BATCH, attention_mask=MASK, max_new_tokens=5))
    assert list(output.seeds) == [0, 0, 0] and list(output.complete) == [None] * 3
    assert output.stats.row_steps == decoder.stats.row_steps > 0
