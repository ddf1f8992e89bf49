"""Servers as separate processes, to be killed and started again."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import requests

from tests.support.wire_client import WireClient

ROOT = Path(__file__).parents[2]


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


class ServerProcess:
    """A server that keeps its port across restarts; on the fake engine unless *real*."""

    def __init__(self, home, port=None, environment=None, real=False, **options):
        if real:
            options["real"] = True
        self.home, self.port, self.options = home, port or free_port(), options
        self.environment = {**os.environ, **(environment or {})}
        self.process = None
        self.client = WireClient(f"http://127.0.0.1:{self.port}")

    def spawn(self, **kwargs):
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "tests.support.fake_engine",
                str(self.port),
                str(self.home),
                json.dumps(self.options),
            ],
            cwd=ROOT,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **kwargs,
        )

    def start(self, **kwargs):
        """Start it, and return when it answers; the first line of its output is its URL."""
        self.spawn(**kwargs)
        line = self.process.stdout.readline()
        assert line.startswith("http://"), self.process.stderr.read()
        return line.strip()

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.end()

    def end(self, timeout=10):
        """Wait for its end; return its stderr."""
        _, errors = self.process.communicate(timeout=timeout)
        return errors

    def close(self):
        if self.process is not None and self.process.poll() is None:
            self.kill()
        self.client.http.close()


def patiently(call, *arguments, seconds=20):
    """Repeat *call* while the server is not reachable."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return call(*arguments)
        except (requests.ConnectionError, requests.exceptions.ChunkedEncodingError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
