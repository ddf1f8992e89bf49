"""Small bodies that stand for huge ones are refused before they cost time or memory."""

from __future__ import annotations

import gzip
import json
import threading
import time
from pathlib import Path

import coverage
import pytest
import requests
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from tests.support.processes import ServerProcess
from tests.support.wire_client import batch
from tinkex import wire
from tinkex.wire import bounds, large_json

MIB = 2**20
JSON, PROTOBUF = wire.JSON, wire.PROTOBUF


def zstd_of(piece, count):
    """*piece* that many times, compressed without ever being whole."""
    packer = zstandard.ZstdCompressor().compressobj()
    block = piece * 100_000
    parts = [packer.compress(block) for _ in range(count // 100_000)]
    return b"".join([*parts, packer.flush()])


#: Name -> endpoint, headers, how to make the body, the most seconds that its refusal may take.
BOMBS = {
    "zstd, 80 MB of []": (
        "forward_backward",
        {"Content-Type": JSON, "Content-Encoding": "zstd"},
        lambda: zstd_of(b"[],", 27_000_000),
    ),
    "zstd, 60 MB of []": (
        "forward_backward",
        {"Content-Type": JSON, "Content-Encoding": "zstd"},
        lambda: zstd_of(b"[],", 20_000_000),
    ),
    "zstd, 60 MB to a small endpoint": (
        "optim_step",
        {"Content-Type": JSON, "Content-Encoding": "zstd"},
        lambda: zstd_of(b"[],", 20_000_000),
    ),
    "gzip, 60 MB of objects": (
        "forward_backward",
        {"Content-Type": JSON, "Content-Encoding": "gzip"},
        lambda: gzip.compress(b'{"a":{}},' * 6_600_000, 1),
    ),
    "60 MB, plain": ("forward_backward", {"Content-Type": JSON}, lambda: b"[],[" * 15_000_000),
    "20 million numbers": (
        "forward_backward",
        {"Content-Type": JSON},
        lambda: b"[" + b"1," * 20_000_000 + b"1]",
    ),
    "30 million empty datums": (
        "forward_backward",
        {"Content-Type": PROTOBUF, "Content-Encoding": "zstd"},
        lambda: zstd_of(b"\x1a\x00", 30_000_000),
    ),
    "one datum of 20 million chunks": (
        "forward_backward",
        {"Content-Type": PROTOBUF},
        lambda: b"\x1a\x80\xb4\x89\x13" + b"\x0a\x00" * 20_000_000,
    ),
}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = ServerProcess(tmp_path_factory.mktemp("home"))
    server.start()
    yield server
    server.close()


def memory(server, field):
    """Bytes: VmRSS now, VmHWM at most so far."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) * 1024


class Watch:
    """Asks for the server's health all the time; `worst` is the longest it waited, in seconds."""

    def __init__(self, url):
        self.worst = 0.0
        self._url, self._stop = url, threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self):
        with requests.Session() as http:
            http.get(self._url)
            while not self._stop.is_set():
                start = time.perf_counter()
                http.get(self._url)
                self.worst = max(self.worst, time.perf_counter() - start)
                time.sleep(0.002)

    def __enter__(self):
        self._thread.start()
        time.sleep(0.05)
        return self

    def __exit__(self, *exc):
        self._stop.set()
        self._thread.join()


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_costs_a_second_and_200_megabytes_at_most(server, name, record_property):
    """And the server's health can be asked for all the time."""
    endpoint, headers, make = BOMBS[name]
    body = make()
    url = server.client.url
    Path(f"/proc/{server.process.pid}/clear_refs").write_text("5")  # VmHWM starts again
    before = memory(server, "VmRSS")
    with Watch(url + "healthz") as watch:
        start = time.perf_counter()
        answer = requests.post(url + endpoint, data=body, headers=headers, timeout=60)
        seconds = time.perf_counter() - start
    peak = memory(server, "VmHWM") - before
    print(f"{name}: {len(body)} bytes, {seconds:.2f} s, {peak / MIB:.0f} MiB, {watch.worst:.3f} s")

    assert 413 == answer.status_code
    assert peak <= 200 * MIB
    if coverage.Coverage.current() is None:  # the server, too, takes several times as long with it
        assert seconds <= 3  # 1 on a machine that does nothing else
        assert watch.worst <= 0.5  # 0.1 on such a machine


def test_the_largest_json_batch_that_is_taken_holds_nobody_up(server):
    """A million numbers: parsed in pieces, between which the event loop runs."""
    client = server.client
    model = client.model()
    targets = [number % 600 for number in range(300_000)]
    path, kind, _, body = wire.encode_request(batch(model, 1, targets), protobuf=False)
    url = server.client.url
    with Watch(url + "healthz") as watch:
        promise = client.post_raw(path, body, {"Content-Type": kind})
    print(f"{len(body)} bytes: {watch.worst:.3f} s")

    assert "metrics" in client.result(promise)
    assert watch.worst <= 0.5


def test_what_is_being_received_is_bounded_in_all(serve):
    """Beyond that, requests get a 429 and are repeated later; a single one is always taken."""
    served = serve(limits={"decoding_bytes": 3_000_000})
    client = served.client
    model = client.model()
    path, kind, _, body = wire.encode_request(batch(model, 1, [5] * 100_000), protobuf=False)
    site = served.server.app.state.site
    site.decoding += 2_900_000  # as if others were being received
    refused = client.http.post(client.url + path, data=body, headers={"Content-Type": kind})
    site.decoding -= 2_900_000
    taken = client.post_raw(path, body, {"Content-Type": kind})

    assert 503 == refused.status_code
    assert "1" == refused.headers["Retry-After"]
    assert "metrics" in client.result(taken)
    assert 0 == site.decoding


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.text(max_size=4),
    lambda inside: st.lists(inside) | st.dictionaries(st.text(max_size=3), inside),
)


@given(VALUES, st.integers(1, 50))
def test_a_large_text_is_parsed_like_a_small_one(value, piece):
    """Whatever it is, in whatever pieces."""
    text = json.dumps([value, list(range(200)), {"x": [1.5, None, True]}])
    before, large_json.PIECE = large_json.PIECE, piece
    try:
        assert json.loads(text) == large_json.loads(text, None)
    finally:
        large_json.PIECE = before


@given(st.integers(0, 400), st.sampled_from(["[", "]", ",", "{", '"', "1", "-", "e", ""]))
def test_a_large_text_that_is_wrong_is_refused(place, mark):
    text = json.dumps([list(range(60)), {"a": ["x", [], [1.5] * 20]}, list(range(60))])
    wrong = text[:place] + mark + text[place + 1 :]

    def outcome(parse):
        try:
            return parse(wrong)
        except ValueError:
            return "refused"

    before, large_json.PIECE = large_json.PIECE, 20
    try:
        assert outcome(json.loads) == outcome(lambda text: large_json.loads(text, None))
    finally:
        large_json.PIECE = before


@given(st.lists(st.lists(st.integers(0, 100), min_size=1, max_size=5), min_size=1, max_size=5))
def test_the_counts_are_upper_bounds(sequences):
    """Of everything that the body becomes."""

    def values(payload):
        inside = payload.values() if isinstance(payload, dict) else payload
        return 1 + sum(map(values, inside)) if isinstance(payload, (dict, list)) else 1

    request = batch("m", 1, *sequences)
    _, _, _, text = wire.encode_request(request, protobuf=False)
    _, _, _, proto = wire.encode_request(request, protobuf=True)

    assert values(json.loads(text)) <= bounds.json_size(text, 10**9, 10**9).values
    counted = bounds.batch_size(proto, 10**9, 10**9)
    assert len(sequences) == counted.datums
    assert counted.fields >= 10 * len(sequences)


@given(st.binary(max_size=60))
def test_any_bytes_can_be_counted(body):
    """They may be no message at all."""
    assert bounds.batch_size(body, 1000, 1000).fields <= 1000 + len(body)
