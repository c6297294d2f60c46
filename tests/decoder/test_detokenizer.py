"""Text that comes token by token is the text of all tokens, and no character comes in halves."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.generation.streamers import BaseStreamer

import ladon
from drafts import SIZES, oracle_decoder
from greedy import PROMPT, plain
from ladon.decoder.detokenizer import Detokenizer, PieceStreamer
from ladon.demo.bundled import demo_path
from user_side import TEXT, make_tokenizer

UNKNOWN = "\N{REPLACEMENT CHARACTER}"
SAMPLES = [
    TEXT,
    "naïve café",
    "漢字 and emoji 🐉🐍!",
    "    deep\n\n\tindent  ",
    3 * "\U0001f469\u200d\U0001f467 e\u0301 한국어 ",  # two people joined to one sign, a letter of two characters
    UNKNOWN,
    " ",
    "a",
]
_WORDS = ["▁", "▁the", "the", "▁cat", "s", "▁s", "a", "é", "漢", ".", "▁.", "</s>x"]


def _fast(model: object, decoder: object, **options: object) -> PreTrainedTokenizerFast:
    backend = Tokenizer(model)
    backend.decoder = decoder
    for name, value in options.items():
        setattr(backend, name, value)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def llama_like() -> PreTrainedTokenizerFast:
    """Sentencepiece's pieces, bytes for all other characters; the first space of a text is dropped."""
    vocabulary = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)], *_WORDS]
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    return _fast(
        models.BPE({word: i for i, word in enumerate(vocabulary)}, [], unk_token="<unk>", byte_fallback=True),
        decoders.Sequence(steps),
        normalizer=normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
    )


def t5_like() -> PreTrainedTokenizerFast:
    vocabulary = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *[(word, -1.0) for word in _WORDS]]
    return _fast(models.Unigram(vocabulary, 0), decoders.Metaspace(), pre_tokenizer=pre_tokenizers.Metaspace())


def bert_like() -> PreTrainedTokenizerFast:
    words = ["<unk>", "<s>", "</s>", "the", "##s", "cat", "##ing", ".", "'", "n", "##é", "##漢"]
    return _fast(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="<unk>"), decoders.WordPiece())


def bundled() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(demo_path())


MAKERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte-level": make_tokenizer,
    "bundled": bundled,
    "llama": llama_like,
    "t5": t5_like,
    "bert": bert_like,
}
TOKENIZERS = {name: maker() for name, maker in MAKERS.items()}


def whole(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int], *, skips: bool = False) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=skips, clean_up_tokenization_spaces=False))


def check(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int], *, skips: bool = False) -> None:
    """Pieces add up, each shown for good, and none is a sign for a character that comes whole later."""
    text, shown = whole(tokenizer, ids, skips=skips), ""
    pieces = Detokenizer(tokenizer, skip_special_tokens=skips)
    for token in ids:
        shown += pieces.push(token)
        assert text.startswith(shown)
    assert shown + pieces.flush() == text
    assert pieces.flush() == ""


@pytest.mark.parametrize("text", SAMPLES)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_pieces_add_up_to_the_text(name: str, text: str) -> None:
    check(TOKENIZERS[name], TOKENIZERS[name](text, add_special_tokens=False)["input_ids"])


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=40), st.sampled_from(sorted(TOKENIZERS)))
def test_any_text(text: str, name: str) -> None:
    check(TOKENIZERS[name], TOKENIZERS[name](text, add_special_tokens=False)["input_ids"])


@settings(max_examples=80, deadline=None)
@given(st.data(), st.sampled_from(["byte-level", "bundled", "t5", "bert"]), st.booleans())
def test_any_tokens(data: st.DataObject, name: str, skips: bool) -> None:
    """Bytes that are no character among them: nothing is shown that a later token changes."""
    tokenizer = TOKENIZERS[name]
    common = tokenizer("é漢🐉 e", add_special_tokens=False)["input_ids"]
    tokens = st.integers(0, len(tokenizer) - 1) | st.sampled_from(common)
    check(tokenizer, data.draw(st.lists(tokens, max_size=60)), skips=skips)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([*"aé🐉ߘ", " ", "the cat", "</s>"]), max_size=40), st.booleans())
def test_bytes_that_stand_for_characters(words: list[str], skips: bool) -> None:
    """Byte-fallback tokens decode as a whole run: a character and half of the next are none for a moment."""
    tokenizer = TOKENIZERS["llama"]
    check(tokenizer, tokenizer("".join(words), add_special_tokens=False)["input_ids"], skips=skips)


def test_a_character_that_was_shown_stays() -> None:
    """The tokenizer takes a whole character back when a byte that is none follows; what has been shown cannot be."""
    tokenizer = TOKENIZERS["llama"]
    ids = [3 + byte for byte in "é".encode()] + [3 + 0xFF] + tokenizer("the", add_special_tokens=False)["input_ids"]
    pieces = Detokenizer(tokenizer)
    assert [pieces.push(token) for token in ids[:3]] == ["", "é", ""]
    rest = "".join(pieces.push(token) for token in ids[3:]) + pieces.flush()
    assert whole(tokenizer, ids).startswith(3 * UNKNOWN) and rest.strip(UNKNOWN) == " the"


@pytest.mark.parametrize("name", ["byte-level", "bundled", "llama"])
def test_after_a_context(name: str) -> None:
    """Its text is not given again; a character that it leaves unfinished is."""
    tokenizer = TOKENIZERS[name]
    ids = tokenizer("the 漢字 🐉 cats", add_special_tokens=False)["input_ids"]
    for cut in range(1, len(ids)):
        before = whole(tokenizer, ids[:cut]).rstrip(UNKNOWN)
        pieces = Detokenizer(tokenizer, ids[:cut])
        after = "".join(map(pieces.push, ids[cut:])) + pieces.flush()
        assert before + after == whole(tokenizer, ids)


class Counting:
    """A tokenizer that counts the tokens it decodes."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer, self.most, self.total = tokenizer, 0, 0

    def decode(self, ids: Sequence[int], **options: object) -> object:
        self.most, self.total = max(self.most, len(ids)), self.total + len(ids)
        return self.tokenizer.decode(ids, **options)


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("kind", ["text", "one token", "half characters", "special tokens"])
def test_work_is_linear(name: str, kind: str) -> None:
    """A window's worth of tokens for each, in texts without an end of line, of broken bytes, of nothing to see."""
    tokenizer = TOKENIZERS[name]
    ids = tokenizer("the cats 漢字 ", add_special_tokens=False)["input_ids"] * 200
    if kind == "one token":
        ids = ids[:1] * 1000
    if kind == "half characters":
        ids = tokenizer("漢", add_special_tokens=False)["input_ids"][:1] * 1000
    if kind == "special tokens":
        ids = ids[:3] + [tokenizer.eos_token_id] * 1000
    counting = Counting(tokenizer)
    pieces = Detokenizer(counting, skip_special_tokens=True)  # type: ignore[arg-type]
    shown = "".join(map(pieces.push, ids[:1000])) + pieces.flush()
    assert counting.most <= 24 and counting.total <= 24 * 1000
    if not (name == "llama" and kind == "half characters"):
        assert shown == whole(tokenizer, ids[:1000], skips=True)


class Puts(BaseStreamer):  # type: ignore[misc]  # transformers is not typed strictly
    """Notes what a streamer is given."""

    def __init__(self) -> None:
        self.seen: list[list[object]] = []

    def put(self, value: torch.Tensor) -> None:
        self.seen.append(value.tolist())

    def end(self) -> None:
        self.seen.append(["end"])


@pytest.mark.parametrize(("tree", "budget"), SIZES)
def test_a_streamer_gets_what_transformers_gives_it(model, tree, budget):
    """Tokens one by one, however many a step accepts."""
    mine, theirs = Puts(), Puts()
    decoder = oracle_decoder(model, plain(model)[0, 12:].tolist(), tree, budget)
    decoder.generate(PROMPT, max_new_tokens=16, streamer=mine)
    plain(model, streamer=theirs)
    assert mine.seen == theirs.seen and len(mine.seen) == 18
    assert (decoder.stats.row_steps < 15) == (budget > 1)


def test_a_streamer_of_pieces_serves_both(model):
    tokenizer = make_tokenizer()
    decoder = ladon.Decoder(model, ladon.new_heads(model, num_heads=2))
    text = tokenizer.decode(plain(model)[0, 12:], skip_special_tokens=True)
    pieces: list[str] = []
    streamer = PieceStreamer(tokenizer, pieces.append)
    for generate in (decoder.generate, model.generate, decoder.generate):
        pieces.clear()
        generate(PROMPT, attention_mask=torch.ones_like(PROMPT), max_new_tokens=16, do_sample=False, streamer=streamer)
        assert "".join(pieces) == text and all(pieces)


def test_a_streamer_that_raises_ends_the_run(model, decoder):
    """At once, with nothing left on the model, and the decoder goes on to be of use."""

    class Broken(Puts):
        def put(self, value: torch.Tensor) -> None:
            super().put(value)
            if len(self.seen) == 3:
                raise KeyboardInterrupt

    broken = Broken()
    with pytest.raises(KeyboardInterrupt):
        decoder.generate(PROMPT, max_new_tokens=16, streamer=broken)
    assert len(broken.seen) == 4 and broken.seen[-1] == ["end"], "nobody waits for more"
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert torch.equal(decoder.generate(PROMPT, max_new_tokens=16), plain(model))
