"""Which layout a checkpoint has, by its keys and shapes; config.json is a hint for what these do not tell."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ladon.errors import HeadsError
from ladon.heads.base import Heads
from ladon.heads.fingerprint import agreement, differing, fingerprint
from ladon.heads.formats import hydra, medusa
from ladon.heads.formats.files import Checkpoint
from ladon.heads.formats.keys import Layout, Parts, some, sort_keys
from ladon.heads.formats.whole import whole_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LAYOUTS = (*medusa.LAYOUTS, hydra.LAYOUT)


@dataclass(frozen=True)
class Found:
    """A checkpoint and what its keys mean.

    Attributes:
        checkpoint: the files.
        layout: whose layout it is.
        parts: what each key is.
    """

    checkpoint: Checkpoint
    layout: Layout
    parts: Parts

    @property
    def holds_model(self) -> bool:
        """Whether the base model lies beside the heads, in transformers' format."""
        return self.layout.is_whole and bool(self.parts.beside)

    def heads(self, vocab_size: int | None = None) -> Heads:
        """The heads, unbound, in the file's dtype, with what the files tell about their base.

        Args:
            vocab_size: V of the target, if it is known; needed where the file does not tell.
        """
        build = hydra.build if self.layout is hydra.LAYOUT else medusa.build
        heads: Heads = build(self.checkpoint, self.layout, self.parts, vocab_size)
        if self.holds_model:
            heads.base_name = str(self.checkpoint.name)
            heads.base_fingerprint = whole_fingerprint(self.checkpoint)
        else:
            heads.base_name = str(self.checkpoint.config.get("base_model_name_or_path") or "")
        _warn_of_broken_numbers(self.checkpoint.name, heads)
        return heads

    def refuse_other_base(self, heads: Heads, model: PreTrainedModel) -> None:
        """Raise `HeadsError` if the heads lie in a whole model, and `model` is another one."""
        if not self.holds_model or heads.base_fingerprint is None:
            return
        wrong = differing(agreement(heads.base_fingerprint, fingerprint(model)))
        if wrong:
            raise HeadsError(
                f"{self.checkpoint.name} holds heads together with their own model, and this is another one (samples "
                f"that agree: {', '.join(wrong)}). Split it: ladon import {self.checkpoint.name} --out DIR, then use "
                "DIR/model with DIR/heads"
            )


def detect(checkpoint: Checkpoint) -> Found:
    """What a checkpoint is.

    Raises:
        HeadsError: no known layout, several at once, or keys that the layout does not have.
    """
    name, keys = checkpoint.name, list(checkpoint.slots)
    if any(key.startswith("hydra_") for key in keys):
        hydra.refuse_other_archs(name, checkpoint.config, keys)
    found = [Found(checkpoint, layout, sort_keys(layout, keys)) for layout in LAYOUTS]
    found = [each for each in found if each.parts.blocks]
    if not found:
        raise HeadsError(
            f"{name} is no known format of heads. Found {len(keys)} tensors: {some(keys) or 'none'}. Known: Ladon's "
            f"own, {', '.join(layout.name for layout in LAYOUTS)}"
        )
    if len(found) > 1:
        each_one = " and ".join(f"{each.layout.name} ({next(iter(each.parts.blocks.values()))})" for each in found)
        raise HeadsError(f"{name} mixes layouts: {each_one}. Keep the tensors of one")
    parts = found[0].parts
    if parts.unknown:
        raise HeadsError(
            f"{name} has the layout {found[0].layout.name}, and tensors that are no part of it: {some(parts.unknown)}. "
            "Nothing is left out silently; remove them, or name the format in an issue"
        )
    return found[0]


def _warn_of_broken_numbers(name: str, heads: Heads) -> None:
    broken = [key for key, tensor in heads.state_dict().items() if not tensor.isfinite().all()]
    if broken:
        warnings.warn(
            f"{name}: {', '.join(broken)} hold NaN or infinite numbers; such heads guess nothing", stacklevel=3
        )
