"""Servers as separate processes, to be frozen, killed and started again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.support.processes import ROOT, free_port

#: What runs the server: as a user does, or with everything written down that the engine does.
SERVE = ("-m", "tinkex", "serve")
RECORDED = ("-m", "tests.chaos.recorder")


class Server:
    """A server on a port and a home that it keeps over restarts."""

    def __init__(self, home: Path, command=SERVE, environment=None, **options):
        self.home, self.port = Path(home), free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = self.home.with_name(f"{self.home.name}.log")
        self._command = [sys.executable, *command, "--port", str(self.port), "--home", str(home)]
        for name, value in options.items():
            self._command += [f"--{name.replace('_', '-')}", str(value)]
        self._environment = {k: v for k, v in os.environ.items() if not k.startswith("TINKER_")}
        self._environment |= {"PYTHONPATH": str(ROOT), **(environment or {})}
        self.process = None

    def start(self, wait=True):
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                self._command, cwd=ROOT, env=self._environment, stdout=subprocess.PIPE, stderr=log
            )
        if wait:
            line = self.process.stdout.readline().decode()
            assert line.startswith("http://"), self.log.read_text()
        return self

    def signal(self, number):
        self.process.send_signal(number)

    def freeze(self):
        self.signal(signal.SIGSTOP)

    def thaw(self):
        self.signal(signal.SIGCONT)

    def kill(self):
        self.signal(signal.SIGKILL)
        self.process.wait()
        self.process.stdout.close()

    def close(self):
        if self.process is not None and self.process.returncode is None:
            self.kill()

    def __enter__(self):
        return self.start()

    def __exit__(self, *exc):
        self.close()


def wait_for(claim, seconds=10.0):
    """Whether *claim* comes true in time."""
    deadline = time.monotonic() + seconds
    while not claim() and time.monotonic() < deadline:
        time.sleep(0.02)
    return claim()
