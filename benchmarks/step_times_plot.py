"""Step times as a picture: a panel per context, a line per batch, as multiples of plain decoding's."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure


def step_time_picture(document: Mapping[str, Any]) -> bytes:
    """A PNG of what `step_times.py` has measured."""
    measured, place = document["measured"], document["environment"]
    contexts = sorted({found["context"] for found in measured})
    figure = Figure(figsize=(4.2 * len(contexts) + 1.2, 3.8), layout="constrained")
    where = place["cpu"] if place["device"] == "cpu" else place["device"]
    figure.suptitle(f"Time of a decode step over plain decoding's\n{document['model']} · {document['dtype']} · {where}")
    panels = figure.subplots(1, len(contexts), squeeze=False, sharey=True)[0]
    for axes, context in zip(panels, contexts, strict=True):
        for found in measured:
            if found["context"] == context:
                multiples = [ms / found["ms"][0] for ms in found["ms"]]
                axes.plot(found["nodes"], multiples, "o-", ms=3, lw=1.3, label=f"batch {found['batch']}")
        axes.set_xscale("log", base=2)
        axes.set_xlabel("nodes verified per row")
        axes.set_title(f"{context} tokens of context", fontsize=10)
        axes.set_ylim(bottom=0)
        axes.grid(True, lw=0.5, alpha=0.5)
        axes.legend(fontsize=8, frameon=False)
    panels[0].set_ylabel("times a step of plain decoding")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()
