"""Optimizers for heads: AdamW, or Muon for stacks of matrices with AdamW beside it for the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torch.optim.adamw import adamw

from ladon.errors import InputError

VECTOR_RATIO = 0.2  # learning rate of what is no matrix over that of the matrices, under Muon
MOMENTUM = 0.95
VECTOR_BETAS = (0.9, 0.95)
EPSILON = 1e-8
# Muon as its author gives it, and as `torch.optim.Muon` has it: https://kellerjordan.github.io/posts/muon
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
NORM_EPSILON = 1e-7
_NO_MATRICES = ("bias", "embed", "norm", "conv", "correction.gate")


def make_optimizer(
    groups: Sequence[Mapping[str, Any]], kind: str, weight_decay: float = 0.0, *, vocab_size: int = 0
) -> Optimizer:
    """One optimizer over groups of parameters, each with a learning rate of its own.

    A given group becomes up to two groups of the optimizer, which both keep its "name": its matrices, and the rest
    (vectors, stacks of biases, embeddings and norms), which is never decayed. Under "muon" the matrices take Muon's
    steps at the group's learning rate, apart from projections to the vocabulary; the rest takes AdamW's at
    `VECTOR_RATIO` times it. Groups that would be empty are left out.

    Args:
        groups: each {"params": parameters, "names": their names, "lr": float, "name": str}. Names tell a stack of
            biases [K, F] from a matrix; without them everything of two dimensions or more is a matrix.
        kind: "adamw" or "muon".
        weight_decay: decoupled decay of the matrices.
        vocab_size: V, by which projections to the vocabulary are known; 0 if there are none.

    Raises:
        InputError: an unknown kind, or nothing to train.
    """
    if kind not in ("adamw", "muon"):
        raise InputError(f"optimizer is {kind!r}; give adamw or muon")
    is_muon = kind == "muon"
    split = []
    for group in groups:
        parameters = list(group["params"])
        parts: dict[bool, list[Tensor]] = {True: [], False: []}
        for parameter, name in zip(parameters, group.get("names", [""] * len(parameters)), strict=True):
            is_matrix = _is_matrix(name, parameter) and not (is_muon and vocab_size in parameter.shape[-2:])
            parts[is_matrix].append(parameter)
        rest_rate, name = group["lr"] * (VECTOR_RATIO if is_muon else 1.0), group.get("name", "")
        split += [
            {"params": parts[True], "lr": group["lr"], "weight_decay": weight_decay, "is_stack": True, "name": name},
            {"params": parts[False], "lr": rest_rate, "weight_decay": 0.0, "is_stack": False, "name": name},
        ]
    split = [part for part in split if part["params"]]
    if not split:
        raise InputError("there is no parameter to train; give heads whose parameters require gradients")
    return StackedMuon(split) if is_muon else AdamW(split)


class StackedMuon(Optimizer):
    """Muon for groups whose "is_stack" is true, all matrices of a stack [..., rows, columns] at once; AdamW for others.

    Muon moves a matrix by its momentum with all singular values brought near 1. Weight decay is decoupled in both.
    """

    def __init__(self, groups: Iterable[dict[str, Any]]) -> None:
        super().__init__(groups, {"lr": 1e-3, "weight_decay": 0.0, "is_stack": False})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if group["is_stack"]:
                for parameter in parameters:
                    self._step_stack(parameter, group["lr"], group["weight_decay"])
            else:
                self._step_vectors(parameters, group["lr"], group["weight_decay"])
        return loss

    def _step_stack(self, parameter: Tensor, rate: float, weight_decay: float) -> None:
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None
        if not state:
            state["momentum"] = torch.zeros_like(gradient)
        momentum = state["momentum"].lerp_(gradient, 1 - MOMENTUM)
        update = orthogonal(gradient.lerp(momentum, MOMENTUM))  # Nesterov's
        rows, columns = parameter.shape[-2:]
        parameter.mul_(1 - rate * weight_decay)
        parameter.add_(update, alpha=-rate * max(1.0, rows / columns) ** 0.5)

    def _step_vectors(self, parameters: list[Tensor], rate: float, weight_decay: float) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32, device="cpu"),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
        states = [self.state[parameter] for parameter in parameters]
        adamw(
            parameters,
            [p.grad for p in parameters if p.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            amsgrad=False,
            beta1=VECTOR_BETAS[0],
            beta2=VECTOR_BETAS[1],
            lr=rate,
            weight_decay=weight_decay,
            eps=EPSILON,
            maximize=False,
        )


def orthogonal(stack: Tensor) -> Tensor:
    """Matrices [..., r, c] with their singular values brought near 1 by Newton-Schulz iterations, as bfloat16."""
    a, b, c = COEFFICIENTS
    is_tall = stack.shape[-2] > stack.shape[-1]
    matrices = stack.bfloat16().reshape(-1, *stack.shape[-2:])
    matrices = matrices.mT if is_tall else matrices
    # The spectral norm is at most the Frobenius norm.
    matrices = matrices / matrices.flatten(1).norm(dim=1).clamp(min=NORM_EPSILON)[:, None, None]
    for _ in range(ITERATIONS):
        gram = torch.bmm(matrices, matrices.mT)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        matrices = torch.baddbmm(matrices, polynomial, matrices, beta=a)
    return (matrices.mT if is_tall else matrices).reshape(stack.shape)


def _is_matrix(name: str, parameter: Tensor) -> bool:
    """Whether a parameter is a linear map or a stack of them."""
    return parameter.ndim >= 2 and min(parameter.shape[-2:]) > 1 and not any(part in name for part in _NO_MATRICES)
