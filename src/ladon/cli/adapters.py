"""Folders of peft adapters, which `from_pretrained` loads into the model that they name."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ladon.errors import InputError

_TOKENIZER = ("tokenizer_config.json", "tokenizer.json")


def adapter_base(source: str) -> str | None:
    """The folder or hub id of the model that an adapter is for; None if `source` is no adapter.

    Raises:
        InputError: it is one, and its configuration names no model, peft is missing, or it does not act in layers.
    """
    from transformers.utils import find_adapter_config_file

    found = find_adapter_config_file(source)
    if found is None or (Path(source) / "config.json").exists():
        return None
    config: Any = json.loads(Path(found).read_text(encoding="utf-8"))
    base = config.get("base_model_name_or_path")
    if not base:
        raise InputError(f"{source} is an adapter that names no model (base_model_name_or_path); load it with peft")
    if find_spec("peft") is None:
        raise InputError(f"{source} is an adapter for {base}, which needs peft; pip install 'ladon-llm[train]'")
    if config.get("num_virtual_tokens"):
        raise InputError(
            f"{source} is a {config.get('peft_type')} adapter, whose virtual tokens before the prompt Ladon does not "
            "give to the model; use the peft model's own generate for it, or an adapter in layers, such as LoRA"
        )
    return str(base)


def tokenizer_source(source: str) -> str:
    """Where the tokenizer lies: with an adapter, if it is saved beside it, else with the adapter's model."""
    from transformers.utils import cached_file

    base = adapter_base(source)
    if base is None:
        return source
    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    beside = any(cached_file(source, name, **quiet) is not None for name in _TOKENIZER)
    return source if beside else base
