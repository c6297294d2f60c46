"""Models whose rotary embedding, attention or query scale changes with the length."""

from __future__ import annotations

from typing import Any

import pytest

SWITCH = 16


LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 4,
    "long_factor": [1.5, 2.5, 3.5, 4.5],
    "rope_theta": 1e4,
    "original_max_position_embeddings": SWITCH,
    "factor": 4.0,
}


DYNAMIC = {"rope_type": "dynamic", "factor": 8.0, "rope_theta": 1e4}


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "longrope": ("llama", {"rope_parameters": LONGROPE}),
    "longrope recomputed": (
        "phi3",
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": SWITCH, "sliding_window": None},
    ),
    "longrope in a window": ("mistral", {"rope_parameters": LONGROPE, "sliding_window": 4, "num_hidden_layers": 3}),
    "dynamic": ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": SWITCH}),
    "blocks": ("llama4_text", {"attn_temperature_tuning": True, "floor_scale": SWITCH, "attn_scale": 0.5}),
    "indexer": ("deepseek_v32", {"index_topk": SWITCH}),
    "glm_moe_dsa": ("glm_moe_dsa", {"index_topk": SWITCH}),
    "axk2": ("axk2", {"index_topk": SWITCH}),
    "hy_v4": ("hy_v4", {"index_topk": SWITCH}),
    "doge": ("doge", {"keep_window_size": SWITCH, "sliding_window": None}),
}


FAST = ("longrope", "longrope recomputed", "longrope in a window", "dynamic", "blocks", "indexer")


def case(name: str) -> Any:
    return pytest.param(name, marks=() if name in FAST else pytest.mark.slow)
