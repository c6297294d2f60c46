"""`ladon chat`: a conversation in the terminal, whose history stays in the cache."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ladon.cli import options
from ladon.cli.options import OUTPUT, WHAT, flag, option, setting
from ladon.cli.output import OutConsole, say, write_whole
from ladon.config import ChatOptions
from ladon.errors import InputError, LadonError

if TYPE_CHECKING:
    from ladon.cli.loading import Loaded
    from ladon.decoder.conversation import Conversation, Message
    from ladon.decoder.decoder import Decoder
    from ladon.engine.sequence import Row
    from ladon.engine.stats import DecodeStats
    from ladon.engine.step import Step
    from ladon.target.prefix_cache import KeptPrefix

COMMANDS = {
    "/help": "this list",
    "/regen": "answer the last message again; sampled answers are drawn anew",
    "/reset": "forget all that was said, but for the system prompt",
    "/save FILE": "write the messages as JSON",
    "/load FILE": "read them back",
    "/stats": "what this session took so far",
    "/quit": "leave, as does the end of the input",
}
_NAMES = {usage.split()[0]: " " in usage for usage in COMMANDS}  # whether it takes a file
_ROLES = ("system", "user", "assistant")
_OF_TOOLS = {"tools", "chat_template_kwargs", "tool_calls", "tool_call_id"}  # what a template would write


@options.command(without=("accept", "joint"))
def chat(
    *,
    target: options.Target,
    system: str | None = option(WHAT, None, "TEXT", "The system prompt, for models with a chat template."),
    max_new_tokens: int = setting(WHAT, ChatOptions, "max_new_tokens", "N", min=1),
    drafting: options.Drafting,
    sampling: options.Sampling,
    color_by_depth: bool = flag(
        OUTPUT, "--color-by-depth", "Give each token the colour of the depth at which it was drafted."
    ),
) -> None:
    r"""Talk with a model, line by line; what was said before is kept in the cache and not read again.

    A model without a chat template, such as the bundled one, continues the text: each line is appended to it as it is.
    A line that ends with a backslash goes on in the next. Lines that start with a slash are commands: /help, /regen,
    /reset, /save FILE, /load FILE, /stats, /quit. Ctrl-C stops an answer, the end of the input the program.
    Answers go to standard output, everything else to standard error. Each answer is drawn anew.

    For example:

        ladon chat
        ladon chat --temperature 0.7 --color-by-depth
        printf 'def f(x):\n/stats\n' | ladon chat --max-new-tokens 32
    """
    for_decoder, wanted = drafting.for_decoder(), sampling.for_generate()
    from ladon.cli.loading import load
    from ladon.decoder.conversation import Conversation

    loaded = load(target)
    decoder = loaded.decoder(**for_decoder)
    wanted |= {"max_new_tokens": max_new_tokens}
    session = Session(decoder, loaded, Conversation(loaded.tokenizer, system), wanted, color_by_depth)
    session.greet()
    for line in _lines():
        if not session.handle(line):
            return


def _lines() -> Iterator[str]:
    """Lines of standard input, without their ends; a backslash joins two. Ctrl-C drops the one being written."""
    while True:
        try:
            line = _line("> ")
            while line is not None and line.endswith("\\"):
                line = f"{line[:-1]}\n{_line('. ') or ''}"
        except KeyboardInterrupt:
            say("\n/quit or the end of the input leaves")
            continue
        except UnicodeDecodeError as error:
            say(f"ladon: the line is not UTF-8 (byte {error.start}); write UTF-8 text")
            continue
        if line is None:
            return
        yield line


def _line(prompt: str) -> str | None:
    """The next line; None at the end. A terminal shows `prompt` and has its own ways to edit a line."""
    if sys.stdin is None:
        return None
    if not sys.stdin.isatty():
        raw = sys.stdin.buffer.readline()
        return raw.decode("utf-8").removesuffix("\n").removesuffix("\r") if raw else None
    with suppress(ImportError):  # not on every system
        import readline  # noqa: F401 (makes input() edit lines and remember them)
    try:
        return input(prompt).encode("utf-8", "surrogateescape").decode("utf-8")
    except EOFError:
        say("")
        return None


class Session:
    """A chat with one decoder: takes lines, writes answers."""

    def __init__(
        self, decoder: Decoder, loaded: Loaded, conversation: Conversation, wanted: dict[str, Any], shows_depth: bool
    ) -> None:
        """`wanted` is what `Decoder.rows` is told about limits and sampling; its seed is that of the session."""
        from ladon.engine.stats import DecodeStats

        self._decoder, self._loaded, self._conversation = decoder, loaded, conversation
        self._wanted, self._shows_depth = wanted, shows_depth
        self._console = OutConsole(highlight=False)
        self._pasts: list[KeptPrefix] = []
        self._answers, self._said = 0, 0
        self._total = DecodeStats()

    def greet(self) -> None:
        """Say what is particular about this chat."""
        if not self._conversation.has_template:
            say(f"{self._loaded.name} has no chat template: it continues the text, each line is appended as it is")
        if self._shows_depth:
            from rich.console import Console

            from ladon.viz.terminal import legend

            Console(stderr=True, highlight=False).print(
                legend(self._loaded.heads.num_heads if self._loaded.heads else 0)
            )

    def handle(self, line: str) -> bool:
        """Do what a line asks for, or say in one line why not; False to leave."""
        before = list(self._conversation.messages)
        try:
            command, text = read_line(line)
            if command == "/quit":
                return False
            if command or text.strip():
                self._do(command, text)
        except LadonError as error:
            self._conversation.messages = before
            say(f"ladon: {' '.join(str(error).split())}")
        return True

    def _do(self, command: str, text: str) -> None:
        chat = self._conversation
        if command == "/help":
            for usage, what in COMMANDS.items():
                say(f"{usage:<12}{what}")
        elif command == "/reset":
            chat.reset()
            self._pasts = []
        elif command == "/save":
            _save(text, chat.messages)
        elif command == "/load":
            chat.replace(_load(text))
            say(f"{len(chat.messages)} messages")
        elif command == "/stats":
            say(f"answers: {self._answers}; {_took(self._said, self._total)}")
        else:
            before = list(chat.messages)
            if command == "/regen":
                chat.ask_again()
            else:
                chat.ask(text)
            if not self._answer():
                chat.messages = before

    def _answer(self) -> bool:
        """Answer the last message, as it comes; whether anything was said."""
        from ladon.decoder.detokenizer import Detokenizer

        sequence = self._sequence()
        context = [] if self._conversation.has_template else sequence.prompt_ids
        pieces = Detokenizer(self._loaded.tokenizer, context, skip_special_tokens=True)
        said, texts, is_stopped = [], [], False
        try:
            with closing(self._decoder.decode([sequence])) as steps:
                accepted = 0
                for step in steps:
                    for token, depth in _with_depths(step, sequence.stats.accepted_nodes - accepted):
                        texts.append(pieces.push(token))
                        said.append(token)
                        self._show(texts[-1], depth)
                    accepted = sequence.stats.accepted_nodes
        except KeyboardInterrupt:
            is_stopped = True
        texts.append(pieces.flush())
        self._show(f"{texts[-1]}\n", None)
        if sequence.past is not None:
            self._pasts = [sequence.past]
        if said:
            self._conversation.answer("".join(texts), said)
        self._count(len(said), self._decoder.stats, "stopped: " if is_stopped else "")
        return bool(said)

    def _sequence(self) -> Row:
        """The last message as a sequence that goes on from what is kept of the chat; `InputError` if it is too long."""
        import torch

        from ladon.sampling.gumbel import mix

        ids = self._conversation.prompt_ids()
        limit = self._loaded.context_limit
        if limit is not None and len(ids) >= limit:
            raise InputError(
                f"the chat has {len(ids)} tokens with this message, and the model's context ends at {limit}; write a "
                "shorter one, or /reset"
            )
        wanted = self._wanted
        if "seed" in wanted:
            wanted = wanted | {"seed": mix(wanted["seed"], self._answers)}  # each answer draws anew
        prompt = torch.tensor(ids, device=self._loaded.model.device)
        (sequence,) = self._decoder.rows([prompt], past=self._pasts, return_dict_in_generate=True, **wanted)
        return sequence

    def _show(self, piece: str, depth: int | None) -> None:
        if self._shows_depth and depth is not None:
            from ladon.viz.terminal import token_text

            self._console.print(token_text(piece, depth), end="", soft_wrap=True)
        else:
            sys.stdout.write(piece)
        sys.stdout.flush()

    def _count(self, said: int, stats: DecodeStats, note: str) -> None:
        """Show what an answer took, and add it to the session's."""
        self._answers += 1
        self._said += said
        say(f"[{note}{_took(said, stats)}]")
        for name in ("prefill_tokens", "reused_tokens", "row_steps", "tokens", "decode_seconds"):
            setattr(self._total, name, getattr(self._total, name) + getattr(stats, name))


def _with_depths(step: Step, accepted: int) -> list[tuple[int, int | None]]:
    """Tokens of one sequence's step, each with the depth of its draft: 0 for the bonus token, None after a prompt."""
    from ladon.viz.record import BONUS

    tokens = step.emitted[0] if step.emitted else []
    if step.tree is None:
        return [(token, None) for token in tokens]
    return [(token, place + 1 if place < accepted else BONUS) for place, token in enumerate(tokens)]


def _took(said: int, stats: DecodeStats) -> str:
    """Counts and speed in a few words; the prefill's tokens are said too, but no step's."""
    speed = ""
    if stats.row_steps:
        speed = f"{stats.acceptance_length:.2f} tokens per step, {stats.tokens_per_second:.0f} tokens/s, "
    return (
        f"{said} tokens in {stats.row_steps} steps, {speed}{stats.reused_tokens} prompt tokens reused, "
        f"{stats.prefill_tokens} read"
    )


def read_line(line: str) -> tuple[str, str]:
    """What a line asks for: a command and its file, or "" and the message; a message's own slash is written twice.

    Raises:
        InputError: an unknown command, or one with a file too many or too few.
    """
    if not line.startswith("/") or line.startswith("//"):
        return "", line[1:] if line.startswith("/") else line
    name, _, argument = line.strip().partition(" ")
    argument = argument.strip()
    if name not in _NAMES:
        raise InputError(f"{name} is no command; commands are {', '.join(COMMANDS)}; a message that starts so: /{name}")
    if bool(argument) != _NAMES[name]:
        what = "name a file" if _NAMES[name] else f"it takes nothing more, but {argument!r} was given"
        raise InputError(f"{name}: {what}")
    return name, argument


def _save(file: str, messages: Sequence[Message]) -> None:
    """Write the messages as JSON; `InputError` if that cannot be."""
    write_whole(_path(file), (json.dumps({"messages": messages}, ensure_ascii=False, indent=1) + "\n").encode())


def _load(file: str) -> list[Message]:
    """Read messages that `_save` has written; `InputError` if the file holds none."""
    try:
        document = json.loads(_path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}; give a file that /save has written") from error
    except ValueError as error:  # neither UTF-8 nor JSON
        raise InputError(f"{file} is not JSON ({error}); give a file that /save has written") from error
    messages = document.get("messages") if isinstance(document, dict) else None
    if not isinstance(messages, list) or not all(map(_is_message, messages)):
        raise InputError(
            f"{file} holds no chat; give a JSON object with `messages`, a list of objects with `role` "
            f"({', '.join(_ROLES)}) and `content`"
        )
    unread = {*document, *(key for message in messages for key in message)} & _OF_TOOLS
    if unread:
        raise InputError(
            f"{file} holds {', '.join(sorted(unread))}, which ladon chat cannot go on with; leave them out"
        )
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _path(file: str) -> Path:
    return Path(os.path.expanduser(file))


def _is_message(message: object) -> bool:
    return isinstance(message, dict) and message.get("role") in _ROLES and isinstance(message.get("content"), str)
