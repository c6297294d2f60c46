"""A chat as the model reads it: its messages, and the tokens that stand for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ladon.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, str]


class Conversation:
    """Messages, and the tokens that the model is given for them.

    With a chat template, the template writes the messages; without one, the text is all of them in a row, which the
    model continues. What it has said stays in its own tokens, which the cache holds: encoding the text again could
    split it otherwise.

    Attributes:
        messages: with role and content.
        has_template: whether the tokenizer has a chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, system: str | None = None) -> None:
        """Start with a system prompt or nothing; `InputError` for one where no template could place it."""
        self._tokenizer = tokenizer
        self.has_template = bool(tokenizer.chat_template)
        if system is not None and not self.has_template:
            raise InputError(
                "--system is given, but the tokenizer has no chat template; leave it out, or use a chat model"
            )
        self._start: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self.messages = list(self._start)
        self._known: list[tuple[str, list[int]]] = []  # beginnings of the chat, and the tokens that they have had

    def reset(self) -> None:
        """Forget everything but the system prompt."""
        self.messages, self._known = list(self._start), []

    def replace(self, messages: Sequence[Message]) -> None:
        """Take other messages, with role and content, in place of all that were said."""
        self.messages, self._known = list(messages), []

    def ask(self, text: str) -> None:
        """Add a message of the user's."""
        self.messages.append({"role": "user", "content": text})

    def ask_again(self) -> None:
        """Take the last answer back; `InputError` if nothing has been asked."""
        if self.messages and self.messages[-1]["role"] == "assistant":
            self.messages.pop()
        if not self.messages or self.messages[-1]["role"] != "user":
            raise InputError("there is no message to answer again; write one")

    def prompt_ids(self) -> list[int]:
        """The tokens after which the model answers the last message.

        Raises:
            InputError: the chat template refuses the messages, or they have no tokens.
        """
        text = self._text()
        whole = self._encode(text, is_start=True)
        beginnings = [(known, ids) for known, ids in self._known if text.startswith(known)]
        if beginnings:
            known, ids = max(beginnings, key=lambda beginning: len(beginning[0]))
            longer = [*ids, *self._encode(text[len(known) :], is_start=False)]
            if self._decode(longer) == self._decode(whole):  # a tokenizer may add a space where the rest begins
                whole = longer
        if not whole:
            raise InputError("the message has no tokens; write some text")
        self._known.append((text, whole))
        return whole

    def answer(self, text: str, token_ids: Sequence[int]) -> None:
        """Add what the model has said after `prompt_ids`, as text and as tokens."""
        self.messages.append({"role": "assistant", "content": text})
        special, said = set(self._tokenizer.all_special_ids), list(token_ids)
        while said and said[-1] in special:
            said.pop()  # the end of the answer; the template writes its own
        prompt, ids = self._known[-1]
        self._known.append((prompt + text, [*ids, *said]))

    def _text(self) -> str:
        if not self.has_template:
            return "".join(message["content"] for message in self.messages)
        try:
            return str(self._tokenizer.apply_chat_template(self.messages, add_generation_prompt=True, tokenize=False))
        except Exception as error:  # of another type for every way in which a template can refuse
            raise InputError(f"the chat template refuses the chat: {' '.join(str(error).split())[:300]}") from error

    def _encode(self, text: str, *, is_start: bool) -> list[int]:
        ids = self._tokenizer(text, add_special_tokens=is_start and not self.has_template)["input_ids"]
        return [int(token) for token in ids]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
