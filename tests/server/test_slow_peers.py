"""Peers that are slow, idle or too many: they cost nothing, and other clients do not notice."""

from __future__ import annotations

import contextlib
import resource
import socket
import time
from pathlib import Path

import pytest
import requests

from tests.support.processes import ServerProcess
from tests.support.wire_client import WireClient

HEAD = b"POST /api/v1/create_session HTTP/1.1\r\nHost: localhost\r\n"
JSON_HEAD = HEAD + b"Content-Type: application/json\r\n"


@contextlib.contextmanager
def connections(port, count):
    """Idle connections to a server."""
    opened = []
    try:
        for _ in range(count):
            opened.append(socket.create_connection(("127.0.0.1", port), timeout=10))
        yield opened
    finally:
        for connection in opened:
            connection.close()


def cpu_seconds(pid):
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


def ended_after(connection, pieces, pause):
    """Seconds until the server closes the connection, and its answer, while *pieces* drip in."""
    start, answer = time.monotonic(), b""
    connection.settimeout(pause)
    for piece in pieces:
        with contextlib.suppress(OSError):
            connection.sendall(piece)
        try:
            received = connection.recv(65536)
        except TimeoutError:
            continue
        except OSError:
            received = b""
        if not received:
            return time.monotonic() - start, answer
        answer += received
    return None, answer


@pytest.fixture
def hurried(serve):
    """A server that waits a short time for heads and bodies."""
    return serve(
        limits={"head_seconds": 0.5, "body_seconds": 0.5, "body_rate": 1000, "idle_seconds": 1}
    )


def port_of(served):
    return int(served.server.url.rpartition(":")[2])


def test_a_head_that_drips_is_cut_off(hurried):
    with connections(port_of(hurried), 1) as [connection]:
        seconds, _ = ended_after(connection, [b"G"] + [b"x"] * 100, 0.05)

    assert seconds is not None
    assert 0.3 < seconds < 4


def test_a_connection_that_says_nothing_is_closed(hurried):
    with connections(port_of(hurried), 1) as [connection]:
        seconds, _ = ended_after(connection, [b""] * 100, 0.05)

    assert seconds is not None


def test_a_second_head_that_drips_is_cut_off(hurried):
    """After a good request on the same connection, too."""
    good = JSON_HEAD + b"Content-Length: 2\r\n\r\n{}"
    with connections(port_of(hurried), 1) as [connection]:
        seconds, answer = ended_after(connection, [good] + [b"G"] * 100, 0.05)

    assert answer.startswith(b"HTTP/1.1 200")
    assert seconds is not None


def test_a_body_that_drips_gets_a_408(hurried):
    with connections(port_of(hurried), 1) as [connection]:
        head = JSON_HEAD + b"Content-Length: 1000\r\n\r\n"
        seconds, answer = ended_after(connection, [head] + [b" "] * 100, 0.05)

    assert answer.startswith(b"HTTP/1.1 408")
    assert b"did not arrive within" in answer
    assert seconds is not None


def test_a_slow_but_steady_body_is_taken(hurried):
    """2,000 bytes at 4,000 a second take as long as the limit alone."""
    body = b'{"tags": ["' + b"x" * 2000 + b'"]}'
    head = JSON_HEAD + f"Content-Length: {len(body)}\r\n\r\n".encode()
    pieces = [head] + [body[i : i + 200] for i in range(0, len(body), 200)] + [b""] * 40
    with connections(port_of(hurried), 1) as [connection]:
        _, answer = ended_after(connection, pieces, 0.05)

    assert answer.startswith(b"HTTP/1.1 200")


def test_a_long_poll_is_not_cut_off(serve):
    """Its head was quick; its answer takes longer than a head may."""
    served = serve(limits={"head_seconds": 0.2, "poll_seconds": 1.0})
    served.engine.gate.clear()
    client = served.client
    promise = client.forward_backward(client.model(), 1, [5])
    answer = client.send("POST", "retrieve_future", promise)
    served.engine.gate.set()

    assert 408 == answer.status_code
    assert "metrics" in client.result(promise)


def limited():
    """In the child: 64 descriptors, as a shell with `ulimit -n 64`."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))


def test_connections_beyond_the_descriptors_cost_nothing(tmp_path):
    """The accept loop used to spin at 100 % of a core, and wrote 21 MB of tracebacks."""
    server = ServerProcess(tmp_path / "home", limits={"head_seconds": 2.0})
    server.start(preexec_fn=limited)
    try:
        client = server.client
        model = client.model()
        with connections(server.port, 40):
            before = cpu_seconds(server.process.pid)
            time.sleep(1.0)
            spent = cpu_seconds(server.process.pid) - before
            # The client's own connection was there before: the reserve is enough to save.
            saved = client.result(client.save(model, 1, "a"))
            time.sleep(2.5)  # the idle ones are closed
            fresh = WireClient(f"http://127.0.0.1:{server.port}")
            healthy = fresh.get("healthz")
            fresh.http.close()
        server.process.terminate()
        log = server.end()
    finally:
        server.close()

    assert spent < 0.5
    assert "path" in saved
    assert {"status": "ok"} == healthy
    assert 1 == log.count("No new connections are accepted")
    assert len(log) < 10_000


def test_many_idle_connections_cost_nothing(tmp_path):
    """3,000, or as many as this process may open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 3000 if hard == resource.RLIM_INFINITY else min(3000, hard - 200)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted + 100), hard))
    server = ServerProcess(tmp_path / "home")
    server.start()
    try:
        with connections(server.port, wanted):
            server.client.get("healthz")
            before = cpu_seconds(server.process.pid)
            time.sleep(1.0)
            spent = cpu_seconds(server.process.pid) - before
            start = time.monotonic()
            for _ in range(20):
                assert requests.get(server.client.url + "healthz", timeout=10).ok
            each = (time.monotonic() - start) / 20
    finally:
        server.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    assert wanted >= 500
    assert spent < 0.2
    assert each < 0.3


def test_a_client_that_does_not_take_its_answer_is_dropped(serve):
    """One that takes it slowly gets all of it."""
    served = serve(limits={"answer_seconds": 2.0, "idle_seconds": 1, "num_samples": 64})
    client = served.client
    sampler = client.sampler()
    promise = client.sample(sampler, 0, num_samples=64, max_tokens=20_000, params={"seed": 1})
    client.result(promise)
    poll = b'{"request_id": "%s"}' % promise["request_id"].encode()
    lines = (
        b"POST /api/v1/retrieve_future HTTP/1.1\r\nHost: localhost\r\n"
        b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(poll)
    )
    with contextlib.ExitStack() as stack:
        slow = socket.socket()
        stack.callback(slow.close)
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect(("127.0.0.1", port_of(served)))
        slow.sendall(lines + poll)
        reader = socket.socket()
        stack.callback(reader.close)
        # With a small buffer, so that the server notices each piece that is taken.
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        reader.connect(("127.0.0.1", port_of(served)))
        reader.sendall(lines + poll)
        taken = _take_slowly(reader, 3.0)
        # Idle connections are closed after a second; the slow one is not idle, but dropped.
        until(lambda: not served.server._uvicorn.server_state.connections)

    assert taken > 5_000_000
    assert {"status": "ok"} == client.get("healthz")


def _take_slowly(reader, seconds):
    """Bytes that a peer gets who reads a piece every tenth of a second, and then the rest."""
    taken, until = 0, time.monotonic() + seconds
    while time.monotonic() < until:
        taken += len(reader.recv(100_000))
        time.sleep(0.1)
    reader.settimeout(5)
    with contextlib.suppress(TimeoutError):
        while piece := reader.recv(1 << 20):
            taken += len(piece)
    return taken


def until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
