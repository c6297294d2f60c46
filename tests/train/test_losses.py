"""The chunked loss: the numbers of the plain one, its gradients, a fraction of its memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from transformers import PreTrainedModel

from ladon.heads import Heads, new_heads
from ladon.train.losses import SoftLabels, TokenLabels, chunked_loss, rows_per_chunk

ROWS, HEADS = 23, 3


def heads_of(model: PreTrainedModel, family: str = "shared") -> Heads:
    heads = new_heads(model, num_heads=HEADS, family=family)
    for parameter in heads.parameters():
        nn.init.normal_(parameter, std=0.3)
    return heads


def problem(model: PreTrainedModel) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden rows, tokens, weights, a third of them 0."""
    hidden = torch.randn(ROWS, model.config.hidden_size, dtype=torch.float64, requires_grad=True)
    tokens = torch.randint(model.config.vocab_size, (ROWS, HEADS))
    weights = torch.rand(ROWS, HEADS, dtype=torch.float64) * (torch.rand(ROWS, HEADS) > 0.3)
    return hidden, tokens, weights


def all_gradients(loss: Tensor, hidden: Tensor, module: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [hidden, *module.parameters()]))


@pytest.mark.parametrize("family", ["shared", "medusa", "lowrank"])
@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_loss_and_gradients_are_those_of_the_plain_loss(tiny_llama: PreTrainedModel, family: str, chunk: int) -> None:
    heads = heads_of(tiny_llama, family) if family != "lowrank" else new_heads(tiny_llama, HEADS, family, rank=8)
    hidden, tokens, weights = problem(tiny_llama)
    outcome = chunked_loss(
        lambda rows, _: heads(rows), hidden, TokenLabels(tokens), weights, list(heads.parameters()), chunk
    )
    losses = functional.cross_entropy(heads(hidden).flatten(0, 1), tokens.flatten(), reduction="none")
    losses = losses.view(ROWS, HEADS)
    plain = (losses * weights).sum()
    torch.testing.assert_close(outcome.loss, plain)
    torch.testing.assert_close(outcome.sums, (losses * (weights > 0)).sum(0))
    scaled = all_gradients(outcome.loss * 3.0, hidden, heads)
    torch.testing.assert_close(scaled, [3.0 * g for g in all_gradients(plain, hidden, heads)])


@pytest.mark.parametrize(
    ("own_vocabulary", "temperature", "variation"),
    [(False, 1.0, 0.0), (True, 1.0, 0.0), (False, 0.5, 0.0), (False, 0.5, 0.9), (True, 1.0, 1.0)],
)
def test_soft_labels_are_the_distance_from_another_distribution(
    tiny_llama: PreTrainedModel, own_vocabulary: bool, temperature: float, variation: float
) -> None:
    heads = heads_of(tiny_llama)
    hidden, _, weights = problem(tiny_llama)
    said_by, places = torch.randn(9, 32, dtype=torch.float64), torch.randint(9, (ROWS, HEADS))
    token_ids = torch.tensor([3, 1, 40, 96]) if own_vocabulary else None
    kept = slice(None) if token_ids is None else token_ids
    outcome = chunked_loss(
        lambda rows, _: heads(rows)[..., kept],
        hidden,
        SoftLabels(heads.project, said_by, places, token_ids, temperature, variation),
        weights,
        list(heads.parameters()),
        5,
    )
    said = (heads.project(said_by).detach()[:, kept] / temperature).softmax(-1)[places]
    own = heads(hidden)[..., kept].log_softmax(-1)
    divergence = functional.kl_div(own, said, reduction="none").sum(-1)
    losses = (1 - variation) * divergence + variation * (own.exp() - said).abs().sum(-1) / 2
    plain = (losses * weights).sum()
    torch.testing.assert_close(outcome.loss, plain)
    torch.testing.assert_close(all_gradients(outcome.loss, hidden, heads), all_gradients(plain, hidden, heads))


def test_the_divergence_from_itself_is_nothing(tiny_llama: PreTrainedModel) -> None:
    heads = new_heads(tiny_llama, HEADS)  # untrained: each head is the target's own projection
    hidden = torch.randn(ROWS, 32, dtype=torch.float64)
    own_places = torch.arange(ROWS)[:, None].expand(-1, HEADS)
    labels = SoftLabels(heads.project, hidden, own_places)
    weights = torch.ones(ROWS, HEADS, dtype=torch.float64)
    outcome = chunked_loss(lambda rows, _: heads(rows), hidden, labels, weights, list(heads.parameters()), 4)
    assert outcome.loss.abs() < 1e-12


def test_rows_that_are_not_finite_are_skipped_and_counted(tiny_llama: PreTrainedModel) -> None:
    heads = heads_of(tiny_llama)
    hidden, tokens, weights = problem(tiny_llama)
    weights = weights + 0.1
    broken = hidden.detach().clone()
    broken[4], broken[20, 3] = torch.nan, torch.inf
    good = [i for i in range(ROWS) if i not in (4, 20)]

    def run(rows: Tensor, labels: Tensor, scale: Tensor) -> tuple[Any, list[Tensor]]:
        outcome = chunked_loss(
            lambda part, _: heads(part), rows, TokenLabels(labels), scale, list(heads.parameters()), 6
        )
        return outcome, list(torch.autograd.grad(outcome.loss, list(heads.parameters())))

    outcome, gradients = run(broken, tokens, weights)
    kept, expected = run(hidden.detach()[good], tokens[good], weights[good])
    assert outcome.skipped == 2 and kept.skipped == 0
    torch.testing.assert_close(outcome.loss, kept.loss)
    torch.testing.assert_close(gradients, expected)


def test_nothing_to_learn_is_a_loss_of_0_with_gradients_of_0(tiny_llama: PreTrainedModel) -> None:
    heads = heads_of(tiny_llama)
    empty = torch.zeros(0, 32, dtype=torch.float64)
    outcome = chunked_loss(
        lambda rows, _: heads(rows),
        empty,
        TokenLabels(torch.zeros(0, HEADS, dtype=torch.int64)),
        torch.zeros(0, HEADS, dtype=torch.float64),
        list(heads.parameters()),
        6,
    )
    outcome.loss.backward()
    assert outcome.loss == 0
    assert all((p.grad == 0).all() for p in heads.parameters())


def test_no_gradient_is_made_where_none_is_wanted(tiny_llama: PreTrainedModel) -> None:
    heads = heads_of(tiny_llama)
    hidden, tokens, weights = problem(tiny_llama)
    with torch.no_grad():
        outcome = chunked_loss(
            lambda rows, _: heads(rows), hidden, TokenLabels(tokens), weights, list(heads.parameters()), 6
        )
    assert not outcome.loss.requires_grad


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations make, while they live."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        import weakref

        out = func(*args, **(kwargs or {}))
        given = {id(t.untyped_storage()) for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)}
        for tensor in tree_flatten(out)[0]:
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key = storage.data_ptr()
                if id(storage) in given or key in self._seen or not key:
                    continue
                size = storage.nbytes()
                self._seen.add(key)
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._freed, key, size)
        return out

    def _freed(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def test_memory_stays_far_below_the_logits_of_all_positions() -> None:
    vocab_size, length, num_heads, width = 128_000, 2048, 5, 4
    projection = nn.Linear(width, vocab_size, bias=False).requires_grad_(False)
    moves = nn.Parameter(torch.randn(num_heads, width, width) * 0.1)
    hidden, tokens = torch.randn(64, width), torch.randint(vocab_size, (64, num_heads))

    def logits_of(rows: Tensor, _: Tensor) -> Tensor:
        return projection(torch.einsum("ch,khd->ckd", rows, moves))

    chunk = rows_per_chunk(num_heads, vocab_size)
    with LiveBytes() as memory:  # 64 of the 2,048 rows: what one chunk leaves behind, every later one would
        outcome = chunked_loss(logits_of, hidden, TokenLabels(tokens), torch.ones(64, num_heads), [moves], chunk)
        outcome.loss.backward()
    everything = vocab_size * length * num_heads * 4
    assert memory.now < 2**20, "something of the chunks is kept"
    assert memory.peak < everything / 40, f"{memory.peak:,} bytes of {everything:,}"
