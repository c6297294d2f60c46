"""Make heads for a model, or load them: the two functions a user calls."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch

from ladon.errors import HeadsError
from ladon.heads.base import Heads
from ladon.heads.calibration import CALIBRATION_FILE, Calibration, read_calibration
from ladon.heads.checkpoint import check_token_ids, find_heads, is_own, read_config, read_tensors
from ladon.heads.correction import HIDDEN_CORRECTION, MARKOV_GATE, MARKOV_RANK, MARKOV_SUCCESSORS
from ladon.heads.formats.detect import detect
from ladon.heads.formats.files import open_checkpoint
from ladon.heads.hydra import HydraHeads
from ladon.heads.medusa import MedusaHeads
from ladon.heads.mlp import LowRankHeads, SharedHeads
from ladon.heads.model_parts import output_projection
from ladon.util.devices import is_offloaded

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FAMILIES: Mapping[str, type[Heads]] = {cls.family: cls for cls in (SharedHeads, MedusaHeads, LowRankHeads, HydraHeads)}
CORRECTION_OPTIONS = (MARKOV_RANK, MARKOV_SUCCESSORS, MARKOV_GATE, HIDDEN_CORRECTION)  # beside those of a family


def new_heads(
    model: PreTrainedModel, num_heads: int = 4, family: str = "shared", *, seed: int = 0, **options: int | str
) -> Heads:
    """Untrained heads for `model`, bound to it, in its dtype and on its device.

    Args:
        model: the target; it is not changed.
        num_heads: K, how many tokens beyond the target's own next token are guessed.
        family: "shared" (a wide residual MLP per head on the target's projection; options `expansion`, 2, and
            `activation`, "silu" or "swiglu"), "medusa" (residual blocks and a projection per head; options
            `num_blocks`, 1, `projection`, "own" or "shared", `draft_vocab_size`, 0 for all, and `projection_bias`, 0),
            "lowrank" (a wide MLP and a thin projection per head; options `expansion`, 2, and `rank`, 64) or "hydra"
            (each head reads the tokens before the one it guesses; option `num_blocks`, 1).
        seed: decides the random start values.
        **options: the family's own settings; `markov_rank` or `hidden_correction`, for a correction by the token before
            each guess, of this rank or inner width; with the former `markov_successors`, for guesses that it adds to
            those of the heads after each token, and `markov_gate`, 1 if its strength is to depend on the hidden row.

    Returns:
        Heads whose logits equal the target's until they are trained.

    Raises:
        HeadsError: an unknown family or option, or a count below 1.
    """
    projection = output_projection(model)
    with torch.device("cpu"):  # whatever the default device and dtype
        heads = _build(family, num_heads, projection.hidden_size, projection.vocab_size, options).float()
    if is_offloaded(projection.module) and not heads.shares_projection:
        raise HeadsError(
            f"{family} heads start from the output projection, and this model's is offloaded. Make them on the model "
            "loaded whole, or use family='shared'"
        )
    heads.initialise(model, seed)
    if heads.correction is not None:
        heads.correction.initialise(seed)
    heads.remember_base(model)
    return heads.bind(model, force=True)


def load_heads(
    path: str | Path, model: PreTrainedModel | None = None, force: bool = False, *, revision: str | None = None
) -> Heads:
    """Heads from a folder, a file or a hub repository, in whatever format, checked strictly.

    The format is told by keys and shapes: Ladon's own, MEDUSA's (v0.1, v2, or a v1.0 model with heads in it), TGI's,
    vLLM's, TensorRT-LLM's, Model-Optimizer's or Hydra's. No pickled code is ever run.

    Args:
        path: a folder or the id of a hub repository, or one file such as `medusa_lm_head.pt`.
        model: the target to bind them to; without it, call `heads.bind(model)` later (a `Decoder` does). Needed here
            where the files do not tell the size of the vocabulary (heads on a shared projection in other formats).
        force: accept a model other than the one they were trained for. The text stays exact, fewer guesses are right.
        revision: branch, tag or commit of the hub repository.

    Returns:
        Heads in the saved dtype, or, with `model`, in its dtype and on its device. Other formats carry no fingerprint
        of their model, or part of one: binding then warns that it cannot be verified.

    Raises:
        HeadsError: files missing or damaged, an unknown format, tensors missing, unexpected or of a wrong shape (each
            named), or heads of another model.
    """
    heads = read_heads(path, model, force, revision=revision)
    return heads if model is None else heads.bind(model, force)


def read_heads(
    path: str | Path, model: PreTrainedModel | None = None, force: bool = False, *, revision: str | None = None
) -> Heads:
    """As `load_heads`, but unbound and in the saved dtype; `model` only tells what the files do not."""
    place = find_heads(path, revision)
    if is_own(place):
        heads = _read_own(place if place.is_dir() else place.parent)
    else:
        found = detect(open_checkpoint(place, str(path)))
        heads = found.heads(None if model is None else output_projection(model).vocab_size)
        if model is not None and not force:
            found.refuse_other_base(heads, model)
    if heads.token_ids is not None:
        check_token_ids(str(path), heads.token_ids, heads.vocab_size)
    heads.folder = place if place.is_dir() else place.parent
    heads.calibration = _own_calibration(heads.folder, heads)
    return heads


def _read_own(folder: Path) -> Heads:
    config = read_config(folder)
    sizes = (config[name] for name in ("family", "num_heads", "hidden_size", "vocab_size", "options"))
    with torch.device("meta"):
        heads = _build(*sizes)
    tensors = read_tensors(folder, {name: tensor.shape for name, tensor in heads.state_dict().items()})
    heads.load_state_dict(tensors, assign=True)
    heads.base_name, heads.base_fingerprint = config["base"]["name"], config["base"]["fingerprint"]
    heads.training_record = config["training"]
    return heads


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
    own = {name: value for name, value in options.items() if name not in CORRECTION_OPTIONS}
    unknown = sorted(own.keys() - set(allowed))
    if unknown:
        allowed = (*allowed, *CORRECTION_OPTIONS)
        raise HeadsError(f"{family} heads have no option {', '.join(unknown)}; they take {', '.join(allowed)}")
    heads = FAMILIES[family](num_heads=num_heads, hidden_size=hidden_size, vocab_size=vocab_size, **own)
    further = [cast(int, options.get(name, 0)) for name in (MARKOV_SUCCESSORS, MARKOV_GATE)]
    if MARKOV_RANK in options:  # its values are checked there
        heads.add_correction(cast(int, options[MARKOV_RANK]), *further)
    elif any(further):
        raise HeadsError(f"{MARKOV_SUCCESSORS} and {MARKOV_GATE} are of a Markov correction; give {MARKOV_RANK} too")
    if HIDDEN_CORRECTION in options:
        heads.add_hidden_correction(cast(int, options[HIDDEN_CORRECTION]))
    return heads
