"""A thousand streams at once: of answers, and of the web page. Some read, some do not."""

from __future__ import annotations

import asyncio
import json
import statistics
import time

import psutil
import pytest

from tests.support.processes import ServerProcess

STREAMS = 1000


@pytest.fixture(scope="module", params=[False, True], ids=["fake", "real"])
def process(request, tmp_path_factory):
    """A server in a separate process, with the real engine or without."""
    server = ServerProcess(tmp_path_factory.mktemp("home"), real=request.param)
    server.start()
    server.client.session()
    yield server
    server.close()


async def open_stream(port, method, path, body=None):
    """Sends a request, and reads the head of its answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    payload = b"" if body is None else json.dumps(body).encode()
    writer.write(
        f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nAuthorization: Bearer tml-any\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(payload)}\r\n\r\n".encode()
        + payload
    )
    head = await reader.readuntil(b"\r\n\r\n")
    assert b" 200 " in head.splitlines()[0], head
    return reader, writer


async def health(port, times):
    """Seconds that each of some health checks takes, one after the other."""
    seconds = []
    for _ in range(times):
        start = time.monotonic()
        reader, writer = await open_stream(port, "GET", "/api/v1/healthz")
        await reader.readuntil(b"}")
        seconds.append(time.monotonic() - start)
        writer.close()
        await asyncio.sleep(0.02)
    return seconds


async def all_streams(port, method, path, body=None):
    room = asyncio.Semaphore(100)  # as many are being opened at a time

    async def one():
        async with room:
            return await open_stream(port, method, path, body)

    return await asyncio.gather(*(one() for _ in range(STREAMS)))


def memory(process):
    return psutil.Process(process.process.pid).memory_info().rss / 2**20


def test_a_thousand_answers_stream_at_once(process):
    """Each to its end, in the text's order, and health checks are answered meanwhile."""
    if not process.options.get("real"):
        pytest.skip("answers need the engine")
    body = {"model": "tiny", "prompt": "The", "max_tokens": 12, "stream": True, "temperature": 0}

    async def run():
        reader, writer = await open_stream(process.port, "POST", "/v1/completions", body)
        await reader.readuntil(b"[DONE]")
        writer.close()
        before = memory(process)
        checks = asyncio.create_task(health(process.port, 20))
        streams = await all_streams(process.port, "POST", "/v1/completions", body)
        texts = await asyncio.gather(*(reader.readuntil(b"[DONE]") for reader, _ in streams))
        for _, writer in streams:
            writer.close()
        return before, await checks, texts

    before, seconds, texts = asyncio.run(run())
    answers = set()
    for text in texts:
        events = [line[6:] for line in text.decode().splitlines() if line.startswith("data: {")]
        answers.add("".join(json.loads(event)["choices"][0]["text"] for event in events))
    print(
        f"health checks {statistics.median(seconds):.3f} s in the median, {max(seconds):.3f} s at "
        f"most; {before:.0f} -> {memory(process):.0f} MiB"
    )

    assert 1 == len(answers)
    assert statistics.median(seconds) < 1  # 0.02 on a machine that does nothing else
    assert memory(process) < before + 300


def test_a_thousand_pages_are_open(process):
    """Nine of ten do not even read. The server's work grows with what changes, not with them."""
    if process.options.get("real"):
        pytest.skip("pages need no engine")

    async def run():
        before = memory(process)
        streams = await all_streams(process.port, "GET", "/ui/events")
        read = streams[::10]
        await asyncio.gather(*(reader.readuntil(b"event: state") for reader, _ in read))
        seconds = await health(process.port, 50)
        during = memory(process)
        process.client.session()  # something new for the pages
        await asyncio.wait_for(
            asyncio.gather(*(reader.readuntil(b"event: state") for reader, _ in read)), 60
        )
        for _, writer in streams:
            writer.close()
        return before, during, seconds

    before, during, seconds = asyncio.run(run())
    print(
        f"health checks {statistics.median(seconds):.3f} s in the median, {max(seconds):.3f} s at "
        f"most; {before:.0f} -> {during:.0f} MiB"
    )
    left = psutil.Process(process.process.pid)
    deadline = time.monotonic() + 60
    while len(left.net_connections()) > 50 and time.monotonic() < deadline:
        time.sleep(0.1)

    assert statistics.median(seconds) < 0.5  # 0.01 on a machine that does nothing else
    assert during < before + 100
    assert len(left.net_connections()) <= 50
