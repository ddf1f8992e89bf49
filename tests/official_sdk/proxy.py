"""A proxy between the official SDK and our server: it writes down what passes, and meddles.

What a network does only now and then - a message twice, out of order, an answer lost - happens here
every time. Bodies are written down whole, so that a test can look at what the SDK never shows.
"""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

import attrs

PREFIX = "/api/v1/"


@attrs.define
class Exchange:
    """One request and its answer; a meddler may change either before it is forwarded.

    Attributes:
        path: behind /api/v1/.
        number: how many requests came before this one.
    """

    method: str
    path: str
    headers: dict[str, str]
    body: bytes = attrs.field(repr=False)
    number: int
    status: int = 0
    answer_headers: dict[str, str] = attrs.field(factory=dict)
    answer: bytes = attrs.field(default=b"", repr=False)

    @property
    def json(self) -> Any:
        """The request's body."""
        return json.loads(self.body)

    @property
    def answer_type(self) -> str:
        return self.answer_headers.get("content-type", "").split(";")[0]

    @property
    def answer_json(self) -> Any:
        return json.loads(self.answer) if self.answer_type == "application/json" else None


Meddler = Callable[[Exchange], None]


def _nothing(exchange: Exchange) -> None:
    pass


class Proxy:
    """Forwards to *upstream*; `url` is its own address.

    Args:
        before: called with each request before it is forwarded, on its own thread: it may
            wait, change it, or forward other requests with `send`.
        after: called with each answer before it goes back.
    """

    def __init__(
        self, upstream: str, before: Meddler = _nothing, after: Meddler = _nothing
    ) -> None:
        self._upstream = urlsplit(upstream).netloc
        self._before, self._after = before, after
        self._lock = threading.Lock()  # guards _count and exchanges
        self._count = 0
        self.exchanges: list[Exchange] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Proxy:
        threading.Thread(target=self._server.serve_forever, name="proxy", daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def to(self, path: str) -> list[Exchange]:
        """What went to *path*, in the order in which the answers came."""
        return [e for e in self.exchanges if e.path.split("?")[0] == path]

    def send(self, exchange: Exchange) -> None:
        """Forward a request and fill in its answer."""
        connection = http.client.HTTPConnection(self._upstream, timeout=120)
        try:
            connection.request(
                exchange.method, PREFIX + exchange.path, exchange.body, exchange.headers
            )
            response = connection.getresponse()
            exchange.status = response.status
            exchange.answer_headers = {k.lower(): v for k, v in response.getheaders()}
            exchange.answer = response.read()
        finally:
            connection.close()

    def _take(self, method: str, path: str, headers: dict[str, str], body: bytes) -> Exchange:
        with self._lock:
            exchange = Exchange(method, path, headers, body, self._count)
            self._count += 1
        self._before(exchange)
        if not exchange.status:
            self.send(exchange)
        with self._lock:
            self.exchanges.append(attrs.evolve(exchange))
        self._after(exchange)
        return exchange

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        take = self._take

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length") or 0))
                drop = ("host", "connection", "content-length", "accept-encoding")
                headers = {k.lower(): v for k, v in self.headers.items() if k.lower() not in drop}
                exchange = take(self.command, self.path.removeprefix(PREFIX), headers, body)
                self.send_response(exchange.status)
                for key, value in exchange.answer_headers.items():
                    if key not in ("content-length", "transfer-encoding", "connection", "date"):
                        self.send_header(key, value)
                self.send_header("content-length", str(len(exchange.answer)))
                self.end_headers()
                self.wfile.write(exchange.answer)

            do_GET = do_POST = do_PUT = do_DELETE = handle_any

            def log_message(self, *args: object) -> None:
                pass

        return Handler
