"""Make heads for a model, or load them: the two functions a user calls."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ladon.calibration import CALIBRATION_FILE, Calibration, read_calibration
from ladon.errors import HeadsError
from ladon.heads.base import Heads
from ladon.heads.checkpoint import find_folder, read_config, read_tensors
from ladon.heads.ends import output_projection
from ladon.heads.lowrank import LowRankHeads
from ladon.heads.medusa import MedusaHeads
from ladon.heads.shared import SharedHeads

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FAMILIES: Mapping[str, type[Heads]] = {cls.family: cls for cls in (SharedHeads, MedusaHeads, LowRankHeads)}


def new_heads(
    model: PreTrainedModel, num_heads: int = 4, family: str = "shared", *, seed: int = 0, **options: int | str
) -> Heads:
    """Untrained heads for `model`, bound to it, in its dtype and on its device.

    Args:
        model: the target; it is not changed.
        num_heads: K, how many tokens beyond the target's own next token are guessed.
        family: "shared" (a wide residual MLP per head on the target's projection; options `expansion`, 4, and
            `activation`, "silu" or "swiglu"), "medusa" (residual blocks and a projection per head; option `num_blocks`,
            1) or "lowrank" (a wide MLP and a thin projection per head; options `expansion`, 2, and `rank`, 64).
        seed: decides the random start values.
        **options: the family's own settings.

    Returns:
        Heads whose logits equal the target's until they are trained.

    Raises:
        HeadsError: an unknown family or option, or a count below 1.
    """
    projection = output_projection(model)
    heads = _build(family, num_heads, projection.hidden_size, projection.vocab_size, options)
    heads.initialise(model, seed)
    heads.remember_base(model)
    return heads.bind(model, force=True)


def load_heads(
    path: str | Path, model: PreTrainedModel | None = None, force: bool = False, *, revision: str | None = None
) -> Heads:
    """Heads from a folder or a hub repository, checked strictly.

    Args:
        path: a folder with `heads.safetensors` and `config.json`, or the id of a hub repository that holds them.
        model: the target to bind them to; without it, call `heads.bind(model)` later (a `Decoder` does).
        force: accept a model other than the one they were trained for. The text stays exact, fewer guesses are right.
        revision: branch, tag or commit of the hub repository.

    Returns:
        Heads in the saved dtype, or, with `model`, in its dtype and on its device.

    Raises:
        HeadsError: files missing or damaged, tensors missing, unexpected or of a wrong shape (each named), or heads of
            another model.
    """
    folder = find_folder(path, revision)
    config = read_config(folder)
    with torch.device("meta"):
        heads = _build(config.family, config.num_heads, config.hidden_size, config.vocab_size, config.options)
    tensors = read_tensors(folder, {name: tensor.shape for name, tensor in heads.state_dict().items()})
    heads.load_state_dict(tensors, assign=True)
    heads.base_name, heads.base_fingerprint = config.base_name, config.base_fingerprint
    heads.training_record = dict(config.training)
    heads.calibration = _own_calibration(folder, heads)
    return heads if model is None else heads.bind(model, force)


def _own_calibration(folder: Path, heads: Heads) -> Calibration | None:
    """The calibration beside the heads; other heads' is left aside with a warning, as it would mislead."""
    found = read_calibration(folder)
    if found is None:
        return None
    path = folder / CALIBRATION_FILE
    if found.heads != heads.weights_hash:
        warnings.warn(f"{path} was made for other heads and is not used; run `ladon calibrate` again", stacklevel=3)
        return None
    if len(found.temperatures) != heads.num_heads:
        raise HeadsError(
            f"{path} has {len(found.temperatures)} temperatures for {heads.num_heads} heads. Remove the file, and run "
            "`ladon calibrate` again"
        )
    return found


def _build(family: str, num_heads: int, hidden_size: int, vocab_size: int, options: Mapping[str, int | str]) -> Heads:
    if family not in FAMILIES:
        raise HeadsError(f"head family {family!r} is unknown; known: {', '.join(FAMILIES)}")
    allowed = FAMILIES[family].option_names
    unknown = sorted(options.keys() - set(allowed))
    if unknown:
        raise HeadsError(f"{family} heads have no option {', '.join(unknown)}; they take {', '.join(allowed)}")
    return FAMILIES[family](num_heads=num_heads, hidden_size=hidden_size, vocab_size=vocab_size, **options)
