"""Where along a sequence rows may share a forward, and how deep a tree may reach there.

Some models treat positions differently from some length on, and decide it for the whole call: `longrope` and
`dynamic` rotary embeddings choose their frequencies by the greatest position of a call, llama4 scales queries by
blocks of 8192 slots, and sparse attention keeps only the best `index_topk` keys (doge: `keep_window_size`), with ties
that fall as the width of the call has it. A regime is a stretch of positions on which a call
with many nodes and many rows equals plain decoding of each row alone. A tree never crosses the end of its regime, and
rows in different regimes are verified by different calls. Where nothing but plain decoding is exact, a regime is
`plain`: one position long, one node at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

# Their generate() computes the whole cache again, with the long frequencies, when a row reaches the switch.
_RECOMPUTING = ("phi3", "phimoe", "phi4_multimodal")


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeRegime:
    """Positions `start` to `stop` - 1; `stop` None: no end. `plain`: one-node trees only, at exact widths."""

    start: int = 0
    stop: int | None = None
    plain: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Rows that share a verify call."""

    regime: RopeRegime
    rows: list[int]


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefillGroup:
    """Prompts that share prefill calls.

    Attributes:
        rows: which of the prompts.
        start: how many tokens of each have been read.
        anchor: a position that every call must contain, so that the rotary embedding sees how long the prompt is.
        whole: the prompt goes in one call, because its parts would not see the same thing.
    """

    rows: list[int]
    start: int
    anchor: int | None
    whole: bool


class RopeRegimes:
    """The regimes of one model.

    Attributes:
        recomputed_at: lengths at which a row's cache must be computed again before it goes on.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        config = model.config.get_text_config(decoder=True)
        ropes = rope_parameters(config)
        self._switches = sorted(
            {rope["original_max_position_embeddings"] for rope in ropes if rope["rope_type"] == "longrope"}
        )
        dynamic = any("dynamic" in rope["rope_type"] for rope in ropes)
        self._dynamic_from = config.max_position_embeddings if dynamic else None
        self._sparse_from: int | None = getattr(config, "index_topk", None) or getattr(config, "keep_window_size", None)
        self._block: int | None = config.floor_scale if _scales_by_slot(config) else None
        self.recomputed_at = self._switches if model.config.model_type in _RECOMPUTING else []
        self._rotaries = [module for module in model.modules() if _frequencies(module)] if dynamic else []
        bounds = (self._dynamic_from, self._sparse_from, self._block)
        self._unbounded = not self._switches and all(bound is None for bound in bounds)

    def at(self, position: int) -> RopeRegime:
        """The regime that holds a position."""
        plain_from = min(
            (bound for bound in (self._dynamic_from, self._sparse_from) if bound is not None), default=None
        )
        if plain_from is not None and position >= plain_from:
            return RopeRegime(start=position, stop=position + 1, plain=True)
        start, stop = 0, plain_from
        for switch in self._switches:
            if switch <= position:
                start = max(start, switch)
            elif stop is None or switch < stop:
                stop = switch
        if self._block is not None:
            block = (position + 1) // self._block  # the scale is that of floor((position + 1) / block)
            start, stop = max(block * self._block - 1, 0), (block + 1) * self._block - 1
        return RopeRegime(start=start, stop=stop)

    def number_at(self, length: int) -> int | None:
        """How positions are treated in a prompt of this length; None: as in no other.

        Of two prompts of one regime, the longer one's keys and values begin with the shorter one's.
        """
        bounds = [bound for bound in (self._dynamic_from, self._sparse_from) if bound is not None]
        return None if any(length > bound for bound in bounds) else sum(switch < length for switch in self._switches)

    def kept_number(self, read: int, length: int) -> int | None:
        """The regime of a row's first `length` keys and values, of which `read` tokens are its prompt.

        A prompt that is half read has those of the whole one. None if they are of several, or of no other length's.
        """
        found = self.number_at(max(read, length))
        return found if self.recomputed_at or self.number_at(read) == found else None

    def depth_cap(self, length: int) -> int | None:
        """The greatest depth of a node whose root is at position `length`; None without a bound."""
        stop = None if self._unbounded else self.at(length).stop
        return None if stop is None else stop - 1 - length

    def parts(self, lengths: Sequence[int]) -> list[Part]:
        """Rows of these lengths, by the regime of their roots."""
        if self._unbounded:
            return [Part(regime=RopeRegime(), rows=list(range(len(lengths))))]
        found: dict[RopeRegime, list[int]] = {}
        for row, length in enumerate(lengths):
            found.setdefault(self.at(length), []).append(row)
        return [Part(regime=regime, rows=rows) for regime, rows in found.items()]

    def prefill_groups(self, lengths: Sequence[int], starts: Sequence[int]) -> list[PrefillGroup]:
        """Prompts of these lengths of which `starts` tokens have been read, by what their next calls have in common."""
        found: dict[tuple[int, int | None, int | None], list[int]] = {}
        for row, (length, start) in enumerate(zip(lengths, starts, strict=True)):
            if start == length:
                continue
            anchor = max((switch for switch in self._switches if switch < length), default=None)
            if self._dynamic_from is not None and length > self._dynamic_from:
                anchor = length - 1
            whole = length if self._sparse_from is not None and length > self._sparse_from else None
            found.setdefault((start, anchor, whole), []).append(row)
        return [
            PrefillGroup(rows=rows, start=start, anchor=anchor, whole=whole is not None)
            for (start, anchor, whole), rows in found.items()
        ]

    @contextmanager
    def fresh(self) -> Iterator[None]:
        """Let the next forward's dynamic frequencies depend on that forward alone, and leave none behind."""
        for module in self._rotaries:
            _reset(module)
        try:
            yield
        finally:
            for module in self._rotaries:
                _reset(module)


def rope_parameters(config: Any) -> list[dict[str, Any]]:
    """All rotary settings of a config: one for the model, or one per layer type."""
    given = getattr(config, "rope_parameters", None) or {}
    found = [given] if "rope_type" in given else list(given.values())
    return [rope for rope in found if isinstance(rope, dict) and rope.get("rope_type")]


def _scales_by_slot(config: Any) -> bool:
    """Whether queries are scaled by cache slot instead of position id (llama4's layers without rotary embedding)."""
    return bool(getattr(config, "attn_temperature_tuning", False)) and not all(getattr(config, "no_rope_layers", [1]))


def _frequencies(module: nn.Module) -> list[str]:
    """Names of the frequency buffers that a dynamic rotary embedding keeps the originals of."""
    names = [*module._buffers, *vars(module)]
    return [name.replace("original_", "") for name in names if name.endswith("original_inv_freq")]


def _reset(module: nn.Module) -> None:
    """Put a rotary embedding back to what it was when the model was loaded."""
    for name in _frequencies(module):
        original = name.replace("inv_freq", "original_inv_freq")
        setattr(module, name, getattr(module, original).clone())
    for name in [name for name in vars(module) if name.endswith("max_seq_len_cached")]:
        setattr(module, name, module.original_max_seq_len)
