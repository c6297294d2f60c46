"""Optimizers of `ladon train`: who takes Muon's steps, that stacks take those of their matrices, exact resuming."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel

from ladon import new_heads
from ladon.errors import InputError
from ladon.train.optimizer import make_optimizer, orthogonal

RATE = 0.02


class Small(nn.Module):
    """A stack of matrices, a stack of biases, a projection to a vocabulary of 11, an embedding, a vector, a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.up_weight = nn.Parameter(torch.randn(2, 3, 6, 4))
        self.up_bias = nn.Parameter(torch.randn(3, 6))
        self.out_weight = nn.Parameter(torch.randn(3, 11, 4))
        self.embed_tokens = nn.Embedding(11, 4)
        self.scale = nn.Parameter(torch.randn(4))
        self.matrix = nn.Parameter(torch.randn(4, 5))

    def losing(self) -> torch.Tensor:
        """Some loss that every parameter changes."""
        return torch.stack([(p - 0.5).pow(2).sum() + p.sum().sin() for p in self.parameters()]).sum()


def groups_of(module: nn.Module, rate: float = RATE) -> list[dict[str, Any]]:
    named = dict(module.named_parameters())
    return [{"params": list(named.values()), "names": list(named), "lr": rate, "name": "heads"}]


def names_in(module: nn.Module, group: dict[str, Any]) -> set[str]:
    return {name for name, p in module.named_parameters() if any(p is q for q in group["params"])}


def test_matrices_take_muon_and_the_rest_a_fifth_of_the_rate() -> None:
    module = Small()
    optimizer = make_optimizer(groups_of(module), "muon", 0.1, vocab_size=11)
    stacks, rest = optimizer.param_groups
    assert names_in(module, stacks) == {"up_weight", "matrix"}
    assert names_in(module, rest) == {"up_bias", "out_weight", "embed_tokens.weight", "scale"}
    assert (stacks["lr"], stacks["weight_decay"], stacks["name"]) == (RATE, 0.1, "heads")
    assert (rest["lr"], rest["weight_decay"], rest["name"]) == (pytest.approx(0.2 * RATE), 0.0, "heads")


def test_adamw_decays_matrices_alone() -> None:
    module = Small()
    optimizer = make_optimizer(groups_of(module), "adamw", 0.1, vocab_size=11)
    assert isinstance(optimizer, torch.optim.AdamW)
    matrices, rest = optimizer.param_groups
    assert names_in(module, matrices) == {"up_weight", "out_weight", "matrix"}
    assert (matrices["lr"], rest["lr"], matrices["weight_decay"], rest["weight_decay"]) == (RATE, RATE, 0.1, 0.0)


@pytest.mark.parametrize("family", ["shared", "medusa", "lowrank"])
def test_stacks_of_biases_and_gates_are_no_matrices(family: str, tiny_llama: PreTrainedModel) -> None:
    options = {"markov_rank": 2, "markov_gate": 1} | ({"rank": 8} if family == "lowrank" else {})
    heads = new_heads(tiny_llama, num_heads=3, family=family, **options)
    optimizer = make_optimizer(groups_of(heads), "muon", vocab_size=heads.vocab_size)
    for group in optimizer.param_groups:
        for name in names_in(heads, group):
            is_matrix = not any(part in name for part in ("bias", "correction", "projection", "out_weight"))
            assert group["is_stack"] == is_matrix, name
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(heads.parameters()))


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch before 2.9 has no Muon to compare with")
@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
def test_a_stack_moves_as_its_matrices_do_under_torchs_muon(shape: tuple[int, int]) -> None:
    stack = nn.Parameter(torch.randn(2, 3, *shape))
    parts = [nn.Parameter(matrix.clone()) for matrix in stack.detach().flatten(0, 1)]
    ours = make_optimizer([{"params": [stack], "lr": RATE, "name": "heads"}], "muon", 0.1)
    theirs = torch.optim.Muon(parts, lr=RATE, weight_decay=0.1)
    for _ in range(4):
        stack.grad = torch.randn_like(stack)
        for part, gradient in zip(parts, stack.grad.flatten(0, 1), strict=True):
            part.grad = gradient.clone()
        ours.step()
        theirs.step()
        # Both iterate in bfloat16; sums in another order differ in its last bit.
        torch.testing.assert_close(stack.detach().flatten(0, 1), torch.stack(parts).detach(), atol=RATE / 50, rtol=0)


def test_the_rest_moves_as_under_torchs_adamw() -> None:
    module, other = Small(), Small()
    other.load_state_dict(module.state_dict())
    ours = make_optimizer(groups_of(module), "muon", vocab_size=11)
    theirs = torch.optim.AdamW(other.parameters(), lr=0.2 * RATE, betas=(0.9, 0.95), weight_decay=0.0)
    for _ in range(3):
        for mine, yours in zip(module.parameters(), other.parameters(), strict=True):
            mine.grad = torch.randn_like(mine)
            yours.grad = mine.grad.clone()
        ours.step()
        theirs.step()
    for name in ("up_bias", "out_weight", "embed_tokens.weight", "scale"):
        torch.testing.assert_close(module.get_parameter(name), other.get_parameter(name))
    assert not torch.allclose(module.matrix, other.matrix)


def test_orthogonal_brings_singular_values_near_one() -> None:
    stack = torch.randn(2, 3, 8, 32) @ torch.diag(torch.logspace(-1, 1, 32))
    values = torch.linalg.svdvals(orthogonal(stack).float())
    assert values.min() > 0.5 and values.max() < 1.3


def train(module: Small, optimizer: torch.optim.Optimizer, scheduler: LambdaLR, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        module.losing().backward()
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_resumed_equals_uninterrupted_bit_for_bit(kind: str, tmp_path: Any) -> None:
    def begin(module: Small) -> tuple[torch.optim.Optimizer, LambdaLR]:
        optimizer = make_optimizer(groups_of(module), kind, 0.01, vocab_size=11)
        return optimizer, LambdaLR(optimizer, lambda step: 1.0 / (1 + step))

    whole, first = Small(), Small()
    first.load_state_dict(whole.state_dict())
    train(whole, *begin(whole), steps=7)

    optimizer, scheduler = begin(first)
    train(first, optimizer, scheduler, steps=3)
    torch.save([first.state_dict(), optimizer.state_dict(), scheduler.state_dict()], tmp_path / "state.pt")
    weights, optimizer_state, scheduler_state = torch.load(tmp_path / "state.pt", weights_only=True)

    second = Small()
    second.load_state_dict(weights)
    optimizer, scheduler = begin(second)
    optimizer.load_state_dict(optimizer_state)
    scheduler.load_state_dict(scheduler_state)
    assert optimizer.param_groups[0]["lr"] == RATE / 4  # the schedule's, live
    train(second, optimizer, scheduler, steps=4)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_parameters_without_gradients_stay(kind: str) -> None:
    module = Small()
    before = copy.deepcopy(module.state_dict())
    optimizer = make_optimizer(groups_of(module), kind, 0.5, vocab_size=11)
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    (module.matrix.sum() + module.scale.sum()).backward()
    optimizer.step()
    moved = {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"matrix", "scale"}


def test_groups_keep_their_names_and_rates() -> None:
    heads, model = Small(), Small()
    groups = [*groups_of(heads), groups_of(model, 1e-3)[0] | {"name": "model"}]
    optimizer = make_optimizer(groups, "muon", vocab_size=11)
    assert [(group["name"], group["lr"]) for group in optimizer.param_groups] == [
        ("heads", RATE),
        ("heads", pytest.approx(0.2 * RATE)),
        ("model", 1e-3),
        ("model", pytest.approx(2e-4)),
    ]


def test_what_cannot_be_optimised_is_said() -> None:
    with pytest.raises(InputError, match="give adamw or muon"):
        make_optimizer(groups_of(Small()), "sgd")
    with pytest.raises(InputError, match="no parameter to train"):
        make_optimizer([{"params": [], "lr": 0.1, "name": "heads"}], "muon")
