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

from ladon.cli.options import DTYPES, Target, shortened
from ladon.config import MTP
from ladon.decoder.decoder import Decoder
from ladon.demo.bundled import demo_path, load_demo
from ladon.errors import InputError
from ladon.heads import Heads, load_heads
from ladon.heads.mtp import load_mtp
from ladon.target.support import context_limit
from ladon.util.machine import cpu_flags

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

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

    @property
    def context_limit(self) -> int | None:
        """How many tokens the model can read; None if there is no bound."""
        return context_limit(self.model.config.get_text_config(decoder=True))

    def decoder(self, **options: Any) -> Decoder:
        """A decoder for the model; `InputError` if its tree needs heads and none were named."""
        self.require_heads(options["tree"], options["ngrams"])
        return Decoder(self.model, self.heads, **options)

    def require_heads(self, tree: object = "dynamic", ngrams: str = "off") -> None:
        """Raise `InputError` if the tree needs heads and there are none: n-grams alone draft what grows, and chains."""
        if self.heads is None and tree != "off" and (ngrams == "off" or tree not in ("dynamic", "chain")):
            raise InputError(f"no heads for {self.name}; give --heads FOLDER, or --tree off for plain decoding")


def load(target: Target, placement: Mapping[str, Any] | None = None) -> Loaded:
    """Load a model and its heads.

    Args:
        target: the names that were given. No heads are the bundled heads for the bundled model, and none otherwise.
        placement: further arguments of `from_pretrained` that put the model in its place, such as device_map.

    Raises:
        InputError: the model cannot be loaded, or dtype or device is unknown.
        HeadsError: the heads cannot be loaded or belong to another model.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if target.threads is not None:
        torch.set_num_threads(target.threads)
    _check_length("--model", target.model)
    _check_length("--heads", target.heads or "")
    device, is_demo = _device(target.device), target.model == DEMO
    if is_demo and not placement:
        model, tokenizer, own_heads = load_demo(_dtype(target.dtype, torch.bfloat16, device))
        model = model.to(device)
        heads: Heads | None = own_heads.bind(model) if target.heads in (None, DEMO) else _heads(target.heads, model)
    else:
        model, tokenizer = _from_transformers(target, device, placement or {})
        heads = _heads(target.heads, model)
    if target.ignore_generation_config:
        own = model.generation_config
        model.generation_config = transformers.GenerationConfig(
            bos_token_id=own.bos_token_id, eos_token_id=own.eos_token_id, pad_token_id=own.pad_token_id
        )
    name = target.model if is_demo else Path(target.model).name
    return Loaded(name=name, model=model, tokenizer=tokenizer, heads=heads, is_demo=is_demo)


def _heads(name: str | None, model: PreTrainedModel) -> Heads | None:
    """The heads of that name for a model that is not the bundled one."""
    if name is None:
        return None
    if name == MTP:
        return load_mtp(model)
    return load_heads(heads_place(name), model)


def heads_place(name: str) -> Path | str:
    """Where the heads of that name are: those of the bundled model have a name of their own."""
    return demo_path() / "heads" if name == DEMO else name


def load_tokenizer(target: Target) -> PreTrainedTokenizerBase:
    """The tokenizer of a model alone; errors as in `load`."""
    import transformers

    transformers.logging.set_verbosity_error()
    _check_length("--model", target.model)
    source = source_of(target.model)
    with _explained(target.model):
        return transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=target.trust_remote_code)


def dtype_name(model: PreTrainedModel) -> str:
    """The dtype as the JSON documents name it, e.g. "bfloat16"."""
    return str(model.dtype).removeprefix("torch.")


def _from_transformers(
    target: Target, device: torch.device, placement: Mapping[str, Any]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    source, trust = source_of(target.model), {"trust_remote_code": target.trust_remote_code}
    with _explained(target.model):
        config = AutoConfig.from_pretrained(source, **trust)
        stored = getattr(config.get_text_config(decoder=True), "dtype", None) or torch.float32
        dtype = _dtype(target.dtype, stored, device)
        model = AutoModelForCausalLM.from_pretrained(source, config=config, dtype=dtype, **trust, **placement)
        tokenizer = AutoTokenizer.from_pretrained(source, **trust)
    return (model if placement else model.to(device)).eval(), tokenizer


def source_of(name: str) -> str:
    """The folder or hub id that a name stands for."""
    if name == DEMO:
        return str(demo_path())
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
        torch.empty(0, device=device, dtype=torch.float32)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built for the device
        raise InputError(f"--device {name} cannot be used ({str(error).splitlines()[0]}); give auto or cpu") from error
    return device
