"""Default values in the API reference: what `_DEFAULTS.tree` is, in place of the name."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import griffe


class Defaults(griffe.Extension):
    """Replaces a default value that is an attribute of a module's `_DEFAULTS` by its value."""

    def on_function_instance(self, *, func: griffe.Function, **kwargs: Any) -> None:
        """Look up the defaults of one function."""
        for parameter in func.parameters:
            name = str(parameter.default or "").removeprefix("_DEFAULTS.")
            if name != str(parameter.default or ""):
                defaults = import_module(func.module.path)._DEFAULTS
                parameter.default = repr(getattr(defaults, name))
