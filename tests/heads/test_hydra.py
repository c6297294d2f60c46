"""Hydra's heads: their formula, their draft, and decoding with them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import PreTrainedModel

from ladon import Decoder, FixedTree
from ladon.errors import HeadsError, InputError
from ladon.heads import Heads, HydraHeads, new_heads
from ladon.heads.calibration import Calibration
from ladon.util.observer import SILENT
from lattices import tree_paths


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


def test_after_many_paths_at_once(tiny_llama: PreTrainedModel) -> None:
    heads = random_heads(tiny_llama)
    hidden = torch.randn(2, 32, dtype=torch.float64)
    for k in (1, 2, 3):
        paths = torch.randint(97, (2, 4, k))
        found = heads.after(hidden, paths)
        assert found.shape == (2, 4, 97)
        for row in range(2):
            for path in range(4):
                expected = by_hand(heads, tiny_llama, hidden[row], paths[row, path].tolist(), k)
                torch.testing.assert_close(found[row, path], expected)


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


TREES = {"dynamic": "dynamic", "chain": "chain", "fixed": FixedTree(((0,), (1,), (0, 0), (0, 1), (2,), (0, 0, 0)))}


def learnt(model: PreTrainedModel, prompts: torch.Tensor) -> tuple[HydraHeads, torch.Tensor]:
    """Heads taught towards the model's own text, so that guesses are accepted now and then; and that text."""
    heads = random_heads(model)
    with torch.no_grad():
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
    return heads, text


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("joint", ["product", "paths", "paths:2"])
def test_decoding_is_lossless(model: PreTrainedModel, joint: str, tree: str, batch: int) -> None:
    prompts = torch.randint(3, 97, (batch, 9))
    heads, text = learnt(model, prompts)
    for budget in (1, 8, 64):
        decoder = Decoder(model, heads, tree=TREES[tree], budget=budget, joint=joint, ngrams="off")
        output = decoder.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=40, do_sample=False)
        assert torch.equal(output, text)
        assert decoder.stats.acceptance_length > (1.2 if budget > 1 else 0)


@pytest.mark.parametrize("tree", TREES)
def test_rows_of_a_padded_batch_are_as_if_alone(model: PreTrainedModel, tree: str) -> None:
    """Greedy as from transformers; sampled as from plain decoding of the same engine with the same seeds."""
    lengths = (3, 9, 6)
    prompts = [torch.randint(3, 97, (length,)) for length in lengths]
    ids = torch.stack([functional.pad(prompt, (9 - len(prompt), 0)) for prompt in prompts])
    mask = torch.stack([(torch.arange(9) >= 9 - length).long() for length in lengths])
    heads, _ = learnt(model, prompts[1][None])
    for budget in (1, 8, 64):
        decoder = Decoder(model, heads, tree=TREES[tree], budget=budget, joint="paths")
        greedy = decoder.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False)
        for row, prompt in enumerate(prompts):
            alone = model.generate(prompt[None], max_new_tokens=20, do_sample=False)
            assert torch.equal(greedy[row, 9:], alone[0, len(prompt) :])
        drawn, plain = (
            made.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=True, temperature=0.8, seed=[4, 5, 6])
            for made in (decoder, Decoder(model, heads, tree="off"))
        )
        assert torch.equal(drawn, plain)


def sure_heads(model: PreTrainedModel) -> HydraHeads:
    """Random heads that are sure enough for their trees to be deep, and whose guesses differ from path to path."""
    heads = random_heads(model)
    with torch.no_grad():
        heads.projection.mul_(6)
        for weight in heads.residual_weight:
            weight[:, heads.hidden_size :].mul_(50)  # the columns of the embeddings, which are small
    return heads


def proposed(model: PreTrainedModel, heads: Heads, hidden: torch.Tensor, root: torch.Tensor, **options: Any) -> Any:
    """The tree that a decoder drafts, of all its nodes."""
    return Decoder(model, heads, **options)._proposer(SILENT).propose(hidden, root, options["budget"])


def test_paths_are_the_default_and_a_chain_is_as_before(tiny_llama: PreTrainedModel) -> None:
    heads = sure_heads(tiny_llama)
    hidden, root = torch.randn(2, 32, dtype=torch.float64), torch.tensor([5, 96])
    made = {
        (joint, tree): proposed(tiny_llama, heads, hidden, root, joint=joint, tree=tree, budget=16)
        for joint in ("auto", "paths", "product")
        for tree in ("dynamic", "chain")
    }
    assert torch.equal(made["auto", "dynamic"].tokens, made["paths", "dynamic"].tokens)
    assert not torch.equal(made["auto", "dynamic"].tokens, made["product", "dynamic"].tokens)
    assert (made["auto", "dynamic"].depths.max(1).values == 3).all()
    for joint in ("auto", "paths"):
        chain = made[joint, "chain"]
        assert torch.equal(chain.tokens, made["product", "chain"].tokens)
        torch.testing.assert_close(chain.log_probs, made["product", "chain"].log_probs)
        assert torch.equal(chain.tokens[:, 1:], heads.draft(hidden, root).argmax(-1))


@pytest.mark.parametrize("num_rows", [3, 14, 64])
def test_trees_hold_what_the_heads_say_after_each_path(tiny_llama: PreTrainedModel, num_rows: int) -> None:
    """From the heads' training form, which sees one path at a time; 14 rows are enough for the best 16 nodes of all."""
    heads = sure_heads(tiny_llama)
    heads.calibration = Calibration(heads="", temperatures=[0.5, 1.5, 0.8], hit_rates=[[]] * 3, joint="paths")
    hidden, root = torch.randn(1, 32, dtype=torch.float64), torch.tensor([7])
    tree = proposed(tiny_llama, heads, hidden, root, joint=f"paths:{num_rows}", budget=16)

    def log_probs(path: tuple[int, ...]) -> torch.Tensor:
        following = torch.tensor([[7, *path, *[0] * (2 - len(path))]])
        return (heads(hidden, following)[0, len(path)] / heads.calibration.temperatures[len(path)]).log_softmax(-1)

    values: dict[tuple[int, ...], float] = {(): 0.0}
    frontier = [()]
    for _ in range(3):
        for path in frontier:
            every = log_probs(path).tolist()
            values |= {(*path, token): values[path] + value for token, value in enumerate(every)}
        longest = [path for path in values if len(path) == len(frontier[0]) + 1]
        frontier = sorted(longest, key=lambda path: -values[path])[: min(num_rows, 14)]
    best = sorted((value for path, value in values.items() if path), reverse=True)[:15]
    assert tree.log_probs[0, 1:].tolist() == pytest.approx(best, abs=1e-4)
    for path, value in zip(tree_paths(tree, 0), tree.log_probs[0, 1:].tolist(), strict=True):
        assert values[path] == pytest.approx(value, abs=1e-4)


@pytest.mark.parametrize("num_rows", [1, 8, 30])
@pytest.mark.parametrize("tree", TREES)
def test_each_head_is_asked_once_a_step(
    tiny_llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, tree: str, num_rows: int
) -> None:
    heads = random_heads(tiny_llama)
    asked: list[tuple[int, ...]] = []
    after = heads.after

    def counted(hidden: torch.Tensor, paths: torch.Tensor) -> torch.Tensor:
        asked.append(tuple(paths.shape))
        return after(hidden, paths)

    monkeypatch.setattr(heads, "after", counted)
    hidden, root = torch.randn(2, 32, dtype=torch.float64), torch.tensor([5, 96])
    proposed(tiny_llama, heads, hidden, root, joint=f"paths:{num_rows}", tree=TREES[tree], budget=64)
    rows = {"dynamic": [1, num_rows, num_rows], "chain": [1, 1, 1], "fixed": [1, 1, 1]}[tree]
    assert asked == [(2, r, k) for k, r in enumerate(rows, start=1)]


def test_joints_that_cannot_be(tiny_llama: PreTrainedModel) -> None:
    with pytest.raises(HeadsError, match='joint is "paths", but the heads do not read the tokens before their guesses'):
        Decoder(tiny_llama, new_heads(tiny_llama, 2), joint="paths")
    heads = random_heads(tiny_llama)
    with pytest.raises(HeadsError, match='joint is "markov", but the heads have no Markov correction'):
        Decoder(tiny_llama, heads, joint="markov")
    for joint in ("paths:0", "paths:", "paths:x", "paths:-1"):
        with pytest.raises(InputError, match="give how many paths it follows, 1 or more, such as 'paths:16'"):
            Decoder(tiny_llama, heads, joint=joint)
    with pytest.raises(InputError, match="joint is 'product:4'; give"):
        Decoder(tiny_llama, heads, joint="product:4")
