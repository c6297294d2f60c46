"""The test a model must pass before it is trusted with token trees: do they give what plain forwards give?

Two rows of different lengths hold a small branching tree each, are verified, committed, and verified again. Every
node's logits are compared with a plain forward of the model over that node's own path, without cache, mask or hooks.
The control is what a wrong mask would give: the logits of the same nodes taken as one chain. A model passes when its
difference is a small share of the control's; one whose forward fails on a tree does not. What fails outside the model's
forwards says nothing about the model, and is raised as the test's own error. About a dozen short forwards; the verdict
is kept per configuration, dtype, attention implementation, arithmetic (autocast, precision of float32 products) and
library version, in the process and in a file.
"""

from __future__ import annotations

import hashlib
import json
import traceback
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
import transformers
from torch import Tensor, nn

from ladon.errors import SelfTestError, UnsupportedModelError
from ladon.target.hooks import lock_of
from ladon.trees.token_tree import TokenTree
from ladon.util.devices import arithmetic, is_out_of_memory, working_dtype
from ladon.util.files import write_whole
from ladon.util.machine import cache_folder

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel

    from ladon.target.kv_cache import TreeCache

_BRANCHING = ((-1, 0, 0, 1, 2, 1), (-1, 0, 1, 0, 3, 3))  # the parents in each row; all leaves at depth 2
_CHAIN = ((-1, 0, 1, 2, 3, 4),) * 2
_LENGTHS = (4, 7)
_STEPS = 2
_PASSES = {torch.float64: 0.01, torch.float32: 0.01}  # share of the control's difference that rounding may reach
_PASSES_HALF = 0.2

_verdicts: dict[str, Verdict] = {}


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What a model was found able to do: any tree, or only chains."""

    trees: bool


class _Output(Protocol):
    @property
    def logits(self) -> Tensor: ...


class Testable(Protocol):
    """The part of a target that the test runs."""

    model: PreTrainedModel
    device: torch.device
    dtype: torch.dtype
    vocab_size: int

    def new_cache(self, batch_size: int) -> TreeCache:
        """See `Target`."""

    def prefill(self, rows: Sequence[Tensor], cache: TreeCache) -> tuple[Tensor, Tensor]:
        """See `Target`."""

    def verify(self, tree: TokenTree, cache: TreeCache) -> _Output:
        """See `Target`."""


def tested(target: Testable) -> Verdict:
    """The verdict on a model, from memory, from the file, or from the test itself.

    Raises:
        UnsupportedModelError: if neither a tree nor a chain gives what plain forwards give.
        SelfTestError: the test itself has failed.
    """
    key = _key(target)
    if key not in _verdicts:
        remembered = _read().get(key)
        if remembered is None:
            remembered = _judge(target)
            _write(key, remembered)
        _verdicts[key] = remembered
    return _verdicts[key]


def allowed_share(target: Testable) -> float:
    """The share of a control's difference that rounding may reach, as the target computes now."""
    return _PASSES.get(working_dtype(target.device, target.dtype), _PASSES_HALF)


def check_blame(error: Exception, model: nn.Module) -> None:
    """Raise `SelfTestError` unless an error of a test has come out of a forward of the model."""
    if not any(frame.f_locals.get("self") is model for frame, _ in traceback.walk_tb(error.__traceback__)):
        raise SelfTestError(
            f"the self-test of {type(model).__name__} failed by itself, with {first_line(error)}. That says nothing "
            "about the model: please report it, and use plain decoding of transformers until it is mended"
        ) from error


def first_line(error: Exception) -> str:
    """An error's kind, and what it says first."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _judge(target: Testable) -> Verdict:
    reasons = []
    for name, shapes in (("a token tree", _BRANCHING), ("a chain", _CHAIN)):
        reason = _failure(target, shapes)
        if reason is None:
            return Verdict(trees=shapes is _BRANCHING)
        reasons.append(f"{name} {reason}")
    raise UnsupportedModelError(
        f"{type(target.model).__name__} cannot verify token trees: against plain decoding, {'; '.join(reasons)}. Use "
        "plain decoding of transformers for it"
    )


def _failure(target: Testable, shapes: tuple[tuple[int, ...], ...]) -> str | None:
    """Why trees of these shapes cannot be trusted, or None."""
    allowed = allowed_share(target)
    try:
        difference, control = measure(target, shapes)
    except Exception as error:
        if isinstance(error, UnsupportedModelError) or is_out_of_memory(error):  # no matter of trees
            raise
        check_blame(error, target.model)
        return f"fails with {first_line(error)}"
    if difference <= allowed * control:
        return None
    return f"differs by {difference:.2g} (a wrong mask differs by {control:.2g}; allowed is {allowed:.0%} of that)"


@torch.no_grad()
def measure(target: Testable, shapes: tuple[tuple[int, ...], ...]) -> tuple[float, float]:
    """Root mean square difference of trees of these shapes to plain forwards, and that of a wrong mask.

    Args:
        target: what is tested.
        shapes: the parents of each row's tree; both rows as many nodes.
    """
    generator = torch.Generator("cpu").manual_seed(0)  # all but the forwards is the host's, in float64

    def draw(*shape: int) -> Tensor:
        return torch.randint(target.vocab_size, shape, generator=generator, device="cpu")

    rows = [draw(length) for length in _LENGTHS]
    cache = target.new_cache(len(rows))
    target.prefill(rows, cache)
    squares = torch.zeros(2, dtype=torch.float64, device="cpu")
    for _ in range(_STEPS):
        tokens = draw(len(rows), len(shapes[0]))
        logits = target.verify(_tree(tokens, shapes, target.device), cache).logits.cpu().double()
        kept = []
        for row, parents in enumerate(shapes):
            paths = [_path(parents, node) for node in range(len(parents))]
            leaves = [path for node, path in enumerate(paths) if node not in parents]
            plain = _plain(target, rows[row], tokens[row], leaves)
            wrong = _plain(target, rows[row], tokens[row], [list(range(len(parents)))])
            squares += torch.stack([(logits[row] - plain).square().mean(), (wrong - plain).square().mean()])
            kept.append(max(paths, key=len))
            rows[row] = torch.cat((rows[row], tokens[row, kept[row]]))
        width = max(map(len, kept))
        path = torch.tensor([nodes + nodes[-1:] * (width - len(nodes)) for nodes in kept], device=target.device)
        counts = [len(nodes) for nodes in kept]
        cache.commit(path, torch.tensor(counts, device=target.device))
        cache.mirror(counts)
    difference, control = (squares / (_STEPS * len(shapes))).sqrt().tolist()
    # In a chain the "wrong" mask is the right one: what the logits themselves vary by is the measure then.
    return difference, control if shapes is not _CHAIN else plain.std(0).mean().item()


def _tree(tokens: Tensor, shapes: tuple[tuple[int, ...], ...], device: torch.device) -> TokenTree:
    return TokenTree(
        tokens=tokens.to(device),
        parents=torch.tensor(shapes, device=device),
        log_probs=torch.zeros(tokens.shape, dtype=torch.float32, device=device),
        max_depth=max(len(_path(parents, node)) for parents in shapes for node in range(len(parents))) - 1,
    )


def _path(parents: tuple[int, ...], node: int) -> list[int]:
    """Nodes from the root to `node`."""
    path = [node]
    while parents[path[0]] >= 0:
        path.insert(0, parents[path[0]])
    return path


def _plain(target: Testable, prefix: Tensor, tokens: Tensor, leaves: list[list[int]]) -> Tensor:
    """Logits after each node, [N, V], by one plain forward over the paths to the leaves, all of one length."""
    ids = torch.stack([torch.cat((prefix, tokens[path])) for path in leaves]).to(target.device)
    try:
        with lock_of(target.model):
            logits = target.model(input_ids=ids, use_cache=False, return_dict=True).logits
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise UnsupportedModelError(
            f"{type(target.model).__name__} cannot be decoded: a plain forward of it fails with {first_line(error)}"
        ) from error
    logits = logits.cpu().double()
    found = torch.empty(len(tokens), logits.shape[-1], dtype=logits.dtype, device=logits.device)
    for path, path_logits in zip(leaves, logits, strict=True):
        found[path] = path_logits[len(prefix) :]
    return found


def _key(target: Testable) -> str:
    config = target.model.config
    facts = {
        "config": {name: value for name, value in config.to_dict().items() if not name.startswith("_name")},
        "class": type(target.model).__qualname__,
        "layers": _layers(target.model),
        "attention": config.get_text_config(decoder=True)._attn_implementation,
        "dtype": str(target.dtype),
        "device": target.device.type,
        "arithmetic": arithmetic(target.device),
        "versions": [transformers.__version__, torch.__version__],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def _layers(model: nn.Module) -> list[str]:
    """Kinds of layers and of numbers in a model: quantised ones are others, though the config is the same."""
    modules = {f"{type(module).__module__}.{type(module).__qualname__}" for module in model.modules()}
    return sorted(modules | {f"{type(p).__qualname__} {p.dtype}" for p in model.parameters()})


def _file() -> Path:
    return cache_folder() / "self_test.json"


def _read() -> dict[str, Verdict]:
    """Verdicts in the file; a file that cannot be read or is not ours counts as empty."""
    try:
        content = json.loads(_file().read_text(encoding="utf-8"))
        return {key: Verdict(trees=bool(value["trees"])) for key, value in content.items()}
    except (OSError, ValueError, AttributeError, TypeError, KeyError):
        return {}


def _write(key: str, verdict: Verdict) -> None:
    """Add a verdict to the file, whole or not at all; where nothing may be written the test runs again next time."""
    content = {name: asdict(known) for name, known in _read().items()} | {key: asdict(verdict)}
    with suppress(OSError):
        _file().parent.mkdir(parents=True, exist_ok=True)
        write_whole(_file(), json.dumps(content, indent=1))
