"""Where prompts come from: the command line, a file, or standard input."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ladon.cli.output import say
from ladon.errors import InputError
from ladon.util.files import explained

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from ladon.bench.workloads import Question
    from ladon.cli.loading import Loaded

Asked = tuple[str, list[list[int]]]  # a name for the prompts, and their token ids

_CALIBRATION_PROMPTS = 120


def read_prompt(prompt: str | None, prompt_file: Path | None) -> str:
    """The one prompt that was given, as it stands, line ends included.

    Raises:
        InputError: two were given, or none; it is empty or not UTF-8; or the file cannot be read.
    """
    if prompt is not None and prompt_file is not None:
        raise InputError("both --prompt and --prompt-file were given; give one of them")
    if prompt is not None:
        source, data = "the prompt", prompt.encode("utf-8", "surrogateescape")
    elif prompt_file is not None:
        with explained(f"cannot read the prompt file {prompt_file}", InputError, "give a readable text file"):
            source, data = str(prompt_file), prompt_file.read_bytes()
    elif sys.stdin is None or sys.stdin.isatty():
        raise InputError("no prompt; give --prompt TEXT, --prompt-file FILE, or text on standard input")
    else:
        source, data = "standard input", sys.stdin.buffer.read()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{source} is not UTF-8 (byte {error.start}); give UTF-8 text") from error
    if not text:
        raise InputError(f"{source} is empty; give some text to continue")
    return text


def read_questions(prompts: Sequence[str], file: Path | None) -> list[Question]:
    """Several prompts, from the command line or from a file: JSONL as `ladon bench` reads it, or lines of a .txt file.

    Raises:
        InputError: both were given; a prompt is empty or not UTF-8; or the file cannot be read, or holds none.
    """
    from ladon.bench.workloads import Question, read_text, read_workload

    if file is None:
        return [Question.to_continue(read_prompt(text, None), number) for number, text in enumerate(prompts, start=1)]
    if prompts:
        raise InputError("both --prompt and --prompts were given; give one of them")
    if file.suffix != ".txt":
        return list(read_workload(file).questions)
    lines = [line for line in read_text(file).split("\n") if line.strip()]
    if not lines:
        raise InputError(f"{file} holds no prompts; give one on each line")
    return [Question.to_continue(line.removesuffix("\r"), number) for number, line in enumerate(lines, start=1)]


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """Token ids of a prompt, [T]; `InputError` if there is none."""
    ids: Tensor = tokenizer(text, return_tensors="pt")["input_ids"][0].long()
    if len(ids) == 0:
        raise InputError("the prompt is empty: it has no tokens; give some text to continue")
    return ids


def asked_of(loaded: Loaded, prompts: str | None, limit: int | None) -> Asked:
    """What a model is asked to calibrate its heads: a data set's prompts, or the bundled model's own.

    Raises:
        InputError: the data set cannot be read, or there is no prompt.
    """
    from ladon.demo.bundled import demo_prompts
    from ladon.train.data.prompts import read_prompts

    if prompts is not None:
        found = read_prompts(prompts, loaded.tokenizer, limit=limit)
        asked = [prompt.token_ids for prompt in found if prompt.token_ids]
        if len(asked) < len(found):
            reasons = ", ".join(sorted({prompt.refused or "empty prompt" for prompt in found if not prompt.token_ids}))
            say(f"ladon: warning: {len(found) - len(asked)} of {len(found)} rows are left out ({reasons})")
        if not asked:
            raise InputError(f"{prompts} has no prompt that can be asked; give others")
        return Path(prompts).name, asked
    if not loaded.is_demo:
        raise InputError("no prompts; give a JSONL file with a JSON object with `prompt` or `messages` on each line")
    texts = demo_prompts(limit or _CALIBRATION_PROMPTS, "calibration")
    ids = [[int(token) for token in loaded.tokenizer(text)["input_ids"]] for text in texts]
    return "standard library modules set aside to calibrate", ids
