"""The front door: `Decoder`.

Preparing inputs, limits and stop rules is left to transformers' own `generate`, which then calls the decoder through
`custom_generate`. What it drops on the way is handled here: the streamer, the tokenizer that stop strings need, an
assistant model.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ladon.config import DecoderOptions
from ladon.constraints.state import Constraint
from ladon.decoder.options import DraftPlan, Prune, chosen_pruning, still_chosen
from ladon.decoder.output import LastCalls, ends_streamer, pack_output, stream
from ladon.decoder.preparation import refuse_changed_inputs, refuse_own_loop
from ladon.decoder.request import (
    CallSampling,
    Request,
    call_options,
    kept_rows,
    left_padded,
    make_request,
    prepared_by_generate,
    refuse_unsupported,
    refuse_wrapped_options,
)
from ladon.decoder.trace import Trace
from ladon.drafting.own_proposer import OwnDrafter
from ladon.drafting.proposer import Proposer, RootProposer
from ladon.engine.engine import Engine
from ladon.engine.recorder import Recorder
from ladon.engine.sequence import Row
from ladon.engine.stats import DecodeStats
from ladon.engine.step import Step
from ladon.errors import InputError
from ladon.heads import Heads
from ladon.heads.wrapped import adapter_state, unwrapped
from ladon.sampling.lossy import Nucleus, Typical, rule_of
from ladon.target.prefix_cache import KeptPrefix
from ladon.target.target import Target
from ladon.tree_size.tree_sizes import TreeSizes
from ladon.trees.fixed_tree import FixedTree, TreeSize
from ladon.util.observer import Observer

if TYPE_CHECKING:
    from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
    from transformers.generation.utils import GenerateDecoderOnlyOutput

_DEFAULTS = DecoderOptions()


class Decoder:
    """Decodes with a target model and, if given, heads that draft token trees for it.

    Greedy output equals `transformers` greedy `generate`. While a forward runs, a hook sits on the model's output
    projection; on alibi models, ctrl, xglm and gpt_neo hooks sit on every layer too, and gpt_neo's layers hold another
    `bias` buffer. Between forwards the model is as it was.

    Attributes:
        sizing: chooses the sizes of trees; what it has learnt serves the next calls.
        pruning: how trees are pruned; None if they are not.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        heads: Heads | None = None,
        *,
        tree: str | FixedTree | TreeSize = _DEFAULTS.tree,
        budget: int | str = _DEFAULTS.budget,
        num_candidates: int = _DEFAULTS.num_candidates,
        joint: str = _DEFAULTS.joint,
        deterministic: bool = False,
        prune: Prune = _DEFAULTS.prune,
        accept: str | Typical | Nucleus = _DEFAULTS.accept,
        profile: bool = False,
        ngrams: str = _DEFAULTS.ngrams,
        proposer: OwnDrafter | None = None,
    ) -> None:
        """Check the model and the options.

        Args:
            model: any causal language model of transformers whose cache can roll back, as it is, with adapters in its
                layers (peft), or compiled.
            heads: decoding heads for it; None: the proposer or n-grams draft. Decoders of several models may share
                heads: each uses a copy, which shares what is in its model's dtype and on its device, and holds the rest
                twice.
            tree: "dynamic" (grown anew at each step from the heads' joint probabilities), "chain" (each head's best
                token), "off" (plain decoding), a `FixedTree` or a `TreeSize`. A model that verifies chains but no trees
                (its self-test says so) gets the chain instead of the dynamic tree.
            budget: nodes verified per step and row, root included; "auto" chooses at each step what pays, plain
                decoding included, and is the size of a fixed tree. A smaller budget cuts a fixed tree.
            num_candidates: candidates kept per head.
            joint: "product" (each head guesses by itself), "markov" or "hidden" (the token before corrects the guess),
                "paths" (each guess after the path so far; "paths:16": after the 16 best of each depth, a beam) or
                "auto", the one that the heads were made for.
            deterministic: let no clock choose, as with LADON_DETERMINISTIC=1 in the environment: automatic sizes depend
                on the trees and a profile (`ladon calibrate`) alone, and are 16 without one.
            prune: "off"; "auto", what `ladon calibrate --pruning` found to pay, if anything; a `Pruning`; or its layer
                and the nodes to keep, such as "4:16".
            accept: "exact"; or, NOT exact where tokens are sampled, "typical" or "nucleus", a `Typical` or a `Nucleus`.
            profile: measure time by stage (waits for the device at each stage).
            ngrams: "auto": what followed the last tokens earlier joins dynamic trees, and without heads is all; not
                those of a `proposer`. "on": those too. "off".
            proposer: a drafter of your own in place of heads: a `Proposer` or any object with its methods, which serves
                one engine at a time, or a class or function without arguments that makes one for each. With
                `tree="chain"`, and for a model that verifies chains only, its trees must not branch.

        Raises:
            InputError: an unknown rule of acceptance, or joint; heads beside a proposer, or one that lacks methods.
            UnsupportedModelError: the model cannot verify a tree exactly.
            HeadsError: the heads do not belong to the model.
            TreeError: an unknown tree or n-gram option, a budget below 1, or a fixed tree that the heads cannot fill,
                that branches where the model verifies chains only, or that is beside a proposer.
        """
        self._given, self.model = unwrapped(model)
        refuse_own_loop(self.model)
        plan = DraftPlan.of(heads, tree, budget, num_candidates, ngrams, joint, proposer)
        self._profile, self._prune, self._rule = profile, prune, rule_of(accept)
        self.heads = None if heads is None else heads.bound(self.model)
        self._given_heads = heads
        self._adapters = adapter_state(self.model)
        self._target = Target(model)
        self._plan = plan.fitting(self._target, self.heads)
        self.pruning = chosen_pruning(prune, heads, self._target)
        self.sizing = self._plan.sizing(self._target, self.heads, self.pruning, deterministic=deterministic)
        self._calls = LastCalls()

    @property
    def stats(self) -> DecodeStats:
        """Counts and times of the last call of this thread; in a thread that has made none, of the last of all."""
        return self._calls.results.stats

    @property
    def seeds(self) -> list[int]:
        """Of the rows of that call, if it was one of `generate`; a row can be drawn again alone with its own."""
        return self._calls.results.seeds

    @property
    def complete(self) -> list[bool | None]:
        """Of the same rows, whether the text is whole, as its constraint has it; None without one."""
        return self._calls.results.complete

    @ends_streamer
    def generate(
        self,
        input_ids: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        prefix_allowed_tokens_fn: Any = None,
        synced_gpus: Any = None,
        assistant_model: PreTrainedModel | None = None,
        streamer: Any = None,
        seed: int | Sequence[int] | None = None,
        constraint: Constraint | Sequence[Constraint | None] | None = None,
        **kwargs: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        """What `model.generate` returns, with fewer forwards.

        Args:
            input_ids: prompts, [B, T] int64, padded on the left or right as `attention_mask` says; or `inputs`.
            generation_config: options, which the model's own fill up and `**kwargs` override.
            logits_processor: called with each node's own prefix, as are those that options ask for. One that is not of
                transformers makes decoding plain, or if it declares `stateless = True` is called with what is said.
            stopping_criteria: get the calls that `generate` makes: about all rows, padded, a token of each at a time,
                with scores if `output_scores` asks for them (0 in rows that have ended); as there, they replace the
                default of the same class, and without an end-of-sequence token rows go on until each has had its end.
            prefix_allowed_tokens_fn: asked about each prefix that is said, and no other.
            synced_gpus: of no effect.
            assistant_model: refused; the heads do its work.
            streamer: gets the prompt, then new tokens, 1-D, as they come; for one prompt. It is ended even if the call
                raises, so that nobody who reads from it waits for ever.
            seed: of what is drawn with `do_sample=True`: a number, from which each row gets one of its own, or one for
                each row, such as `seeds` shows; None draws a number from torch's global generator.
            constraint: what texts may be (`ladon.json_schema`, `regex`, `grammar`), for all rows, or one or None for
                each; where it lets a row go no further, that ends with a warning. `complete` tells whose text is whole.
            **kwargs: `generate`'s options: `attention_mask`, `max_new_tokens`, `max_length`, `eos_token_id`,
                `stop_strings` and `token_healing` with `tokenizer`, `return_dict_in_generate`, `num_return_sequences`;
                `past_key_values` of an earlier output (`ladon.target.prefix_cache.KeptCache`). Model inputs other than
                the mask (and position ids that follow from it, and token types of 0 that change nothing) are refused,
                caches of other kinds too.

        Returns:
            Sequences [B, T + new], padded on the right after a row's end; or transformers' output object.

        Raises:
            InputError: a prompt that is empty, not [B, T], not in the vocabulary, or at or past the context limit; no
                room for a token; an option that is not supported, or that transformers does not accept.
        """
        options = {**kwargs, "generation_config": generation_config, "logits_processor": logits_processor}
        options |= {"prefix_allowed_tokens_fn": prefix_allowed_tokens_fn, "synced_gpus": synced_gpus}
        options["assistant_model"] = assistant_model
        input_ids, options = call_options(self._given, input_ids, options, stopping_criteria or [])
        own: dict[str, Any] = {
            "seed": seed,
            "constraint": constraint,
            "pasts": kept_rows(options.pop("past_key_values", None)),
        }
        return self._run(self._prepare(input_ids, **own, **options), streamer)

    def __call__(
        self, model: PreTrainedModel, input_ids: Tensor, **prepared: Any
    ) -> Tensor | GenerateDecoderOnlyOutput:
        """What `model.generate(..., custom_generate=decoder)` calls, with inputs prepared.

        Before it calls a `custom_generate` callable, transformers drops `streamer` (an iterator streamer given there
        waits for ever), `tokenizer` (stop strings and token healing raise) and `assistant_model` (it has no effect),
        and refuses `num_return_sequences` above 1 in greedy decoding. `Decoder.generate` and `attach` handle them. An
        empty cache of transformers' given as `past_key_values` stays empty where transformers does not mark it as the
        user's.
        """
        return self._run(self._request(model, input_ids, **prepared), None)

    def trace(
        self, input_ids: Tensor, *, max_new_tokens: int, eos_token_id: int | Sequence[int] | None = None
    ) -> Trace:
        """Decode one sequence greedily and record every step's tree. Reads whole trees from the device: slower.

        Args:
            input_ids: one prompt, [T] or [1, T] int64.
            max_new_tokens: how many tokens to emit at most, the prefill's token (the first root) included.
            eos_token_id: tokens that end the sequence; the model's own if None.

        Returns:
            The prefill's token, and an iterator over the decode steps, each made when it is asked for.

        Raises:
            InputError: what `generate` refuses, the options in the model's generation config included; or several
                prompts.
        """
        options: dict[str, Any] = {} if eos_token_id is None else {"eos_token_id": eos_token_id}
        if input_ids.ndim == 2 and len(input_ids) > 1:
            raise InputError(f"a trace shows one sequence, but there are {len(input_ids)}; give one prompt")
        rows = self.rows([input_ids.flatten()], max_new_tokens=max_new_tokens, **options)
        return Trace(self.engine().run(rows), len(rows[0].prompt))

    def rows(self, prompts: Sequence[Tensor], *, past: Sequence[KeptPrefix] = (), **options: Any) -> list[Row]:
        """Prompts as rows for `engine` or `decode`, with the limits and stop rules that `generate` would give them.

        Args:
            prompts: token ids of each, [T] int64, without padding.
            past: sequences decoded before (`Row.past`); each prompt goes on from the one that it shares most with.
            **options: `generate`'s: `max_new_tokens`, `eos_token_id`, `stopping_criteria` (called about one row at a
                time, since each may come and go), `do_sample` (False if it is not given), `seed`, `constraint`,
                `return_dict_in_generate` (rows keep their `past`, scores) and so on.

        Raises:
            InputError: what `generate` refuses.
        """
        own: dict[str, Any] = {name: options.pop(name, None) for name in ("seed", "constraint")}
        criteria = options.pop("stopping_criteria", None) or []
        input_ids, mask = left_padded(prompts)
        options = {"do_sample": False, "attention_mask": mask, **options}
        input_ids, options = call_options(self._given, input_ids, options, criteria)
        return self._prepare(input_ids, pasts=past, together=False, **own, **options).rows

    def decode(self, rows: Sequence[Row], *, max_rows: int | None = None) -> Generator[Step, None, None]:
        """Decode rows whose limits, stops and token ids the caller has checked, in an `engine` of their own."""
        return self.engine(max_rows=max_rows).run(rows)

    def engine(self, *, max_rows: int | None = None, is_plain: bool = False) -> Engine:
        """An engine for rows that come and go, with statistics of its own, which are this thread's `stats` from now on.

        Args:
            max_rows: rows in flight at most, 1 or more, the others wait; None for no bound.
            is_plain: draft nothing.

        Raises:
            InputError: `max_rows` is below 1, or the proposer drafts for sequences of another engine.
        """
        self._target.check(anew=True)  # first of all: the model may have changed since the last call
        if self._adapters != (found := adapter_state(self.model)):
            self._adapters = found
            if self.heads is not None:
                self.heads.warn_of_adapters(self.model)
        self.pruning = pruning = still_chosen(self.pruning, self._prune, self._target)
        device = self._target.device
        sizes = TreeSizes(1 if is_plain else self.sizing, device, pruning)
        recorder = Recorder(self._calls.begin().stats, sizes, self.model, device, profile=self._profile)
        return Engine(
            self._target,
            RootProposer() if is_plain else self._proposer(recorder),
            sizes,
            observer=recorder,
            max_rows=max_rows,
            rule=self._rule,
            lookup=None if is_plain else self._plan.lookup(self._target),
        )

    def _prepare(
        self,
        input_ids: Tensor,
        *,
        seed: Any = None,
        constraint: Any = None,
        pasts: Sequence[KeptPrefix] = (),
        together: bool = True,
        **options: Any,
    ) -> Request:
        """What transformers makes of a call's options; its complaints about them become an `InputError`."""
        refuse_wrapped_options(self._given, options)
        prepare = partial(self._request, seed=seed, constraint=constraint, pasts=pasts, together=together)
        request: Request = prepared_by_generate(self._given, input_ids, prepare, options)
        return request

    def _request(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        generation_config: Any = None,
        seed: int | Sequence[int] | None = None,
        constraint: Constraint | Sequence[Constraint | None] | None = None,
        pasts: Sequence[KeptPrefix] = (),
        together: bool = True,
        **model_kwargs: Any,
    ) -> Request:
        """A call that transformers has prepared, as rows; what is not supported is refused."""
        if model is not self.model:
            raise InputError("this decoder was made for another model; make one with ladon.Decoder(model, heads)")
        refuse_unsupported(input_ids, generation_config, model_kwargs, self._target.ignores_zeros)
        refuse_changed_inputs(model, input_ids, model_kwargs, generation_config.max_length)
        return make_request(
            input_ids,
            model_kwargs.get("attention_mask"),
            stopping_criteria,
            generation_config,
            self._target.context_limit,
            getattr(model.get_input_embeddings(), "num_embeddings", None),
            CallSampling.of(generation_config, logits_processor, seed, len(input_ids), constraint),
            pasts or kept_rows(model_kwargs.get("past_key_values"), prepared=True),
            together=together,
        )

    def _run(self, request: Request, streamer: Any) -> Tensor | GenerateDecoderOnlyOutput:
        """Decode a request to its end."""
        is_plain = any(row.sampling_params.is_plain for row in request.rows)
        engine = self.engine(is_plain=is_plain)
        results = self._calls.results
        results.seeds = [row.seed for row in request.rows]
        try:
            stream(request, engine.run(request.rows), streamer)
            for judge in request.judges:
                judge.settle()
            results.stats.tokens = sum(row.stats.tokens for row in request.rows)  # without what was cut off later
        finally:
            results.complete = [row.complete for row in request.rows]
        return pack_output(request, results)

    def _proposer(self, observer: Observer) -> Proposer:
        if self._given_heads is not None:  # they, or the model, may have changed since the last call
            self.heads = self._given_heads.bound(self.model, force=True, known=self.heads)
        return self._plan.proposer(self._target, self.heads, observer)
