"""The early-exit head: what a target would say, guessed from the hidden states in its middle.

ProPD (arXiv 2402.13485) judges a tree's nodes after a few layers, and lets only those go on that a head trained for it
finds likely. It sees every node of the tree, so it must be cheap: it shares the target's output projection.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ladon.errors import HeadsError
from ladon.heads.base import check_count, seeded_normal
from ladon.heads.checkpoint import EARLY_EXIT_FILES, VERSION, find_folder, read_tensors, write_pair
from ladon.heads.formats.files import read_versioned
from ladon.heads.model_parts import decoder_layers, final_norm, output_projection
from ladon.util.devices import device_of, input_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONFIG_FILE, WEIGHTS_FILE = EARLY_EXIT_FILES
FORMAT = "ladon-early-exit"
EPSILON = 1e-6
_AGAIN = "Remove the file, or train the heads again"


class EarlyExit(nn.Module):
    """A hidden state after decoder layer l, made into one for the target's output projection.

    n = scale * normalised(h) + shift, then n + down(SiLU(up(n))), where `down` starts at zero and scale and shift are
    those of the target's final norm: an untrained head is the target with its layers after l left out. With width W the
    parameters are up_weight [W, H], down_weight [H, W], scale and shift [H]: at W = H / 8 about a fiftieth of a layer.

    Attributes:
        layer: l, counted from 1, below `num_layers`.
        num_layers: L, the target's decoder layers.
        hidden_size: H.
        width: W.
        is_centred: whether the mean is taken off before normalising, as in a LayerNorm.
        training_record: how it was trained, as JSON values; saved with it.
    """

    def __init__(self, *, layer: int, num_layers: int, hidden_size: int, width: int, is_centred: bool = False) -> None:
        super().__init__()
        for name, value in (("hidden_size", hidden_size), ("width", width), ("num_layers", num_layers)):
            check_count(name, value)
        if not isinstance(layer, int) or isinstance(layer, bool) or not 1 <= layer < num_layers:
            allowed = f"1 to {num_layers - 1}" if num_layers > 1 else "a model with more layers"
            raise HeadsError(f"the early exit is after layer {layer!r} of {num_layers}; give {allowed}")
        self.layer, self.num_layers, self.hidden_size, self.width = layer, num_layers, hidden_size, width
        self.is_centred = is_centred
        self.training_record: dict[str, Any] = {}
        self.scale = nn.Parameter(torch.ones(hidden_size))
        self.shift = nn.Parameter(torch.zeros(hidden_size))
        self.up_weight = nn.Parameter(torch.empty(width, hidden_size))
        self.down_weight = nn.Parameter(torch.zeros(hidden_size, width))

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states after layer l, [..., H], to what the output projection takes, [..., H] in the same dtype."""
        wide = hidden if hidden.dtype == torch.float64 else hidden.float()
        if self.is_centred:
            wide = wide - wide.mean(-1, keepdim=True)
        normal = (wide * (wide.square().mean(-1, keepdim=True) + EPSILON).rsqrt()).to(hidden.dtype)
        start = normal * self.scale + self.shift
        inner = functional.silu(functional.linear(start, self.up_weight))
        return start + functional.linear(inner, self.down_weight)

    def save(self, folder: str | Path) -> None:
        """Write `early_exit.safetensors` and `early_exit.json` into the folder of the heads.

        Raises:
            HeadsError: the folder cannot be written to.
        """
        document = {
            **{name: getattr(self, name) for name in ("layer", "num_layers", "hidden_size", "width", "is_centred")},
            "training": self.training_record,
        }
        write_pair(Path(folder), WEIGHTS_FILE, self.state_dict(), CONFIG_FILE, FORMAT, document)


def new_early_exit(model: PreTrainedModel, layer: int, *, width: int | None = None, seed: int = 0) -> EarlyExit:
    """An untrained early-exit head for `model`, in its dtype and on the device of that layer.

    Args:
        model: the target; it is not changed.
        layer: after which it looks, from 1, below the number of layers.
        width: of its inner layer; H / 8 if left out.
        seed: decides the random start values.

    Raises:
        HeadsError: no such layer, or a width below 1.
        UnsupportedModelError: the model's layers cannot be found.
    """
    layers, hidden_size = decoder_layers(model), output_projection(model).hidden_size
    scale, shift, is_centred = final_norm(model, hidden_size)
    with torch.device("cpu"):  # whatever the default
        made = EarlyExit(
            layer=layer,
            num_layers=len(layers),
            hidden_size=hidden_size,
            width=max(1, hidden_size // 8) if width is None else width,
            is_centred=is_centred,
        ).float()
    with torch.no_grad():
        made.scale.copy_(scale)
        made.shift.copy_(shift)
        made.up_weight.copy_(seeded_normal(tuple(made.up_weight.shape), hidden_size**-0.5, seed))
    return _placed(made, model, layers)


def load_early_exit(path: str | Path, model: PreTrainedModel | None = None) -> EarlyExit | None:
    """The early-exit head in a folder of heads; None if there is none.

    Args:
        path: a folder or hub repository, as `load_heads` takes it.
        model: the target, to whose dtype and device it goes; None leaves it as it was saved.

    Raises:
        HeadsError: files are missing or damaged, or it was made for a model of other sizes.
    """
    folder = find_folder(path)
    if not (folder / CONFIG_FILE).exists() and not (folder / WEIGHTS_FILE).exists():
        return None
    made, training = _read_config(folder / CONFIG_FILE)
    tensors = read_tensors(
        folder, {name: tensor.shape for name, tensor in made.state_dict().items()}, WEIGHTS_FILE, CONFIG_FILE
    )
    made.load_state_dict(tensors, assign=True)
    made.training_record = training
    if model is None:
        return made
    layers, hidden_size = decoder_layers(model), output_projection(model).hidden_size
    if (made.num_layers, made.hidden_size) != (len(layers), hidden_size):
        raise HeadsError(
            f"the early exit in {folder} is for a model of {made.num_layers} layers of width {made.hidden_size}, this "
            f"one has {len(layers)} of width {hidden_size}. Load the model it was trained on"
        )
    return _placed(made, model, layers)


def _placed(made: EarlyExit, model: PreTrainedModel, layers: nn.ModuleList) -> EarlyExit:
    return made.to(device_of(layers[made.layer - 1]) or input_device(model), model.dtype)


def _read_config(path: Path) -> tuple[EarlyExit, dict[str, Any]]:
    """An empty head of the saved sizes, and its training record."""
    sizes = read_versioned(path, FORMAT, VERSION, _AGAIN)
    try:
        training = dict(sizes.pop("training"))
        with torch.device("meta"):
            return EarlyExit(**sizes), training
    except (TypeError, ValueError, KeyError) as error:
        raise HeadsError(f"{path} is damaged ({error}). {_AGAIN}") from error
