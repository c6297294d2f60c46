"""The front door: `Decoder.generate`, `custom_generate`, `attach`, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

import ladon
from greedy import BATCH, MASK, PROMPT, plain
from ladon.errors import HeadsError, InputError, TreeError


class Collector(BaseStreamer):
    """Keeps what is put, and whether the end came once."""

    def __init__(self) -> None:
        self.chunks, self.ends = [], 0

    def put(self, value):
        self.chunks.append(value)

    def end(self):
        self.ends += 1


def test_equals_generate(model, decoder):
    assert torch.equal(decoder.generate(PROMPT, max_new_tokens=16), plain(model))
    assert torch.equal(decoder.generate(inputs=PROMPT, max_new_tokens=16), plain(model))
    assert decoder.stats.tokens == 15 and decoder.stats.prefill_tokens == 12


def test_max_length_and_generation_config(model, decoder):
    expected = plain(model, max_new_tokens=5)
    assert torch.equal(decoder.generate(PROMPT, max_length=17), expected)
    config = model.generation_config.__class__(max_new_tokens=5)
    assert torch.equal(decoder.generate(PROMPT, generation_config=config), expected)


def test_left_padded_rows_equal_rows_alone(model, decoder):
    """A reference implementation takes the attention mask and ignores it."""
    output = decoder.generate(BATCH, attention_mask=MASK, max_new_tokens=10)
    for row in range(3):
        alone = plain(model, BATCH[row][MASK[row].bool()][None], max_new_tokens=10)
        assert output[row, 8:].tolist() == alone[0, -10:].tolist()
    assert torch.equal(output[:, :8], BATCH)


def test_right_padded_rows_equal_rows_alone(model, decoder):
    ids = torch.tensor([[5, 6, 7, 0, 0], [11, 12, 13, 14, 15]])
    output = decoder.generate(ids, attention_mask=(ids != 0).long(), max_new_tokens=6)
    assert output[0, 5:].tolist() == plain(model, ids[:1, :3], max_new_tokens=6)[0, 3:].tolist()


def test_several_ends_and_padding_after_them(model, decoder):
    free = plain(model, BATCH[1:2], max_new_tokens=12)[0, 8:].tolist()
    ends = [free[4], free[7]]
    output = decoder.generate(BATCH, attention_mask=MASK, max_new_tokens=12, eos_token_id=ends, pad_token_id=0)
    expected = plain(model, BATCH, attention_mask=MASK, max_new_tokens=12, eos_token_id=ends, pad_token_id=0)
    assert torch.equal(output, expected)
    assert output[1, 8 + free.index(next(t for t in free if t in ends)) + 1 :].eq(0).all()


def test_a_model_without_an_end_token(model, decoder):
    model.generation_config.pad_token_id = None
    assert decoder.generate(PROMPT, max_new_tokens=4).shape == (1, 16)


class StopAfter(StoppingCriteria):
    """Ends a row when its newest token is the given one; notes the lengths it was called with."""

    def __init__(self, token: int) -> None:
        self.token, self.lengths = token, []

    def __call__(self, input_ids, scores, **kwargs):
        self.lengths.append(input_ids.shape[1])
        return input_ids[:, -1] == self.token


def test_criteria_are_called_as_if_tokens_came_one_at_a_time(model, decoder):
    target = plain(model)[0, 12 + 8].item()
    mine, theirs = StopAfter(target), StopAfter(target)
    output = decoder.generate(PROMPT, max_new_tokens=16, stopping_criteria=StoppingCriteriaList([mine]))
    assert torch.equal(output, plain(model, stopping_criteria=StoppingCriteriaList([theirs])))
    assert mine.lengths == theirs.lengths


def test_streamer_gets_each_token_once_in_order(decoder):
    streamer = Collector()
    output = decoder.generate(PROMPT, max_new_tokens=16, streamer=streamer)
    assert streamer.ends == 1 and torch.equal(streamer.chunks[0], PROMPT)
    assert all(chunk.ndim == 1 for chunk in streamer.chunks[1:])
    assert torch.cat(streamer.chunks[1:]).tolist() == output[0, 12:].tolist()
    with pytest.raises(InputError, match="streamer"):
        decoder.generate(BATCH, attention_mask=MASK, max_new_tokens=2, streamer=Collector())


def test_return_dict_and_copies(model, decoder):
    output = decoder.generate(PROMPT, max_new_tokens=4, return_dict_in_generate=True)
    assert torch.equal(output.sequences, plain(model, max_new_tokens=4))
    copies = decoder.generate(PROMPT, max_new_tokens=4, num_return_sequences=3)
    assert torch.equal(copies, output.sequences.repeat(3, 1))
    copies = decoder.generate(BATCH, attention_mask=MASK, max_new_tokens=4, num_return_sequences=2)
    assert torch.equal(copies[0], copies[1]) and copies.shape[0] == 6


def test_custom_generate(model, decoder):
    assert torch.equal(model.generate(PROMPT, custom_generate=decoder, max_new_tokens=16), plain(model))
    other = ladon.Decoder(type(model)(model.config).eval())
    with pytest.raises(InputError, match="another model"):
        model.generate(PROMPT, custom_generate=other, max_new_tokens=4)


def test_attach_and_detach(model):
    heads = ladon.new_heads(model, num_heads=3)
    expected = plain(model)
    decoder = ladon.attach(model, heads, tree="chain")
    assert torch.equal(model.generate(PROMPT, max_new_tokens=16), expected)
    assert decoder.stats.row_steps > 0
    streamer = Collector()
    model.generate(PROMPT, max_new_tokens=3, streamer=streamer)
    assert streamer.ends == 1
    assert torch.equal(model.generate(PROMPT, custom_generate=decoder, max_new_tokens=16), expected)
    ladon.detach(model)
    ladon.detach(model)
    assert "generate" not in vars(model) and torch.equal(model.generate(PROMPT, max_new_tokens=16), expected)


@pytest.fixture
def tokenizer():
    """One token per character, 97 of them."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = Tokenizer(models.WordLevel({chr(33 + i): i for i in range(97)}, unk_token="!"))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex(""), "isolated")
    characters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=characters, pad_token="!", padding_side="left")


def test_pipeline(model, tokenizer):
    from transformers import pipeline

    texts = ["abc", "Ladon"]
    options = {"max_new_tokens": 8, "do_sample": False, "batch_size": 2}
    before = pipeline("text-generation", model=model, tokenizer=tokenizer)(texts, **options)
    decoder = ladon.attach(model, ladon.new_heads(model, num_heads=3))
    after = pipeline("text-generation", model=model, tokenizer=tokenizer)(texts, **options)
    assert before == after and decoder.stats.row_steps > 0


def test_stop_strings(model, tokenizer):
    free = tokenizer.decode(plain(model)[0, 12:])
    stop = free[5:7]
    expected = plain(model, stop_strings=[stop], tokenizer=tokenizer)
    decoder = ladon.Decoder(model, ladon.new_heads(model, num_heads=3))
    output = decoder.generate(PROMPT, max_new_tokens=16, stop_strings=stop, tokenizer=tokenizer)
    assert torch.equal(output, expected) and output.shape[1] < 12 + 16
    with pytest.raises(InputError, match="tokenizer"):
        decoder.generate(PROMPT, max_new_tokens=16, stop_strings=stop)


def test_trace_tells_the_whole_story(model, decoder):
    expected = plain(model)[0, 12:].tolist()
    steps = list(decoder.trace(PROMPT, max_new_tokens=16))
    assert [steps[0].tokens[0], *(t for step in steps for t in step.emitted)] == expected
    assert [step.index for step in steps] == list(range(len(steps)))
    length = 12
    for step in steps:
        assert step.length == length and step.path[0] == 0 and step.parents[0] == -1
        assert [step.tokens[node] for node in step.path[1:]] == step.emitted[: len(step.path) - 1]
        assert step.depths[step.path[-1]] == len(step.path) - 1
        length += len(step.path)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"seed": 3}, "do_sample=True"),
        ({"do_sample": True, "temperature": -1.0}, "temperature"),
        ({"num_beams": 2}, "beam_search"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions"),
    ],
)
def test_options_that_are_not_supported_say_so(decoder, kwargs, message):
    with pytest.raises(InputError, match=message):
        decoder.generate(PROMPT, **{"max_new_tokens": 4, **kwargs})


def test_prompts_that_cannot_be_continued(model, decoder):
    with pytest.raises(InputError, match="empty"):
        decoder.generate(torch.zeros(1, 0, dtype=torch.long), max_new_tokens=4)
    with pytest.raises(InputError, match="prompt 1 is empty"):
        decoder.generate(BATCH[:2], attention_mask=torch.stack([MASK[1], MASK[1] * 0]), max_new_tokens=4)
    for length in (256, 300):
        with pytest.raises(InputError, match=f"{length} tokens, the model's context limit is 256"):
            decoder.generate(torch.full((1, length), 5), max_new_tokens=4)
    assert decoder.generate(torch.full((1, 255), 5), max_new_tokens=4).shape == (1, 256)
    with pytest.raises(InputError, match="past_key_values"):
        cache = model(PROMPT).past_key_values
        decoder.generate(PROMPT, past_key_values=cache, max_new_tokens=4)


def test_options_of_the_decoder_are_checked(model):
    heads = ladon.new_heads(model, num_heads=2)
    with pytest.raises(TreeError, match="3 deep but there are 2 heads"):
        ladon.Decoder(model, heads, tree=ladon.FixedTree.chain(3))
    with pytest.raises(TreeError, match="budget is 0"):
        ladon.Decoder(model, heads, budget=0)
    with pytest.raises(TreeError, match="budget is 'many'"):
        ladon.Decoder(model, heads, budget="many")
    with pytest.raises(TreeError, match="tree is 'star'"):
        ladon.Decoder(model, heads, tree="star")
    other = type(model)(type(model.config)(**{**model.config.to_dict(), "vocab_size": 50})).eval()
    with pytest.raises(HeadsError, match="vocabulary"):
        ladon.Decoder(other, heads)


def test_without_heads_and_n_grams_decoding_is_plain(model):
    decoder = ladon.Decoder(model, ngrams="off")
    assert torch.equal(decoder.generate(PROMPT, max_new_tokens=16), plain(model))
    assert decoder.stats.acceptance_length == 1.0


def test_a_fixed_tree_may_use_ranks_beyond_the_budget(model, decoder):
    tree = ladon.FixedTree(((0,), (7,), (7, 5)))
    wide = ladon.Decoder(model, decoder.heads, tree=tree, budget=3)
    assert torch.equal(wide.generate(PROMPT, max_new_tokens=16), plain(model))
    assert wide.stats.nodes_verified <= 3 * wide.stats.row_steps


def test_a_model_that_verifies_chains_only_never_gets_a_branch(model, monkeypatch):
    monkeypatch.setattr("ladon.decoder.decoder.Target.supports_trees", False)
    heads = ladon.new_heads(model, num_heads=3)
    for tree in ("dynamic", "chain", "off", ladon.FixedTree.chain(2)):
        decoder = ladon.Decoder(model, heads, tree=tree)
        assert torch.equal(decoder.generate(PROMPT, max_new_tokens=8), plain(model, max_new_tokens=8))
        for step in decoder.trace(PROMPT, max_new_tokens=8):
            real = [p for p, log_prob in zip(step.parents, step.log_probs, strict=True) if log_prob != -torch.inf]
            assert real == list(range(-1, len(real) - 1)), "each node but the padding follows the one before"
    with pytest.raises(TreeError, match="chains only"):
        ladon.Decoder(model, heads, tree=ladon.FixedTree.from_dense([1, 2]))
