"""Large requests that wait are on disk, not in memory."""

from __future__ import annotations

import threading
import time

import pytest

from tests.support.fake_engine import FakeEngine
from tests.support.processes import ServerProcess, free_port
from tests.support.wire_client import batch
from tinkex import wire


def large(model, seq, tokens=40_000):
    request = batch(model, seq, [seq % 600 + 1] * tokens)
    path, kind, _, body = wire.encode_request(request, protobuf=True)
    return path, kind, body


def until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("port", ["journalled", "temporary"])
def test_large_requests_wait_on_disk_and_give_the_same_results(serve, tmp_path, port):
    """In order, mixed with small ones."""
    gate = threading.Event()
    engine = FakeEngine(gate=gate)
    port = free_port() if port == "journalled" else 0
    limits = {"spool_bytes": 100_000}
    served = serve(home=tmp_path / "a", engine=engine, limits=limits, port=port)
    client = served.client
    model = client.model()
    promises = []
    for seq in range(1, 10):
        if seq % 3 == 0:
            promises.append(client.optim_step(model, seq))
        else:
            path, kind, body = large(model, seq)
            promises.append(client.send_batch(path, kind, body))
    waiting = served.server.scheduler._lines[model].waiting.values()
    requests = [job.steps.args[0].request for job in waiting]
    files = list((tmp_path / "a").glob("servers/*/spool/*"))
    gate.set()
    results = [client.result(promise) for promise in promises]
    usual = serve(home=tmp_path / "b").client
    other = usual.model()
    expected = []
    for seq in range(1, 10):
        if seq % 3 == 0:
            promise = usual.optim_step(other, seq)
        else:
            path, kind, body = large(other, seq)
            promise = usual.send_batch(path, kind, body)
        expected.append(usual.result(promise))

    assert expected == results
    assert 5 <= requests.count(None) <= 6  # all large ones but the one that runs
    assert bool(files) == (port == 0)
    assert [] == list((tmp_path / "a").glob("servers/*/spool/*"))


def test_after_a_kill_large_requests_run_from_the_journal(tmp_path):
    """They are not read into memory at the start."""
    limits = {"spool_bytes": 100_000, "poll_seconds": 0.5}
    server = ServerProcess(tmp_path / "home", limits=limits, stuck=True)
    server.start()
    client = server.client
    model = client.model()
    promises = []
    for seq in (1, 2):
        path, kind, body = large(model, seq)
        promises.append(client.send_batch(path, kind, body))
    promises.append(client.optim_step(model, 3))
    server.kill()
    server.options.pop("stuck")
    server.start()
    results = [client.result(promise) for promise in promises]
    server.close()

    assert all("metrics" in result for result in results)


def test_a_request_that_cannot_be_written_stays_in_memory_and_runs(serve, tmp_path, caplog):
    client = serve(limits={"spool_bytes": 1000}).client
    model = client.model()
    [folder] = (tmp_path / "home").glob("servers/*/spool")
    folder.rmdir()
    path, kind, body = large(model, 1)

    assert "metrics" in client.result(client.send_batch(path, kind, body))
    assert "stays in memory" in caplog.text
