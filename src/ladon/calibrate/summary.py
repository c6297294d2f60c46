"""A calibration for people."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from ladon.calibrate.simulate import NOT_SIMULATED
from ladon.config import HIDDEN, PATHS
from ladon.heads.calibration import Calibration
from ladon.trees.fixed_tree import FixedTree
from ladon.viz.fixed_tree import outline

_RANKS = 5
_WAYS = 3  # to prune, shown per batch size


def summary(calibration: Calibration) -> Iterable[RenderableType]:
    """Tables and lines: depths, trees, simulated runs and step times, as far as the calibration has them."""
    yield _depths(calibration)
    if calibration.error:
        yield Text(
            "calibration error: on the prompts left out of the fit, without → with temperatures; 0 % is truthful", "dim"
        )
    for size, paths in calibration.fixed_trees.items():
        tree = FixedTree(tuple(tuple(path) for path in paths))
        yield Text.assemble((f"best fixed tree of {size} nodes  ", "bold"), outline(tree))
    if calibration.simulated:
        yield _acceptance(calibration.simulated)
    if calibration.prefixes:
        yield _prefixes(calibration.prefixes)
        yield Text(
            "known: the answer goes on; oracle: its tokens are in the lattice (else: coverage); selected: in the tree "
            "(else: ranking); top-1: they are the best candidates, the chain",
            "dim",
        )
        if any(calibration.prefixes["leaf_mass"]):
            lost = ", ".join(f"{mass:.1%}" for mass in calibration.prefixes["leaf_mass"])
            yield Text(f"probability of candidates after which nothing is guessed, depth by depth: {lost}", "dim")
    if calibration.joint in (PATHS, HIDDEN):
        kind = "dynamic trees" if calibration.simulated else "trees"
        yield Text(f"no {kind} are simulated: {NOT_SIMULATED}", "dim")
    if calibration.step_times:
        yield from _times(calibration.step_times)
    if calibration.pruning:
        yield from _pruning(calibration.pruning)


def _table(title: str, columns: Sequence[str], left: Sequence[str] = ()) -> Table:
    """A table without rows, of numbers but for the columns named by `left`."""
    table = Table(title=title, title_justify="left")
    for name in columns:
        table.add_column(name, justify="left" if name in left else "right")
    return table


def _depths(calibration: Calibration) -> Table:
    columns = ["head", f"right, rank 1-{_RANKS}, all positions", "given the prefix is right", "temperature"]
    table = _table("Heads", [*columns, "error, best candidate", "error, all candidates"], left=columns[1:3])
    marginal = calibration.marginal_hit_rates or [[]] * len(calibration.temperatures)
    for depth, temperature in enumerate(calibration.temperatures):
        errors = [_change(calibration.error, kind, depth) for kind in ("top", "all")] if calibration.error else ["", ""]
        rates = [_shares(rows[depth]) for rows in (marginal, calibration.hit_rates)]
        table.add_row(str(depth + 1), *rates, f"{temperature:.3f}", *errors)
    return table


def _shares(rates: Sequence[float]) -> str:
    return " ".join(f"{100 * rate:4.1f}" for rate in rates[:_RANKS])


def _change(error: Mapping[str, Any], kind: str, depth: int) -> str:
    before, after = (error[when][kind][depth] for when in ("before", "after"))
    return "" if before is None else f"{before:.1%} → {after:.1%}"


def _acceptance(simulated: Sequence[Mapping[str, Any]]) -> Table:
    """One line per size: the fixed tree and the dynamic one, the latter without and with temperatures."""
    found = {(entry["tree"], entry["nodes"], entry["temperatures"]): entry for entry in simulated}
    title = "Tokens per step, simulated on the prompts left out of the fit"
    table = _table(title, ["nodes", "chain", "fixed", "dynamic", "dynamic, with temperatures"])
    columns = [("chain", False), ("fixed", False), ("dynamic", False), ("dynamic", True)]
    for nodes in sorted({entry["nodes"] for entry in simulated}):
        entries = [found.get((tree, nodes, temperatures)) for tree, temperatures in columns]
        table.add_row(str(nodes), *(_length(entry) for entry in entries))
    return table


def _length(entry: Mapping[str, Any] | None) -> str:
    return "" if entry is None or entry["acceptance_length"] is None else f"{entry['acceptance_length']:.2f}"


def _prefixes(prefixes: Mapping[str, Any]) -> Table:
    """One line per stage with what it loses against the one above: coverage, then ranking; and the chain beside it."""
    selected = sorted(prefixes["selected"].items(), key=lambda item: -int(item[0]))
    stages = [("known", prefixes["known"]), ("oracle", prefixes["oracle"])]
    stages += [(f"selected, {size} nodes", found) for size, found in selected]
    title = f"How far the truth is followed, from {prefixes['positions']} positions left out of the fit"
    depths = [f"depth {depth}" for depth in range(1, len(prefixes["known"]["shares"]) + 1)]
    table = _table(title, ["prefix", "mean", "lost", *depths], left=["prefix"])
    means = [found["mean"] for _, found in stages]
    losses = ["", *(f"{above - mean:.2f}" for above, mean in pairwise(means)), ""]
    for (name, found), lost in zip([*stages, ("top-1", prefixes["top"])], losses, strict=True):
        table.add_row(name, f"{found['mean']:.2f}", lost, *(f"{share:.1%}" for share in found["shares"]))
    return table


def _times(step_times: Mapping[str, Any]) -> Iterable[RenderableType]:
    measured, projected, place = step_times["measured"][0], step_times.get("projected"), step_times["place"]
    columns = ["nodes", "ms", "of a plain step", *(("tokens per step", "projected speed-up") if projected else ())]
    table = _table(f"A decode step at {measured['context']} tokens of context", columns)
    rows = zip(*(measured[name] for name in ("nodes", "ms", "relative")), strict=True)
    for line, (nodes, ms, relative) in enumerate(rows):
        cells, bold = [str(nodes), f"{ms:.2f}", f"{relative:.2f}x"], ""
        if projected:
            length, speedup = (projected[name][line] for name in ("acceptance_length", "speedup"))
            cells += [f"{length:.2f}", f"{speedup:.2f}x"]
            bold = "bold" if nodes == projected["best_budget"] else ""
        table.add_row(*cells, style=bold)
    yield table
    for other in step_times["measured"][1:]:
        relative = ", ".join(f"{n}: {r:.2f}x" for n, r in zip(other["nodes"], other["relative"], strict=True))
        yield Text(f"{other['batch']} rows at {other['context']} tokens: {other['ms'][0]:.2f} ms plain; {relative}")
    yield Text(
        " · ".join(f"{name} {place[name]}" for name in ("device", "cpu", "threads", "dtype") if name in place), "dim"
    )


def _pruning(pruning: Mapping[str, Any]) -> Iterable[RenderableType]:
    """Of each batch size the best few ways to prune, against the best tree that is not pruned."""
    names = ["batch", "after layer", "criterion", "nodes", "kept", "tokens per step", "score, ms", "verify, ms"]
    title = "Early pruning, against the best tree that is not pruned"
    table = _table(title, [*names, "tokens per second"], left=["criterion"])
    for measured in pruning["measured"]:
        for row in measured["pruned"][:_WAYS]:
            criterion = f"{_criterion(row)}{', trained' if row['trained'] else ''}"
            counts = [measured["batch"], row["layer"], criterion, row["nodes"], row["keep"]]
            means = [f"{row[name]:.2f}" for name in ("acceptance_length", "score_ms", "verify_ms")]
            table.add_row(*map(str, counts), *means, f"{row['gain']:.2f}x")
    yield table
    best = pruning["best"]
    if best is None:
        yield Text('early pruning does not pay enough on every batch size here: prune="auto" leaves it off', "dim")
    else:
        where = f"after layer {best['layer']}, {best['keep']} of {best['nodes']} nodes"
        yield Text(f'prune="auto": {where}, {_criterion(best)}; {best["gain"]:.2f}x at least', "dim")


def _criterion(row: Mapping[str, Any]) -> str:
    """A criterion with the setting that it has."""
    settings = {"evidence": f" {row['weight']:g}", "top-k": f" {row['top_k']}"}
    return f"{row['criterion']}{settings.get(row['criterion'], '')}"
