"""Recorded traces, against a walk over the model's greedy text with transformers alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from ladon.calibrate.lattice_trace import GRID, LatticeTrace, record
from ladon.errors import InputError
from ladon.heads import Heads, new_heads
from ladon.trees import lattice
from traces import NearHeads, trace_of

PROMPTS = [torch.tensor([5, 6, 7, 8]), torch.tensor([9, 10]), torch.tensor([11, 12, 13, 14, 15, 16])]
NEW_TOKENS = 12


def random_heads(model: PreTrainedModel, num_heads: int = 2, **options: int) -> Heads:
    heads = new_heads(model, num_heads, **options)
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return heads


def greedy(model: PreTrainedModel, prompt: Tensor) -> Tensor:
    rows = model.generate(
        prompt[None], attention_mask=torch.ones_like(prompt)[None], max_new_tokens=NEW_TOKENS, do_sample=False
    )
    return rows[0]


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_candidates_and_truth_are_those_of_the_greedy_text(tiny_llama: PreTrainedModel, batch_size: int) -> None:
    """One answer ends early, so a row leaves its batch before the others."""
    first = greedy(tiny_llama, PROMPTS[0])[4:]
    tiny_llama.generation_config.eos_token_id = int(first[5])
    heads = random_heads(tiny_llama, markov_rank=2, markov_gate=1)
    trace = record(tiny_llama, heads, PROMPTS, max_new_tokens=NEW_TOKENS, batch_size=batch_size, num_candidates=7)
    position = 0
    for row, prompt in enumerate(PROMPTS):
        text = greedy(tiny_llama, prompt)
        answer = text[len(prompt) :].tolist()
        assert trace.row_starts[row] == position
        with torch.no_grad():
            hidden = tiny_llama.base_model(input_ids=text[None]).last_hidden_state[0]
        for place in range(len(answer) - 1):
            following = [*answer[place + 1 : place + 3], -1, -1][:2]
            assert trace.truth[position].tolist() == following
            state = hidden[len(prompt) + place - 1]
            logits = heads(state)
            torch.testing.assert_close(trace.gates[position], heads.correction.gates(state).float())
            expected = lattice.from_logits(logits[None], 7)
            assert trace.tokens[position].tolist() == expected.tokens[0, :, 0].tolist()
            for k in (1, 2):
                torch.testing.assert_close(trace.log_probs(k)[position], expected.log_probs[0, k - 1, 0])
            position += 1
    assert trace.row_starts.tolist()[-1] == trace.num_positions == position
    assert len(set(trace.row_starts.diff().tolist())) > 1, "an answer ended early"
    assert trace.heads == heads.weights_hash
    assert not tiny_llama.get_output_embeddings()._forward_pre_hooks


def test_ranks(tiny_llama: PreTrainedModel) -> None:
    heads = random_heads(tiny_llama)
    trace = record(tiny_llama, heads, PROMPTS, max_new_tokens=30, num_candidates=20)
    ranks = trace.ranks()
    for position, (truth, tokens) in enumerate(zip(trace.truth.tolist(), trace.tokens.tolist(), strict=True)):
        for k in range(2):
            expected = -1 if truth[k] < 0 else [*tokens[k], truth[k]].index(truth[k])
            assert ranks[position, k] == expected
    assert (ranks == -1).sum() == len(PROMPTS) and 0 < (ranks == 20).sum() < ranks.numel()


def test_conditioned_heads_see_the_true_tokens_and_entries_become_tokens(model: PreTrainedModel) -> None:
    heads = NearHeads(num_heads=3, hidden_size=32, vocab_size=97)
    heads.remember_base(model)
    trace = record(model, heads, PROMPTS[:2], max_new_tokens=30, num_candidates=3)
    assert trace.joint == "paths"
    checked = 0
    for position, (root, truth) in enumerate(zip(trace.roots.tolist(), trace.truth.tolist(), strict=True)):
        for depth, before in enumerate([root, *truth[:-1]]):
            if 48 < before < 96:
                assert trace.tokens[position, depth, 0] == before
                assert set(trace.tokens[position, depth].tolist()) == {before - 1, before, before + 1}
                checked += depth
    assert checked, "later heads have seen more than the root"


@settings(max_examples=50, deadline=None)
@given(
    temperature=st.floats(GRID[0], GRID[-1]),
    seed=st.integers(0, 2**31),
    spread=st.floats(0.0, 8.0),
)
def test_probabilities_at_any_temperature(temperature: float, seed: int, spread: float) -> None:
    """The normaliser between two temperatures of the grid is within 0.2 % of the true one."""
    logits = torch.randn(3, 2, 200, generator=torch.Generator().manual_seed(seed)) * spread
    trace = trace_of(logits, 10)
    expected = lattice.from_logits(logits, 10, temperatures=torch.full((2,), temperature))
    for k in (1, 2):
        torch.testing.assert_close(trace.log_probs(k, temperature), expected.log_probs[:, k - 1, 0], atol=2e-3, rtol=0)


@pytest.mark.parametrize("temperature", GRID)
def test_temperatures_of_the_grid_are_exact(temperature: float) -> None:
    logits = torch.randn(3, 1, 50) * 5
    expected = lattice.from_logits(logits, 10, temperatures=torch.tensor([temperature]))
    torch.testing.assert_close(trace_of(logits, 10).log_probs(1, temperature), expected.log_probs[:, 0, 0])


def test_a_broken_head_offers_nothing() -> None:
    logits = torch.randn(2, 1, 50)
    logits[0, 0, 7] = torch.nan
    logits[1, 0, 20:] = -torch.inf
    log_probs = trace_of(logits, 30).log_probs(1, 1.3)
    assert (log_probs[0] == -torch.inf).all()
    assert (log_probs[1] > -torch.inf).sum() == 20


def test_temperatures_outside_the_grid_are_refused() -> None:
    with pytest.raises(InputError, match=r"temperature 5\.0 is outside what a trace holds; give 0\.25 to 4"):
        trace_of(torch.zeros(1, 1, 5), 2).log_probs(1, 5.0)


def test_save_and_load(tmp_path: Path) -> None:
    trace = replace(trace_of(torch.randn(4, 2, 9), 3), heads="0123", joint="paths", about={"model": "m", "prompts": 4})
    trace.save(tmp_path / "t.safetensors")
    loaded = LatticeTrace.load(tmp_path / "t.safetensors")
    assert loaded.gates is None
    for name in ("tokens", "logits", "log_normalizers", "truth", "row_starts"):
        torch.testing.assert_close(getattr(loaded, name), getattr(trace, name), rtol=0, atol=0)
    assert (loaded.heads, loaded.joint, loaded.about) == (trace.heads, "paths", trace.about)
    assert [path.name for path in tmp_path.iterdir()] == ["t.safetensors"]
    gated = replace(trace, gates=torch.rand(4, 2))
    gated.save(tmp_path / "t.safetensors")
    assert torch.equal(LatticeTrace.load(tmp_path / "t.safetensors").gates, gated.gates)


def test_files_that_are_no_trace(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    (tmp_path / "torn").write_bytes(b"\x10\x00")
    save_file({"tokens": torch.zeros(1)}, tmp_path / "other")
    for name, problem in [("missing", "cannot read the trace"), ("torn", "cannot read the trace"), ("other", "is no")]:
        with pytest.raises(InputError, match=problem) as error:
            LatticeTrace.load(tmp_path / name)
        assert "\n" not in str(error.value) and "ladon calibrate --trace" in str(error.value)
    with pytest.raises(InputError, match="cannot write the trace"):
        trace_of(torch.zeros(1, 1, 5), 2).save(tmp_path / "no" / "folder")


def test_rows_of_a_trace() -> None:
    trace = trace_of(torch.randn(6, 1, 9), 3)
    trace = replace(trace, row_starts=torch.tensor([0, 2, 2, 6]), gates=torch.rand(6, 1))
    part = trace.of_rows([2, 0])
    assert part.row_starts.tolist() == [0, 4, 6]
    torch.testing.assert_close(part.logits, trace.logits[[2, 3, 4, 5, 0, 1]])
    assert torch.equal(part.gates, trace.gates[[2, 3, 4, 5, 0, 1]])
    assert trace.of_rows([1]).num_positions == 0


def test_prompts_that_cannot_be_answered(tiny_llama: PreTrainedModel) -> None:
    heads = new_heads(tiny_llama, 2)
    with pytest.raises(InputError, match="prompt 2 has no tokens"):
        record(tiny_llama, heads, [torch.tensor([5]), torch.tensor([], dtype=torch.long)], max_new_tokens=4)
    with pytest.raises(InputError, match="prompt 1 has 256 tokens, the model's context limit is 256"):
        record(tiny_llama, heads, [torch.full((256,), 5)], max_new_tokens=4)


def test_an_answer_of_one_token_and_a_small_vocabulary() -> None:
    config = LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    model = LlamaForCausalLM(config).eval()
    trace = record(model, new_heads(model, 2), PROMPTS[1:2], max_new_tokens=1)
    assert (trace.num_positions, trace.num_heads, trace.num_candidates) == (0, 2, 16)
