"""transformers' logits processors at every node of a tree: each node is shown its own prefix.

A processor turns the scores after a prefix into others. Those that look at the scores alone run over all nodes in one
call. Those that look at the prefix run by row and depth, where prefixes have one length. Both kinds are known by their
class, a subclass not included. Code of the user's is asked about no prefix that is not said: that of
`prefix_allowed_tokens_fn`, and a class that declares `stateless = True`, go along the accepted path
(`ladon.sampling.sampler`). Any other class may keep count of its calls: its row is decoded plainly, one node and one
call for each emitted token.

Shapes: b rows, N nodes, V vocabulary, m nodes of one prefix length T.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from copy import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ladon.errors import InputError
from ladon.sampling.sampling_params import Context, Nodes
from ladon.trees.transfer import to_host

if TYPE_CHECKING:
    from transformers import LogitsProcessorList

_BY_SCORES = {
    "TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper", "TopHLogitsWarper", "MinPLogitsWarper",
    "TypicalLogitsWarper", "EpsilonLogitsWarper", "EtaLogitsWarper", "SuppressTokensLogitsProcessor",
    "InfNanRemoveLogitsProcessor", "LogitNormalization",
}  # fmt: skip
_BY_PREFIX = {
    "MinLengthLogitsProcessor", "MinNewTokensLengthLogitsProcessor", "RepetitionPenaltyLogitsProcessor",
    "EncoderRepetitionPenaltyLogitsProcessor", "NoRepeatNGramLogitsProcessor", "EncoderNoRepeatNGramLogitsProcessor",
    "SequenceBiasLogitsProcessor", "NoBadWordsLogitsProcessor", "PrefixConstrainedLogitsProcessor",
    "ForcedBOSTokenLogitsProcessor", "ForcedEOSTokenLogitsProcessor", "ExponentialDecayLengthPenalty",
    "SuppressTokensAtBeginLogitsProcessor", "WatermarkLogitsProcessor",
}  # fmt: skip
_CALLBACK = "PrefixConstrainedLogitsProcessor"


class Processors:
    """The processors of one call of `generate`, in their order.

    Attributes:
        is_plain: whether one of them must be called once per emitted token.
        reads: whether one of them looks at the prefix.
        asks: whether one of them is, or calls, code of the user's.
    """

    def __init__(self, processors: LogitsProcessorList | Sequence[Any]) -> None:
        self._processors = list(processors)
        self._by_scores = [_is_of(processor, _BY_SCORES) for processor in self._processors]
        users = [processor for processor in self._processors if not _is_of(processor, _BY_SCORES | _BY_PREFIX)]
        unknown = [
            type(processor).__name__ for processor in users if getattr(processor, "stateless", False) is not True
        ]
        self.is_plain, self.reads = bool(unknown), not all(self._by_scores)
        self.asks = bool(users) or any(_is_of(processor, {_CALLBACK}) for processor in self._processors)
        self.unknown = ", ".join(unknown)

    def check_rows(self, num_rows: int) -> None:
        """Warn that rows are decoded plainly, if they are; raise `InputError` if there are several of them."""
        if not self.is_plain:
            return
        if num_rows > 1:
            raise InputError(
                f"{self.unknown} may keep state from call to call, and rows are not decoded in step: give one prompt "
                "at a time, or declare `stateless = True` in the class if it keeps nothing between calls"
            )
        warnings.warn(
            f"{self.unknown} may keep state from call to call: decoding plainly, one token per forward. Declare "
            "`stateless = True` in the class if it keeps nothing between calls",
            stacklevel=2,
        )

    def __call__(self, scores: Tensor, context: Context, nodes: Nodes) -> Tensor:
        """Processed scores after each node, [b, N, V]; those of padding mean nothing. `scores` may be overwritten."""
        groups = None
        for processor, by_scores in zip(self._processors, self._by_scores, strict=True):
            if by_scores:
                flat = processor(nodes.tree.tokens.reshape(-1, 1), scores.flatten(0, 1))
                scores = flat.view_as(scores)
            else:
                groups = groups or _prefix_groups(context, nodes)
                scores = self._by_groups(processor, scores, context, groups)
        return scores

    def _by_groups(self, processor: Any, scores: Tensor, context: Context, groups: list[_Group]) -> Tensor:
        found = scores.clone()
        for place, index, prefixes in groups:
            own, given = _for_row(processor, context.rows[place].number, len(index)), scores[place, index]
            made = own(prefixes, given)
            if made.shape != given.shape:
                raise InputError(
                    f"{type(processor).__name__} gave scores of shape {list(made.shape)} for {list(given.shape)}: it "
                    "is called with one row of the batch at a time. Give one prompt at a time"
                )
            found[place, index] = made.to(scores.dtype)
        return found


_Group = tuple[int, Tensor, Tensor]  # a row's place; its nodes of one depth [m]; their prefixes [m, T]


def _is_of(processor: Any, names: set[str]) -> bool:
    kind = type(processor)
    return kind.__name__ in names and kind.__module__ == "transformers.generation.logits_process"


def _prefix_groups(context: Context, nodes: Nodes) -> list[_Group]:
    """The real nodes by row and depth. Reads the device."""
    assert context.prefixes is not None  # who has such processors `reads`
    tree, depths = nodes.tree, nodes.depths
    paths = _paths(nodes, depths)
    of_nodes = to_host(torch.where(tree.log_probs > -torch.inf, depths, -1))
    groups = []
    for place, prefix in enumerate(context.prefixes):
        for depth in range(tree.max_depth + 1):
            mine = [node for node, own in enumerate(of_nodes[place]) if own == depth]
            if mine:
                index = torch.tensor(mine, device=prefix.device)
                path = paths[place, index, :depth].to(prefix.dtype)
                groups.append((place, index, torch.cat([prefix.expand(len(mine), -1), path], dim=1)))
    return groups


def _paths(nodes: Nodes, depths: Tensor) -> Tensor:
    """The tokens on the way to each node, from depth 1 on, [b, N, D]; meaningless beyond its own depth."""
    tree, found = nodes.tree, []
    for depth in range(1, tree.max_depth + 1):
        at_depth = nodes.ancestors & (depths == depth)[:, None]
        found.append(tree.tokens.gather(1, at_depth.int().argmax(-1)))
    return torch.stack(found, dim=-1) if found else tree.tokens[:, :, None][:, :, :0]


def _for_row(processor: Any, number: int, num_nodes: int) -> Any:
    """The processor as it treats row `number` of the call's batch, for so many prefixes of that row."""
    name = type(processor).__name__
    if name == _CALLBACK:
        own, allowed = copy(processor), processor._prefix_allowed_tokens_fn
        own._prefix_allowed_tokens_fn, own._num_beams = lambda _, ids: allowed(number, ids), 1
        return own
    if name == "RepetitionPenaltyLogitsProcessor" and isinstance(
        getattr(processor, "prompt_ignore_length", None), Tensor
    ):
        own = copy(processor)
        own.prompt_ignore_length = processor.prompt_ignore_length[number].expand(num_nodes)
        return own
    if name == "EncoderRepetitionPenaltyLogitsProcessor":
        own = copy(processor)
        own.encoder_input_ids = processor.encoder_input_ids[number].expand(num_nodes, -1)
        return own
    if name == "EncoderNoRepeatNGramLogitsProcessor":
        own = copy(processor)
        own.generated_ngrams, own.batch_size = [processor.generated_ngrams[number]], 1
        return own
    return processor


class ProcessedSampling:
    """The law of `generate`: processors, then the greatest score or a draw.

    Attributes:
        draws: whether tokens are sampled.
        reads: whether a processor looks at the prefix.
        is_plain: whether a processor must be called once per emitted token.
        asks: whether a processor is, or calls, code of the user's.
    """

    def __init__(self, processors: Processors, *, draws: bool) -> None:
        self._processors, self.draws = processors, draws
        self.reads, self.is_plain, self.asks = processors.reads, processors.is_plain, processors.asks

    def scores(self, logits: Tensor, context: Context, nodes: Nodes) -> Tensor:
        """The processed scores, in float32 as in `generate`, or in float64 where a draw needs more."""
        exact = self.draws and logits.dtype == torch.float64
        return self._processors(logits.to(torch.float64 if exact else torch.float32, copy=True), context, nodes)
