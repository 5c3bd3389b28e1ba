"""A small server that plays an OpenAI-compatible endpoint, and time that costs none."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from vlm.procedures.instruct.rate_limiter import Clock


@dataclass
class Raw:
    """An answer that is no plain text of a model."""

    status: int = 200
    body: Any = b""
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Asked:
    """A request that arrived. `number` counts from 1."""

    number: int
    path: str
    key: str | None
    body: dict[str, Any]

    @property
    def text(self) -> str:
        """Of the last message."""
        content = self.body["messages"][-1]["content"]
        return content if isinstance(content, str) else content[-1]["text"]


class Server:
    """Answers with what `play` returns: a text, or a `Raw`; None breaks the connection off."""

    def __init__(self, play: Callable[[Asked], "str | Raw | None"]) -> None:
        self.play = play
        self.asked: list[Asked] = []
        self._lock = threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(inner) -> None:
                self._answer(inner)

            def log_message(inner, *_: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self._lock:
            asked = Asked(len(self.asked) + 1, handler.path, handler.headers["Authorization"], body)
            self.asked.append(asked)
        found = self.play(asked)
        if found is None:
            handler.close_connection = True
            return
        raw = found if isinstance(found, Raw) else Raw(body=completion(found))
        data = raw.body if isinstance(raw.body, bytes) else json.dumps(raw.body).encode()
        try:
            handler.send_response(raw.status)
            for name, value in raw.headers.items():
                handler.send_header(name, value)
            handler.send_header("Content-Length", str(len(data)))
            handler.end_headers()
            handler.wfile.write(data)
        except OSError:  # who asked is gone
            pass


def completion(text: str | None, *, end: str = "stop", tokens: int = 7, **message: Any) -> dict[str, Any]:
    choice = {"index": 0, "message": {"role": "assistant", "content": text, **message}, "finish_reason": end}
    return {"object": "chat.completion", "choices": [choice], "usage": {"completion_tokens": tokens}}


@contextmanager
def serving(play: Callable[[Asked], "str | Raw | None"]) -> Iterator[Server]:
    server = Server(play)
    thread = threading.Thread(target=server._http.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server._http.shutdown()
        server._http.server_close()


class FakeClock(Clock):
    """Sleeping takes no time and is noted."""

    def __init__(self) -> None:
        super().__init__()
        self.time = 0.0
        self.slept: list[float] = []
        self._lock = threading.Lock()

    def again(self) -> "FakeClock":
        """For another start, which stops the clock at its end."""
        self.stopping.clear()
        return self

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        with self._lock:
            self.time += max(0.0, seconds)
            self.slept.append(seconds)
        super().sleep(0)
