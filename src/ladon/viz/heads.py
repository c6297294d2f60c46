"""What is known of heads, as `ladon inspect` shows it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from rich import box
from rich.console import RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ladon.heads.card import history_rows, in_bytes, number, share, shown_base
from ladon.trees.fixed_tree import FixedTree, TreeSize, best_fixed_tree
from ladon.viz.fixed_tree import fixed_view, path_values

_TOP = 5


def parts(about: Mapping[str, Any]) -> Iterator[RenderableType]:
    """What `ladon.heads.description.describe` found, and the `tree` of `tree_facts`, part by part."""
    rates: Any = ()
    if about["kind"] == "model":
        yield _facts(about["path"], _model_facts(about))
    elif about["kind"] != "tree":
        yield _facts(about["path"], _heads_facts(about))
        yield from _training(about["training"])
        yield from _calibration(about["calibration"])
        rates = (about["calibration"] or {}).get("hit_rates", ())
    if about["tree"] is not None:
        yield from _tree(about["tree"], rates)


def tree_facts(shape: FixedTree | TreeSize | None, rates: Any, nodes: int) -> dict[str, Any] | None:
    """The tree to draw: the one that is given, or the best of so many nodes for the hit rates; None if neither is."""
    is_best = shape is None
    if shape is None:
        if not rates:
            return None
        shape = best_fixed_tree(rates, nodes)
    if not isinstance(shape, FixedTree):
        return {"budget": shape.budget, "num_candidates": shape.num_candidates, "depth": shape.depth, "paths": None}
    expected = round(1 + sum(path_values(shape, rates).values()), 4) if rates else None
    paths = [list(path) for path in shape.paths]
    sizes = {"budget": shape.num_nodes, "depth": shape.max_depth}
    return {**sizes, "is_best": is_best, "expected_tokens": expected, "paths": paths}


def _facts(title: str, facts: Iterable[tuple[str, str]]) -> RenderableType:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts:
        table.add_row(name, Text(value))
    return Padding(table, (0, 0, 1, 0))


def _model_facts(about: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    yield "what", f"a model without heads ({about['architecture']})"
    sizes = [f"{about[n]:,} {word}" for n, word in (("layers", "layers"), ("vocab_size", "tokens")) if about[n]]
    if about["hidden_size"]:
        sizes.insert(1, f"width {about['hidden_size']:,}")
    yield "sizes", ", ".join(sizes) or "not told"
    dtype = f" in {about['dtype']}" if about["dtype"] else ""
    yield "memory", f"{about['parameters']:,} parameters, {in_bytes(about['bytes'])}{dtype}"
    yield "next", "`ladon train` makes heads for it"


def _heads_facts(about: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    chosen = ", ".join(f"{name} {value}" for name, value in about["options"].items())
    beside = ", with their model beside them" if about["kind"] == "model with heads" else ""
    yield "what", f"{about['num_heads']} heads, {about['format']} format{beside}"
    conditioned = "; each reads the tokens before its own" if about["is_conditioned"] else ""
    yield "family", about["family"] + (f" ({chosen})" if chosen else "") + conditioned
    known = (
        f", {about['draft_vocab_size']:,} of them guessed" if about["draft_vocab_size"] < about["vocab_size"] else ""
    )
    yield "sizes", f"width {about['hidden_size']:,}, {about['vocab_size']:,} tokens{known}"
    mark = "" if about["base"]["has_fingerprint"] else " (no fingerprint of it)"
    yield "made for", (shown_base(about["base"]["name"]) or "a model that is not named") + mark
    yield "memory", _size(about["memory"])
    if about["early_exit"] is not None:
        early = about["early_exit"]
        yield "early exit", f"after layer {early['layer']} of {early['num_layers']}; {_size(early)}"
    if about["model"] is not None:
        yield from _model_comparison(about["model"], about)
    if about["training"] is None:
        yield "training", "nothing is recorded"
    if about["calibration"] is None:
        yield "calibration", "none; `ladon calibrate` measures hit rates and temperatures"


def _model_comparison(model: Mapping[str, Any], about: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    name = shown_base(model["name"]) or "this model"
    sizes = f"width {model['hidden_size']:,}, {model['vocab_size']:,} tokens"
    if model["fits"] is False and model["agreement"] is None:
        yield "fits", f"no: {name} has {sizes}"
        return
    shares = model["agreement"] or {}
    agreed = ", ".join(f"{group} {'unread' if s is None else f'{s:.0%}'}" for group, s in shares.items())
    verdict = {True: "yes", False: "no, another model's", None: "the sizes do; more cannot be told"}[model["fits"]]
    yield "fits", f"{verdict}: {name}" + (f" (weights that agree: {agreed})" if agreed else "")
    of_step = f"{model['draft_bytes'] / model['step_bytes']:.0%}"
    yield "in its dtype", f"{in_bytes(model['heads_bytes'])} in {model['dtype']}"
    with_projection = ", the shared projection included" if model["uses_projection"] else ""
    yield (
        "a draft reads",
        (f"{in_bytes(model['draft_bytes'])}{with_projection}: {of_step} of a step's {in_bytes(model['step_bytes'])}"),
    )


def _size(memory: Mapping[str, Any]) -> str:
    return f"{memory['parameters']:,} parameters, {in_bytes(memory['bytes'])} in {memory['dtype']}"


def _training(training: Mapping[str, Any] | None) -> Iterable[RenderableType]:
    if training is None:
        return
    settings = training["settings"]
    counts = [f"{training['rows']:,} rows"] if isinstance(training.get("rows"), int) else []
    updates = settings.get("updates", settings.get("steps"))
    if isinstance(updates, int):
        counts.append(f"{updates:,} updates")
    counts += [f"{training[n]} {n.replace('_', ' ')}" for n in ("skipped_rows", "skipped_steps") if training.get(n)]
    title = "Training" + (f": {', '.join(counts)}" if counts else "")
    if not training["history"]:
        yield Padding(Text(title, "bold"), (0, 0, 1, 0))
        return
    last = training["history"][-1]
    table = _table(f"{title}; top-1 on held-out rows")
    columns = ["after", *(f"head {k}" for k in range(1, len(last["accuracy"]) + 1))]
    has_lengths = "tree_length" in last
    for name in columns + (["chain", f"tree of {last.get('budget', '?')}"] if has_lengths else []):
        table.add_column(name, justify="left" if name == "after" else "right")
    for row in history_rows(training["history"]):
        table.add_row(*(row if has_lengths else row[:-2]))
    yield table
    if has_lengths:
        yield Text(" chain, tree: tokens per step to expect; 1 is plain decoding\n", "dim")


def _calibration(found: Mapping[str, Any] | None) -> Iterable[RenderableType]:
    if found is None:
        return
    about = found["measured_on"]
    counts = [f"{about[name]:,} {name}" for name in ("answers", "positions") if isinstance(about.get(name), int)]
    table = _table("Calibration" + (f": {', '.join(counts)}" if counts else ""))
    for name in ("head", "temperature", "right: best", f"best {_TOP}", "error before", "after"):
        table.add_column(name, justify="right")
    rates, errors = found["marginal_hit_rates"] or found["hit_rates"], found["error"]
    for depth, temperature in enumerate(found["temperatures"]):
        row = rates[depth]
        changes = [errors[when]["all"][depth] if when in errors else None for when in ("before", "after")]
        top = [share(row[0]), share(sum(row[:_TOP]))] if row else ["-", "-"]
        table.add_row(str(depth + 1), f"{temperature:.3f}", *top, *map(share, changes))
    yield table
    lines = []
    best = max(found["simulated"], key=lambda entry: entry["acceptance_length"] or 0.0, default=None)
    if best is not None:
        lines.append(
            f"tokens per step: {number(best['acceptance_length'])} with a {best['tree']} tree of {best['nodes']} nodes"
        )
    times = found["step_times"]
    if "projected" in times:
        budget, measured = times["projected"]["best_budget"], times["measured"][0]
        place = measured["nodes"].index(budget)
        speedup = times["projected"]["speedup"][place]
        lines.append(
            f"step times: {measured['ms'][0]:.2f} ms plain, {measured['ms'][place]:.2f} ms with {budget} nodes: "
            f"{number(speedup)}x projected on {times['place'].get('cpu') or 'that machine'}"
        )
    yield Padding(Text("\n".join(lines)), (0, 0, 1, 1))


def _tree(tree: Mapping[str, Any], rates: Any) -> Iterable[RenderableType]:
    if tree["paths"] is None:
        yield Text(
            f"A tree grown anew at each step: {tree['budget']} nodes, {tree['num_candidates']} candidates per node, "
            f"{tree['depth']} deep at most"
        )
        return
    title = f"{'Best fixed tree' if tree['is_best'] else 'Fixed tree'}: {tree['budget']} nodes, {tree['depth']} deep"
    if tree["expected_tokens"] is not None:
        title += f", {tree['expected_tokens']:.2f} tokens per step expected"
    yield Text(title, "bold")
    in_steps = ", and in how many steps it is right" if rates else ""
    yield Text(f"each number is a candidate's rank, 0 the best{in_steps}", "dim")
    yield fixed_view(FixedTree(tuple(tuple(path) for path in tree["paths"])), rates)


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
