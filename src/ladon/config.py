"""Every default value of the library, once. The command line takes its defaults and help from here."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

AUTO_BUDGET = 16  # what budget="auto" means until tree sizes are chosen from measured cost


@dataclass(frozen=True, kw_only=True)
class DecoderOptions:
    """How a `Decoder` drafts and verifies. The field docs are the help of the command line."""

    tree: str = field(
        default="dynamic",
        metadata={"help": "dynamic (grown anew each step), chain, off (plain decoding), or a file of rank paths"},
    )
    budget: int | str = field(
        default="auto",
        metadata={"help": f"nodes verified per step and sequence, root included; auto is {AUTO_BUDGET} for now"},
    )
    num_candidates: int = field(
        default=32, metadata={"help": "candidates kept per head and step; ranks of a fixed tree must be below it"}
    )


def help_of(options: type[DecoderOptions], name: str) -> str:
    """The help text of one field."""
    for option in fields(options):
        if option.name == name:
            return str(option.metadata["help"])
    raise KeyError(name)
