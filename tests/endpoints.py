"""An OpenAI-compatible endpoint in this process, which answers what a test says."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "sk-very-secret"
Reply = Callable[[int, str, dict[str, Any]], tuple[int, Any]]


class Server(ThreadingHTTPServer):
    """Answers with what `reply(number of this request, path, body)` says, and keeps what came."""

    daemon_threads = True

    def __init__(self, reply: Reply) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply, self.lock = reply, threading.Lock()
        self.requests: list[tuple[str, dict[str, Any], dict[str, str]]] = []
        self.running = self.most = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.running += 1
            self.server.most = max(self.server.most, self.server.running)
            number = len(self.server.requests)
            self.server.requests.append((self.path, body, dict(self.headers)))
        status, said = self.server.reply(number, self.path, body)
        data = said if isinstance(said, bytes) else json.dumps(said).encode()
        with self.server.lock:
            self.server.running -= 1
        if status == 0:  # the connection breaks
            self.close_connection = True
            return
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        if status == 429:
            self.send_header("Retry-After", "0")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Nothing on standard error."""


@contextmanager
def serving(reply: Reply) -> Iterator[Server]:
    with Server(reply) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def says(body: dict[str, Any], text: str = "for line", finish: str | None = "stop") -> tuple[int, Any]:
    """A good response, of the kind that the request asks for."""
    said = {"message": {"role": "assistant", "content": text}} if "messages" in body else {"text": text}
    return 200, {"choices": [{"index": 0, "finish_reason": finish, **said}]}
