"""Lossy acceptance: drafted tokens are kept because they are likely enough, not because the target drew them.

Steps get longer and the text no longer follows the target's law: not exact, never the default, asked for by name. What
is drawn still follows the law: the token after the last one accepted, and the first of an answer. A row from which
nothing is drawn has a point mass as its law, so that its likeliest token is the only one that is likely enough: there
every rule is the exact one.

Shapes: b rows, N nodes, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ladon.config import ACCEPT
from ladon.errors import InputError
from ladon.trees.token_tree import TokenTree


class Rule(Protocol):
    """Which nodes are likely enough."""

    def admits(self, law: Tensor, own: Tensor, tree: TokenTree) -> Tensor:
        """Whether each node is, [b, N] bool, given that its parent is kept; the root's own entry is not read.

        Args:
            law: log-probabilities after each node, [b, N, V].
            own: of each node's token after its parent, [b, N].
            tree: the nodes.
        """


@dataclass(frozen=True, kw_only=True, slots=True)
class Typical:
    """MEDUSA's typical acceptance (arXiv 2401.10774): the less certain the target is, the less a token needs.

    A node is kept if its probability after its parent exceeds min(epsilon, delta * exp(-entropy)) there; the entropy is
    in nats.

    Attributes:
        epsilon: a probability; more than this is always enough.
        delta: 0 or more.
    """

    epsilon: float = 0.09
    delta: float = 0.3

    def __post_init__(self) -> None:
        """Raise `InputError` for settings out of range."""
        if not 0 <= self.epsilon <= 1:
            raise InputError(f"epsilon is {self.epsilon}; give a probability, from 0 to 1")
        if not 0 <= self.delta < math.inf:
            raise InputError(f"delta is {self.delta}; give a number, 0 or more")

    def admits(self, law: Tensor, own: Tensor, tree: TokenTree) -> Tensor:
        """See `Rule`."""
        entropy = torch.special.entr(law.exp()).sum(-1)
        least = (self.delta * (-entropy).exp()).clamp(max=self.epsilon)
        found: Tensor = own.exp() > least.gather(1, _parents(tree))
        return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Nucleus:
    """A node is kept if it is in its parent's top-p set: if the likelier tokens there have less than `top_p` together.

    Attributes:
        top_p: a probability above 0.
    """

    top_p: float = 0.8

    def __post_init__(self) -> None:
        """Raise `InputError` for a probability that is none."""
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}; give a probability above 0, at most 1")

    def admits(self, law: Tensor, own: Tensor, tree: TokenTree) -> Tensor:
        """See `Rule`. Of equally likely tokens the one with the smaller id comes first, as in top-p sampling."""
        rows = torch.arange(len(law), device=law.device)[:, None]
        others, own = law[rows, _parents(tree)], own[:, :, None]
        earlier = torch.arange(law.shape[-1], device=law.device) < tree.tokens[:, :, None]
        before = (others > own) | ((others == own) & earlier)
        return (others.exp() * before).sum(-1) < self.top_p


class Admitted(NamedTuple):
    """What a rule says of the nodes.

    Attributes:
        nodes: which are kept if their parents are, [b, N] bool; the root's own entry means nothing.
        log_probs: of each node's token after its parent, by the row's law, [b, N]; 0 where nothing is drawn.
    """

    nodes: Tensor
    log_probs: Tensor


def admitted(rule: Rule, scores: Tensor, tree: TokenTree) -> Admitted:
    """The nodes of rows that draw from the softmax of `scores` [b, N, V]; never one that the law excludes."""
    law = scores.log_softmax(-1)
    is_known = tree.tokens < law.shape[-1]  # a prompt may hold tokens that the model never says
    own = law.flatten(1).gather(1, _parents(tree) * law.shape[-1] + tree.tokens.clamp(max=law.shape[-1] - 1))
    own = own.masked_fill(~is_known, -torch.inf)
    return Admitted(rule.admits(law, own, tree) & (own > -torch.inf), own)


def admitted_by_picks(tree: TokenTree, picks: Tensor) -> Admitted:
    """The nodes of rows that draw nothing: those that the target picks after their parents, by `picks` [b, N]."""
    said = picks.gather(1, _parents(tree))
    return Admitted(said == tree.tokens, torch.zeros_like(tree.log_probs))


def rule_of(accept: str | Typical | Nucleus) -> Typical | Nucleus | None:
    """The rule that an option names, or is; None for exact acceptance."""
    if isinstance(accept, Typical | Nucleus):
        return accept
    if not isinstance(accept, str) or accept not in ACCEPT:
        names = ", ".join(f'"{name}"' for name in ACCEPT)
        raise InputError(f"accept is {accept!r}; give {names}, or a ladon.Typical or ladon.Nucleus with settings")
    return {"exact": None, "typical": Typical(), "nucleus": Nucleus()}[accept]


def parsed_rule(text: str) -> Typical | Nucleus | None:
    """The rule in a text such as "typical" or "typical:epsilon=0.2,delta=0.5"; None for exact acceptance.

    Raises:
        InputError: an unknown rule or setting, or one that is no number or out of range.
    """
    name, _, settings = text.partition(":")
    rule = rule_of(name)
    given: dict[str, Any] = {}
    known = [] if rule is None else [field.name for field in fields(rule)]
    for part in settings.split(",") if settings else []:
        setting, _, value = part.partition("=")
        if setting not in known:
            allowed = f"it has {', '.join(known)}" if known else "it has none"
            raise InputError(f"accept is {text!r}, but {name} has no setting {setting!r}; {allowed}")
        try:
            given[setting] = float(value)
        except ValueError:
            raise InputError(f"accept is {text!r}, and {value!r} is no number; give {setting}=NUMBER") from None
    return None if rule is None else replace(rule, **given)


def _parents(tree: TokenTree) -> Tensor:
    """Each node's parent, [b, N]; the root's is the root."""
    return tree.parents.clamp(min=0)
