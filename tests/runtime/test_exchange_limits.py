"""
Peers that drip and peers that flood: every phase of an exchange ends in time and within its size.

The peers are sockets that speak HTTP by the byte; a drip is a byte every 20 ms, for ever.
"""

from __future__ import annotations

import contextlib
import gzip
import itertools
import socket
import ssl
import threading
import time
import tracemalloc
import zlib
from pathlib import Path

import pytest
import requests

import tinkex
from tests.support.canned import HEALTHZ, Canned
from tinkex import errors, wire
from tinkex.config import Config, Patience
from tinkex.runtime import exchange_limits
from tinkex.runtime.exchange_limits import ExchangeLimits
from tinkex.runtime.retry import ONCE
from tinkex.runtime.sample_stream import read_events
from tinkex.runtime.transport import Transport

CERTIFICATE = Path(__file__).parents[1] / "support" / "localhost.pem"

HEAD = b"HTTP/1.1 200 OK\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
MEGABYTE = 1 << 20


class Peer:
    """Sends each connection *first*, then the items of *rest* with a pause between them, once it
    has sent us something. It reads nothing if *deaf*."""

    def __init__(self, first=b"", rest=(), pause=0.0, context=None, deaf=False):
        self._first, self._rest, self._pause = first, rest, pause
        self._context, self._deaf = context, deaf
        self._listener = socket.create_server(("127.0.0.1", 0))
        port = self._listener.getsockname()[1]
        self.url = f"{'https' if context else 'http'}://localhost:{port}"
        self._open = []
        self._over = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                self._open.append(sock)
                threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock):
        with contextlib.suppress(OSError), contextlib.closing(sock):
            if self._context:
                sock = self._context.wrap_socket(sock, server_side=True)
                self._open.append(sock)
            if self._deaf:
                self._over.wait()
            sock.recv(MEGABYTE)
            sock.sendall(self._first)
            for data in self._rest:
                if self._over.wait(self._pause):
                    return
                sock.sendall(data)

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self._over.set()
        self._listener.close()
        for sock in self._open:
            sock.close()


def drip(text):
    """The bytes of *text* for ever, one at a time."""
    return (bytes([byte]) for byte in itertools.cycle(text))


@pytest.fixture
def way():
    """Makes a transport to a peer, whose requests may take half a second."""
    with contextlib.ExitStack() as stack:

        def make(peer, **options):
            options.setdefault("patience", Patience(request=0.5, connect=0.5))
            made = Transport(Config(peer.url, "tml-key", **options))
            stack.callback(made.close)
            made.established = True
            return made

        yield make


def ask(way, **options):
    return way.call(wire.HEALTHZ, retry=ONCE, **options)


def foreign_session():
    """Its adapter is the user's: nothing is known of its connections."""
    session = requests.Session()
    session.mount("http://", requests.adapters.HTTPAdapter(pool_maxsize=5))
    return session


# Time.

SLOW = {
    "in the first line": (b"", lambda: drip(b"HTTP/1.1 200 O" + b"K" * 10_000)),
    "in the head": (HEAD + b"X-A: ", lambda: drip(b"a")),
    "in a body of known length": (HEAD + b"Content-Length: 9000\r\n\r\n", lambda: drip(b"a")),
    "in a body without length": (HEAD + b"Connection: close\r\n\r\n", lambda: drip(b"a")),
    "in a chunk": (CHUNKED + b"FFFF\r\n", lambda: drip(b"a")),
    "in a chunk's length": (CHUNKED, lambda: drip(b"0")),
    "in chunks": (CHUNKED, itertools.cycle([b"1\r\na\r\n"])),
    "in the trailers": (CHUNKED + b"0\r\n", itertools.cycle([b"A: b\r\n"])),
    "in what is compressed": (
        HEAD + b"Content-Encoding: gzip\r\nContent-Length: 9000\r\n\r\n" + gzip.compress(b"")[:10],
        lambda: drip(b"\0"),
    ),
    "with 100 Continue": (b"", itertools.cycle([b"HTTP/1.1 100 Continue\r\n\r\n"])),
}
HINTS = b"", itertools.cycle([b"HTTP/1.1 103 Hints\r\nLink: a\r\n\r\n"])


@pytest.mark.parametrize("phase", SLOW)
@pytest.mark.parametrize("session", [None, foreign_session], ids=["ours", "the user's adapter"])
def test_a_peer_that_drips_is_left_in_time(phase, session, way):
    """Each read succeeds, so a timeout for each read never comes."""
    first, rest = SLOW[phase]
    with Peer(first, rest() if callable(rest) else rest, pause=0.02) as peer:
        started = time.monotonic()
        with pytest.raises(errors.APIError, match=r"answer (within 0 s|is unusable)") as caught:
            ask(way(peer, session=session and session()))

        assert time.monotonic() - started < 3
    assert isinstance(caught.value, errors.APITimeoutError)


def test_a_peer_that_only_ever_hints_is_left_in_time(way):
    with Peer(*HINTS, pause=0.02) as peer, pytest.raises(errors.APITimeoutError):
        ask(way(peer))
    # To http.client, which a user's adapter is made of, the first hint is the answer.
    with Peer(*HINTS, pause=0.02) as peer, pytest.raises(errors.APIStatusError, match="103"):
        ask(way(peer, session=foreign_session()))


def test_a_peer_that_drips_during_the_tls_handshake_is_left_in_time(way):
    """A record that never ends, while the certificate is waited for."""
    record = b"\x16\x03\x03\x40\x00\x02\x00\x3f\xfc\x03\x03"
    with Peer(record, drip(b"a"), pause=0.02) as peer:
        peer.url = peer.url.replace("http:", "https:")
        started = time.monotonic()
        with pytest.raises(errors.APIConnectionError):
            ask(way(peer))

        assert time.monotonic() - started < 3


def test_a_peer_that_drips_over_tls_is_left_in_time(way):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(CERTIFICATE)
    with Peer(HEAD + b"X-A: ", drip(b"a"), pause=0.02, context=context) as peer:
        started = time.monotonic()
        with pytest.raises(errors.APITimeoutError):
            ask(way(peer, verify=str(CERTIFICATE)))

        assert time.monotonic() - started < 3


class Nowhere:
    """A peer that cannot be reached."""

    def __init__(self, url):
        self.url = url


@pytest.mark.parametrize("session", [None, foreign_session], ids=["ours", "the user's adapter"])
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_name_that_is_not_resolved_is_left_in_time(scheme, session, way, monkeypatch):
    """A resolver has no time limit that a program could set."""
    over = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: over.wait(30))
    started = time.monotonic()
    with pytest.raises(errors.APIConnectionError, match=r"slow\.test"):
        ask(way(Nowhere(f"{scheme}://slow.test"), session=session and session()))
    taken = time.monotonic() - started
    over.set()

    assert taken < 3


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_proxy_whose_name_is_not_resolved_is_left_in_time(scheme, way, monkeypatch):
    over = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: over.wait(30))
    session = requests.Session()
    session.proxies = {scheme: "http://slow-proxy.test:3128"}
    started = time.monotonic()
    with pytest.raises(errors.APIConnectionError, match=r"slow-proxy\.test"):
        ask(way(Nowhere(f"{scheme}://server.test"), session=session))
    taken = time.monotonic() - started
    over.set()

    assert taken < 3


def test_a_host_of_many_addresses_that_do_not_answer_is_left_in_time(way, monkeypatch):
    """Each of them alone would get the whole time."""
    many = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (f"192.0.2.{i}", 80)) for i in range(40)]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: many)

    def connect(sock, address):
        time.sleep(sock.gettimeout())
        raise TimeoutError("timed out")

    monkeypatch.setattr(socket.socket, "connect", connect)
    started = time.monotonic()
    with pytest.raises(errors.APIConnectionError, match=r"many\.test"):
        ask(way(Nowhere("http://many.test")))

    assert time.monotonic() - started < 3


def test_a_connection_that_is_made_too_late_is_closed(way, monkeypatch):
    """By then the exchange has failed."""
    resolve, over = socket.getaddrinfo, threading.Event()

    def late(*args, **kwargs):
        over.wait(30)
        return resolve(*args, **kwargs)

    with Peer(HEAD) as peer:
        monkeypatch.setattr(socket, "getaddrinfo", late)
        with pytest.raises(errors.APIConnectionError):
            ask(way(peer))
        over.set()
        deadline = time.monotonic() + 10
        while not peer._open or peer._open[0].fileno() >= 0:  # accepted, and ended by the client
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.mark.parametrize("tls", [False, True])
def test_a_peer_that_does_not_read_is_left_in_time(tls, way, monkeypatch):
    """The request is larger than all buffers between."""
    monkeypatch.setattr(exchange_limits, "SLOWEST", 1e9)  # what they hold is to give no time
    context = None
    if tls:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(CERTIFICATE)
    with Peer(context=context, deaf=True) as peer:
        started = time.monotonic()
        made = way(peer, verify=str(CERTIFICATE))
        with pytest.raises(errors.APIConnectionError):
            made.send(
                "POST", made.url("forward"), b"x" * (20 * MEGABYTE), retry=ONCE, parse=lambda a: a
            )

        assert time.monotonic() - started < 5


def test_first_contact_with_a_peer_that_drips_keeps_its_promise():
    """8 s by default; here 1.5 s."""
    with Peer(HEAD + b"X-A: ", drip(b"a"), pause=0.02) as peer:
        started = time.monotonic()
        with pytest.raises(errors.APITimeoutError, match="no complete answer within"):
            tinkex.ServiceClient(peer.url, "tml-key", patience=Patience(first_contact=1.5))

        assert time.monotonic() - started < 5


def test_a_large_body_gets_more_time(monkeypatch):
    """A second for each 50 kB beyond the first 64 KiB: a slow line is no attack."""
    now = [0.0]
    monkeypatch.setattr(exchange_limits.time, "monotonic", lambda: now[0])
    limits = ExchangeLimits(5.0, 60.0)
    now[0] = 59.0
    assert 1.0 == limits.left()
    limits.take(exchange_limits.FREE)
    assert 1.0 == limits.left(), "small answers get no more"
    limits.take(500_000)
    limits.sent += 500_000
    assert 21.0 == limits.left()
    now[0] = 80.0
    with pytest.raises(TimeoutError):
        limits.left()


# Size.

ZEROS = b"\0" * MEGABYTE


def chunk(data):
    return b"%x\r\n%s\r\n" % (len(data), data)


def bomb(wbits):
    """Endless chunks of a compressed stream of zeros."""
    packer = zlib.compressobj(9, wbits=wbits)
    while True:
        yield chunk(packer.compress(ZEROS * 8) + packer.flush(zlib.Z_FULL_FLUSH))


FLOODS = {
    "chunks": (CHUNKED, itertools.repeat(chunk(ZEROS))),
    "a body without length": (HEAD + b"Connection: close\r\n\r\n", itertools.repeat(ZEROS)),
    "an announced length": (HEAD + b"Content-Length: 5000000000\r\n\r\n", itertools.repeat(ZEROS)),
    "headers": (HEAD, itertools.repeat(b"A: " + b"b" * 60_000 + b"\r\n")),
    "a header": (HEAD + b"A: ", itertools.repeat(ZEROS)),
    "100 Continue": (b"", itertools.repeat(b"HTTP/1.1 100 Continue\r\n\r\n" * 1000)),
    "trailers": (CHUNKED + b"0\r\n", itertools.repeat(b"A: b\r\n" * 1000)),
    "gzip": (HEAD + b"Content-Encoding: gzip\r\n" + CHUNKED[len(HEAD) :], lambda: bomb(31)),
    "deflate": (HEAD + b"Content-Encoding: deflate\r\n" + CHUNKED[len(HEAD) :], lambda: bomb(15)),
    "gzip in gzip": (
        HEAD + b"Content-Encoding: gzip, gzip\r\n" + CHUNKED[len(HEAD) :],
        lambda: bomb(31),
    ),
    "zstd": (HEAD + b"Content-Encoding: zstd\r\n" + CHUNKED[len(HEAD) :], itertools.repeat(ZEROS)),
}


@pytest.mark.parametrize("kind", FLOODS)
@pytest.mark.parametrize("session", [None, foreign_session], ids=["ours", "the user's adapter"])
def test_a_flood_ends_at_the_bound_of_its_kind(kind, session, way):
    """1 MiB for all but lists and results. Nothing near 100 MB is held meanwhile."""
    first, rest = FLOODS[kind]
    patience = Patience(request=2.0 if session else 60.0)
    with Peer(first, rest() if callable(rest) else rest) as peer:
        transport = way(peer, session=session and session(), patience=patience)
        tracemalloc.start()
        try:
            with pytest.raises(errors.APIError) as caught:
                ask(transport)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()

        if kind not in ("headers", "a header", "100 Continue", "trailers"):  # ended by http.client
            assert isinstance(caught.value, errors.APIResponseValidationError), caught.value
            assert "unusable" in str(caught.value)
        assert 100 * MEGABYTE > peak


@pytest.mark.parametrize(
    "endpoint, most",
    [(wire.HEALTHZ, 1 << 20), (wire.LIST_CHECKPOINTS, 1 << 24), (wire.RETRIEVE_FUTURE, 1 << 28)],
    ids=lambda value: getattr(value, "path", value),
)
def test_each_kind_has_its_bound(endpoint, most):
    assert most == endpoint.most_bytes


def test_results_have_the_largest_bound():
    assert {1 << 28} == {operation.most_bytes for operation in wire.OPERATIONS.values()}


@pytest.mark.parametrize("body", [b"[" + b"[]," * 2_000_000 + b"[]]", b"[" + b"1," * 20_000_000])
def test_json_that_stands_for_more_than_it_is_is_not_decoded(body):
    """Millions of empty lists: 64 bytes of memory for each, and most of a second."""
    with Canned() as canned:
        canned.add("GET", HEALTHZ, body=body, content_type="application/json")
        with pytest.raises(errors.APIResponseValidationError, match="lists and objects"):
            canned.transport().send(
                "GET", HEALTHZ, retry=ONCE, most_bytes=1 << 28, parse=lambda answer: answer.json()
            )


# What comes before and after an answer.


def test_early_hints_are_not_taken_for_the_answer(way):
    """http.client would return the 103, and leave the answer to the next request."""
    answer = HEAD + b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"
    bodies = [b'{"status":"first"}', b'{"status":"second"}']
    hints = b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"
    first, second = (hints + answer % (len(body), body) for body in bodies)
    answers = iter([first, second])

    class Turns(Peer):
        def _serve(self, sock):
            with contextlib.suppress(OSError):
                while sock.recv(MEGABYTE):
                    sock.sendall(next(answers))

    with Turns() as peer:
        transport = way(peer)

        assert ["first", "second"] == [ask(transport).status for _ in range(2)]


# Streams.

SSE = HEAD + b"Content-Type: text/event-stream\r\nConnection: close\r\n\r\n"
EVENT = b'data: {"sequence_index": 0, "token": 7, "logprob": -0.5}\n\n'


def stream(way, peer, **options):
    made = way(peer, **options)
    with made.open_stream("POST", made.url("stream_sample"), b"{}") as opened:
        yield from read_events(opened.lines())


def test_a_stream_may_last_as_long_as_each_part_comes_in_time(way):
    """The limit of half a second is for each line."""
    events = [EVENT] * 10 + [b"data: [DONE]\n\n"]
    with Peer(SSE, events, pause=0.1) as peer:
        started = time.monotonic()

        assert 10 == len(list(stream(way, peer)))
        assert time.monotonic() - started > 0.9


def test_a_stream_that_drips_is_left_in_time(way):
    with Peer(SSE + EVENT + b"data: ", drip(b"a"), pause=0.02) as peer:
        started = time.monotonic()
        with pytest.raises(errors.APITimeoutError, match="no complete answer within"):
            list(stream(way, peer))

        assert time.monotonic() - started < 4


@pytest.mark.parametrize("flood", [ZEROS, b"data: x\n" * 1000], ids=["a line", "lines"])
def test_an_event_that_never_ends_is_not_kept(flood, way):
    refused = pytest.raises(errors.APIResponseValidationError)
    with Peer(SSE, itertools.repeat(flood)) as peer, refused:
        list(stream(way, peer, patience=Patience(request=60.0)))


def test_a_stream_that_is_compressed_is_refused(way):
    """It was not asked for, and a line of it could be of any length."""
    head = SSE.replace(b"Connection", b"Content-Encoding: gzip\r\nConnection")
    refused = pytest.raises(errors.APIResponseValidationError, match="was not asked for")
    with Peer(head, [gzip.compress(EVENT)]) as peer, refused:
        list(stream(way, peer))
