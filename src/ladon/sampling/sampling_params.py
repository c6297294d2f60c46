"""The law of a call of `generate`: what its options say about how tokens are picked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ladon.constraints.state import Constraint, row_constraints
from ladon.errors import InputError
from ladon.sampling.gumbel import row_seeds
from ladon.sampling.logits_processors import ProcessedPicker, Processors
from ladon.sampling.sampler import GREEDY, Picker

if TYPE_CHECKING:
    from transformers import GenerationConfig, LogitsProcessorList


@dataclass(frozen=True, kw_only=True, slots=True)
class Law:
    """How the tokens of a call's rows are picked.

    Attributes:
        picker: the same for all rows.
        seeds: of their noise, one each; zeros where nothing is drawn.
        constraints: theirs, one each; None for none.
    """

    picker: Picker
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
    ) -> Law:
        """What the merged config and the prepared processors ask for.

        Warns where a processor makes decoding plain.

        Raises:
            InputError: seeds or constraints that are none, or not one for each row; several rows that cannot be decoded
                together; a top_p of 0.
        """
        if seed is not None and not config.do_sample:
            raise InputError("a seed is given, but nothing is drawn; pass do_sample=True, or leave the seed out")
        if config.do_sample and config.top_p == 0:  # transformers takes it for greedy decoding
            raise InputError("top_p is 0; give a probability above 0, or do_sample=False for the likeliest token")
        constraints = row_constraints(constraint, num_rows)
        if not config.do_sample and not processors:
            return cls(picker=GREEDY, seeds=[0] * num_rows, constraints=constraints)
        known = Processors(processors or [])
        known.check_rows(num_rows)
        picker = ProcessedPicker(known, draws=bool(config.do_sample))
        seeds = row_seeds(seed, num_rows) if picker.draws else [0] * num_rows
        return cls(picker=picker, seeds=seeds, constraints=constraints)
