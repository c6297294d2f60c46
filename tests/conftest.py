"""What every test runs under: one thread, no network, a cache of its own; and the fixtures that several files share.

The environment is set before torch is imported, so that `pytest` alone, without any variable, is the whole command;
processes that tests start inherit it.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from pathlib import Path

_CACHE = tempfile.TemporaryDirectory(prefix="ladon-tests-")
os.environ.update(
    OMP_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_VERBOSITY="error",
    LADON_CACHE=_CACHE.name,  # verdicts of the user's own runs must not stand in for the self-test
    MPLBACKEND="Agg",
    NO_COLOR="1",
    COLUMNS="120",
)

import pytest  # noqa: E402 (the environment comes first)
import torch  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel  # noqa: E402

from ladon import Decoder, new_heads  # noqa: E402
from user_side import Tiny, make_tiny  # noqa: E402

torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    """Every test starts from the same torch seed, alone or in the whole suite."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture
def tiny_llama() -> PreTrainedModel:
    """A random two-layer Llama in float64 (grouped heads, V = 97): new for each test, so a test may change it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).double().eval()


@pytest.fixture
def model(tiny_llama: PreTrainedModel) -> PreTrainedModel:
    """The same, with no token that ends a text."""
    tiny_llama.generation_config.eos_token_id = None
    return tiny_llama


@pytest.fixture
def decoder(model: PreTrainedModel) -> Decoder:
    """A decoder with random heads for `model`: some of their guesses are right."""
    heads = new_heads(model, num_heads=3)
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return Decoder(model, heads)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A tiny float32 model with heads and tokenizer, in memory and on disk; tests leave it unchanged."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tokenizers and transformers while training and saving
        return make_tiny(tmp_path_factory.mktemp("tiny"))
