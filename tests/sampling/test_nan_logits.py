"""Logits after which nothing can be said: the row ends with one line, keeps what it has, and disturbs no other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import ladon
from ladon.cli import loading
from ladon.cli.main import run
from ladon.engine.sequence import Row
from toys import looking
from user_side import Tiny

PROMPT = torch.arange(5, 12)
GOOD = 5  # new tokens before the logits fail
LAWS = {"greedy": {"do_sample": False}, "sampled": {"do_sample": True, "top_k": 0, "temperature": 0.8, "seed": 3}}


def fail_from(model: PreTrainedModel, position: int) -> Callable[[], None]:
    """From this position on all logits are NaN but one, as after an overflow; the answer undoes it."""
    seen: dict[str, torch.Tensor] = {}

    def note(module: torch.nn.Module, args: object, kwargs: dict[str, torch.Tensor]) -> None:
        seen["positions"] = kwargs["position_ids"]

    def forget(*_: object) -> None:
        seen.clear()

    def spoil(module: torch.nn.Module, args: object, logits: torch.Tensor) -> torch.Tensor:
        if not seen:  # heads project, too
            return logits
        bad = seen["positions"].expand(len(logits), -1)[:, -logits.shape[1] :] >= position
        spoilt = logits.masked_fill(bad[..., None], torch.nan)
        spoilt[..., 3] = logits[..., 3]
        return spoilt

    hooks = [  # as a fault of the model's own, which the self-test does not look for
        model.model.register_forward_pre_hook(looking(note), with_kwargs=True),
        model.lm_head.register_forward_hook(looking(spoil)),
        model.register_forward_hook(looking(forget)),
    ]

    def undo() -> None:
        for hook in hooks:
            hook.remove()

    return undo


@pytest.fixture(params=["plain", "tree", "typical"])
def decoder(request, model) -> ladon.Decoder:
    heads = ladon.new_heads(model, num_heads=3)
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    options = {"plain": {"tree": "off"}, "tree": {"budget": 12}, "typical": {"budget": 12, "accept": "typical"}}
    return ladon.Decoder(model, heads, **options[request.param])


class Notes:
    """A streamer that notes what it is given."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


@pytest.mark.parametrize("law", LAWS)
def test_generate_raises_one_line_and_loses_no_token(model, decoder, law) -> None:
    expected = decoder.generate(PROMPT[None], max_new_tokens=GOOD, **LAWS[law])[0].tolist()
    fail_from(model, len(PROMPT) - 1 + GOOD)
    notes = Notes()
    with pytest.raises(ladon.LogitsError, match=f"prompt 0, new token {GOOD + 1}: .* NaN") as error:
        decoder.generate(PROMPT[None], max_new_tokens=20, streamer=notes, **LAWS[law])
    assert "\n" not in str(error.value) and isinstance(error.value, ladon.LadonError)
    if decoder._rule is None or law == "greedy":
        assert notes.tokens == expected
    assert len(notes.tokens) == len(expected) and notes.ended


@pytest.mark.parametrize("law", LAWS)
def test_one_row_ends_and_the_others_go_on(model, decoder, law) -> None:
    prompts = [PROMPT, torch.tensor([3, 8, 4])]
    options = {**LAWS[law], "max_new_tokens": 8}
    if law == "sampled":
        options["seed"] = [3, 4]

    def decoded() -> list[Row]:
        rows, engine = decoder.rows(prompts, **options), decoder.engine()
        for row in rows:
            engine.submit(row)
        while engine.step() is not None:
            pass
        return rows

    expected = decoded()
    undo = fail_from(model, len(PROMPT) - 1 + GOOD)  # the other row ends before it comes there
    bad, good = decoded()
    assert bad.cancelled and isinstance(bad.error, ladon.LogitsError) and len(bad.tokens) == GOOD
    assert good.error is None and not good.cancelled and good.tokens == expected[1].tokens
    if decoder._rule is None or law == "greedy":
        assert bad.tokens == expected[0].tokens[:GOOD]
    undo()
    assert [row.tokens for row in decoded()] == [row.tokens for row in expected]


@pytest.mark.parametrize("law", LAWS)
def test_logits_that_fail_at_once(model, decoder, law) -> None:
    decoder.generate(PROMPT[None], max_new_tokens=2)
    fail_from(model, 0)
    with pytest.raises(ladon.LogitsError, match="prompt 0, new token 1:"):
        decoder.generate(PROMPT[None], max_new_tokens=20, **LAWS[law])


class Forbid:
    """A processor that leaves no token."""

    stateless = True

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return torch.full_like(scores, -torch.inf)


def test_a_draw_from_no_token_at_all(decoder) -> None:
    """transformers' own multinomial raises there; greedily it says token 0, and so do we."""
    options = {"max_new_tokens": 6, "logits_processor": [Forbid()]}
    with pytest.raises(ladon.LogitsError, match=r"new token 1: .* no token that can be drawn"):
        decoder.generate(PROMPT[None], do_sample=True, seed=2, **options)
    assert decoder.generate(PROMPT[None], do_sample=False, **options)[0, 7:].tolist() == [0] * 6


def test_nan_that_a_processor_removes_is_no_fault(model, decoder) -> None:
    decoder.generate(PROMPT[None], max_new_tokens=2)
    fail_from(model, len(PROMPT) - 1 + GOOD)
    output = decoder.generate(PROMPT[None], max_new_tokens=9, remove_invalid_values=True)
    assert output.shape[1] == len(PROMPT) + 9


def test_the_command_line_shows_what_came_before(tiny: Tiny, monkeypatch, capsys) -> None:
    prompt = "for line in self.lines:"
    options = ["generate", *tiny.arguments, "--prompt", prompt, "--max-new-tokens", "16", "--budget", "8"]
    assert run(options) == 0
    expected = capsys.readouterr().out.rstrip("\n")
    whole, first = loading.load, len(tiny.tokenizer(prompt)["input_ids"]) - 1

    def load_what_fails(*arguments: Any, **options: Any) -> loading.Loaded:
        loaded = whole(*arguments, **options)
        fail_from(loaded.model, first + 9)
        return loaded

    monkeypatch.setattr(loading, "load", load_what_fails)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    assert run(options) == 2
    captured = capsys.readouterr()
    shown = captured.out.rstrip("\n")
    assert shown and expected.startswith(shown) and len(shown) < len(expected)
    assert len(captured.err.splitlines()) == 1 and "new token 10: the model's logits are NaN" in captured.err
