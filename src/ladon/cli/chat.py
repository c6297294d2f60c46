"""`ladon chat`: a conversation in the terminal, whose history stays in the cache."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from ladon.cli import options
from ladon.cli.conversation import COMMANDS, Conversation, read_line
from ladon.cli.output import OutConsole, say
from ladon.config import ChatOptions, DecoderOptions, help_of
from ladon.errors import InputError, LadonError

if TYPE_CHECKING:
    from ladon.cli.loading import Loaded
    from ladon.decoder.decoder import Decoder
    from ladon.engine.sequence import Row
    from ladon.engine.stats import DecodeStats
    from ladon.engine.step import Step
    from ladon.target.prefix_cache import KeptPrefix

_DEFAULTS = DecoderOptions()
_CHAT = ChatOptions()

_SystemOption = Annotated[
    str | None, Option("--system", metavar="TEXT", help="The system prompt, for models with a chat template.")
]
_ColourOption = Annotated[
    bool,
    Option("--color-by-depth", help="Give each token the colour of the depth at which it was drafted."),
]
_NewTokensOption = Annotated[
    int, Option("--max-new-tokens", metavar="N", min=1, help=f"{help_of(ChatOptions, 'max_new_tokens').capitalize()}.")
]


def chat(
    model: options.ModelOption = "demo",
    heads: options.HeadsOption = None,
    system: _SystemOption = None,
    max_new_tokens: _NewTokensOption = _CHAT.max_new_tokens,
    tree: options.TreeOption = _DEFAULTS.tree,
    budget: options.BudgetOption = str(_DEFAULTS.budget),
    prune: options.PruneOption = _DEFAULTS.prune,
    ngrams: options.NgramsOption = _DEFAULTS.ngrams,
    temperature: options.TemperatureOption = _CHAT.temperature,
    top_p: options.TopPOption = _CHAT.top_p,
    top_k: options.TopKOption = _CHAT.top_k,
    seed: options.SeedOption = _CHAT.seed,
    color_by_depth: _ColourOption = False,
    dtype: options.DtypeOption = "auto",
    device: options.DeviceOption = "auto",
    threads: options.ThreadsOption = None,
    trust_remote_code: options.TrustOption = False,
    ignore_generation_config: options.IgnoreConfigOption = False,
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
    nodes, shape = options.parse_budget(budget), options.parse_tree(tree)
    law = options.sampling(temperature, top_k, top_p, seed)
    from ladon.cli.loading import load, require_heads
    from ladon.decoder.decoder import Decoder

    loaded = load(
        model,
        heads,
        dtype=dtype,
        device=device,
        threads=threads,
        trust_remote_code=trust_remote_code,
        ignore_generation_config=ignore_generation_config,
    )
    require_heads(loaded, shape, ngrams)
    conversation = Conversation(loaded.tokenizer, system)
    decoder = Decoder(loaded.model, loaded.heads, tree=shape, budget=nodes, prune=prune, ngrams=ngrams)
    session = Session(decoder, loaded, conversation, {**law, "max_new_tokens": max_new_tokens}, color_by_depth)
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
        self, decoder: Decoder, loaded: Loaded, conversation: Conversation, law: dict[str, Any], shows_depth: bool
    ) -> None:
        """`law` is what `Decoder.rows` is told about limits and sampling; its seed is that of the session."""
        from ladon.engine.stats import DecodeStats

        self._decoder, self._loaded, self._conversation = decoder, loaded, conversation
        self._law, self._shows_depth = law, shows_depth
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
            chat.save(text)
        elif command == "/load":
            chat.load(text)
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

        row = self._row()
        context = [] if self._conversation.has_template else row.prompt_ids
        pieces = Detokenizer(self._loaded.tokenizer, context, skip_special_tokens=True)
        said, texts, is_stopped = [], [], False
        try:
            with closing(self._decoder.decode([row])) as steps:
                accepted = 0
                for step in steps:
                    for token, depth in _with_depths(step, row.stats.accepted_nodes - accepted):
                        texts.append(pieces.push(token))
                        said.append(token)
                        self._show(texts[-1], depth)
                    accepted = row.stats.accepted_nodes
        except KeyboardInterrupt:
            is_stopped = True
        texts.append(pieces.flush())
        self._show(f"{texts[-1]}\n", None)
        if row.past is not None:
            self._pasts = [row.past]
        if said:
            self._conversation.answer("".join(texts), said)
        self._count(len(said), self._decoder.stats, "stopped: " if is_stopped else "")
        return bool(said)

    def _row(self) -> Row:
        """The last message as a row, which goes on from what is kept of the chat; `InputError` if it is too long."""
        import torch

        from ladon.sampling.gumbel import mix
        from ladon.target.support import context_limit

        ids = self._conversation.prompt_ids()
        limit = context_limit(self._loaded.model.config.get_text_config(decoder=True))
        if limit is not None and len(ids) >= limit:
            raise InputError(
                f"the chat has {len(ids)} tokens with this message, and the model's context ends at {limit}; write a "
                "shorter one, or /reset"
            )
        law = self._law
        if "seed" in law:
            law = law | {"seed": mix(law["seed"], self._answers)}  # each answer draws anew
        prompt = torch.tensor(ids, device=self._loaded.model.device)
        (row,) = self._decoder.rows([prompt], past=self._pasts, return_dict_in_generate=True, **law)
        return row

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
    """Tokens of a step of one row, each with the depth of its draft: 0 for the bonus token, None after a prompt."""
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
