"""Model, tokenizer and heads from the names that a user gives."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ladon.cli.adapters import adapter_base, tokenizer_source
from ladon.cli.options import DTYPES, shortened
from ladon.config import MTP
from ladon.demo.bundled import demo_path, load_demo
from ladon.errors import InputError
from ladon.heads import load_heads
from ladon.heads.mtp import load_mtp
from ladon.util.machine import cpu_flags

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ladon.heads import Heads

DEMO = "demo"
_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPES}


@dataclass(frozen=True, kw_only=True, slots=True)
class Loaded:
    """What a command works with; `heads` is None if none were named."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    heads: Heads | None
    is_demo: bool


def load(
    model: str,
    heads: str | None,
    *,
    dtype: str,
    device: str = "auto",
    threads: int | None = None,
    trust_remote_code: bool = False,
    ignore_generation_config: bool = False,
    placement: Mapping[str, Any] | None = None,
) -> Loaded:
    """Load a model and its heads.

    Args:
        model: "demo", a folder, or a hub id.
        heads: "demo", a folder, a hub id, or "mtp" for the modules that the model ships with; None is the bundled heads
            for the bundled model, and no heads otherwise.
        dtype: "auto" or a dtype's name.
        device: "auto" or a torch device.
        threads: CPU threads of torch; None leaves its choice.
        trust_remote_code: run code that comes with the checkpoint.
        ignore_generation_config: forget how the checkpoint wants its text generated; its special tokens stay.
        placement: further arguments of `from_pretrained` that put the model in its place, such as device_map.

    Raises:
        InputError: the model cannot be loaded, or dtype or device is unknown.
        HeadsError: the heads cannot be loaded or belong to another model.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if threads is not None:
        torch.set_num_threads(threads)
    _check_length("--model", model)
    _check_length("--heads", heads or "")
    place = _device(device)
    if model == DEMO and not placement:
        target, tokenizer, own_heads = load_demo(_dtype(dtype, torch.bfloat16, place))
        target = target.to(place)
        found: Heads | None = own_heads.bind(target) if heads in (None, DEMO) else _heads(str(heads), target)
    else:
        source = str(demo_path()) if model == DEMO else model
        target, tokenizer = _from_transformers(source, dtype, place, trust_remote_code, placement or {})
        found = None if heads is None else _heads(heads, target)
    if ignore_generation_config:
        own = target.generation_config
        target.generation_config = transformers.GenerationConfig(
            bos_token_id=own.bos_token_id, eos_token_id=own.eos_token_id, pad_token_id=own.pad_token_id
        )
    name = model if model == DEMO else Path(model).name
    return Loaded(name=name, model=target, tokenizer=tokenizer, heads=found, is_demo=model == DEMO)


def _heads(name: str, target: PreTrainedModel) -> Heads:
    """The heads of that name for a model that is not the bundled one."""
    if name == MTP:
        return load_mtp(target)
    return load_heads(demo_path() / "heads" if name == DEMO else name, target)


def load_tokenizer(model: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model alone; errors as in `load`."""
    import transformers

    transformers.logging.set_verbosity_error()
    _check_length("--model", model)
    source = str(demo_path()) if model == DEMO else _source(model)
    with _explained(model):
        source = tokenizer_source(source)
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    return tokenizer


def require_heads(loaded: Loaded, tree: object, ngrams: str) -> None:
    """Raise `InputError` if the tree needs heads and none were named: n-grams alone draft what grows, and chains."""
    if loaded.heads is None and tree != "off" and (ngrams == "off" or tree not in ("dynamic", "chain")):
        raise InputError(f"no heads for {loaded.name}; give --heads FOLDER, or --tree off for plain decoding")


def dtype_name(model: PreTrainedModel) -> str:
    """The dtype as the JSON documents name it, e.g. "bfloat16"."""
    return str(model.dtype).removeprefix("torch.")


def _from_transformers(
    name: str, dtype: str, device: torch.device, trust_remote_code: bool, placement: Mapping[str, Any]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    source = _source(name)
    with _explained(name):
        base = adapter_base(source) or source  # transformers puts an adapter's weights into the model that it names
        config = AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code)
        stored = getattr(config.get_text_config(decoder=True), "dtype", None) or torch.float32
        model = AutoModelForCausalLM.from_pretrained(
            source, config=config, dtype=_dtype(dtype, stored, device), trust_remote_code=trust_remote_code, **placement
        )
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_source(source), trust_remote_code=trust_remote_code)
    return (model if placement else model.to(device)).eval(), tokenizer


def _source(name: str) -> str:
    """The folder or hub id that a name stands for."""
    path = Path(os.path.expanduser(name))
    is_hub_id = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) and not name.startswith(".")
    if not path.is_dir() and (path.exists() or not is_hub_id):
        raise InputError(f"there is no model folder {name}; give a folder in transformers' format, or a hub id")
    return str(path) if path.is_dir() else name


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Say in one line why a checkpoint cannot be loaded."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # transformers raises every kind, for every way in which a checkpoint can be wrong
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise InputError(
            f"cannot load the model {name}: {reason} Give a folder with a causal language model and its tokenizer, or "
            "the id of one on the hub"
        ) from error


def _dtype(name: str, stored: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype asked for; "auto" is the stored one unless it is a half precision that is slow on this CPU."""
    if name != "auto":
        if name not in _DTYPES:
            raise InputError(f"--dtype is {name!r}; give auto, {', '.join(_DTYPES)}")
        return _DTYPES[name]
    if isinstance(stored, str):
        stored = _DTYPES.get(stored, torch.float32)
    if device.type != "cpu" or stored not in (torch.bfloat16, torch.float16):
        return stored
    has_it = stored == torch.bfloat16 and cpu_flags() & {"avx512_bf16", "amx_bf16"}
    return stored if has_it else torch.float32


def _check_length(option: str, name: str) -> None:
    """Raise `InputError` for a name that no file system takes."""
    try:
        os.stat(os.path.expanduser(name))
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise InputError(
                f"{option} is {shortened(name)!r}, too long for a name; give a folder or a hub id"
            ) from error


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built for the device
        raise InputError(f"--device {name} cannot be used ({str(error).splitlines()[0]}); give auto or cpu") from error
    return device
