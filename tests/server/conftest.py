"""Servers for the tests: real HTTP on a free port, with a temporary home."""

from __future__ import annotations

import subprocess

import attrs
import pytest

from tests.support.fake_engine import FakeEngine
from tests.support.wire_client import WireClient
from tinkex.server.app import LocalServer
from tinkex.server.limits import Limits

#: Short waits, so that a test of waiting does not wait.
QUICK = Limits(poll_seconds=0.3, reap_seconds=0.1)


class Served:
    """A running server with its engine and a client."""

    def __init__(self, home, *, engine=None, limits=None, make_engine=None, **options):
        self.engine = engine or FakeEngine()
        self.limits = limits or QUICK
        self.server = LocalServer(
            home, engine=make_engine or (lambda: self.engine), limits=self.limits, **options
        )
        self.server.start()
        self.client = WireClient(self.server.url)

    def client_with(self, key):
        return WireClient(self.server.url, key)

    def close(self):
        self.client.http.close()
        self.server.close()


@pytest.fixture
def serve(tmp_path):
    """Starts servers that are stopped after the test; all on one home by default."""
    running = []

    def start(home=None, limits=None, **options):
        quick = attrs.evolve(QUICK, **limits) if isinstance(limits, dict) else limits
        served = Served(home or tmp_path / "home", limits=quick, **options)
        running.append(served)
        return served

    yield start
    for served in running:
        served.close()


@pytest.fixture
def served(serve):
    return serve()


@pytest.fixture
def client(served):
    return served.client


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A certificate of 127.0.0.1 that it has signed itself, and its key."""
    folder = tmp_path_factory.mktemp("tls")
    certificate, key = folder / "cert.pem", folder / "key.pem"
    command = (
        f"openssl req -x509 -newkey rsa:2048 -nodes -days 2 -keyout {key} -out {certificate} "
        "-subj /CN=localhost -addext subjectAltName=IP:127.0.0.1,DNS:localhost"
    )
    subprocess.run(command.split(), check=True, capture_output=True)
    return certificate, key
