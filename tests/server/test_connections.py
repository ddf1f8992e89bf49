"""How many connections are accepted, and what becomes of those that are slow."""

from __future__ import annotations

import asyncio
import errno
import logging
import resource
import socket
import time

import pytest

from tinkex.server import connections
from tinkex.server.connections import Acceptor, most_connections


class Echo(asyncio.Protocol):
    """Returns what it gets; keeps itself in a set while it is open."""

    def __init__(self, open_ones):
        self._open = open_ones

    def connection_made(self, transport):
        self._transport = transport
        self._open.add(self)

    def data_received(self, data):
        self._transport.write(data)

    def connection_lost(self, exc):
        self._open.discard(self)


class Listener:
    """A listening socket whose accept() fails while there are failures left."""

    def __init__(self):
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.failures = []

    def accept(self):
        if self.failures:
            raise self.failures.pop(0)
        return self._socket.accept()

    def __getattr__(self, name):
        return getattr(self._socket, name)


async def exchange(address):
    """Connect and have something returned; the stream to close."""
    reader, writer = await asyncio.open_connection(*address)
    writer.write(b"hi")
    return await reader.readexactly(2), writer


async def until(condition):
    async def look():
        while not condition():
            await asyncio.sleep(0.005)

    await asyncio.wait_for(look(), 20)


@pytest.fixture
def accepting(monkeypatch):
    """Runs `scenario(listener, open connections)` beside an Acceptor of at most *most*."""
    monkeypatch.setattr(connections, "_PAUSE_SECONDS", 0.02)

    def run(scenario, most=10):
        async def both():
            open_ones, listener = set(), Listener()
            acceptor = Acceptor(listener, lambda: Echo(open_ones), open_ones, most)
            try:
                await scenario(listener, open_ones)
            finally:
                acceptor.close()
                listener.close()

        asyncio.run(both())

    return run


def test_a_connection_beyond_the_limit_waits_until_one_is_closed(accepting, caplog):
    """It stays in the backlog: it is neither refused nor forgotten."""

    async def scenario(listener, open_ones):
        _, first = await exchange(listener.getsockname())
        second = asyncio.ensure_future(exchange(listener.getsockname()))
        await asyncio.sleep(0.1)
        assert not second.done()

        first.close()
        answer, writer = await second
        writer.close()
        assert b"hi" == answer

    with caplog.at_level(logging.WARNING):
        accepting(scenario, most=1)

    [said] = [record.getMessage() for record in caplog.records]  # several pauses, one line
    assert said.startswith("No new connections are accepted until one is closed: 1 connections")


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM])
def test_when_descriptors_run_out_it_pauses_and_tries_again(accepting, caplog, number):
    async def scenario(listener, open_ones):
        listener.failures = [OSError(number, "exhausted")] * 3
        answer, writer = await exchange(listener.getsockname())
        writer.close()
        assert b"hi" == answer
        assert [] == listener.failures

    accepting(scenario)

    assert ["exhausted" in record.getMessage() for record in caplog.records] == [True]


def test_a_connection_that_is_gone_before_it_is_accepted_costs_the_next_nothing(accepting):
    async def scenario(listener, open_ones):
        listener.failures = [ConnectionAbortedError(), InterruptedError()]
        answer, writer = await exchange(listener.getsockname())
        writer.close()
        assert b"hi" == answer

    accepting(scenario)


def test_any_other_failure_of_accept_is_not_hidden(accepting):
    """The event loop logs it; to pause for it could go on for ever."""
    seen = []

    async def scenario(listener, open_ones):
        asyncio.get_running_loop().set_exception_handler(
            lambda loop, context: seen.append(context["exception"].errno)
        )
        listener.failures = [OSError(errno.EBADF, "no socket")]
        _, writer = await exchange(listener.getsockname())
        writer.close()

    accepting(scenario)

    assert [errno.EBADF] == seen


def test_one_that_breaks_while_it_starts_is_closed(accepting, caplog):
    """Nothing is left open, and only the debug log has it."""

    async def scenario(listener, open_ones):
        async def broken(*arguments, **options):
            raise ConnectionResetError("reset")

        loop = asyncio.get_running_loop()
        loop.connect_accepted_socket, whole = broken, loop.connect_accepted_socket
        reader, writer = await asyncio.open_connection(*listener.getsockname())
        assert b"" == await reader.read()
        writer.close()
        loop.connect_accepted_socket = whole
        assert set() == open_ones

    with caplog.at_level(logging.DEBUG, "tinkex.server.connections"):
        accepting(scenario)

    assert "A connection ended before it began: reset" in caplog.text


@pytest.mark.parametrize(
    "descriptors, expected",
    [(resource.RLIM_INFINITY, 5000), (1024, 976), (10**6, 5000), (20, 1)],
)
def test_a_reserve_of_descriptors_is_left_for_files(monkeypatch, descriptors, expected):
    monkeypatch.setattr(resource, "getrlimit", lambda which: (descriptors, descriptors))

    assert expected == most_connections(5000)


# Slow peers, on a whole server.

HEAD = b"GET /api/v1/healthz HTTP/1.1\r\nHost: x\r\n"


@pytest.fixture
def connect(serve):
    served = serve(limits={"head_seconds": 0.3})
    host, port = served.server.url.removeprefix("http://").split(":")
    made = []

    def connect():
        made.append(socket.create_connection((host, int(port)), timeout=20))
        return made[-1]

    yield connect
    for one in made:
        one.close()


def answer_of(peer):
    """The first answer, whose body is whole."""
    got = b""
    while b'{"status":"ok"}' not in got:
        part = peer.recv(65536)
        assert part, got
        got += part
    return got.split(b"\r\n")[0]


@pytest.mark.parametrize("sent", [b"", b"GET /api", HEAD])
def test_a_head_that_does_not_come_closes_the_connection(connect, sent):
    peer = connect()
    peer.sendall(sent)

    assert b"" == peer.recv(100)


def test_the_time_for_a_head_starts_with_its_first_byte(connect):
    """A connection may idle between two requests; the second head may not take forever either."""
    peer = connect()
    peer.sendall(HEAD + b"\r\n")
    first = answer_of(peer)
    time.sleep(0.5)  # longer than a head may take
    peer.sendall(HEAD + b"\r\n")
    second = answer_of(peer)
    peer.sendall(HEAD)

    assert b"HTTP/1.1 200 OK" == first == second
    assert b"" == peer.recv(100)


def test_the_beginning_of_the_next_head_may_come_with_a_request(connect):
    peer = connect()
    peer.sendall(HEAD + b"\r\n" + HEAD)
    first = answer_of(peer)
    peer.sendall(b"\r\n")

    assert b"HTTP/1.1 200 OK" == first == answer_of(peer)
