"""Never silent, never endless: whatever is waited for when the server freezes or dies, a line in
the log reports it, an error comes when patience is over, and Ctrl-C gets through at once."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import attrs
import psutil
import pytest

import tinkex
from tests.chaos import waits
from tests.chaos.servers import Server, wait_for
from tests.support.processes import ROOT
from tinkex import errors

SLOW = ("-m", "tests.chaos.slow")
#: close() does not raise: it gives up what it could not send.
KINDS = [kind for kind in waits.KINDS if kind is not waits.close]
#: The budget is `no_answer`, and the exchange that is under way when it ends.
IMPATIENT = tinkex.Patience(
    connect=0.5, request=1.0, poll=1.0, no_answer=2.0, report_after=0.4, report_every=1.0,
    heartbeat=60, close=0.5,
)  # fmt: skip


class Lines(logging.Handler):
    """What is logged, and when."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append((time.monotonic(), record.getMessage()))

    def first(self, pattern, since=0.0):
        """Seconds from *since* to the first line with *pattern* in it; None without one."""
        times = [at - since for at, line in self.lines if re.search(pattern, line)]
        return min((seconds for seconds in times if seconds > 0), default=None)


@pytest.fixture
def lines():
    handler = Lines()
    logging.getLogger("tinkex").addHandler(handler)
    yield handler
    logging.getLogger("tinkex").removeHandler(handler)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with Server(tmp_path_factory.mktemp("silence") / "home", SLOW) as server:
        yield server


def wait_out(wait):
    """(what it raised, when)"""
    try:
        wait()
    except BaseException as exc:
        return exc, time.monotonic()
    return None, time.monotonic()


@contextlib.contextmanager
def silent(server, how):
    """While the server is frozen or dead."""
    how(server)
    yield time.monotonic()
    server.thaw() if how is Server.freeze else server.start()


@contextlib.contextmanager
def waiting_for(server, patience=None):
    """All kinds of waits, each as a function that waits, on its own session."""
    with ThreadPoolExecutor(len(KINDS)) as pool:
        services = [tinkex.ServiceClient(server.url, "tml-any", patience=patience) for _ in KINDS]
        try:
            yield pool, list(pool.map(lambda kind, service: kind(service), KINDS, services))
        finally:
            for service in services:
                service.close("interrupted")  # some of these would wait for ever


@pytest.mark.parametrize("how", [Server.freeze, Server.kill], ids=["frozen", "killed"])
def test_a_silent_server_is_reported_and_then_an_error(server, how, lines):
    """Within the set times, naming what is waited for and the server."""
    with waiting_for(server, IMPATIENT) as (pool, ready), silent(server, how) as began:
        ends = list(pool.map(wait_out, [wait for wait, _ in ready]))

    for kind, (_, pattern), (error, ended) in zip(KINDS, ready, ends):
        reported = lines.first(f"waiting .*({pattern})", began) or 99.0
        assert isinstance(error, errors.APIConnectionError), kind
        assert server.url in str(error), kind
        assert ended - began < 5.0, kind
        # What fails at once needs no line before.
        assert reported < 2.0 or ended - began < IMPATIENT.report_after, kind


def test_with_the_settings_as_they_come_a_line_says_so_within_ten_seconds(server, lines):
    """For whatever is waited for when the server freezes."""
    with waiting_for(server) as (pool, ready), silent(server, Server.freeze) as began:
        for wait, _ in ready:
            pool.submit(wait_out, wait)

        def not_reported():
            return [p for _, p in ready if not lines.first(f"waiting .*({p})", began)]

        wait_for(lambda: not not_reported(), 10.0)
        missing = not_reported()

    assert [] == missing


@pytest.mark.parametrize("how", [Server.freeze, Server.kill], ids=["frozen", "killed"])
def test_an_idle_session_says_that_nobody_hears_its_heartbeat(server, how, lines):
    """A user who returns after lunch should find out when the server went away."""
    patience = attrs.evolve(IMPATIENT, heartbeat=0.3)
    with tinkex.ServiceClient(server.url, "tml-any", patience=patience), silent(server, how):
        said = wait_for(lambda: lines.first("heartbeat"), 4)

    assert said


@pytest.fixture(scope="module")
def interrupted(server):
    """kind -> (seconds to KeyboardInterrupt, seconds to the end, status) of programs that get
    Ctrl-C while they wait for a frozen server."""
    programs = {kind: Program(kind.__name__, server.url) for kind in waits.KINDS}
    try:
        for program in programs.values():
            program.expect("ready")
        server.freeze()
        for program in programs.values():
            program.go()
        for program in programs.values():
            program.expect("waiting")
        time.sleep(0.3)
        return {kind: program.interrupt() for kind, program in programs.items()}
    finally:
        server.thaw()
        for program in programs.values():
            program.process.kill()
            program.process.communicate()


class Program:
    """A program of waits.py."""

    def __init__(self, kind, url):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.chaos.waits", kind, url],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip

    def expect(self, word):
        line = self.process.stdout.readline().strip()
        assert word == line, self.process.stderr.read()

    def go(self):
        print(file=self.process.stdin, flush=True)

    def interrupt(self):
        began = time.monotonic()
        self.process.send_signal(signal.SIGINT)
        self.expect("interrupted")
        heard = time.monotonic() - began
        status = self.process.wait(20)
        return heard, time.monotonic() - began, status


@pytest.mark.parametrize("kind", waits.KINDS, ids=lambda kind: kind.__name__)
def test_ctrl_c_gets_through_at_once(interrupted, kind):
    """The client closes and the program ends within a second, whatever it was waiting for."""
    heard, ended, status = interrupted[kind]

    assert 130 == status
    assert heard < 1.0
    assert ended < 1.5


EMBEDDED = """
import tinkex
try:
    with tinkex.ServiceClient() as service:
        training = service.create_lora_training_client("tiny", rank=2)
        print(service._session.engine._process.pid, flush=True)
        input()
        training.get_info()
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


def test_ctrl_c_ends_an_embedded_engine_that_is_frozen(tmp_path):
    """A process that is stopped hears no SIGTERM; nothing may be left of it all the same."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TINKER_")}
    program = subprocess.Popen(
        [sys.executable, "-c", EMBEDDED],
        cwd=ROOT, env={**environment, "TINKEX_HOME": str(tmp_path)}, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    engine = int(program.stdout.readline())
    os.kill(engine, signal.SIGSTOP)
    print(file=program.stdin, flush=True)
    time.sleep(0.3)
    began = time.monotonic()
    program.send_signal(signal.SIGINT)
    out, _ = program.communicate(timeout=20)
    seconds = time.monotonic() - began

    assert "interrupted" in out
    assert seconds < 1.5
    assert not psutil.pid_exists(engine)
