"""Kept connections: the short way of an exchange, held against the adapter of requests itself.

The server here speaks HTTP by the byte, so that it can speak it badly.
"""

from __future__ import annotations

import contextlib
import gzip
import queue
import socket
import ssl
import threading
import zlib
from pathlib import Path

import pytest
import requests

from tinkex.runtime import http_adapter
from tinkex.runtime.http_adapter import KeptConnections

CERTIFICATE = Path(__file__).parents[1] / "support" / "localhost.pem"

PLAIN = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 5\r\n\r\nplain"


class ByteServer:
    """Answers each request with the next of its scripted answers.

    An answer is a list of pieces, each its own packet: bytes; CLOSE, which ends the connection; or
    an Event to wait for. Keeps all requests whole, with the number of their connection.
    """

    def __init__(self, context=None):
        self.answers: queue.SimpleQueue = queue.SimpleQueue()
        self.requests = []
        self.connections = 0
        self._seen = threading.Condition()
        self._context = context
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"{'https' if context else 'http'}://localhost:{self._listener.getsockname()[1]}"
        self._open = []
        threading.Thread(target=self._accept, daemon=True).start()

    def script(self, *answers):
        for answer in answers:
            self.answers.put(answer)

    def has_seen(self, count):
        """Wait until *count* requests have arrived and been answered."""
        with self._seen:
            return self._seen.wait_for(lambda: len(self.requests) >= count, 30)

    def close(self):
        self._listener.close()
        for sock in self._open:
            with contextlib.suppress(OSError):
                sock.close()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self.connections += 1
                self._open.append(sock)
                number = self.connections
                threading.Thread(target=self._serve, args=(sock, number), daemon=True).start()

    def _serve(self, sock, number):
        with contextlib.suppress(OSError):
            if self._context:
                sock = self._context.wrap_socket(sock, server_side=True)
                self._open.append(sock)
            reader = sock.makefile("rb")
            while request := self._request(reader):
                answer = self.answers.get(timeout=30)
                with self._seen:
                    self.requests.append((number, request))
                    self._seen.notify_all()
                for piece in answer:
                    if piece is CLOSE:
                        sock.shutdown(socket.SHUT_RDWR)
                        return
                    if isinstance(piece, threading.Event):
                        piece.wait(30)
                    else:
                        sock.sendall(piece)

    def _request(self, reader):
        lines = []
        while (line := reader.readline()) not in (b"\r\n", b""):
            lines.append(line)
        length = [
            int(li.split(b":")[1]) for li in lines if li.lower().startswith(b"content-length")
        ]
        return b"".join(lines) + b"\r\n" + reader.read(length[0] if length else 0) if lines else b""


CLOSE = object()


@pytest.fixture
def server():
    made = ByteServer()
    yield made
    made.close()


@pytest.fixture
def kept():
    """The adapter under test."""
    made = KeptConnections()
    yield made
    made.close()


@pytest.fixture
def reference():
    """The adapter of requests, which is right by definition."""
    made = requests.adapters.HTTPAdapter()
    yield made
    made.close()


#: What every request of ours carries.
ALWAYS = {"Accept-Encoding": "gzip, deflate", "User-Agent": "tinkex/test"}


def request(url, body=b"asked", method="POST", **headers):
    made = requests.PreparedRequest()
    made.prepare(method, url, data=body, headers={**ALWAYS, **headers})
    return made


def ask(adapter, server, body=b"asked", timeout=30, verify=True, method="POST", **headers):
    """(status, headers, content) of one exchange."""
    made = request(f"{server.url}/a?b=c", body, method, **headers)
    response = adapter.send(made, timeout=timeout, verify=verify)
    said = {name.lower(): value.strip() for name, value in response.headers.items()}
    return response.status_code, said, response.content


def head(*lines, status="200 OK", version="1.1"):
    return "\r\n".join([f"HTTP/{version} {status}", *lines, "", ""]).encode()


DEFLATED = zlib.compress(b"deflated")
GZIPPED = gzip.compress(b"gzipped" * 100)

#: Every way an answer may come.
ANSWERS = {
    "plain": [PLAIN],
    "empty": [head("Content-Length: 0")],
    "head and body apart": [head("Content-Length: 3"), b"abc"],
    "head in two": [head("Content-Length: 3")[:20], head("Content-Length: 3")[20:] + b"abc"],
    "body in pieces": [head("Content-Length: 6") + b"ab", b"cd", b"ef"],
    "large": [head("Content-Length: 3000000") + b"x" * 3_000_000],
    "head of 20 kB": [head(f"X-Long: {'y' * 20_000}", "Content-Length: 1") + b"z"],
    "lower case": [head("content-length: 2", "connection: keep-alive") + b"ok"],
    "no reason": [head("Content-Length: 2", status="200") + b"ok"],
    "header twice": [head("X-A: 1", "Content-Length: 0", "x-a: 2")],
    "folded header": [head("X-A: 1", "  and 2", "Content-Length: 0")],
    "header without value": [head("X-A:", "Content-Length: 0")],
    "header with spaces": [head("X-A:   1  ", "Content-Length: 0")],
    "latin-1 header": [head("X-A: ").replace(b"X-A: ", b"X-A: \xe9\r\nContent-Length: 0")],
    "error": [head("Content-Length: 4", status="503 Busy") + b"busy"],
    "redirect": [head("Content-Length: 0", "Location: /b", status="307 Away")],
    "204": [head(status="204 No Content")],
    "204 with a length": [head("Content-Length: 3", status="204 No Content")],
    "304": [head("Content-Length: 10", status="304 Not Modified")],
    "100 first": [head(status="100 Continue"), PLAIN],
    "100 with it": [head(status="100 Continue") + PLAIN],
    "chunked": [head("Transfer-Encoding: chunked") + b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"],
    "chunked slowly": [head("Transfer-Encoding: chunked"), b"3\r\nab", b"c\r\n0\r", b"\n\r\n"],
    "chunked and a length": [
        head("Transfer-Encoding: chunked", "Content-Length: 99") + b"1\r\na\r\n0\r\n\r\n"
    ],
    "gzip": [head("Content-Encoding: gzip", f"Content-Length: {len(GZIPPED)}") + GZIPPED],
    "deflate": [head("Content-Encoding: deflate", f"Content-Length: {len(DEFLATED)}") + DEFLATED],
    "gzip in chunks": [
        head("Content-Encoding: gzip", "Transfer-Encoding: chunked")
        + b"%x\r\n%s\r\n0\r\n\r\n" % (len(GZIPPED), GZIPPED)
    ],
    "broken gzip": [head("Content-Encoding: gzip", "Content-Length: 3") + b"abc"],
    "until the end": [head("Connection: close") + b"until", b" the end", CLOSE],
    "length and close": [head("Connection: close", "Content-Length: 3") + b"abc", CLOSE],
    "neither length nor close": [head("Content-Type: a/b") + b"abc", CLOSE],
    "HTTP/1.0": [head("Content-Length: 3", version="1.0") + b"abc", CLOSE],
    "HTTP/1.0 kept": [head("Connection: keep-alive", "Content-Length: 1", version="1.0") + b"a"],
    "length twice": [head("Content-Length: 3", "Content-Length: 3") + b"abc"],
    "length that is no number": [head("Content-Length: abc") + b"abc", CLOSE],
    "negative length": [head("Content-Length: -3") + b"abc", CLOSE],
    "cut in the body": [head("Content-Length: 9") + b"abc", CLOSE],
    "cut in the head": [b"HTTP/1.1 200 OK\r\nConte", CLOSE],
    "cut before anything": [CLOSE],
    "not HTTP": [b"SSH-2.0-OpenSSH_9.2\r\n\r\n", CLOSE],
    "no status": [head("Content-Length: 0", status="OK"), CLOSE],
    "status of one digit": [head("Content-Length: 0", status="2 OK"), CLOSE],
    "header without colon": [head("nonsense", "Content-Length: 0"), CLOSE],
}


@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_reads_as_requests_reads_it(name, server, kept, reference):
    """Status, headers and content; or the same kind of error. And what follows is not disturbed."""
    seen = []
    for adapter in (kept, reference):
        server.script([PLAIN], ANSWERS[name], [PLAIN])
        first = ask(adapter, server)
        try:
            outcome = ask(adapter, server)
        except requests.RequestException as exc:
            outcome = requests.Timeout if isinstance(exc, requests.Timeout) else "broken"
        seen.append((first, outcome, ask(adapter, server)))

    assert seen[0] == seen[1]


@pytest.mark.parametrize("method, body", [("POST", b"asked"), ("POST", b""), ("GET", b"")])
def test_a_request_is_what_requests_would_send(method, body, server, kept, reference):
    """But for the order of the headers, which means nothing."""
    for adapter in (kept, reference):
        server.script([PLAIN], [PLAIN])
        for _ in range(2):
            ask(adapter, server, body, method=method, Accept="a/b")
    lines = [sorted(sent.partition(b"\r\n\r\n")[0].split(b"\r\n")) for _, sent in server.requests]
    bodies = {sent.partition(b"\r\n\r\n")[2] for _, sent in server.requests}

    assert lines[1] == lines[3] == lines[0]
    assert {body} == bodies


def test_a_connection_is_kept(server, kept):
    server.script(*[[PLAIN]] * 20)
    for _ in range(20):
        ask(kept, server)

    assert 1 == server.connections


def test_a_connection_that_the_server_closed_meanwhile_is_replaced(server, kept):
    server.script([PLAIN], [PLAIN, CLOSE], [PLAIN])
    for _ in range(2):
        ask(kept, server)
    pool = next(iter(kept._pools.values()))
    conn = pool._get_conn()
    pool._put_conn(conn)
    while conn.sock is not None and conn.sock.recv(1, socket.MSG_PEEK) != b"":
        pass  # until the end of the connection has come here

    assert (200, b"plain") == ask(kept, server)[::2]
    assert 2 == server.connections


@pytest.mark.parametrize("begun", [b"", head("Content-Length: 7") + b"abc"], ids=["", "half"])
def test_a_silent_server_times_out_and_its_late_answer_is_nobody_s(server, kept, begun):
    """Whether it has begun to answer or not."""
    later = threading.Event()
    late = head("Content-Length: 7") + b"abclate"
    server.script([PLAIN], [begun, later, late[len(begun) :]], [PLAIN])
    ask(kept, server)
    with pytest.raises(requests.ReadTimeout):
        ask(kept, server, timeout=0.1)
    assert server.has_seen(2)
    later.set()

    assert b"plain" == ask(kept, server)[2]


def test_an_exchange_that_is_interrupted_leaves_nothing_behind(server, kept, monkeypatch):
    """Ctrl-C may come while an answer is read; the next request must not get it."""
    server.script([PLAIN], [head("Content-Length: 3") + b"old"], [PLAIN])
    ask(kept, server)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(http_adapter, "_plain_head", _interrupted)
        ask(kept, server)

    assert b"plain" == ask(kept, server)[2]
    assert 2 == server.connections


def _interrupted(start):
    raise KeyboardInterrupt


@pytest.mark.parametrize("bad", ["a\r\nX-Injected: 1", "a\nb", "a\rb", "trailing\r\n"])
def test_a_line_break_in_a_header_is_refused(bad, server, kept):
    server.script([PLAIN], [PLAIN])
    ask(kept, server)
    made = request(f"{server.url}/a")
    made.headers["X-A"] = bad
    with pytest.raises((ValueError, requests.RequestException)):
        kept.send(made, timeout=30)

    assert 1 == len(server.requests)


@pytest.mark.parametrize("target", ["/a b", "/a\r\nX: y", "/a\x7f"])
def test_a_target_that_would_end_early_is_not_sent_as_it_is(target, server, kept):
    server.script([PLAIN], [PLAIN])
    ask(kept, server)
    made = request(f"{server.url}/a")
    made.url = server.url + target
    with contextlib.suppress(ValueError, requests.RequestException):
        kept.send(made, timeout=30)

    assert not any(b"X: y" in sent.splitlines() for _, sent in server.requests)
    assert all(len(sent.split(b"\r\n")[0].split()) == 3 for _, sent in server.requests)


@pytest.mark.parametrize("size", [0, 3, http_adapter.SMALL, http_adapter.SMALL + 1, 3_000_000])
def test_a_body_arrives_whole(size, server, kept):
    server.script([PLAIN], [PLAIN])
    body = bytes(range(256)) * (size // 256 + 1)
    for _ in range(2):
        ask(kept, server, body[:size])

    assert [body[:size]] * 2 == [sent.partition(b"\r\n\r\n")[2] for _, sent in server.requests]


@pytest.mark.parametrize("size, writes", [(0, 1), (3, 1), (1 << 16, 1), ((1 << 16) + 1, 2)])
def test_head_and_small_body_go_out_in_one_write(size, writes, server, kept, monkeypatch):
    """Two packets where one will do cost a round trip each way on some networks."""
    server.script([PLAIN], [PLAIN])
    ask(kept, server)
    written = []
    pool = next(iter(kept._pools.values()))
    conn = pool._get_conn()
    conn.sock = Spy(conn.sock, written)
    pool._put_conn(conn)
    ask(kept, server, b"x" * size)

    assert writes == len(written)


class Spy:
    """A socket of which one sees what is written to it."""

    def __init__(self, sock, written):
        self._sock = sock
        self._written = written

    def sendall(self, data):
        self._written.append(data)
        self._sock.sendall(data)

    def __getattr__(self, name):
        return getattr(self._sock, name)


def test_many_threads_share_it_and_each_gets_its_own_answer(kept):
    """As many connections as threads, and no more."""
    with contextlib.closing(Echo()) as echo:
        wrong = []

        def work(number):
            for turn in range(30):
                body = f"{number} {turn}".encode()
                if ask(kept, echo, body)[2] != body:
                    wrong.append(body)

        threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)

        assert [] == wrong
        assert echo.connections <= 8


class Echo(ByteServer):
    """Answers with the body of the request."""

    def _serve(self, sock, number):
        with contextlib.suppress(OSError):
            reader = sock.makefile("rb")
            while request := self._request(reader):
                body = request.partition(b"\r\n\r\n")[2]
                sock.sendall(head(f"Content-Length: {len(body)}") + body)


def test_over_tls_the_certificate_is_checked_and_the_way_is_short_too(kept):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(CERTIFICATE)
    server = ByteServer(context)
    try:
        server.script([PLAIN], ANSWERS["large"], ANSWERS["gzip in chunks"], [PLAIN])
        read = [ask(kept, server, verify=str(CERTIFICATE))[2] for _ in range(4)]

        assert [5, 3_000_000, 700, 5] == [len(content) for content in read]
        assert 1 == server.connections
        with pytest.raises(requests.exceptions.SSLError):
            ask(kept, server)  # it is its own authority
    finally:
        server.close()


def test_a_proxy_is_asked_with_the_whole_url(server, kept):
    server.script([PLAIN], [PLAIN])
    for _ in range(2):
        made = request("http://training.test/a?b=c")
        kept.send(made, timeout=30, proxies={"http": server.url})

    assert all(
        sent.startswith(b"POST http://training.test/a?b=c HTTP/1.1") for _, sent in server.requests
    )


def test_a_closed_port_is_told_as_requests_tells_it(kept):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(requests.ConnectionError, match="refused"):
        kept.send(request(f"http://127.0.0.1:{port}/"), timeout=5)


def test_a_stream_comes_as_it_is_sent(server, kept):
    """Tokens and archives are read piece by piece."""
    later = threading.Event()
    server.script([PLAIN], [head("Content-Length: 6") + b"abc", later, b"def"])
    ask(kept, server)
    with kept.send(request(f"{server.url}/a"), stream=True, timeout=30) as response:
        first = response.raw.read(3)
        later.set()

        assert b"abc" == first
        assert b"def" == response.raw.read()


def test_a_connection_that_takes_too_long_is_told_as_requests_tells_it(
    kept, reference, monkeypatch
):
    def too_long(*_, **__):
        raise TimeoutError("timed out")

    monkeypatch.setattr("urllib3.util.connection.create_connection", too_long)
    for adapter in (reference, kept):
        with pytest.raises(requests.ConnectTimeout):
            adapter.send(request("http://127.0.0.1:9/"), timeout=(0.2, 5))


def test_a_host_that_is_not_known_is_told_as_requests_tells_it(kept, monkeypatch):
    def unknown(*_, **__):
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr("urllib3.util.connection.create_connection", unknown)
    with pytest.raises(requests.ConnectionError, match="NameResolution"):
        kept.send(request("http://nowhere.invalid/"), timeout=5)


def test_it_can_be_used_again_after_closing(server, kept):
    server.script([PLAIN], [PLAIN])
    ask(kept, server)
    kept.close()

    assert b"plain" == ask(kept, server)[2]
