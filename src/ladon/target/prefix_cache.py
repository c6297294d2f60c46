"""What a decoded sequence leaves behind: its tokens with their keys and values, copied out of the cache.

A later prompt that begins with the same tokens starts from there, and only the rest of it is read. The copy is the
sequence's own: engines use their buffers again, and what has been kept is never written to.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

from torch import Tensor, nn

from ladon.errors import InputError
from ladon.target.additions import Additions
from ladon.util.devices import arithmetic, input_device, offloading

Stores = Sequence[Mapping[str, Tensor]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Maker:
    """A model as it was at some time.

    That is: its weights' places in memory, how often they had been written to, and how it computed. Weights changed in
    place through `.data`, and offloaded ones, look as before. `additions` are its adapters and what else others have
    put in; None with hooks on it, whose work may change unseen: then it is never again what it was.
    """

    model: weakref.ref[nn.Module]
    weights: int
    arithmetic: tuple[str, ...]
    additions: int | None

    @classmethod
    def of(cls, model: nn.Module) -> Maker:
        """`model` as it is now. Does not read the device."""
        weights = [_state(module, own) for module in model.modules() for own in module._parameters.values()]
        return cls(
            model=weakref.ref(model),
            weights=hash(tuple(weights)),
            arithmetic=arithmetic(input_device(model)),
            additions=Additions.of(model).mark,
        )

    def goes_on(self, now: Maker) -> bool:
        """Whether what was made then can be gone on from now."""
        return self == now and now.additions is not None


def _state(module: nn.Module, parameter: Tensor | None) -> tuple[int, int]:
    """Where a parameter of a module is, and how often it was written to; for an offloaded one, who holds it."""
    holder = offloading(module)
    if parameter is None or holder is not None:
        return id(holder), 0
    return parameter.data_ptr(), 0 if parameter.is_inference() else parameter._version


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class KeptPrefix:
    """The leading tokens of a sequence, with their keys and values.

    Attributes:
        token_ids: T of them.
        stores: of each layer of the cache, by name: [parts, heads, T, D] on the model's device.
        regime: how the model treats positions in sequences of this length (`ladon.target.rope_regimes`).
        maker: the model.
    """

    token_ids: Sequence[int]
    stores: Stores
    regime: int
    maker: Maker

    def __len__(self) -> int:
        """T, the number of tokens."""
        return len(self.token_ids)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return sum(states.nbytes for layer in self.stores for states in layer.values())

    def shared(self, token_ids: Sequence[int]) -> int:
        """How many leading tokens are those of another sequence too."""
        pairs = zip(self.token_ids, token_ids, strict=False)
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))

    def first(self, count: int) -> KeptPrefix:
        """The same up to `count` tokens; nothing is copied."""
        stores = [{name: states[:, :, :count] for name, states in layer.items()} for layer in self.stores]
        return replace(self, token_ids=self.token_ids[:count], stores=stores)

    def check(self, model: nn.Module) -> None:
        """Raise `InputError` unless `model` is what made this, and is as it was; with hooks on it nobody goes on."""
        if self.maker.model() is not model:
            raise InputError("past_key_values come from another model object; give them to the model that made them")
        now = Maker.of(model)
        if self.maker != now and now.additions is not None:
            what = "adapters, hooks or layers have"
            if self.maker.weights != now.weights:
                what = "weights have"
            elif self.maker.arithmetic != now.arithmetic:
                what = "arithmetic (autocast, float32 precision) has"
            raise InputError(
                f"the model's {what} changed since past_key_values were made; leave past_key_values out, and the "
                "prompt is read anew"
            )


class KeptCache:
    """`past_key_values` of a call's output, for the next call.

    Give it back with longer or other prompts, each whole: a prompt starts from the sequence with which it has the most
    leading tokens in common.

    Attributes:
        rows: the sequences that have been decoded, in the order of their prompts.
    """

    def __init__(self, rows: Sequence[KeptPrefix]) -> None:
        self.rows = tuple(rows)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return sum(row.nbytes for row in self.rows)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """0, for transformers' `generate`, which asks how much of the prompt it need not prepare: none of it."""
        return 0


def longest_past(pasts: Sequence[KeptPrefix], token_ids: Sequence[int]) -> KeptPrefix | None:
    """The past that shares most with a prompt, cut to what they share; None if that is nothing.

    The prompt's last token is never part of it: what the model says after it has to be asked.
    """
    counts = [past.shared(token_ids[:-1]) for past in pasts]
    longest = max(counts, default=0)
    return pasts[counts.index(longest)].first(longest) if longest else None
