"""The heartbeat of a session, and what becomes of a session that is dropped, not closed."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time

import pytest

import tinkex
from tests.support.fake_server import FakeServer, datum, refused, reset, session, settings, status
from tests.support.processes import ROOT
from tests.support.served import served
from tinkex import types
from tinkex.config import Patience
from tinkex.runtime import embedded, sample_watch, wait_log
from tinkex.runtime.session import Session
from tinkex.runtime.transport import Transport


@pytest.fixture
def server():
    return FakeServer()


class Beats:
    """Counts beats, and lets a test wait for the n-th."""

    def __init__(self, server, fault=None):
        self._seen = threading.Condition()
        self.count = 0
        server.always("session_heartbeat", self)
        self.fault = fault

    def __call__(self, server, request, limits, behave):
        with self._seen:
            self.count += 1
            self._seen.notify_all()
        return behave() if self.fault is None else self.fault(server, request, limits, behave)

    def wait_for(self, n):
        with self._seen:
            return self._seen.wait_for(lambda: self.count >= n, 10)


def beating(server):
    return session(server, heartbeat=True, patience=Patience(heartbeat=0.001))


def test_statement_27_the_session_gives_signs_of_life(server):
    """To /session_heartbeat: /heartbeat is a 404, and sessions died of it unnoticed.
    (statement 27)"""
    beats = Beats(server)
    with beating(server):
        assert beats.wait_for(3)

    seen = server.seen("session_heartbeat")[0]
    assert {"session_id": "s0", "type": "session_heartbeat"} == seen.body
    assert 10.0 == seen.timeout[1]
    assert 10.0 == Patience().heartbeat


def test_the_heartbeat_ends_with_the_session(server):
    beats = Beats(server)
    with beating(server) as s:
        beats.wait_for(2)
        heart = s._heart
    heart.join(10)

    assert not heart.is_alive()


@pytest.mark.parametrize(
    "fault",
    [status(503), reset(), refused(), status(404, {"detail": "no session s0"})],
    ids=["503", "reset", "refused", "the session is not known"],
)
def test_missed_beats_are_told_at_the_second_one_and_then_once_a_minute(server, caplog, fault):
    """Not after 120 s, and not at every beat."""
    beats = Beats(server, fault)
    with beating(server):
        beats.wait_for(20)
        server.clock.sleep(61)
        beats.wait_for(beats.count + 3)
    warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]

    assert 2 == len(warnings)
    assert "no heartbeat has reached the server for" in warnings[0]
    assert "(session s0)" in warnings[0]


def test_one_missed_beat_is_no_news(server, caplog):
    beats = Beats(server)
    server.script("session_heartbeat", status(503))
    with beating(server):
        beats.wait_for(3)

    assert [] == caplog.records


def test_a_beat_is_tried_once(server):
    """The next one comes soon enough; retries would pile up."""
    beats = Beats(server, status(503))
    with beating(server):
        beats.wait_for(3)

    assert {"0"} == {
        seen.headers["x-stainless-retry-count"] for seen in server.seen("session_heartbeat")
    }


def test_a_server_without_heartbeats_is_left_in_peace(server):
    server.lacks.add("session_heartbeat")
    with beating(server) as s:
        s._heart.join(10)

        assert 1 == len(server.seen("session_heartbeat"))


def test_a_404_of_a_proxy_does_not_end_the_heartbeats_of_a_server_that_has_them(server):
    """The official SDK dropped its sessions like this, silently."""
    beats = Beats(server)
    with beating(server):
        beats.wait_for(2)
        server.script("session_heartbeat", *[status(404, b"<html>no backend</html>")] * 3)

        assert beats.wait_for(beats.count + 3)


def test_a_session_that_the_server_has_ended_is_told_once(server, caplog):
    server.always("session_heartbeat", status(410))
    with beating(server) as s:
        s._heart.join(10)

    assert ["the server has ended session s0"] == [r.getMessage() for r in caplog.records]


def test_a_heart_is_not_stopped_by_an_exception_that_nobody_thought_of(server):
    """A credential command that fails once must not cost the session."""
    beats = Beats(server)
    with beating(server) as s:
        beats.wait_for(1)
        calls = []

        def broken_once():
            calls.append(1)
            if len(calls) == 1:
                raise ValueError("TINKER_CREDENTIAL_CMD ended with status 1")
            return "tml-key"

        s.transport.get_key = broken_once
        assert beats.wait_for(beats.count + 3)


# Dropped, not closed.


def threads_and_descriptors():
    """Of tinkex's threads; descriptors of all kinds, without those that tests keep."""
    threads = [t for t in threading.enumerate() if t.name.startswith("tinkex-")]
    return len(threads), len(os.listdir("/proc/self/fd"))


def settles_at(expected, seconds=30):
    """What is there when no more than *expected* is left, or after so many seconds."""
    deadline = time.monotonic() + seconds
    while True:
        gc.collect()
        found = threads_and_descriptors()
        if all(f <= e for f, e in zip(found, expected)) or time.monotonic() > deadline:
            return found
        time.sleep(0.05)


@pytest.fixture
def no_lingering(monkeypatch):
    """Threads that end by themselves after some idle seconds do so at once."""
    monkeypatch.setattr(sample_watch, "LINGER", 0.01)
    monkeypatch.setattr(wait_log.WaitLog, "_watch", lambda self: None)


def looks_at_the_server(service):
    service.health()


def trains_and_samples(service):
    training = service.create_lora_training_client("tiny")
    training.forward_backward([datum()], "cross_entropy").result(20)
    service.create_sampling_client(base_model="tiny").sample([1, 2]).result(20)


def drop_thirty(use):
    """Print what one dropped client leaves in a process, and what thirty more do."""
    sample_watch.LINGER = 0.01
    wait_log.WaitLog._watch = lambda self: None
    with served(FakeServer()) as url:

        def work():
            use(tinkex.ServiceClient(url, "tml-test"))

        work()
        before = settles_at((0, 0), seconds=1)
        for _ in range(30):
            work()
        print(before, settles_at(before), sep="\n")


@pytest.mark.parametrize("use", [looks_at_the_server, trains_and_samples])
def test_dropped_clients_leave_no_threads_and_no_descriptors(use):
    """In a separate process, which no other test has affected."""
    code = f"from tests.runtime import test_heartbeat as t; t.drop_thirty(t.{use.__name__})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )

    assert 0 == done.returncode, done.stderr
    before, after = done.stdout.splitlines()
    assert before == after


def test_a_dropped_client_s_work_is_done_first(server, no_lingering):
    """Only the future is left of it."""
    with served(server) as url:
        service = tinkex.ServiceClient(url, "tml-test")
        training = service.create_lora_training_client("tiny")
        futures = [training.optim_step(types.AdamParams()) for _ in range(20)]
        del service, training
        gc.collect()

        assert 20 == len([future.result(20) for future in futures])


class Engine:
    def obituary(self):
        return None


def test_a_dropped_client_releases_the_embedded_engine(server, monkeypatch):
    released = threading.Event()
    monkeypatch.setattr(embedded, "release", lambda engine: released.set())
    config = settings()
    Session(config, transport=Transport(config, adapter=server), engine=Engine())
    gc.collect()

    assert released.wait(20)
