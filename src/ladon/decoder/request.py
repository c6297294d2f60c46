"""From `generate`'s arguments to rows, and from rows to what `generate` returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial, wraps
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ladon.constraints.llguidance_backend import Grammar
from ladon.constraints.state import Constraint, GrammarState, row_constraints
from ladon.decoder.preparation import is_of_library
from ladon.decoder.refused import UNSET, refuse_options
from ladon.decoder.stopping import Judge, StopRules, stop_string_rule
from ladon.engine.sequence import Row
from ladon.errors import InputError, LadonError, UnsupportedModelError
from ladon.heads.wrapped import unwrapped
from ladon.sampling.gumbel import row_seeds
from ladon.sampling.logits_processors import ProcessedSampling, Processors
from ladon.sampling.sampling_params import GREEDY, SamplingParams
from ladon.target.prefix_cache import KeptCache, KeptPrefix, longest_past

if TYPE_CHECKING:
    from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList

# Model inputs that say how `generate` computes, not what; the mask and the position ids are read.
_NEUTRAL_INPUTS = {
    "attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep", "cache_position",
}  # fmt: skip
_TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """A call of `generate`, prepared.

    Attributes:
        input_ids: the prompts as they are returned, [B, T], padding included.
        rows: one for each prompt.
        config: the merged generation config.
        judges: of its rows' stopping criteria.
    """

    input_ids: Tensor
    rows: list[Row]
    config: GenerationConfig
    judges: list[Judge]

    @property
    def pad_id(self) -> int:
        """What stands after a row's end."""
        return pad_id_of(self.config)


def merged_option(model: PreTrainedModel, options: dict[str, Any], name: str) -> Any:
    """An option as `generate` merges it: the call's own, else that of its `generation_config`, else the model's."""
    if name in options:
        return options[name]
    configs = (options.get("generation_config"), model.generation_config)
    values = (getattr(config, name, None) for config in configs)
    return next((value for value in values if value is not None), None)


def expand_copies(model: PreTrainedModel, input_ids: Tensor, options: dict[str, Any]) -> Tensor:
    """Prompts [B, T] repeated as often as `num_return_sequences` asks, [B * copies, T].

    `options` changes with them, and no longer asks for copies: greedy `generate` refuses those, wherever it finds them.
    Greedy rows of one prompt are equal, as they must be.
    """
    from transformers import GenerationConfig

    name, config = "num_return_sequences", options.get("generation_config")
    copies = merged_option(model, options, name) or 1
    if merged_option(model, {"generation_config": config}, name) not in (None, 1):
        options["generation_config"] = GenerationConfig() if config is None else deepcopy(config)
        options["generation_config"].num_return_sequences = 1
    if copies == 1:
        return input_ids
    options[name] = 1
    for per_row in ("attention_mask", "position_ids", *_TOKEN_TYPES):
        if options.get(per_row) is not None:
            options[per_row] = options[per_row].repeat_interleave(copies, 0)
    return input_ids.repeat_interleave(copies, 0)


def call_options(
    model: PreTrainedModel, input_ids: Any, options: dict[str, Any], criteria: Sequence[Any]
) -> tuple[Tensor, dict[str, Any]]:
    """Prompts and options of a call, checked, as transformers can prepare them.

    What it would drop before it calls a `custom_generate`, or refuse there, is put in other terms: stop strings become
    one of the stopping criteria, copies become prompts.

    Raises:
        InputError: the prompt or an option cannot be used.
    """
    input_ids = options.pop("inputs", None) if input_ids is None else input_ids
    check_prompt(input_ids, options.get("attention_mask"), merged_option(model, options, "max_new_tokens"))
    kept_rows(options.get("past_key_values"))
    refuse_options(partial(merged_option, model, options), len(input_ids))  # (transformers may fail at them first)
    if options.pop("assistant_model", None) is not None:
        raise InputError("assistant_model is not supported: Ladon's heads do its work; leave it out")
    rules, tokenizer = list(criteria), options.pop("tokenizer", None)
    stop_strings = merged_option(model, options, "stop_strings")
    if stop_strings is not None:
        rules.append(stop_string_rule(stop_strings, tokenizer))
        options["stop_strings"] = None  # the criterion stands for them
    input_ids = expand_copies(model, input_ids, options)
    if merged_option(model, options, "token_healing"):
        input_ids = _healed(model, input_ids, options, tokenizer)
    return input_ids, {**options, "stopping_criteria": rules}


def _healed(model: PreTrainedModel, input_ids: Tensor, options: dict[str, Any], tokenizer: Any) -> Tensor:
    """Prompts [B, T] with their last tokens chosen anew, as `token_healing` of transformers does it; T may change.

    It decodes one token of each prompt. `options` change: they no longer ask for it, and the mask is that of the healed
    prompts, of which transformers makes none anew: what it would find padded in the prompts as they were stays padded.
    """
    if tokenizer is None:
        raise InputError("token_healing needs the tokenizer; pass tokenizer=... as well")
    if tokenizer.bos_token is None or tokenizer.pad_token is None:
        raise InputError(
            "token_healing needs a tokenizer with bos_token and pad_token, and this one has "
            f"{tokenizer.bos_token!r} and {tokenizer.pad_token!r}; set what is missing"
        )
    options["token_healing"] = False
    mask = prepared_by_generate(model, input_ids, lambda *_, **made: made.get("attention_mask"), dict(options))
    healed: Tensor = model.heal_tokens(input_ids, tokenizer)
    if mask is not None and mask.shape != healed.shape:
        raise InputError(
            f"token_healing makes prompts of {input_ids.shape[1]} tokens into {healed.shape[1]}, and their mask no "
            "longer fits; strip the spaces from their ends, or give one prompt at a time"
        )
    options["attention_mask"] = torch.ones_like(healed) if mask is None else mask
    check_prompt(healed, options["attention_mask"], None)
    return healed


def left_padded(prompts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Prompts [T] as `generate` takes them: ids and attention mask, [B, T], padded on the left."""
    ids, mask = (
        nn.utils.rnn.pad_sequence([row.flip(0) for row in rows], batch_first=True).flip(1)
        for rows in (prompts, [torch.ones_like(prompt) for prompt in prompts])
    )
    return ids, mask


def check_prompt(input_ids: Any, attention_mask: Tensor | None, max_new_tokens: Any) -> None:
    """Raise `InputError` for what transformers would report in its own way, or not at all.

    Args:
        input_ids: must be [B, T] integers, T at least 1.
        attention_mask: must be [B, T] too, if given.
        max_new_tokens: must be at least 1, if given.
    """
    if input_ids is None:
        raise InputError("there is no prompt; give input_ids (inputs_embeds is not supported)")
    if not isinstance(input_ids, Tensor) or input_ids.dtype not in (torch.int64, torch.int32):
        kind = input_ids.dtype if isinstance(input_ids, Tensor) else type(input_ids).__name__
        raise InputError(f"the prompt is {kind}; give token ids as an int64 tensor [B, T]")
    if input_ids.numel() == 0:
        raise InputError("the prompt is empty; give at least one token")
    if input_ids.ndim != 2:
        raise InputError(f"the prompt has shape {list(input_ids.shape)}, not [B, T]; for one prompt, input_ids[None]")
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise InputError(
            f"the attention mask has shape {list(attention_mask.shape)}, the prompt {list(input_ids.shape)}; give one "
            "number for each token"
        )
    if max_new_tokens is not None and not (isinstance(max_new_tokens, Integral) and int(max_new_tokens) >= 1):
        raise InputError(f"max_new_tokens is {max_new_tokens!r}; ask for 1 or more")


def refuse_unsupported(
    input_ids: Tensor, config: GenerationConfig, model_kwargs: dict[str, Any], ignores_zeros: Callable[[str], bool]
) -> None:
    """Raise `InputError` for anything that would change the output and is not supported.

    Args:
        input_ids: the prompts, [B, T].
        config: the merged generation config.
        model_kwargs: model inputs, the user's and those that `generate` has prepared.
        ignores_zeros: whether an input of the model, by its name, has no effect if it is all zeros.
    """
    refuse_options(lambda name: getattr(config, name, None), len(input_ids))
    mode = str(config.get_generation_mode().value)
    if mode not in ("greedy_search", "sample"):
        raise InputError(f"generation mode {mode} is not supported; Ladon decodes greedily or samples; {UNSET}")
    _refuse_inputs(input_ids, model_kwargs, ignores_zeros)


def refuse_wrapped_options(given: Any, options: Mapping[str, Any]) -> None:
    """Raise for what a peft model would keep to itself: adapters that do not run, and arguments for them.

    Raises:
        InputError: an argument chooses adapters row by row.
        UnsupportedModelError: an adapter is active that does not act in layers.
    """
    unwrapped(given)
    for name in ("adapter_names", *getattr(given, "special_peft_forward_args", ())):
        if options.get(name) is not None:
            raise InputError(f"{name} gives rows of one call their own adapters: not supported; call set_adapter")


def kept_rows(cache: Any, *, prepared: bool = False) -> Sequence[KeptPrefix]:
    """The sequences in a cache given by the user; `InputError` for one of another kind, which would stay as it is.

    `prepared`: `generate` has been there, and has made an empty cache if the user gave none.
    """
    if isinstance(cache, KeptCache):  # first of all: not every transformers 5 marks it as the user's
        return cache.rows
    if cache is None or (prepared and not getattr(cache, "_is_user_defined", False) and cache.get_seq_length() == 0):
        return ()
    raise InputError(
        f"past_key_values is a {type(cache).__name__}; give what an earlier call returned as past_key_values "
        "(return_dict_in_generate=True), or leave it out: the whole prompt goes in as input_ids in any case"
    )


def _refuse_inputs(input_ids: Tensor, model_kwargs: dict[str, Any], ignores_zeros: Callable[[str], bool]) -> None:
    """Raise `InputError` for model inputs that the target would not get. May read the device."""

    def says_nothing(name: str, value: Any) -> bool:
        """As in text-only calls of models that could also take images: an empty dict, and the types of text tokens."""
        if isinstance(value, Tensor):
            return name in _TOKEN_TYPES and value.shape == input_ids.shape and not value.any() and ignores_zeros(name)
        return value is None or value == {}

    given = [k for k, v in model_kwargs.items() if k not in _NEUTRAL_INPUTS and not says_nothing(k, v)]
    if given:
        raise InputError(
            f"{', '.join(given)}: Ladon gives the model token ids and positions, no images or other inputs. Leave them "
            "out, or use transformers' own generate"
        )
    positions = model_kwargs.get("position_ids")
    if positions is not None and not _count_tokens(positions, input_ids, model_kwargs.get("attention_mask")):
        raise InputError("position_ids that do not count a row's tokens from 0 are not supported; leave them out")


def _count_tokens(position_ids: Tensor, input_ids: Tensor, attention_mask: Tensor | None) -> bool:
    """Whether positions [.., 1 | B, T] count the real tokens of each row from 0; in the padding anything goes."""
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    if position_ids.shape[-1] != mask.shape[1] or position_ids.shape[-2:-1] not in ((), (1,), mask.shape[:1]):
        return False
    expected = mask.long().cumsum(-1) - 1
    return bool(((position_ids.to(mask.device) == expected) | (mask == 0)).all())


def pad_id_of(config: GenerationConfig) -> int:
    """The padding of a prepared generation config; 0 if it has none. Reads the device."""
    pad = getattr(config, "_pad_token_tensor", None)
    return 0 if pad is None else int(pad)


def make_request(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    criteria: StoppingCriteriaList | None,
    config: GenerationConfig,
    context_limit: int | None,
    vocab_size: int | None,
    sampling: CallSampling,
    pasts: Sequence[KeptPrefix] = (),
    *,
    together: bool = True,
) -> Request:
    """A call with one row per prompt, its padding stripped.

    Args:
        input_ids: [B, T], padded wherever `attention_mask` [B, T] is 0.
        attention_mask: None when nothing is padded.
        criteria: the prepared stop rules, end-of-sequence tokens and length limit among them.
        config: the prepared generation config, whose `max_length` holds where no criterion limits the length.
        context_limit: the greatest length of a sequence that the model was made for, if any.
        vocab_size: how many tokens the model can read; None if that is not known.
        sampling: how tokens are sampled.
        pasts: sequences that prompts may go on from.
        together: stopping criteria are asked about all rows; False: about each by itself.

    Raises:
        InputError: a prompt is empty, leaves no room for a token, or has a token that is not in the vocabulary.
    """
    rules = StopRules.of(criteria)
    max_length = config.max_length if rules.max_length is None else rules.max_length
    max_new_tokens = max(max_length - input_ids.shape[1], 1)  # criteria are asked after a token: there is always one
    keeps = frozenset(name for name in ("logits", "scores") if getattr(config, f"output_{name}", False))
    keeps = keeps if config.return_dict_in_generate else frozenset()
    judges = rules.judges(input_ids, pad_id_of(config), together=together)
    rows: list[Row] = []
    for index, (ids, constraint) in enumerate(zip(input_ids, sampling.constraints, strict=True)):
        if isinstance(constraint, Grammar):
            constraint = constraint.for_model(vocab_size, rules.end_ids)
        prompt = ids if attention_mask is None else ids[attention_mask[index].bool()]
        if len(prompt) == 0:
            raise InputError(
                f"prompt {index} is empty: its attention mask is 0 everywhere; give at least one token, and a mask if "
                "the prompt holds the padding token"
            )
        limit = max_new_tokens
        if context_limit is not None:
            limit = min(limit, context_limit - len(prompt))
            if limit < 1:
                raise InputError(
                    f"prompt {index} has {len(prompt)} tokens, the model's context limit is {context_limit}; shorten "
                    f"the prompt to {context_limit - 1} tokens or fewer"
                )
        judge = judges[index % len(judges)] if judges else None
        rows.append(
            Row(
                prompt=prompt,
                max_new_tokens=limit,
                is_stop=rules.end_ids.__contains__ if judge is None else judge.rule(),
                seed=sampling.seeds[index],
                sampling_params=sampling.sampling_params,
                grammar=None if constraint is None else GrammarState(constraint, rules.end_ids),
                padded=ids,
                number=index,
                end_ids=rules.end_ids,
                keeps=keeps,
                keeps_past=bool(config.return_dict_in_generate and config.use_cache is not False),
            )
        )
        if judge is not None:
            judge.rows.append(rows[-1])
        if pasts:
            rows[-1].past = longest_past(pasts, rows[-1].prompt_ids)
    _check_ids(rows, vocab_size)
    return Request(input_ids=input_ids, rows=rows, config=config, judges=judges)


def _check_ids(rows: list[Row], vocab_size: int | None) -> None:
    """Raise `InputError` for tokens that the model cannot read. Reads the device once."""
    least, greatest = torch.stack(torch.cat([row.prompt for row in rows]).aminmax()).tolist()
    if least < 0 or (vocab_size is not None and greatest >= vocab_size):
        raise InputError(
            f"the prompt holds token {least if least < 0 else greatest}, which is not among the model's "
            f"{vocab_size or ''} tokens, counted from 0. Encode the prompt with this model's tokenizer"
        )


def end_ids(token_ids: int | Sequence[int] | None) -> frozenset[int]:
    """End-of-sequence ids, in any of the forms that generation configs hold them."""
    return frozenset([token_ids] if isinstance(token_ids, int) else token_ids or ())


def own_generate(model: PreTrainedModel) -> Callable[..., Any]:
    """The class's `generate`, whatever the model object carries."""
    return partial(type(model).generate, model)


def prepared_by_generate(
    model: PreTrainedModel, input_ids: Tensor, prepare: Callable[..., Any], options: dict[str, Any]
) -> Any:
    """What `prepare` makes of a call's inputs and options as transformers prepares them.

    Raises:
        InputError: what transformers complains of.
        UnsupportedModelError: the class has a generate of its own that keeps the request to itself.
    """
    made: list[Any] = []

    @wraps(prepare)  # generate reads the names of its arguments
    def noted(*args: Any, **kwargs: Any) -> Any:
        made.append(prepare(*args, **kwargs))
        return made[-1]

    try:
        returned = own_generate(model)(input_ids, custom_generate=noted, **options)
    except LadonError:
        raise
    except ValueError as error:
        raise InputError(" ".join(str(error).split())) from error
    except (AttributeError, TypeError) as error:
        if is_of_library(type(model).generate):
            raise
        raise _own_generate_refused(model) from error
    if not made or returned is not made[-1]:
        raise _own_generate_refused(model)
    return returned


def _own_generate_refused(model: PreTrainedModel) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{type(model).__name__} has a generate of its own that does not give back what custom_generate returns, so "
        "what it does to its result would be lost; use that generate, or a class with the generate of transformers"
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class CallSampling:
    """How the tokens of a call's sequences are sampled.

    Attributes:
        sampling_params: the same for all.
        seeds: of their noise, one each; zeros where nothing is drawn.
        constraints: theirs, one each; None for none.
    """

    sampling_params: SamplingParams
    seeds: Sequence[int]
    constraints: Sequence[Constraint | None]

    @classmethod
    def of(
        cls,
        config: GenerationConfig,
        processors: LogitsProcessorList | None,
        seed: int | Sequence[int] | None,
        num_rows: int,
        constraint: Constraint | Sequence[Constraint | None] | None = None,
    ) -> CallSampling:
        """What the merged config and the prepared processors ask for.

        Warns where a processor makes decoding plain.

        Raises:
            InputError: seeds or constraints that are none, or not one for each row; several rows that cannot be decoded
                together.
        """
        if seed is not None and not config.do_sample:
            raise InputError("a seed is given, but nothing is drawn; pass do_sample=True, or leave the seed out")
        constraints = row_constraints(constraint, num_rows)
        if not config.do_sample and not processors:
            return cls(sampling_params=GREEDY, seeds=[0] * num_rows, constraints=constraints)
        known = Processors(processors or [])
        known.check_rows(num_rows)
        params = ProcessedSampling(known, draws=bool(config.do_sample))
        seeds = row_seeds(seed, num_rows) if params.draws else [0] * num_rows
        return cls(sampling_params=params, seeds=seeds, constraints=constraints)
