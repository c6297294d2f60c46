"""A drafter of the user's own, given as `proposer=`: it serves one engine at a time, and its trees are checked."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import cast
from weakref import WeakValueDictionary

from torch import Tensor

from ladon.drafting.proposer import Proposer
from ladon.errors import InputError, TreeError
from ladon.sampling.acceptance import Accepted
from ladon.trees.check import check_form, check_tree
from ladon.trees.token_tree import TokenTree, root_tree
from ladon.util.observer import SILENT, Observer

OwnDrafter = Proposer | Callable[[], Proposer]

_METHODS = ("propose", "join", "observe", "mirror", "keep")
_BUSY: WeakValueDictionary[int, OwnProposer] = WeakValueDictionary()  # who has sequences, by the id of its drafter
_LOCK = threading.Lock()


class OwnProposer(Proposer):
    """Stands between an engine and a drafter of the user's."""

    def __init__(
        self, own: OwnDrafter, vocab_size: int, *, is_chain: bool = False, observer: Observer = SILENT
    ) -> None:
        """For one engine.

        Args:
            own: the drafter, or a class or function without arguments that makes one.
            vocab_size: drafted tokens must be below it.
            is_chain: whether its trees must not branch.
            observer: is told while it drafts.

        Raises:
            InputError: methods are missing, or the drafter serves another engine.
        """
        drafter = _made(own)
        self._drafter, self._vocab_size, self._is_chain, self._observer = drafter, vocab_size, is_chain, observer
        self._name = type(drafter).__name__
        self.reads_prompts = bool(getattr(drafter, "reads_prompts", False))
        self.is_checked = bool(getattr(drafter, "is_checked", True)) or is_chain
        self._is_serving = False
        self._refuse_if_busy(_BUSY.get(id(drafter)))

    def join(self, prompts: Sequence[Tensor], hidden: Tensor, states: Sequence[Tensor] = ()) -> None:
        """Sequences join, if the drafter serves no other engine."""
        if not self._is_serving:
            with _LOCK:
                self._refuse_if_busy(_BUSY.setdefault(id(self._drafter), self))
            self._is_serving = True
            self._drafter.keep([])  # whatever it has from an engine that was dropped halfway
        self._drafter.join(prompts, hidden, states)

    def propose(self, hidden: Tensor, root: Tensor, max_nodes: int) -> TokenTree:
        """Its trees, checked; it is not asked for roots alone."""
        if max_nodes == 1:
            return root_tree(root)
        with self._observer.stage("heads"):
            tree = self._drafter.propose(hidden, root, max_nodes)
        try:
            tree = check_form(tree, root, max_nodes)
            if self.is_checked:
                check_tree(tree, root, self._vocab_size, is_chain=self._is_chain)
        except TreeError as error:
            raise TreeError(f"what {self._name}.propose has returned cannot be verified: {error}") from None
        return replace(tree, max_depth=min(tree.max_depth, tree.num_nodes - 1), depths=None)

    def observe(self, accepted: Accepted, hidden: Tensor) -> None:
        """The outcome, without the numbers that say that there is no token."""
        tokens, bonus = accepted.tokens.clamp(min=0), accepted.bonus.clamp(min=0)
        self._drafter.observe(replace(accepted, tokens=tokens, bonus=bonus), hidden)

    def mirror(self, counts: Sequence[int]) -> None:
        """The counts."""
        self._drafter.mirror(counts)

    def keep(self, rows: Sequence[int]) -> None:
        """Who stays; when nobody does, the drafter is free for another engine."""
        if not self._is_serving:
            return  # it serves another engine, or nobody
        if not rows:
            self._is_serving = False
            with _LOCK:
                _BUSY.pop(id(self._drafter), None)
        self._drafter.keep(rows)

    def _refuse_if_busy(self, owner: OwnProposer | None) -> None:
        if owner is not None and owner is not self:
            raise InputError(
                f"this {self._name} has sequences of another engine in flight, and serves one engine at a time; give "
                f"the class, proposer={self._name}, so that each engine gets its own"
            )


def check_methods(own: OwnDrafter) -> None:
    """Raise `InputError` if a drafter, or a class of them, lacks methods; what a function makes is not known yet."""
    if _is_function(own):
        return
    kind = own if isinstance(own, type) else type(own)
    missing = [name for name in _METHODS if not callable(getattr(own, name, None))]
    if getattr(kind, "propose", None) is Proposer.propose:
        missing.append("propose")
    if missing:
        raise InputError(
            f"the proposer {kind.__name__} has no {', '.join(missing)}; a class derived from ladon.Proposer needs "
            "propose alone"
        )


def _is_function(own: object) -> bool:
    return callable(own) and not isinstance(own, type) and not hasattr(own, "propose")


def _made(own: OwnDrafter) -> Proposer:
    """The drafter itself, or one that its class or a function makes."""
    check_methods(own)
    if isinstance(own, type) or _is_function(own):
        own = cast(Callable[[], Proposer], own)()
        if _is_function(own):
            raise InputError(f"what makes the proposer has returned a {type(own).__name__}, which has no propose")
        check_methods(own)
    return cast(Proposer, own)
