"""Answers from an OpenAI-compatible endpoint: the same model on a server or cluster that the user already has."""

from __future__ import annotations

import queue
import random
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from ladon.errors import InputError
from ladon.train.data.prompts import Prompt, turn_end
from ladon.train.distill.distill import Answer, Failure, Settings

_HOPELESS = {401: "refuses the key; name its variable with --api-key-env", 403: "refuses the key", 404: "is not there"}
_TIMEOUT = (10.0, 600.0)  # seconds to connect, and between two bytes of an answer
_LONGEST_WAIT = 60.0  # seconds between two tries
_UNREACHABLE = "endpoint does not answer"
_Queue = queue.Queue[tuple[Prompt, Any]]  # a choice of a response, a `Failure`, or the error that ends the run


class _Temporary(Exception):
    """A request that failed and may work later."""

    def __init__(self, reason: str, detail: str, wait: float | None = None) -> None:
        """`wait` is the server's own wish in seconds."""
        super().__init__(reason)
        self.reason, self.detail, self.wait = reason, detail, wait


class EndpointModel:
    """Answers with POST requests to `URL/completions` and `URL/chat/completions`, several at a time.

    Prompts given as text or token ids are continued, chats are sent as messages. What the server says is encoded with
    the tokenizer, so the tokens are those of its text and may differ from those it sampled.
    """

    def __init__(
        self,
        url: str,
        tokenizer: PreTrainedTokenizerBase,
        *,
        concurrency: int,
        api_key: str | None = None,
        tries: int = 6,
        wait: float = 1.0,
    ) -> None:
        """Nothing is sent yet.

        Args:
            url: up to and without the last part, such as "http://host:8000/v1".
            tokenizer: the model's own.
            concurrency: requests at a time.
            api_key: sent as a bearer token, and written nowhere.
            tries: requests made for one prompt before it counts as failed.
            wait: seconds before the second try; twice as long before each later one.

        Raises:
            InputError: the URL is none, or the package requests is missing.
        """
        if not url.startswith(("http://", "https://")):
            raise InputError(f"--endpoint is {url!r}; give a URL such as http://localhost:8000/v1")
        try:
            import requests
        except ImportError as error:
            raise InputError("--endpoint needs the package requests; pip install 'ladon-llm[train]'") from error
        self._requests: Any = requests
        self._url, self._tokenizer, self._api_key = url.rstrip("/"), tokenizer, api_key
        self._turn_end = turn_end(tokenizer)
        self._concurrency, self._tries, self._wait = concurrency, tries, wait
        self._stopped = threading.Event()

    def answers(self, prompts: Sequence[Prompt], settings: Settings) -> Iterator[list[Answer | Failure]]:
        """Answers in the order in which they come.

        Raises:
            InputError: the endpoint is not there, refuses the key, keeps reasoning apart, or does not answer at all.
        """
        left, lock = iter(prompts), threading.Lock()
        found: _Queue = queue.Queue()

        def work() -> None:
            with self._requests.Session() as session:
                while not self._stopped.is_set():
                    with lock:
                        prompt = next(left, None)
                    if prompt is None:
                        return
                    try:
                        found.put((prompt, self._choice(session, prompt, settings)))
                    except Exception as error:  # raised again by the reader; meanwhile nobody asks on
                        self._stopped.set()
                        found.put((prompt, error))

        self._stopped.clear()
        for _ in range(min(self._concurrency, len(prompts))):
            # daemons: after Ctrl-C the process ends without waiting for answers that are under way
            threading.Thread(target=work, daemon=True).start()
        try:
            yield from self._collected(found, len(prompts))
        finally:
            self._stopped.set()

    def _collected(self, found: _Queue, num: int) -> Iterator[list[Answer | Failure]]:
        """`num` outcomes, as many together as there are; what they say is encoded here, in one thread."""
        silent = 0
        while num > 0:
            pairs = [found.get()]
            while not found.empty():
                pairs.append(found.get())
            num -= len(pairs)
            outcomes = [self._outcome(prompt, choice) for prompt, choice in pairs if not isinstance(choice, Exception)]
            if outcomes:
                yield outcomes
            for _, choice in pairs:
                if isinstance(choice, Exception):
                    raise choice
            for outcome in outcomes:
                is_silent = isinstance(outcome, Failure) and outcome.reason == _UNREACHABLE
                silent = silent + 1 if is_silent else 0
                if silent >= 2 * self._concurrency and isinstance(outcome, Failure):
                    raise InputError(f"{self._url} does not answer ({outcome.detail}); start it, then run this again")

    def _choice(self, session: Any, prompt: Prompt, settings: Settings) -> Any:
        """What the server says to one prompt, after as many tries as it takes: a choice, or a `Failure`."""
        wait = self._wait
        for number in range(1, self._tries + 1):
            try:
                return self._post(session, prompt, settings)
            except _Temporary as failure:
                if number == self._tries or self._stopped.is_set():
                    return Failure(prompt=prompt, reason=failure.reason, detail=failure.detail)
                pause = wait * random.uniform(0.75, 1.25) if failure.wait is None else failure.wait  # not all at once
                self._stopped.wait(min(pause, _LONGEST_WAIT))
                wait *= 2
        raise AssertionError("tries is 1 or more")

    def _post(self, session: Any, prompt: Prompt, settings: Settings) -> Any:
        """The first choice of the response; a `Failure` if the server refuses this prompt."""
        path, body = _request(prompt, settings)
        headers = {} if self._api_key is None else {"Authorization": f"Bearer {self._api_key}"}
        errors = self._requests.exceptions
        try:
            response = session.post(
                f"{self._url}/{path}",
                json=body,
                timeout=_TIMEOUT,
                auth=lambda request: request.headers.update(headers) or request,  # (else a .netrc would replace it)
            )
        except (errors.ConnectionError, errors.Timeout, errors.ChunkedEncodingError) as error:
            raise _Temporary(reason=_UNREACHABLE, detail=self._clean(type(error).__name__)) from error
        except errors.RequestException as error:
            raise InputError(f"cannot ask {self._url}: {self._clean(str(error))}; check --endpoint") from error
        status = response.status_code
        if status in _HOPELESS:
            raise InputError(f"{self._url}/{path} {_HOPELESS[status]} (HTTP {status}: {self._clean(response.text)})")
        if status == 429 or status >= 500:
            raise _Temporary(
                reason=f"endpoint error {status}", detail=self._clean(response.text), wait=_seconds(response.headers)
            )
        if status != 200:
            return Failure(prompt=prompt, reason=f"endpoint error {status}", detail=self._clean(response.text))
        try:
            return response.json()["choices"][0]
        except (ValueError, LookupError, TypeError) as error:
            detail = self._clean(response.text)
            raise _Temporary(reason="endpoint sends no completion", detail=detail) from error

    def _outcome(self, prompt: Prompt, choice: Any) -> Answer | Failure:
        """What a choice says, as tokens."""
        if isinstance(choice, Failure):
            return choice
        said = choice.get("message", choice) if isinstance(choice, dict) else None
        content = said.get("content", said.get("text")) if isinstance(said, dict) else said
        if not isinstance(said, dict) or not isinstance(content, str | None):
            return Failure(prompt=prompt, reason="endpoint sends no completion", detail=self._clean(str(choice)))
        if said.get("reasoning_content") or said.get("reasoning"):
            raise InputError(
                f"{self._url} keeps reasoning apart from its answers, which then lack what the model said first; start "
                "the server without a reasoning parser"
            )
        if said.get("tool_calls"):
            detail = "what the model said is not in the response; start the server without a tool parser"
            return Failure(prompt=prompt, reason="endpoint keeps tool calls apart", detail=detail)
        text, finish = content or "", choice.get("finish_reason")
        if finish not in ("stop", "length"):
            return Failure(prompt=prompt, reason=f"finish reason {finish}")
        end = self._tokenizer.eos_token_id if prompt.messages is None else self._turn_end
        ids = self._encode(prompt, text) + ([end] if finish == "stop" and end is not None else [])
        return Answer(prompt=prompt, token_ids=ids, text=text, finish=finish)

    def _encode(self, prompt: Prompt, text: str) -> list[int]:
        """Tokens of an answer: what it adds to those of the prompt, or where they do not join so, its own."""
        if prompt.text is not None:
            special = prompt.messages is None
            whole = self._tokenizer(prompt.text + text, add_special_tokens=special)["input_ids"]
            if whole[: len(prompt.token_ids)] == prompt.token_ids:
                return [int(token) for token in whole[len(prompt.token_ids) :]]
        return [int(token) for token in self._tokenizer(text, add_special_tokens=False)["input_ids"]]

    def _clean(self, text: str) -> str:
        """One short line in which the key does not stand."""
        text = " ".join(text.split())[:300]
        return text.replace(self._api_key, "***") if self._api_key else text


def _request(prompt: Prompt, settings: Settings) -> tuple[str, dict[str, Any]]:
    """The path and the body of the request for one prompt."""
    body: dict[str, Any] = {
        "model": settings.model,
        "max_tokens": settings.max_new_tokens,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
    }
    seed = settings.seed_of(prompt)
    if seed is not None:
        body["seed"] = seed
    if settings.top_k:
        body["top_k"] = settings.top_k  # not OpenAI's own, but vLLM, SGLang and llama.cpp know it
    if prompt.messages is not None:
        if prompt.tools:
            body["tools"] = prompt.tools
        if prompt.template_options:
            body["chat_template_kwargs"] = prompt.template_options  # not OpenAI's own, but vLLM and SGLang know it
        return "chat/completions", body | {"messages": prompt.messages}
    return "completions", body | {"prompt": prompt.token_ids if prompt.text is None else prompt.text}


def _seconds(headers: Any) -> float | None:
    """How long the server asks to wait, if it says so in seconds."""
    text = headers.get("Retry-After", "")
    return float(text) if text.isdigit() else None
