"""The model card: a README.md beside trained heads, for whoever finds them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ladon.errors import HeadsError
from ladon.heads.base import Heads
from ladon.heads.calibration import Calibration
from ladon.heads.early_exit import EarlyExit
from ladon.util.files import explained, write_whole

CARD_FILE = "README.md"
MARKER = (
    "<!-- Written by Ladon, and again whenever these heads are trained. Remove this line to keep your own text. -->"
)
_HEX = 8  # digits of a fingerprint that are shown
_USUAL = ("dtype", "model", "heads", "data", "updates", "processes")  # settings that are no choices, or shown elsewhere


def write_card(
    folder: str | Path, heads: Heads, *, early_exit: EarlyExit | None = None, data: str = "", licence: str = ""
) -> bool:
    """Write `README.md` into the folder of the heads, unless somebody else wrote the one that is there.

    Args:
        folder: where the heads were saved.
        heads: as they were saved, with what is known about their training and calibration.
        early_exit: the early exit trained with them.
        data: what they learned from, in words.
        licence: theirs, as the hub names it ("apache-2.0"); left out if not known.

    Returns:
        Whether it was written.

    Raises:
        HeadsError: the folder cannot be written to.
    """
    path = Path(folder) / CARD_FILE
    with explained(f"cannot write {path}", HeadsError, "make room or give another folder"):
        if path.exists() and MARKER not in path.read_text(encoding="utf-8", errors="replace"):
            return False
        write_whole(path, model_card(heads, early_exit=early_exit, data=data, licence=licence))
    return True


def model_card(heads: Heads, *, early_exit: EarlyExit | None = None, data: str = "", licence: str = "") -> str:
    """The text of the card; see `write_card` for what it is made from."""
    base = shown_base(heads.base_name)
    sections = [
        _front_matter(heads, licence),
        MARKER,
        f"# Decoding heads for {base or 'an unnamed model'}",
        f"{heads.num_heads} extra decoding heads for {base or 'a causal language model'}. With them Ladon decodes "
        "several tokens per forward pass of the model, and the text stays what the model alone says.",
        _facts(heads, early_exit),
        *_training(heads.training_record, data),
        *_accuracy(history_of(heads.training_record)),
        *_calibration(heads.calibration),
        _use(heads.base_name if _hub_id(heads.base_name) else "MODEL"),
        _limits(heads),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def history_of(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The reports on held-out rows in a training record, in order; entries of another form are left out."""
    entries = record.get("history")
    entries = entries if isinstance(entries, list) else []
    return [entry for entry in entries if isinstance(entry, dict) and _is_report(entry)]


def history_rows(history: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Of each report after what it is, each head's top-1, and the tokens per step of chain and tree, as text."""
    return [
        [
            str(entry.get("after") or f"step {entry.get('step', '?')}"),
            *(share(row[0]) for row in entry["accuracy"]),
            *(number(entry.get(name)) for name in ("chain_length", "tree_length")),
        ]
        for entry in history
    ]


def shown_base(name: str) -> str:
    """A base model's name for people: the id on the hub, or the last part of a folder's path."""
    return name if _hub_id(name) or not re.match(r"[/~.]|[A-Za-z]:", name) else Path(name).name


def num_parameters(heads: torch.nn.Module) -> tuple[int, int, str]:
    """Parameters, their bytes as they are, and their dtype in words."""
    tensors = list(heads.state_dict().values())
    kinds = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors if tensor.is_floating_point()})
    return (
        sum(t.numel() for t in tensors if t.is_floating_point()),
        sum(t.numel() * t.element_size() for t in tensors),
        " and ".join(kinds),
    )


def in_bytes(count: float) -> str:
    """Bytes in a unit that fits, such as "2.1 MB"."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def _hub_id(name: str) -> bool:
    return bool(re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name)) and not Path(name).exists()


def _is_report(entry: Mapping[str, Any]) -> bool:
    losses, accuracy = entry.get("loss"), entry.get("accuracy")
    if not isinstance(losses, list) or not isinstance(accuracy, list) or not accuracy:
        return False
    return len(losses) == len(accuracy) and all(isinstance(row, list) and row for row in accuracy)


def _front_matter(heads: Heads, licence: str) -> str:
    """YAML; strings are written as JSON, which is YAML too."""
    lines = ["---", "library_name: ladon"]
    if _hub_id(heads.base_name):
        lines.append(f"base_model: {json.dumps(heads.base_name)}")
    if licence:
        lines.append(f"license: {json.dumps(licence)}")
    return "\n".join([*lines, "tags:", "- ladon", "- medusa", "- speculative-decoding", "---"])


def _facts(heads: Heads, early_exit: EarlyExit | None) -> str:
    options = ", ".join(f"{name} {value}" for name, value in heads.options.items())
    mark = heads.base_fingerprint
    own = "" if heads.token_ids is None else f", of which the heads know {len(heads.token_ids):,}"
    recognised = f"samples of its weights, `{mark.body[:_HEX]}…`" if mark and mark.body else "nothing"
    if mark is not None and mark.adapters:
        recognised += f", and of the adapter that was active, `{mark.adapters[:_HEX]}…`"
    rows = [
        ("model", shown_base(heads.base_name) or "not named"),
        ("recognised by", recognised),
        ("family", f"{heads.family}" + (f" ({options})" if options else "")),
        ("heads", f"{heads.num_heads}, on hidden states of width {heads.hidden_size:,}"),
        ("vocabulary", f"{heads.vocab_size:,}{own}"),
        ("size", _size(heads)),
    ]
    if early_exit is not None:
        where = f"after layer {early_exit.layer} of {early_exit.num_layers}"
        rows.append(("early exit", f"{where}: {_size(early_exit)}"))
    return _table(["", ""], rows)


def _size(heads: torch.nn.Module) -> str:
    count, size, dtype = num_parameters(heads)
    return f"{count:,} parameters, {in_bytes(size)} in {dtype}"


def _training(record: Mapping[str, Any], data: str) -> list[str]:
    settings = record.get("settings")
    settings = settings if isinstance(settings, dict) else {}
    lines = []
    if data:
        lines.append(f"Learned from {data}.")
    if isinstance(record.get("rows"), int):
        updates = f", {settings['updates']:,} updates" if isinstance(settings.get("updates"), int) else ""
        lines.append(f"{record['rows']:,} rows{updates}.")
    for name in ("skipped_rows", "skipped_steps"):
        if record.get(name):
            lines.append(f"{name.replace('_', ' ').capitalize()}: {record[name]} (not finite).")
    chosen = {name: value for name, value in settings.items() if name not in _USUAL and _is_shown(value)}
    if not lines and not chosen:
        return []
    listed = ", ".join(f"{name} {value}" for name, value in chosen.items())
    return ["## Training", " ".join(lines), f"Settings: `{listed}`." if listed else ""]


def _is_shown(value: object) -> bool:
    """Settings that are plain values; paths say nothing to others."""
    return isinstance(value, int | float | str) and value != "" and "/" not in str(value)


def _accuracy(history: Sequence[Mapping[str, Any]]) -> list[str]:
    if not history:
        return []
    last = history[-1]
    width = max(len(row) for row in last["accuracy"])
    by_head = [
        (str(head), number(loss), *(share(value) for value in row))
        for head, (loss, row) in enumerate(zip(last["loss"], last["accuracy"], strict=True), start=1)
    ]
    sections = [
        "## Accuracy on held-out rows",
        "How often the token that head k foretells, k + 1 places ahead, is among its best candidates; the loss is in "
        "nats.",
        _table(["head", "loss", *(f"top-{n}" for n in range(1, width + 1))], by_head),
    ]
    if len(history) > 1 or "tree_length" in last:
        heads = [f"top-1, head {head}" for head in range(1, len(last["accuracy"]) + 1)]
        nodes = f" of {last['budget']}" if "budget" in last else ""
        sections += [
            "What more of the training brought, and the tokens per step to expect (1 is plain decoding):",
            _table(["after", *heads, "chain", f"tree{nodes}"], history_rows(history)),
        ]
    return sections


def _calibration(found: Calibration | None) -> list[str]:
    if found is None:
        return []
    columns, rows = ["head", "temperature", "right, best candidate"], []
    errors = found.error if {"before", "after"} <= found.error.keys() else {}
    if errors:
        columns.append("calibration error")
    for depth, temperature in enumerate(found.temperatures):
        rates = found.marginal_hit_rates or found.hit_rates
        row = [str(depth + 1), f"{temperature:.3f}", share(rates[depth][0] if rates[depth] else None)]
        if errors:
            row.append(" → ".join(share(errors[when]["all"][depth]) for when in ("before", "after")))
        rows.append(tuple(row))
    sections = ["## Calibration", _table(columns, rows)]
    best = max(found.simulated, key=lambda entry: entry.get("acceptance_length") or 0.0, default=None)
    if best is not None:
        sections.append(
            f"Simulated on answers set aside: {number(best.get('acceptance_length'))} tokens per step with a "
            f"{best['tree']} tree of {best['nodes']} nodes."
        )
    return sections


def _use(model: str) -> str:
    return f"""## Use

```python
import ladon
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({json.dumps(model)}, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained({json.dumps(model)})
heads = ladon.load_heads("HEADS", model)  # this folder, or this repository's id
decoder = ladon.Decoder(model, heads)
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(decoder.generate(**inputs, max_new_tokens=128)[0]))
```

or `ladon generate --model {model} --heads HEADS --prompt "Once upon a time"`; `ladon inspect HEADS` says more."""


def _limits(heads: Heads) -> str:
    return f"""## Limits

- They belong to one model. On another, or after that one is trained further, the text stays exact and fewer guesses are
  right; loading refuses a model whose weights differ.
- They guess at most {heads.num_heads} tokens beyond the model's own next one.
- How many guesses are right depends on the text: measure on your own prompts with `ladon calibrate`."""


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def share(value: object) -> str:
    """A share in percent; "-" for none."""
    return f"{100 * value:.1f} %" if isinstance(value, int | float) else "-"


def number(value: object) -> str:
    """A number to two places; "-" for none."""
    return f"{value:.2f}" if isinstance(value, int | float) else "-"
