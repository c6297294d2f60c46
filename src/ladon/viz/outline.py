"""A fixed tree as one line of text."""

from __future__ import annotations

from ladon.trees.fixed_tree import FixedTree, RankPath


def outline(tree: FixedTree) -> str:
    """The ranks below the root, each with its children in brackets; leaves that follow each other are a range.

    `0(0(0) 1) 1(0) 2-4` is: the best candidate of head 1, after it the best two of head 2, after the first of those
    the best of head 3; the second of head 1 with the best of head 2; and the third to fifth of head 1.
    """
    children: dict[RankPath, list[int]] = {}
    for path in tree.paths:
        children.setdefault(path[:-1], []).append(path[-1])

    def below(path: RankPath) -> str:
        parts: list[str] = []
        run: list[int] = []  # leaves in a row that are not written yet
        for rank in sorted(children.get(path, [])):
            is_leaf = (*path, rank) not in children
            if run and not (is_leaf and rank == run[-1] + 1):
                parts.append(_range(run))
                run = []
            if is_leaf:
                run.append(rank)
            else:
                parts.append(f"{rank}({below((*path, rank))})")
        return " ".join([*parts, _range(run)] if run else parts)

    return below(())


def _range(run: list[int]) -> str:
    return str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}"
