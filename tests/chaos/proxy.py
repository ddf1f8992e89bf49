"""A network that breaks: a proxy on loopback that hits a set part of the requests with a fault.

Which request is hit by what follows from the seed, the endpoint and how many requests to it came
before, so that a run that fails can be repeated. Knows nothing of what the requests mean, beyond
that 410 is an answer to a poll.
"""

from __future__ import annotations

import contextlib
import http.client
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import BinaryIO

import attrs

PREFIX = "/api/v1/"
POLL = "retrieve_future"
PROTOBUF = "application/x-protobuf"
JSON = "application/json"

LOGIN_PAGE = b"<html><title>Please log in</title></html>"
#: Bodies of answers that say 200 and application/json.
GARBAGE = (b"", b"{", b'{"request_id": ', b"null", b"[]", b'"ok"', b"7", b'{"ok": true}',
           b"\x00\xff\xfe garbage \x80", LOGIN_PAGE)  # fmt: skip
#: How long the port stays closed after a refusal, in seconds.
AWAY = 0.15


class Gone(Exception):
    """The connection to the client is closed."""


@attrs.define
class Answer:
    status: int
    headers: list[tuple[str, str]]
    body: bytes = attrs.field(repr=False)

    @property
    def is_protobuf(self) -> bool:
        return any(k.lower() == "content-type" and PROTOBUF in v for k, v in self.headers)

    def with_header(self, name: str, value: str) -> Answer:
        kept = [(k, v) for k, v in self.headers if k.lower() != name.lower()]
        return attrs.evolve(self, headers=[*kept, (name, value)])

    @property
    def head(self) -> bytes:
        """As if the body were whole."""
        hop_by_hop = ("content-length", "transfer-encoding", "connection")
        lines = [f"HTTP/1.1 {self.status} {http.client.responses.get(self.status, '?')}"]
        lines += [f"{k}: {v}" for k, v in self.headers if k.lower() not in hop_by_hop]
        lines += [f"content-length: {len(self.body)}", "", ""]
        return "\r\n".join(lines).encode("latin-1")


@attrs.define(eq=False)
class Exchange:
    """One request on its way, to be sent on, answered, or broken.

    Attributes:
        path: behind /api/v1/, without query.
        head, body: of the request, as they came.
        chance: decides whatever is left to chance.
    """

    proxy: Proxy
    client: socket.socket
    path: str
    head: bytes
    body: bytes = attrs.field(repr=False)
    chance: random.Random

    def forward(self) -> Answer:
        """What the server says; to be called any number of times."""
        with contextlib.closing(self.proxy.connect()) as server:
            server.sendall(self.head + self.body)
            response = http.client.HTTPResponse(server, method=self.head.split(b" ")[0].decode())
            response.begin()
            return Answer(response.status, response.getheaders(), response.read())

    def reply(self, answer: Answer, upto: int | None = None) -> None:
        """Send an answer, or the first bytes of its body."""
        self.client.sendall(answer.head + answer.body[:upto])

    def reset(self) -> None:
        """End the connection as a crash does."""
        self.client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        raise Gone

    def part_of(self, body: bytes) -> int:
        """A length that is not the whole."""
        return self.chance.randrange(len(body)) if body else 0


Fault = Callable[[Exchange], None]


def refuse(x: Exchange) -> None:
    """The port is closed for a while."""
    x.proxy.go_away(AWAY)
    x.reset()


def reset_before(x: Exchange) -> None:
    """The server never sees the request."""
    x.reset()


def reset_during(x: Exchange) -> None:
    """The server sees the head and a part of the body."""
    with contextlib.closing(x.proxy.connect()) as server:
        server.sendall(x.head + x.body[: x.part_of(x.body)])
    x.reset()


def reset_after(x: Exchange) -> None:
    """The server does what it was asked; its answer is lost."""
    x.forward()
    x.reset()


def reset_in_answer(x: Exchange) -> None:
    answer = x.forward()
    x.reply(answer, x.part_of(answer.body))
    x.reset()


def truncate(x: Exchange) -> None:
    """The connection ends in good order in the middle of the answer."""
    answer = x.forward()
    x.reply(answer, x.part_of(answer.body))
    raise Gone


def half_an_answer(x: Exchange) -> None:
    """The first part of the answer, as if it were whole: half a JSON, half a protobuf."""
    answer = x.forward()
    x.reply(attrs.evolve(answer, body=answer.body[: x.part_of(answer.body)]))


def delay(x: Exchange) -> None:
    time.sleep(x.chance.uniform(0.02, 0.4))
    x.reply(x.forward())


def duplicate(x: Exchange) -> None:
    """The server gets the request twice, at the same time or one after the other's answer."""
    pause = x.chance.choice([0.0, 0.0, 0.3])

    def again() -> None:
        time.sleep(pause)
        with contextlib.suppress(OSError, http.client.HTTPException):
            x.forward()

    threading.Thread(target=again, daemon=True).start()
    x.reply(x.forward())


def garbage(x: Exchange) -> None:
    if x.chance.random() < 0.5:
        x.forward()
    x.reply(Answer(200, [("content-type", JSON)], x.chance.choice(GARBAGE)))


def wrong_type(x: Exchange) -> None:
    """The right answer under a wrong name, or a login page under its own."""
    answer = x.forward()
    if x.chance.random() < 0.3:
        x.reply(Answer(200, [("content-type", "text/html")], LOGIN_PAGE))
    else:
        other = JSON if answer.is_protobuf else PROTOBUF
        x.reply(answer.with_header("content-type", x.chance.choice([other, "text/html"])))


def status(code: int, body: bytes = b"", **headers: str) -> Fault:
    """An error status of a gateway's own, whether or not the server has seen the request."""

    def fault(x: Exchange) -> None:
        if x.chance.random() < 0.5:
            x.forward()
        named = [(name.replace("_", "-"), value) for name, value in headers.items()]
        x.reply(Answer(code, named, body))

    return fault


FAULTS: dict[str, Fault] = {
    "refused": refuse,
    "reset before the body": reset_before,
    "reset in the body": reset_during,
    "reset before the answer": reset_after,
    "reset in the answer": reset_in_answer,
    "answer cut off": truncate,
    "half an answer": half_an_answer,
    "delayed": delay,
    "twice": duplicate,
    "garbage": garbage,
    "wrong content type": wrong_type,
    "400 empty": status(400),
    "400 of a proxy": status(400, LOGIN_PAGE, content_type="text/html"),
    "408": status(408),
    "409": status(409),
    "410 on a poll": status(410, b'{"detail": "promise expired"}', content_type=JSON),
    "429": status(429),
    "429 with Retry-After": status(429, retry_after="0.2"),
    "500": status(500),
    "502": status(502, LOGIN_PAGE, content_type="text/html"),
    "503": status(503, retry_after="0.1"),
    "504": status(504),
}


class Proxy:
    """Stands before the server on *upstream* (a port); `url` is its own address.

    Args:
        rate: the part of the requests that is hit; 0 lets everything through.
    """

    def __init__(self, upstream: int, seed: int = 0, rate: float = 0.0) -> None:
        self.upstream, self.seed, self.rate = upstream, seed, rate
        self._lock = threading.Lock()  # guards all below
        self._seen: Counter[str] = Counter()
        self.hits: Counter[str] = Counter()
        self._clients: set[socket.socket] = set()
        self._away_until = 0.0
        self._closed = False
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self._port = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self._port}"

    def __enter__(self) -> Proxy:
        threading.Thread(target=self._accept, name="chaos-proxy", daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        with self._lock:
            self._closed = True
            left = list(self._clients)
        self._listener.close()
        for client in left:
            with contextlib.suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)

    @property
    def requests(self) -> int:
        return self._seen.total()

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.upstream), timeout=120)

    def go_away(self, seconds: float) -> None:
        """Do not listen for a while; open connections continue."""
        with self._lock:
            self._away_until = time.monotonic() + seconds

    def _accept(self) -> None:
        while not self._closed:
            self._listener.settimeout(0.02)
            try:
                client, _ = self._listener.accept()
            except TimeoutError:
                client = None
            except OSError:
                return
            if client is not None:
                client.settimeout(None)
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                with self._lock:
                    self._clients.add(client)
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()
            if self._away_until > time.monotonic():
                self._stay_away()

    def _stay_away(self) -> None:
        """Connections to a closed port are refused."""
        self._listener.close()
        time.sleep(max(0.0, self._away_until - time.monotonic()))
        with self._lock:
            if not self._closed:
                self._listener = socket.create_server(("127.0.0.1", self._port), backlog=1024)

    def _serve(self, client: socket.socket) -> None:
        with contextlib.suppress(Gone, OSError, http.client.HTTPException), client:
            incoming = client.makefile("rb")
            with incoming:
                while head := _read_head(incoming):
                    self._pass_on(client, head, incoming.read(_content_length(head)))
        with self._lock:
            self._clients.discard(client)

    def _pass_on(self, client: socket.socket, head: bytes, body: bytes) -> None:
        path = head.split(b" ", 2)[1].decode().removeprefix(PREFIX).split("?")[0]
        endpoint = path.split("/")[0]
        with self._lock:
            number = self._seen[endpoint]
            self._seen[endpoint] += 1
            kind = self.fault_of(endpoint, number)
            if kind is not None:
                self.hits[kind] += 1
        chance = random.Random(f"{self.seed}/{endpoint}/{number}/how")
        x = Exchange(self, client, path, head, body, chance)
        if kind is None:
            x.reply(x.forward())
        else:
            FAULTS[kind](x)

    def fault_of(self, endpoint: str, number: int) -> str | None:
        """What happens to request *number* (from 0) to an endpoint; None: nothing."""
        chance = random.Random(f"{self.seed}/{endpoint}/{number}")
        if chance.random() >= self.rate:
            return None
        return chance.choice([k for k in FAULTS if endpoint == POLL or k != "410 on a poll"])


def _read_head(incoming: BinaryIO) -> bytes:
    """Up to and with the empty line; b"" at the end of the connection."""
    lines = []
    while (line := incoming.readline()) not in (b"\r\n", b""):
        lines.append(line)
    return b"".join(lines) + b"\r\n" if lines else b""


def _content_length(head: bytes) -> int:
    for line in head.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            return int(value)
    return 0
