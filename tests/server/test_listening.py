"""The port: HTTPS, and an end that finishes what was accepted."""

from __future__ import annotations

import signal
import socket
import threading
import time

import pytest
import requests

from tests.support.fake_engine import FakeEngine
from tests.support.processes import ServerProcess, free_port
from tests.support.wire_client import WireClient
from tinkex.server.home import HomeError


def until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def secure(serve, certificate):
    served = serve(certificate=certificate)
    served.client.http.verify = str(certificate[0])
    return served


def test_https_serves_what_http_does(secure):
    """Training, sampling, a stream, and a download whose link is https, too."""
    client = secure.client
    model = client.model()
    step = client.result(client.optim_step(model, 1))
    client.result(client.save(model, 2, "mine"))
    path = f"training_runs/{model}/checkpoints/weights/mine/archive"
    link = client.send("GET", path, allow_redirects=False).headers["Location"]
    archive = client.http.get(link)
    sample = client.result(client.sample(client.sampler(), 0))

    assert "metrics" in step
    assert sample["sequences"]
    assert secure.server.url.startswith("https://")
    assert link.startswith("https://")
    assert 200 == archive.status_code


def test_a_client_that_does_not_know_the_certificate_refuses_it(secure):
    with pytest.raises(requests.exceptions.SSLError):
        requests.get(f"{secure.server.url}/api/v1/healthz", timeout=10)


def test_peers_that_speak_no_tls_are_closed_and_cost_others_nothing(serve, certificate):
    """A handshake that does not come, and plain HTTP."""
    secure = serve(certificate=certificate, limits={"head_seconds": 3.0})
    secure.client.http.verify = str(certificate[0])
    port = int(secure.server.url.rpartition(":")[2])
    silent = socket.create_connection(("127.0.0.1", port))
    plain = socket.create_connection(("127.0.0.1", port))
    plain.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
    ends = []
    for peer in (plain, silent):
        peer.settimeout(10)
        try:
            ends.append(peer.recv(100))
        except ConnectionResetError:
            ends.append(b"")
        peer.close()

    assert b"HTTP" not in b"".join(ends)
    assert {"status": "ok"} == secure.client.get("healthz")


def test_certificates_that_cannot_be_used_are_named(serve, certificate, tmp_path):
    noise = tmp_path / "noise.pem"
    noise.write_text("no certificate")
    for pair in ((noise, certificate[1]), (certificate[0], noise), (tmp_path / "x", noise)):
        with pytest.raises(HomeError, match=r"\.pem|/x"):
            serve(certificate=pair)


def test_a_server_that_drains_finishes_what_it_accepted_and_takes_nothing_new(serve):
    """Also what arrives over new connections; results are fetched before it ends."""
    gate = threading.Event()
    engine = FakeEngine(gate=gate)
    served = serve(engine=engine, limits={"drain_seconds": 30.0})
    client = served.client
    gate.set()
    model, sampler = client.model(), client.sampler()
    gate.clear()
    promises = [client.forward_backward(model, 1, [5]), client.optim_step(model, 2)]
    promises.append(client.sample(sampler, 0))
    served.server.stop()
    late = WireClient(served.server.url)
    until(lambda: late.send("GET", "readyz").status_code == 503)
    refused = [
        late.send("POST", "optim_step", {"model_id": model, "seq_id": 3}),
        late.send("POST", "create_session", {"sdk_version": "test"}),
    ]
    gate.set()
    results = [late.result(promise) for promise in promises]
    served.server._thread.join(10)

    assert [503, 503] == [answer.status_code for answer in refused]
    assert all("Retry-After" in answer.headers for answer in refused)
    assert all("error" not in result for result in results)
    assert not served.server._thread.is_alive()
    late.http.close()


def test_a_drain_ends_when_its_time_is_over_and_a_restart_continues(tmp_path):
    """Nothing that was accepted is lost: what is left is in the journal."""
    limits = {"drain_seconds": 0.5, "poll_seconds": 0.5}
    server = ServerProcess(tmp_path / "home", limits=limits, stuck=True)
    server.start()
    client = server.client
    model = client.model()
    promises = [client.forward_backward(model, 1, [5]), client.optim_step(model, 2)]
    start = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    server.end(20)
    seconds = time.monotonic() - start
    server.options.pop("stuck")
    server.start()
    results = [client.result(promise) for promise in promises]
    server.close()

    assert seconds >= 0.4
    assert all("metrics" in result for result in results)


def test_an_operation_that_waits_for_a_missing_one_does_not_hold_up_the_end(serve):
    """Its predecessor can not come any more."""
    served = serve(limits={"drain_seconds": 60.0}, port=free_port())
    model = served.client.model()
    served.client.optim_step(model, 2)
    start = time.monotonic()
    served.server.close()

    assert time.monotonic() - start < 30


def test_an_idle_server_ends_at_once_when_it_is_asked_to(serve, tmp_path):
    """It looks for itself only once a second. Connections that are kept alive do not hold it up."""
    seconds = 0.0
    for number in range(5):
        served = serve(tmp_path / str(number))
        served.client.get("healthz")
        start = time.monotonic()
        served.server.close()
        seconds += time.monotonic() - start

    assert seconds < 3
