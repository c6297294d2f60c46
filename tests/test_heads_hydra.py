"""Hydra's heads: their formula, their draft, and decoding with them."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional
from transformers import PreTrainedModel

from ladon import Decoder, FixedTree
from ladon.errors import HeadsError
from ladon.heads import HydraHeads, new_heads


def random_heads(model: PreTrainedModel, num_heads: int = 3, num_blocks: int = 2) -> HydraHeads:
    heads = new_heads(model, num_heads, "hydra", num_blocks=num_blocks)
    assert isinstance(heads, HydraHeads)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return heads


def by_hand(heads: HydraHeads, model: PreTrainedModel, hidden: torch.Tensor, tokens: list[int], k: int) -> torch.Tensor:
    """Head k (from 1) on one hidden state [H] and the k tokens after it, as the paper has it."""
    u = torch.cat([hidden, *(model.model.embed_tokens.weight[token] for token in tokens[:k])])
    x = heads.residual_weight[k - 1] @ u + heads.residual_bias[k - 1]
    x = x + functional.silu(heads.first_weight[k - 1] @ u + heads.first_bias[k - 1])
    for block in range(heads.num_blocks - 1):
        x = x + functional.silu(heads.block_weight[block, k - 1] @ x + heads.block_bias[block, k - 1])
    return heads.projection[k - 1] @ x + heads.projection_bias[k - 1]


@pytest.mark.parametrize("num_blocks", [1, 3])
def test_formula(tiny_llama: PreTrainedModel, num_blocks: int) -> None:
    heads = random_heads(tiny_llama, 3, num_blocks)
    assert heads.first_weight[2].shape == (32, 4 * 32)
    hidden, following = torch.randn(2, 5, 32, dtype=torch.float64), torch.randint(97, (2, 5, 3))
    logits = heads(hidden, following)
    assert logits.shape == (2, 5, 3, 97)
    for k in (1, 2, 3):
        expected = by_hand(heads, tiny_llama, hidden[1, 4], following[1, 4].tolist(), k)
        torch.testing.assert_close(logits[1, 4, k - 1], expected)


def test_a_draft_follows_each_heads_best_token(tiny_llama: PreTrainedModel) -> None:
    heads = random_heads(tiny_llama, 4)
    hidden, root = torch.randn(3, 32, dtype=torch.float64), torch.tensor([5, 0, 96])
    logits = heads.draft(hidden, root)
    best = logits.argmax(-1)
    assert len({tuple(row) for row in best.tolist()}) > 1
    following = torch.cat([root[:, None], best[:, :-1]], dim=1)
    torch.testing.assert_close(logits, heads(hidden, following))


def test_a_head_sees_no_token_at_or_after_its_own_place(tiny_llama: PreTrainedModel) -> None:
    heads = random_heads(tiny_llama)
    hidden, following = torch.randn(32, dtype=torch.float64), torch.tensor([1, 2, 3])
    before = heads(hidden, following)
    for place in range(3):
        changed = following.clone()
        changed[place] = 50
        same = (heads(hidden, changed) == before).all(-1)
        assert same.tolist() == [k < place for k in range(3)]


def test_training_learns_and_leaves_the_model_alone(tiny_llama: PreTrainedModel) -> None:
    heads = new_heads(tiny_llama, 2, "hydra", num_blocks=2)
    before = {name: value.clone() for name, value in tiny_llama.state_dict().items()}
    hidden, following = torch.randn(64, 32, dtype=torch.float64), torch.randint(97, (64, 2))
    targets = (following * 7 + 3) % 97  # what the tokens before tell, and the hidden state does not
    optimizer = torch.optim.Adam(heads.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = functional.cross_entropy(heads(hidden, following).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in heads.parameters())
    assert all(p.grad is None for p in tiny_llama.parameters())
    assert all(torch.equal(value, before[name]) for name, value in tiny_llama.state_dict().items())


def test_untrained_heads_equal_the_target(tiny_llama: PreTrainedModel) -> None:
    heads = new_heads(tiny_llama, 3, "hydra")
    hidden = torch.randn(4, 32, dtype=torch.float64)
    expected = tiny_llama.lm_head(hidden)[:, None].expand(-1, 3, -1)
    torch.testing.assert_close(heads(hidden, torch.randint(97, (4, 3))), expected)
    torch.testing.assert_close(heads.draft(hidden, torch.randint(97, (4,))), expected)


@pytest.mark.parametrize("following", [None, torch.zeros(2, 2, dtype=torch.long)])
def test_the_tokens_before_must_be_given(tiny_llama: PreTrainedModel, following: torch.Tensor | None) -> None:
    heads = new_heads(tiny_llama, 3, "hydra")
    with pytest.raises(HeadsError, match=r"expected \[2, 3\] token ids"):
        heads(torch.randn(2, 32, dtype=torch.float64), following)


TREES = ["dynamic", "chain", FixedTree(((0,), (1,), (0, 0), (0, 1), (2,), (0, 0, 0)))]


@pytest.mark.parametrize("tree", TREES, ids=["dynamic", "chain", "fixed"])
@pytest.mark.parametrize("batch", [1, 3])
def test_decoding_is_lossless(model: PreTrainedModel, tree: str | FixedTree, batch: int) -> None:
    prompts = torch.randint(3, 97, (batch, 9))
    heads = random_heads(model)
    with torch.no_grad():  # towards the model's own text, so that guesses are accepted now and then
        text = model.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=40, do_sample=False)
        hidden = model.model(text).last_hidden_state
    windows = text.unfold(1, 5, 1)  # [b, t, 5]: a token and the four after it
    following, targets, rows = windows[..., 1:4], windows[..., 2:5], hidden[:, : windows.shape[1]]
    optimizer = torch.optim.Adam(heads.parameters(), lr=1e-2)
    for _ in range(15):
        loss = functional.cross_entropy(heads(rows, following).flatten(0, 2), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    decoder = Decoder(model, heads, tree=tree, budget=8, ngrams="off")
    output = decoder.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=40, do_sample=False)
    assert torch.equal(output, text)
    assert decoder.stats.acceptance_length > 1.2
