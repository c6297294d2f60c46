"""transformers' logits processors at the nodes of a tree: every one against itself on each node's own prefix."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.generation import logits_process as kinds

import ladon
from drafts import TREES, decode, make_proposer
from ladon.engine.sequence import Row
from ladon.errors import InputError
from ladon.sampling.logits_processors import _BY_PREFIX, _BY_SCORES, ProcessedSampling, Processors
from ladon.sampling.sampler import first_best, noisy
from ladon.sampling.sampling_params import GREEDY, Context, Nodes
from ladon.target.target import Target
from ladon.trees.token_tree import ancestor_mask
from random_trees import draw

VOCAB, PAD = 97, 0
PADDED = torch.tensor([[PAD, PAD, 11, 12, 13, 11], [21, 22, 23, 21, 22, 25]])
MASK = (PADDED != PAD).long()
WRITTEN = [[11, 12], [22, 25, 21]]  # what was emitted since, the root last

MADE: dict[str, Callable[[], Any]] = {
    "TemperatureLogitsWarper": lambda: kinds.TemperatureLogitsWarper(0.7),
    "TopKLogitsWarper": lambda: kinds.TopKLogitsWarper(5),
    "TopPLogitsWarper": lambda: kinds.TopPLogitsWarper(0.8),
    "TopHLogitsWarper": lambda: kinds.TopHLogitsWarper(0.5),
    "MinPLogitsWarper": lambda: kinds.MinPLogitsWarper(0.1),
    "TypicalLogitsWarper": lambda: kinds.TypicalLogitsWarper(0.8),
    "EpsilonLogitsWarper": lambda: kinds.EpsilonLogitsWarper(0.01),
    "EtaLogitsWarper": lambda: kinds.EtaLogitsWarper(0.01),
    "SuppressTokensLogitsProcessor": lambda: kinds.SuppressTokensLogitsProcessor([3, 4, 12]),
    "InfNanRemoveLogitsProcessor": lambda: kinds.InfNanRemoveLogitsProcessor(),
    "LogitNormalization": lambda: kinds.LogitNormalization(),
    "MinLengthLogitsProcessor": lambda: kinds.MinLengthLogitsProcessor(10, torch.tensor([5])),
    "MinNewTokensLengthLogitsProcessor": lambda: kinds.MinNewTokensLengthLogitsProcessor(6, 4, torch.tensor([5])),
    "RepetitionPenaltyLogitsProcessor": lambda: kinds.RepetitionPenaltyLogitsProcessor(1.4),
    "EncoderRepetitionPenaltyLogitsProcessor": lambda: kinds.EncoderRepetitionPenaltyLogitsProcessor(1.3, PADDED),
    "NoRepeatNGramLogitsProcessor": lambda: kinds.NoRepeatNGramLogitsProcessor(2),
    "EncoderNoRepeatNGramLogitsProcessor": lambda: kinds.EncoderNoRepeatNGramLogitsProcessor(2, PADDED),
    "SequenceBiasLogitsProcessor": lambda: kinds.SequenceBiasLogitsProcessor([[[12, 13], 4.0], [[7], -3.0]]),
    "NoBadWordsLogitsProcessor": lambda: kinds.NoBadWordsLogitsProcessor([[12, 13], [8], [25, 21, 22]], None),
    "PrefixConstrainedLogitsProcessor": lambda: kinds.PrefixConstrainedLogitsProcessor(allowed, 1),
    "ForcedBOSTokenLogitsProcessor": lambda: kinds.ForcedBOSTokenLogitsProcessor(9),
    "ForcedEOSTokenLogitsProcessor": lambda: kinds.ForcedEOSTokenLogitsProcessor(11, 5),
    "ExponentialDecayLengthPenalty": lambda: kinds.ExponentialDecayLengthPenalty((1, 1.2), torch.tensor([5]), 6),
    "SuppressTokensAtBeginLogitsProcessor": lambda: kinds.SuppressTokensAtBeginLogitsProcessor([3, 4], 9),
    "WatermarkLogitsProcessor": lambda: kinds.WatermarkLogitsProcessor(VOCAB, "cpu"),
}
IF_THERE = {"TopHLogitsWarper"}  # not in every transformers that is supported


def allowed(number: int, ids: torch.Tensor) -> list[int]:
    """Depends on the row and on the whole prefix."""
    return [(int(ids.sum()) * (number + 1) + step) % VOCAB for step in (1, 5, 9, 40)]


def made(name: str) -> Any:
    if name in IF_THERE and not hasattr(kinds, name):
        pytest.skip("not in this transformers")
    return MADE[name]()


def one_row(name: str, number: int) -> Any:
    """The same processor, made for one row of the batch alone."""
    if name == "EncoderRepetitionPenaltyLogitsProcessor":
        return kinds.EncoderRepetitionPenaltyLogitsProcessor(1.3, PADDED[number : number + 1])
    if name == "EncoderNoRepeatNGramLogitsProcessor":
        return kinds.EncoderNoRepeatNGramLogitsProcessor(2, PADDED[number : number + 1])
    if name == "PrefixConstrainedLogitsProcessor":
        return kinds.PrefixConstrainedLogitsProcessor(lambda _, ids: allowed(number, ids), 1)
    return MADE[name]()


def context() -> Context:
    rows = [
        Row(
            prompt=ids[mask.bool()], max_new_tokens=20, is_stop=lambda _: False, padded=ids, number=number,
            tokens=list(written),
        )
        for number, (ids, mask, written) in enumerate(zip(PADDED, MASK, WRITTEN, strict=True))
    ]  # fmt: skip
    return Context(rows=rows, prefixes=[torch.cat([row.padded, torch.tensor(row.tokens)]) for row in rows])


def path_of(parents: list[int], tokens: list[int], node: int) -> list[int]:
    """Tokens from below the root to the node."""
    return [] if node == 0 else [*path_of(parents, tokens, parents[node]), tokens[node]]


def check_every_node(processors: Processors, alone: Callable[[int], Any], seed: int) -> None:
    """Scores at each real node of random trees against the processor called on that node's own prefix."""
    drawn = draw(random.Random(seed), [None, None], 14, 30)  # tokens below 30, so that prefixes repeat
    tree = drawn.tree
    logits = torch.randn(2, tree.num_nodes, VOCAB, generator=torch.Generator().manual_seed(seed))
    given, where = logits.clone(), context()
    found = processors(logits, where, Nodes(tree=tree, ancestors=ancestor_mask(tree.parents, tree.max_depth)))
    for row in range(2):
        parents, tokens = tree.parents[row].tolist(), tree.tokens[row].tolist()
        for node in range(tree.num_nodes):
            if tree.log_probs[row, node] == -torch.inf:
                continue
            ids = torch.cat([where.prefixes[row], torch.tensor(path_of(parents, tokens, node), dtype=torch.int64)])
            expected = alone(row)(ids[None], given[row, node][None].clone())[0]
            assert torch.equal(found[row, node] == -torch.inf, expected == -torch.inf)
            assert torch.allclose(found[row, node], expected, atol=1e-6)


@pytest.mark.parametrize("name", MADE)
def test_scores_at_each_node(name: str) -> None:
    processor = made(name)
    for seed in range(3):
        processors = Processors([processor])
        assert not processors.is_plain
        check_every_node(processors, lambda row: one_row(name, row), seed)


def test_every_class_that_is_known_is_tested() -> None:
    assert set(MADE) == _BY_SCORES | _BY_PREFIX


def test_many_at_once_and_in_order() -> None:
    names = ["RepetitionPenaltyLogitsProcessor", "TemperatureLogitsWarper", "NoRepeatNGramLogitsProcessor"]
    names += ["TopKLogitsWarper", "SequenceBiasLogitsProcessor", "LogitNormalization"]
    for order in (names, names[::-1]):
        check_every_node(
            Processors([MADE[name]() for name in order]),
            lambda row, order=order: LogitsProcessorList([one_row(name, row) for name in order]),
            7,
        )


class Counting(LogitsProcessor):
    """Keeps count of its calls; forbids a token that depends on it."""

    def __init__(self) -> None:
        self.lengths: list[int] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.lengths.append(input_ids.shape[1])
        scores = scores.clone()
        scores[:, len(self.lengths) % VOCAB] = -torch.inf
        return scores


class Tilted(LogitsProcessor):
    """Looks at the scores alone, and says so."""

    stateless = True

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores * 0.5 + torch.arange(scores.shape[-1]) * 0.05


class MyTopK(kinds.TopKLogitsWarper):
    """A subclass may mean anything."""


def test_who_is_known() -> None:
    for processor, is_plain in ((Counting(), True), (Tilted(), False), (MyTopK(3), True)):
        assert Processors([processor]).is_plain is is_plain


@pytest.fixture
def heads(tiny_llama: PreTrainedModel) -> ladon.Heads:
    heads = ladon.new_heads(tiny_llama, num_heads=3)
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return heads


def test_an_unknown_one_is_called_once_per_token(tiny_llama: PreTrainedModel, heads: ladon.Heads) -> None:
    ours, theirs = Counting(), Counting()
    prompt = torch.arange(3, 12)[None]
    expected = tiny_llama.generate(prompt, max_new_tokens=12, logits_processor=LogitsProcessorList([theirs]))
    decoder = ladon.Decoder(tiny_llama, heads)
    with pytest.warns(UserWarning, match="Counting .*plainly") as caught:
        found = decoder.generate(prompt, max_new_tokens=12, logits_processor=LogitsProcessorList([ours]))
    assert len([warning for warning in caught if "plainly" in str(warning.message)]) == 1
    assert found.tolist() == expected.tolist() and ours.lengths == theirs.lengths
    assert decoder.stats.nodes_verified == decoder.stats.row_steps == 11
    with pytest.raises(InputError, match="one prompt at a time"):
        decoder.generate(prompt.repeat(2, 1), max_new_tokens=4, logits_processor=LogitsProcessorList([Counting()]))


OPTIONS: list[dict[str, Any]] = [
    {"repetition_penalty": 1.5},
    {"no_repeat_ngram_size": 2},
    {"min_new_tokens": 9, "eos_token_id": 5},
    {"min_length": 20, "eos_token_id": [5, 7]},
    {"bad_words_ids": [[12], [30, 31]]},
    {"sequence_bias": [[[12, 13], 4.0], [[40], 1.5]]},
    {"suppress_tokens": [3, 4, 50], "begin_suppress_tokens": [60]},
    {"forced_eos_token_id": 5},
    {"exponential_decay_length_penalty": (3, 1.5), "eos_token_id": 5},
    {"encoder_repetition_penalty": 1.3},
    {"encoder_no_repeat_ngram_size": 2},
    {"prefix_allowed_tokens_fn": allowed},
    {"renormalize_logits": True, "repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "remove_invalid_values": True},
]


def option_name(options: dict[str, Any]) -> str:
    return "+".join(options)


@pytest.mark.parametrize("options", OPTIONS, ids=option_name)
def test_greedy_is_that_of_generate(tiny_llama: PreTrainedModel, heads: ladon.Heads, options: dict[str, Any]) -> None:
    """Prompts of two lengths together, trees of 1, 8 and 64 nodes."""
    torch.manual_seed(1)
    short, long = torch.randint(3, VOCAB, (4,)), torch.randint(3, VOCAB, (9,))
    ids = torch.zeros(2, 9, dtype=torch.int64)
    ids[0, 5:], ids[1] = short, long
    options = {"max_new_tokens": 16, "attention_mask": (ids != 0).long(), "pad_token_id": 0, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        expected = tiny_llama.generate(ids, do_sample=False, **options)
        for budget in (1, 8, 64):
            found = ladon.Decoder(tiny_llama, heads, budget=budget).generate(ids, do_sample=False, **options)
            assert found.tolist() == expected.tolist()


LAWS: list[dict[str, Any]] = [
    {"temperature": 1.0, "top_k": 0},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.9},
    {"min_p": 0.05, "repetition_penalty": 1.3},
    {"typical_p": 0.9, "no_repeat_ngram_size": 3},
    {"epsilon_cutoff": 0.001, "eta_cutoff": 0.001},
]


@pytest.mark.parametrize("law", LAWS, ids=option_name)
def test_one_seed_one_text(tiny_llama: PreTrainedModel, heads: ladon.Heads, law: dict[str, Any]) -> None:
    """Plain, chain, dynamic and pruned, alone and together, all say the same."""
    tiny_llama.generation_config.eos_token_id = None
    prompts = torch.randint(3, VOCAB, (3, 8), generator=torch.Generator().manual_seed(2))
    options = {"max_new_tokens": 20, "do_sample": True, "pad_token_id": 0, **law}
    plain = ladon.Decoder(tiny_llama)
    expected = plain.generate(prompts, seed=4, **options).tolist()
    seeds = plain.seeds
    assert plain.generate(prompts, seed=5, **options).tolist() != expected
    decoders = [ladon.Decoder(tiny_llama, heads, tree="chain"), ladon.Decoder(tiny_llama, heads)]
    decoders += [ladon.Decoder(tiny_llama, heads, budget=b) for b in (8, 64)]
    decoders.append(ladon.Decoder(tiny_llama, heads, budget=16, prune=ladon.Pruning(layer=1, keep=4)))
    for decoder in decoders:
        assert decoder.generate(prompts, seed=4, **options).tolist() == expected
        assert decoder.seeds == seeds
        alone = [decoder.generate(prompts[row][None], seed=[seeds[row]], **options)[0].tolist() for row in range(3)]
        assert alone == expected
    torch.manual_seed(9)
    drawn = [plain.generate(prompts[:1], **options).tolist() for _ in range(2)]
    torch.manual_seed(9)
    assert plain.generate(prompts[:1], **options).tolist() == drawn[0] != drawn[1]


def test_rows_of_several_laws_in_one_engine(tiny_llama: PreTrainedModel) -> None:
    """Greedy, sampled and processed rows decode together, each as if it were alone."""
    target, prompts = Target(tiny_llama), [torch.arange(3, 9), torch.arange(5, 20), torch.arange(1, 4)]
    params_of = [
        GREEDY,
        ProcessedSampling(Processors([kinds.TemperatureLogitsWarper(0.8)]), draws=True),
        ProcessedSampling(Processors([kinds.NoRepeatNGramLogitsProcessor(1)]), draws=False),
    ]

    def said(places: list[int], tree: str) -> list[list[int]]:
        rows = [
            Row(
                prompt=prompts[place],
                max_new_tokens=15,
                is_stop=lambda _: False,
                seed=place,
                sampling_params=params_of[place],
            )
            for place in places
        ]
        decoder = ladon.Decoder(tiny_llama, ladon.new_heads(tiny_llama, num_heads=3), tree=tree, budget=9)
        for _ in decoder.decode(rows):
            pass
        return [row.tokens for row in rows]

    alone = [said([place], "off")[0] for place in range(3)]
    assert len(set(alone[2])) == 15
    for tree in ("off", "chain", "dynamic"):
        assert said([0, 1, 2], tree) == alone
        assert said([2, 0, 1], tree) == [alone[2], alone[0], alone[1]]
    assert target.vocab_size == VOCAB


@pytest.mark.parametrize("tree", TREES)
def test_what_is_said_is_accepted(tiny_llama: PreTrainedModel, tree: str) -> None:
    """Trees that hold the truth of a law are accepted under it: processed picks, not raw ones, walk the tree."""
    prompt = torch.arange(3, 9)
    options = {"max_new_tokens": 18, "do_sample": False, "repetition_penalty": 1.6}
    truth = tiny_llama.generate(prompt[None], **options)[0, 6:].tolist()
    row_processors = Processors([kinds.RepetitionPenaltyLogitsProcessor(1.6)])
    proposer = make_proposer("oracle", TREES[tree], [truth], VOCAB, None)
    outputs, stats = decode(
        Target(tiny_llama), proposer, [prompt], 18, sampling_params=ProcessedSampling(row_processors, draws=False)
    )
    assert outputs == [truth] and stats.acceptance_length > 1.5


def test_acceptance_is_the_mass_on_the_children(tiny_llama: PreTrainedModel) -> None:
    """Over seeds, the share of draws that fall on a node's children is the target's mass there."""
    logits = torch.randn(1, 1, 12, generator=torch.Generator().manual_seed(3))
    children, num = [1, 4, 7], 20_000
    params = ProcessedSampling(Processors([kinds.TemperatureLogitsWarper(0.9)]), draws=True)
    law = (logits[0, 0] / 0.9).softmax(-1)
    drawn = draw(random.Random(0), [None], 1, 12).tree
    nodes = Nodes(tree=drawn.rows([0] * num), ancestors=torch.ones(num, 1, 1, dtype=torch.bool))
    where = Context(rows=[], seeds=torch.arange(num), first=torch.zeros(num, dtype=torch.int64))
    picks = first_best(noisy(params.scores(logits.expand(num, -1, -1), where, nodes), where, nodes))[:, 0]
    share = float(torch.isin(picks, torch.tensor(children)).float().mean())
    mass = float(law[children].sum())
    assert share == pytest.approx(mass, abs=4 * (mass * (1 - mass) / num) ** 0.5)


@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.4}, {"do_sample": True, "top_k": 9, "seed": 2}])
def test_logits_and_scores_are_those_of_plain_decoding(
    tiny_llama: PreTrainedModel, heads: ladon.Heads, options: dict[str, Any]
) -> None:
    """For each emitted token, of rows that end at different places; greedy ones are `generate`'s."""
    prompts = torch.randint(3, VOCAB, (3, 7), generator=torch.Generator().manual_seed(4))
    given = {"max_new_tokens": 15, "pad_token_id": 0, "return_dict_in_generate": True, **options}
    given |= {"output_scores": True, "output_logits": True, "eos_token_id": [2, 5, 8, 11, 14, 17, 20]}
    plain = ladon.Decoder(tiny_llama).generate(prompts, **given)
    found = ladon.Decoder(tiny_llama, heads, budget=12).generate(prompts, **given)
    assert found.sequences.tolist() == plain.sequences.tolist()
    new = plain.sequences[:, 7:]
    assert len(found.scores) == len(found.logits) == len(plain.scores) == new.shape[1]
    theirs = plain if "seed" in options else tiny_llama.generate(prompts, **given)
    for place in range(new.shape[1]):
        alive = new[:, place] != 0
        for name in ("scores", "logits"):
            one, other = found[name][place], theirs[name][place]
            assert one.shape == other.shape == (3, VOCAB)
            assert torch.allclose(one[alive].float(), other[alive].float(), atol=1e-5)
            assert torch.equal(one[alive] == -torch.inf, other[alive] == -torch.inf)


@pytest.mark.parametrize("change", [{"num_beams": 2}, {"output_attentions": True, "return_dict_in_generate": True}])
def test_what_is_still_refused(tiny_llama: PreTrainedModel, change: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        ladon.Decoder(tiny_llama).generate(torch.arange(3, 9)[None], max_new_tokens=4, do_sample=True, **change)


def test_a_seed_without_sampling_is_refused(tiny_llama: PreTrainedModel) -> None:
    with pytest.raises(InputError, match="do_sample=True"):
        ladon.Decoder(tiny_llama).generate(torch.arange(3, 9)[None], max_new_tokens=4, do_sample=False, seed=3)
