"""The front door: `Decoder`, and `attach` for code that only knows `model.generate`.

Preparing inputs, limits and stop rules is left to transformers' own `generate`, which then calls the decoder through
`custom_generate`. Two things it drops on the way are carried around it here: the streamer, and the tokenizer that stop
strings need.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ladon.config import AUTO_BUDGET, TREES, DecoderOptions
from ladon.engine import Engine, Row
from ladon.errors import InputError, TreeError
from ladon.fixed_tree import FixedTree
from ladon.heads import Heads
from ladon.proposers import HeadsProposer, Proposer, RootProposer, candidates_needed, tree_builder
from ladon.requests import make_rows, pack_output, refuse_unsupported, stop_string_rule
from ladon.stats import DecodeStats, StageClock
from ladon.target import Target
from ladon.trace import Trace

if TYPE_CHECKING:
    from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
    from transformers.generation.utils import GenerateDecoderOnlyOutput

_DEFAULTS = DecoderOptions()


class Decoder:
    """Decodes with a target model and, if given, heads that draft token trees for it.

    Greedy output equals `transformers` greedy `generate`. One call at a time per model: while a call runs, hooks sit on
    the model's output projection; between calls the model is as it was.

    Attributes:
        stats: counts and times of the last call.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        heads: Heads | None = None,
        *,
        tree: str | FixedTree = _DEFAULTS.tree,
        budget: int | str = _DEFAULTS.budget,
        num_candidates: int = _DEFAULTS.num_candidates,
        profile: bool = False,
    ) -> None:
        """Check the model and the options.

        Args:
            model: any causal language model of transformers whose cache can roll back.
            heads: decoding heads for it; None decodes plainly.
            tree: "dynamic" (grown anew at each step from the heads' joint probabilities), "chain" (each head's best
                token), "off" (plain decoding) or a `FixedTree`. A model that verifies chains but no trees (its
                self-test says so) gets the chain instead of the dynamic tree.
            budget: nodes verified per step and row, root included; "auto" is 16 until sizes are chosen from measured
                cost. A fixed tree has its own size, and a smaller budget cuts it.
            num_candidates: candidates kept per head.
            profile: measure time by stage (waits for the device at each stage).

        Raises:
            UnsupportedModelError: the model cannot verify a tree exactly.
            HeadsError: the heads do not belong to the model.
            TreeError: an unknown tree option, a budget below 1, or a fixed tree that the heads cannot fill or that
                branches where the model verifies chains only.
        """
        self._tree = _check_tree_option(tree, heads, num_candidates)
        self._budget = _check_budget(budget, self._tree)
        self._num_candidates = num_candidates
        self._profile = profile
        self.model = model
        self.heads = None if heads is None else heads.bind(model)
        self._target = Target(model)
        if heads is not None and not self._target.supports_trees:
            self._tree = _as_chain(self._tree)
        self.stats = DecodeStats()

    def generate(self, input_ids: Tensor | None = None, **kwargs: Any) -> Tensor | GenerateDecoderOnlyOutput:
        """What `model.generate` returns, with fewer forwards.

        Args:
            input_ids: prompts, [B, T] int64, padded on the left or right as `attention_mask` says.
            **kwargs: `generate`'s options: `attention_mask`, `max_new_tokens`, `max_length`, `eos_token_id`,
                `stopping_criteria` (called as if tokens came one at a time, each row alone), `stop_strings` with
                `tokenizer`, `streamer`, `return_dict_in_generate`, `num_return_sequences`, `generation_config`.

        Returns:
            Sequences [B, T + new], padded on the right after a row's end; or transformers' output object.

        Raises:
            InputError: an empty prompt, one at or past the context limit, no room for a token, or an option that is
                not supported.
        """
        inputs = kwargs.pop("inputs", None)
        input_ids = inputs if input_ids is None else input_ids
        if input_ids is None:
            raise InputError("there is no prompt; give input_ids")
        _check_request(input_ids, kwargs.get("max_new_tokens"))
        copies = kwargs.pop("num_return_sequences", None) or 1
        if copies > 1:  # greedy generate refuses this; rows are then equal, as they must be
            input_ids = input_ids.repeat_interleave(copies, 0)
            if kwargs.get("attention_mask") is not None:
                kwargs["attention_mask"] = kwargs["attention_mask"].repeat_interleave(copies, 0)
        criteria = list(kwargs.pop("stopping_criteria", None) or [])
        tokenizer, stop_strings = kwargs.pop("tokenizer", None), kwargs.pop("stop_strings", None)
        if stop_strings is not None:
            criteria.append(stop_string_rule(stop_strings, tokenizer))
        streamer = kwargs.pop("streamer", None)
        return _own_generate(self.model)(
            input_ids,
            custom_generate=self,
            ladon_streamer=streamer,
            stopping_criteria=criteria,
            **kwargs,
        )

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        generation_config: GenerationConfig | None = None,
        ladon_streamer: Any = None,
        **model_kwargs: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        """What `model.generate(..., custom_generate=decoder)` calls, with inputs prepared.

        transformers drops `streamer` and `tokenizer` before a `custom_generate` callable is called: an iterator
        streamer given there waits for ever, and stop strings raise. Use `Decoder.generate` or `attach` for those.
        """
        if model is not self.model:
            raise InputError("this decoder was made for another model; make one with ladon.Decoder(model, heads)")
        assert generation_config is not None
        rows = self._rows(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs)
        if ladon_streamer is not None and len(input_ids) > 1:
            raise InputError(f"a streamer shows one sequence, but there are {len(input_ids)}; give one prompt")
        if ladon_streamer is not None:
            ladon_streamer.put(input_ids.cpu())
        for step in self._engine().run(rows):
            if ladon_streamer is not None:
                ladon_streamer.put(torch.tensor(step.emitted[0]))
        if ladon_streamer is not None:
            ladon_streamer.end()
        return pack_output(input_ids, rows, generation_config)

    def trace(
        self, input_ids: Tensor, *, max_new_tokens: int, eos_token_id: int | Sequence[int] | None = None
    ) -> Trace:
        """Decode one sequence greedily and record every step's tree. Reads whole trees from the device: slower.

        Args:
            input_ids: one prompt, [T] or [1, T].
            max_new_tokens: how many tokens to emit at most, the prefill's token (the first root) included.
            eos_token_id: tokens that end the sequence; the model's own if None.

        Returns:
            The prefill's token, and an iterator over the decode steps, each made when it is asked for.

        Raises:
            InputError: what `generate` refuses, the options in the model's generation config included.
        """
        prompt = input_ids.reshape(1, -1)
        _check_request(prompt, max_new_tokens)
        options = {} if eos_token_id is None else {"eos_token_id": eos_token_id}
        rows = _own_generate(self.model)(
            prompt,
            custom_generate=self._rows,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            **options,
        )
        return Trace(self._engine().run(rows), prompt.shape[1])

    def _rows(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList | None,
        stopping_criteria: StoppingCriteriaList | None,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> list[Row]:
        """The rows of a call that transformers has prepared; what is not supported is refused."""
        refuse_unsupported(generation_config, logits_processor, model_kwargs)
        mask, limit = model_kwargs.get("attention_mask"), self._target.context_limit
        return make_rows(input_ids, mask, stopping_criteria, generation_config, limit)

    def _engine(self) -> Engine:
        """An engine for one call, with statistics of its own."""
        self.stats = DecodeStats()
        clock = StageClock(self.stats.stage_seconds, enabled=self._profile, device=self._target.device)
        return Engine(self._target, self._proposer(clock), budget=self._budget, stats=self.stats, clock=clock)

    def _proposer(self, clock: StageClock) -> Proposer:
        if self.heads is None or self._tree == "off":
            return RootProposer()
        num_candidates = candidates_needed(self._tree, self._num_candidates, self._budget)
        return HeadsProposer(self.heads, tree_builder(self._tree), num_candidates, clock)


def attach(model: PreTrainedModel, heads: Heads | None = None, **options: Any) -> Decoder:
    """Make `model.generate` decode with trees, for pipelines and any code that calls it; `detach` undoes it.

    Args:
        model: the model; only this instance changes.
        heads: its decoding heads.
        **options: as `Decoder` takes them.

    Returns:
        The decoder, whose `stats` tell about the last call.
    """
    decoder = Decoder(model, heads, **options)

    def generate(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("custom_generate") is not None:
            return _own_generate(model)(*args, **kwargs)
        return decoder.generate(*args, **kwargs)

    vars(model)["generate"] = generate
    return decoder


def detach(model: PreTrainedModel) -> None:
    """Give `model` its own `generate` back; nothing happens if `attach` was not called."""
    vars(model).pop("generate", None)


def _own_generate(model: PreTrainedModel) -> Callable[..., Any]:
    """The class's `generate`, whatever `attach` has put on the instance."""
    own: Callable[..., Any] = type(model).generate
    return partial(own, model)


def _check_request(input_ids: Tensor, max_new_tokens: int | None) -> None:
    """Raise `InputError` for what transformers would report in its own way."""
    if input_ids.numel() == 0:
        raise InputError("the prompt is empty; give at least one token")
    if max_new_tokens is not None and max_new_tokens < 1:
        raise InputError(f"max_new_tokens is {max_new_tokens}; ask for 1 or more")


def _check_tree_option(tree: str | FixedTree, heads: Heads | None, num_candidates: int) -> str | FixedTree:
    if isinstance(tree, FixedTree):
        if heads is not None:
            tree.check_fits(heads.num_heads, num_candidates)
        return tree
    if tree not in TREES:
        names = ", ".join(f'"{name}"' for name in TREES)
        raise TreeError(f"tree is {tree!r}; give {names} or a ladon.FixedTree")
    return tree


def _as_chain(tree: str | FixedTree) -> str | FixedTree:
    """The option for a model that verifies chains only; a fixed tree that branches would not be exact there."""
    if isinstance(tree, FixedTree) and tree.num_nodes > tree.max_depth + 1:
        raise TreeError('this model verifies chains only, and the fixed tree branches; give tree="chain"')
    return "chain" if tree == "dynamic" else tree


def _check_budget(budget: int | str, tree: str | FixedTree) -> int:
    if budget == "auto":
        return tree.num_nodes if isinstance(tree, FixedTree) else AUTO_BUDGET
    if isinstance(budget, bool) or not isinstance(budget, int) or budget < 1:
        raise TreeError(f'budget is {budget!r}; give "auto" or a number of nodes, 1 or more (the root is one of them)')
    return budget
