"""What a row may say, whatever its law: a constraint, and where a row and the nodes of its tree stand in it.

A state is a value: the state after a token is another one. So every node of a tree can have its own, and nothing is
taken back when a branch is left. Everything here is plain host work.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Protocol

from ladon.errors import ConstraintError, InputError


class State(Protocol):
    """Where a text stands in its constraint; never changes."""

    @property
    def is_complete(self) -> bool:
        """Whether the text may end here."""

    @property
    def problem(self) -> str:
        """What went wrong, where the constraint gave up; else empty."""

    def allowed(self) -> bytes:
        """Tokens that may come next, end-of-sequence tokens aside: bit t % 8 of byte t // 8; none beyond the last."""

    def after(self, token: int) -> State:
        """The state after a token that is allowed."""


class Constraint(Protocol):
    """What texts may be; one of these serves any number of rows."""

    def start(self) -> State:
        """The state before the first token."""


class Place:
    """A state in a row, where end-of-sequence tokens have a meaning: they are allowed where the text may end.

    After such a token nothing is allowed any more.
    """

    def __init__(self, state: State, end_ids: frozenset[int], *, has_ended: bool = False) -> None:
        self._state, self._end_ids, self._has_ended = state, end_ids, has_ended

    @property
    def is_complete(self) -> bool:
        """Whether the text is one that the constraint allows, as it stands."""
        return self._state.is_complete

    @property
    def problem(self) -> str:
        """See `State.problem`."""
        return self._state.problem

    @cached_property
    def allowed(self) -> bytes:
        """Tokens that may come next, packed as in `State.allowed`."""
        if self._has_ended:
            return b""
        found = self._state.allowed()
        if not self._end_ids:
            return found
        bits = bytearray(found.ljust(max(self._end_ids) // 8 + 1, b"\0"))
        for token in self._end_ids:
            bit = 1 << token % 8
            bits[token // 8] = bits[token // 8] | bit if self.is_complete else bits[token // 8] & ~bit
        return bytes(bits)

    @cached_property
    def _number(self) -> int:
        return int.from_bytes(self.allowed, "little")

    @property
    def allows_nothing(self) -> bool:
        """Whether no token may come next."""
        return self._number == 0

    @property
    def only(self) -> int | None:
        """The token that must come next; None if there is a choice, or nothing."""
        number = self._number
        return number.bit_length() - 1 if number and number & (number - 1) == 0 else None

    def allows(self, token: int) -> bool:
        """Whether this token may come next."""
        byte, mask = token // 8, self.allowed
        return 0 <= byte < len(mask) and bool(mask[byte] >> token % 8 & 1)

    def after(self, token: int) -> Place:
        """The place after a token that is allowed."""
        ends = token in self._end_ids
        return Place(self._state if ends else self._state.after(token), self._end_ids, has_ended=ends)


class GrammarState:
    """A row's constraint, as far as the row is written, and at the nodes of its tree.

    Attributes:
        nodes: the place of each node slot of the row's tree, which may be more than are verified; the root's, which is
            that of the row, comes first.
        illegal: slots of the tree as it was drafted whose tokens were forbidden, or came after such a token.
        drafted: how many slots that tree had, padding aside, root included.
    """

    def __init__(self, constraint: Constraint, end_ids: frozenset[int] = frozenset()) -> None:
        """A row that has no token yet; `end_ids` are the end-of-sequence tokens, with which its stop rule ends it."""
        self._start = Place(constraint.start(), end_ids)
        self.nodes = [self._start]
        self.illegal: Sequence[int] = ()
        self.drafted = 1

    @property
    def here(self) -> Place:
        """After the row's tokens."""
        return self.nodes[0]

    def take(self, token: int) -> None:
        """Go on by a token of the row.

        Raises:
            ConstraintError: it is not allowed: nothing is, or the row's law leaves nothing that is.
        """
        if not self.here.allows(token):
            raise ConstraintError(_dead_end(self.here))
        self.nodes, self.illegal, self.drafted = [self.here.after(token)], (), 1

    def take_anew(self, tokens: Sequence[int]) -> None:
        """Go on from the start by these tokens, which it has taken before."""
        self.nodes = [self._start]
        for token in tokens:
            self.take(token)

    def is_over(self) -> bool:
        """Whether the text is complete and nothing can come any more, not even an end-of-sequence token.

        Raises:
            ConstraintError: nothing can come, and the text is not complete.
        """
        if not self.here.allows_nothing:
            return False
        if not self.here.is_complete:
            raise ConstraintError(_dead_end(self.here))
        return True

    def looked_through(self, num_nodes: int) -> tuple[int, int]:
        """Of the first so many slots as they were drafted, root aside: how many there were, how many were illegal."""
        drafts = max(min(num_nodes, self.drafted) - 1, 0)
        return drafts, sum(slot < num_nodes for slot in self.illegal)


def _dead_end(place: Place) -> str:
    if place.problem:
        return f"the constraint gave up: {place.problem}. Simplify it"
    if place.allows_nothing:
        return (
            "the constraint allows no token here, and the text may not end here either; the tokens so far are kept. "
            "Change the grammar so that every beginning it allows can be finished"
        )
    return (
        "no token that the constraint allows is left by the other options, such as min_new_tokens, suppress_tokens or "
        "bad_words_ids; the tokens so far are kept. Leave those options out"
    )


def row_constraints(
    constraint: Constraint | Sequence[Constraint | None] | None, num_rows: int
) -> list[Constraint | None]:
    """The constraints of a call's rows: one for all, or one (or None) for each.

    Raises:
        InputError: something else, or not one for each row.
    """
    found: list[Any] = list(constraint) if isinstance(constraint, Sequence) else [constraint] * num_rows
    wrong = [type(one).__name__ for one in found if one is not None and not hasattr(one, "start")]
    if wrong or isinstance(constraint, str):
        kind = "str" if isinstance(constraint, str) else wrong[0]
        raise InputError(f"constraint is {kind}; make one with ladon.json_schema, ladon.regex or ladon.grammar")
    if len(found) != num_rows:
        raise InputError(f"there are {len(found)} constraints for {num_rows} rows; give one, or one for each row")
    return found
