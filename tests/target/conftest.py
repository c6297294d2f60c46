"""A fixture that several tests of the target share."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace

import pytest
from transformers import Phi3ForCausalLM, PreTrainedModel

from families import FAMILIES, build
from rope_cases import CASES


@pytest.fixture
def make(case: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[], PreTrainedModel]:
    """Builds the model of a case."""
    name, options = CASES[case]
    prepare = inspect.getsource(Phi3ForCausalLM.prepare_inputs_for_generation)
    if name == "phi3" and "next_sequence_length" not in prepare:
        pytest.skip("generate of the installed transformers forgets the context at the switch")
    family = FAMILIES[name]
    monkeypatch.setitem(FAMILIES, name, replace(family, options={**family.options, **options}))
    return lambda: build(name)
