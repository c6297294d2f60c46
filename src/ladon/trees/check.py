"""Whether a tree is one: what a drafter of the user's has made is looked at before the target runs on it."""

from __future__ import annotations

import math
from itertools import islice

import torch
from torch import Tensor

from ladon.errors import TreeError
from ladon.trees.token_tree import TokenTree
from ladon.trees.transfer import host_values, to_host

_DTYPES = {"tokens": torch.int64, "parents": torch.int64, "log_probs": torch.float32}


def check_form(tree: object, root: Tensor, max_nodes: int) -> TokenTree:
    """What can be told without reading the device: types, shapes, devices, sizes.

    Args:
        tree: what was drafted.
        root: the token that each tree must begin with, [B] int64.
        max_nodes: nodes that each may have, root included.

    Returns:
        The tree.

    Raises:
        TreeError: it is none in this respect.
    """
    if not isinstance(tree, TokenTree):
        raise TreeError(f"it is a {type(tree).__name__}; give a ladon.TokenTree")
    for name, dtype in _DTYPES.items():
        values = getattr(tree, name)
        if not isinstance(values, Tensor):
            raise TreeError(f"{name} is a {type(values).__name__}; give a tensor")
        if values.ndim != 2 or len(values) != len(root) or values.shape[1] == 0 or values.shape != tree.tokens.shape:
            raise TreeError(
                f"{name} has shape {list(values.shape)}, there are {len(root)} sequences; give [B, N] = "
                f"[{len(root)}, number of nodes], the same for tokens, parents and log_probs"
            )
        if values.dtype != dtype or values.device != root.device:
            raise TreeError(f"{name} is {values.dtype} on {values.device}; give {dtype} on {root.device}")
    if tree.num_nodes > max_nodes:
        raise TreeError(
            f"it has {tree.num_nodes} nodes per sequence, root included, but max_nodes is {max_nodes}; "
            "tree.prefix(max_nodes) has the first ones"
        )
    if isinstance(tree.max_depth, bool) or not isinstance(tree.max_depth, int) or tree.max_depth < 0:
        raise TreeError(f"max_depth is {tree.max_depth!r}; give an int, 0 or more")
    return tree


def check_tree(
    tree: TokenTree, root: Tensor | None = None, vocab_size: int | None = None, *, is_chain: bool = False
) -> None:
    """Raise `TreeError` at the first node that breaks the definition. Reads the device once.

    Args:
        tree: of the form that `check_form` asks for.
        root: the token that each tree must begin with, [B] int64; None: any.
        vocab_size: tokens must be below it; None: they may be any.
        is_chain: whether it must not branch.
    """
    bits = tree.log_probs.float().contiguous().view(torch.int32).long()  # not every device has float64
    roots = tree.tokens[:, :1] if root is None else root[:, None]
    table = to_host(torch.cat([roots, tree.tokens, tree.parents, bits], dim=1))
    for place, (first, *values) in enumerate(table):
        numbers = iter(values)
        tokens, parents, logs = (list(islice(numbers, tree.num_nodes)) for _ in range(3))
        log_probs = host_values(torch.tensor(logs, dtype=torch.int32, device="cpu").view(torch.float32))
        problem = _root_problem(tokens[0], parents[0], log_probs[0], first)
        if problem is not None:
            raise TreeError(f"sequence {place}: {problem}")
        problem = _Nodes(tokens, parents, log_probs, tree.max_depth).problem(vocab_size, is_chain=is_chain)
        if problem is not None:
            raise TreeError(f"sequence {place}, {problem}")


def _root_problem(token: int, parent: int, log_prob: float, root: int) -> str | None:
    if parent != -1:
        return f"node 0 has parent {parent}, but the root's parent must be -1"
    if token != root:
        return f"node 0 has token {token}, but the root that was given is {root}"
    if log_prob != 0.0:
        return f"node 0 has log-probability {log_prob:g}, but the root's must be 0"
    return None


class _Nodes:
    """A sequence's tree on the host, slot by slot; padding is all that has log-probability -inf."""

    def __init__(self, tokens: list[int], parents: list[int], log_probs: list[float], max_depth: int) -> None:
        self._tokens, self._parents, self._log_probs, self._max_depth = tokens, parents, log_probs, max_depth
        self._depths = [0]
        self._children: dict[tuple[int, int], int] = {}  # by parent and token

    def problem(self, vocab_size: int | None, *, is_chain: bool) -> str | None:
        """What is wrong with the first node that breaks the definition; None if none does."""
        for node in range(1, len(self._tokens)):
            found = self._token_problem(node, vocab_size) or self._place_problem(node, is_chain=is_chain)
            if found is not None:
                return f"node {node} {found}"
        return None

    def _token_problem(self, node: int, vocab_size: int | None) -> str | None:
        token = self._tokens[node]
        if vocab_size is None or 0 <= token < vocab_size:
            return None
        return f"has token {token}, but the vocabulary has 0 to {vocab_size - 1} (padding too)"

    def _place_problem(self, node: int, *, is_chain: bool) -> str | None:
        parent, log_prob = self._parents[node], self._log_probs[node]
        if not 0 <= parent < node:
            return (
                f"has parent {parent}, but a parent must come before its child (0 to {node - 1}). Sort the nodes by "
                "depth"
            )
        self._depths.append(self._depths[parent] + 1)
        if log_prob == -math.inf:
            return None
        if math.isnan(log_prob):
            return "has log-probability NaN; give a number, 0 at most"
        if log_prob > self._log_probs[parent]:
            return (
                f"has log-probability {log_prob:g}, above its parent's {self._log_probs[parent]:g}; a longer path can "
                "only be less likely"
            )
        if self._depths[node] > self._max_depth:
            return f"is at depth {self._depths[node]}, but max_depth is {self._max_depth}; give the greatest depth"
        if is_chain and parent != node - 1:
            return f"has parent {parent}, not {node - 1}: it branches, but only chains may be drafted here"
        twin = self._children.setdefault((parent, self._tokens[node]), node)
        if twin != node:
            return f"has token {self._tokens[node]} as its sibling {twin} does; siblings must differ"
        return None
