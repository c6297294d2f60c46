"""MTP modules: the layers that some models ship with to guess further tokens, as transformers loads them.

Multi-token prediction is DeepSeek-V3's (arXiv 2412.19437, section 2.2): module l is one decoder layer of the model. At
a token it reads that token's embedding and what module l - 1 (for the first: the model, after its final norm) made of
the token before, and guesses the token after. Unlike decoding heads it attends to all that stands before, so it keeps
keys and values of its own (`ladon.drafting.mtp`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import torch
import transformers
from torch import Tensor

from ladon.config import MTP, MTP_DEPTH
from ladon.errors import HeadsError
from ladon.heads.base import Heads
from ladon.heads.copies import Placement, shared_copy
from ladon.heads.model_parts import output_projection
from ladon.util.devices import input_device, is_offloaded

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import Cache, PreTrainedModel
    from transformers.modeling_layers import MtpModel
    from typing_extensions import Self


_OWN_MODULES = ("layers", "shared_post_norm")  # what the modules have beside what is the target's


class MtpHeads(Heads):
    """A model's MTP modules in the place of heads: depth k is guessed by module k.

    Depths beyond the last module are that module's again, its own last output standing for the one before it. The
    modules are the model's own: they are not saved, trained or calibrated here.

    Attributes:
        mtp: transformers' modules; embedding, output projection and rotary embedding in it are the target's.
        num_layers: M, the modules that are used.
    """

    family = MTP
    option_names = ("num_layers",)
    is_conditioned = True

    def __init__(self, model: PreTrainedModel, mtp: MtpModel, *, num_heads: int | None = None) -> None:
        """`mtp` has been made for `model`; `num_heads` as for `load_mtp`."""
        projection = output_projection(model)
        if num_heads is None:
            num_heads = max(len(mtp.layers), MTP_DEPTH)
        super().__init__(num_heads=num_heads, hidden_size=projection.hidden_size, vocab_size=projection.vocab_size)
        self.num_layers = min(len(mtp.layers), num_heads)
        self._mtp = (mtp.eval(),)  # in a tuple, as it has the target's modules among its own
        self.remember_base(model)
        self.bind(model, force=True)

    @property
    def mtp(self) -> MtpModel:
        """The modules."""
        return self._mtp[0]

    def bind(self, model: PreTrainedModel, force: bool = False) -> Self:
        """See `Heads.bind`: the modules take what they share with the target from this one, and follow it."""
        super().bind(model, force)
        mtp, device = self.mtp, _device_of(model)
        mtp.tie_with_main_model(model)
        mtp.config._attn_implementation = model.config.get_text_config(decoder=True)._attn_implementation
        for name, module in mtp.named_children():
            if name in _OWN_MODULES:
                module.to(device)
                if next(module.parameters()).dtype != model.dtype:  # some modules keep a few numbers in float32
                    module.to(model.dtype)
        return self

    def _copy(self, placement: Placement) -> Self:
        """See `Heads.bound`: the modules are copied with them, but not what these have of the target."""
        made = super()._copy(placement)
        mtp = shared_copy(self.mtp, lambda own: own)
        for name in _OWN_MODULES:
            module = getattr(mtp, name, None)
            if module is not None:  # some modules keep a few numbers in float32
                fits = next(module.parameters()).dtype == placement.dtype
                setattr(mtp, name, shared_copy(module, placement.without_dtype() if fits else placement))
        made._mtp = (mtp,)
        return made

    def run(self, layer: int, hidden: Tensor, tokens: Tensor, positions: Tensor, mask: Tensor, cache: Cache) -> Tensor:
        """One module over N tokens of each row.

        Args:
            layer: which module, from 0.
            hidden: what the module before, or the model, made of the token before each, [B, N, H].
            tokens: [B, N] int64.
            positions: of the tokens, [B, N] int64.
            mask: who sees which slot of the cache, [B, 1, N, S], in the form that the attention takes.
            cache: has room for the tokens; layer `layer` of it is the module's.

        Returns:
            What the module makes of them, [B, N, H]: `project` gives the logits of the tokens after them.
        """
        # transformers' own masks are those of one row with one path
        self.mtp.create_masks_for_mtp_layer = lambda *_: {"attention_mask": mask}
        found: Tensor = self.mtp.forward_layer(layer, hidden, positions, cache, input_ids=tokens)
        return found

    def forward(self, hidden: Tensor, following: Tensor | None = None) -> NoReturn:
        """Raise `HeadsError`: one hidden row is not enough."""
        raise HeadsError(
            "MTP modules read all the text before a guess: they draft in a Decoder, and cannot be run on single hidden "
            "states, to calibrate them or to find a fixed tree. Use other heads for that"
        )

    def initialise(self, model: PreTrainedModel, seed: int) -> NoReturn:
        """Raise `HeadsError`: they come trained."""
        raise HeadsError(
            "MTP modules come with their model and are not made anew; load them with ladon.load_mtp(model)"
        )

    def save(self, path: str | Path) -> NoReturn:
        """Raise `HeadsError`: they are part of the model's own checkpoint."""
        raise HeadsError(
            "MTP modules are saved with their model, not by themselves; load them with ladon.load_mtp(model)"
        )


def load_mtp(model: PreTrainedModel, num_heads: int | None = None) -> MtpHeads:
    """The MTP modules in a model's own checkpoint, for `Decoder(model, heads)`.

    Args:
        model: loaded with `from_pretrained`; transformers reads the modules from where the model came from.
        num_heads: K, how many tokens to guess. None: as many as there are modules, at least 3; the last module guesses
            all further ones.

    Raises:
        HeadsError: the model ships no modules, they cannot be read, or the installed transformers has no support.
    """
    name = type(model).__name__
    found = _mtp_class()
    if found is None:
        raise HeadsError(
            f"transformers {transformers.__version__} cannot load MTP modules; 5.23 can. Upgrade it, or use other heads"
        )
    if not getattr(model.config.get_text_config(decoder=True), "num_mtp_layers", None):
        raise HeadsError(
            f"{name} has no MTP modules that transformers can load (its config has no num_mtp_layers). Use other heads"
        )
    device = _device_of(model)
    try:
        mtp = found.from_pretrained(model, device_map={"": device})
    except Exception as error:  # transformers raises every kind, for every way in which a checkpoint can be wrong
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise HeadsError(
            f"cannot load the MTP modules of {name} from {model.config.name_or_path or 'nowhere'}: {reason} Load the "
            "model with from_pretrained from a checkpoint that holds them"
        ) from error
    return MtpHeads(model, mtp, num_heads=num_heads)


def _device_of(model: PreTrainedModel) -> torch.device:
    """Where the modules go; `HeadsError` for an offloaded model, which seems to be nowhere."""
    device = input_device(model)
    if device.type == "meta" or is_offloaded(model):
        raise HeadsError(
            f"the weights of {type(model).__name__} are offloaded, and MTP modules run beside them on one device. Load "
            "the model onto it whole, or use other heads"
        )
    return device


def _mtp_class() -> Any:
    """Transformers' class, None where it has none that runs layer by layer."""
    from transformers import modeling_layers

    found = getattr(modeling_layers, "MtpModel", None)
    return found if hasattr(found, "forward_layer") and hasattr(found, "create_masks_for_mtp_layer") else None
