"""Telemetry of a session: opt-in, bounded, and without effect on the program."""

from __future__ import annotations

import threading

import pytest

from tests.support.fake_server import FakeServer, blocked, reset, status, transport
from tinkex.config import PROTOCOL_VERSION
from tinkex.runtime import telemetry
from tinkex.runtime.telemetry import Reporter


@pytest.fixture
def server():
    return FakeServer()


@pytest.fixture
def reporter(server):
    made = Reporter(transport(server), "s0")
    yield made
    made.close()


def events(server):
    return [event for body in server.bodies("telemetry") for event in body["events"]]


def test_it_is_off_unless_it_was_asked_for(server):
    assert telemetry.start(transport(server), "s0") is None

    asked = telemetry.start(transport(server, telemetry=True), "s0")
    assert isinstance(asked, Reporter)
    asked.close()


def test_a_session_begins_and_ends_once(reporter, server):
    reporter.close()
    reporter.close()

    assert ["SESSION_START", "SESSION_END"] == [event["event"] for event in events(server)]
    assert "0:00:00" == events(server)[-1]["duration"]
    assert {"s0"} == {body["session_id"] for body in server.bodies("telemetry")}
    assert PROTOCOL_VERSION == server.bodies("telemetry")[0]["sdk_version"]


def test_events_are_numbered_and_named(reporter, server):
    reporter.log_event("step", {"loss": 1.5, "done": True, "note": None})
    reporter.flush()
    first, second = events(server)

    assert [0, 1] == [first["event_session_index"], second["event_session_index"]]
    assert first["event_id"] != second["event_id"]
    assert ("GENERIC_EVENT", "step", "INFO") == (
        second["event"],
        second["event_name"],
        second["severity"],
    )
    assert second["timestamp"].endswith("+00:00")


def test_what_is_true_stays_true(reporter, server):
    """Theirs sends "true" and "nil"."""
    reporter.log_event("x", {"a": True, "b": None, "c": 5})
    reporter.flush()

    assert {"a": True, "b": None, "c": 5} == events(server)[-1]["event_data"]


def test_an_exception_is_told_with_its_own_traceback(reporter, server):
    """Theirs shows the reporter's."""

    def failing_step():
        raise ValueError("too hot")

    try:
        failing_step()
    except ValueError as exc:
        reporter.log_exception(exc)
    reporter.flush()
    told = events(server)[-1]

    assert ("ValueError", "too hot", "ERROR") == (
        told["error_type"],
        told["error_message"],
        told["severity"],
    )
    assert "failing_step" in told["traceback"]


def test_events_go_in_batches(reporter, server):
    for i in range(250):
        reporter.log_event("x", {"i": i})
    reporter.close()

    assert list(range(250)) == [e["event_data"]["i"] for e in events(server) if "event_data" in e]
    assert all(len(body["events"]) <= telemetry.BATCH for body in server.bodies("telemetry"))


def test_a_full_batch_is_sent_at_once(reporter, server, monkeypatch):
    """Not after the ten seconds."""
    arrived = threading.Event()

    def arrive(server, request, limits, behave):
        arrived.set()
        return behave()

    server.always("telemetry", arrive)
    for _ in range(telemetry.BATCH):
        reporter.log("X")

    assert arrived.wait(5)


@pytest.mark.parametrize("fault", [status(500), reset(), status(404)])
def test_what_cannot_be_sent_is_dropped_and_nobody_is_told(reporter, server, fault, caplog):
    server.always("telemetry", fault)
    reporter.log("X")
    reporter.flush()

    assert [] == [r for r in caplog.records if r.levelname != "DEBUG"]
    assert {"0"} == {s.headers["x-stainless-retry-count"] for s in server.seen("telemetry")}


def test_the_queue_has_a_limit(server, monkeypatch):
    monkeypatch.setattr(telemetry, "QUEUE_LIMIT", 3)
    entered, release = threading.Event(), threading.Event()
    server.always("telemetry", blocked(entered, release))
    reporter = Reporter(transport(server), "s0")

    assert [True, True, False, False] == [reporter.log("X") for _ in range(4)]
    release.set()
    reporter.close()


def test_logging_never_waits_for_the_server(server):
    entered, release = threading.Event(), threading.Event()
    server.always("telemetry", blocked(entered, release))
    reporter = Reporter(transport(server), "s0")
    for _ in range(telemetry.BATCH):
        reporter.log("X")
    entered.wait(10)

    assert reporter.log("while it hangs")
    release.set()
    reporter.close()


def test_closing_waits_for_a_server_that_hangs_two_seconds_at_most(server, monkeypatch):
    monkeypatch.setattr(telemetry, "CLOSE_TIMEOUT", 0.02)
    entered, release = threading.Event(), threading.Event()
    server.always("telemetry", blocked(entered, release))
    reporter = Reporter(transport(server), "s0")
    closer = threading.Thread(target=reporter.close)
    closer.start()
    closer.join(5)

    assert not closer.is_alive()
    release.set()


def test_what_json_cannot_say_is_sent_as_text(reporter, server):
    reporter.log_event("x", {"a": {1, 2}, "b": object})
    reporter.flush()

    assert "{1, 2}" == events(server)[-1]["event_data"]["a"]


def test_it_may_be_used_from_many_threads(reporter, server):
    threads = [
        threading.Thread(target=lambda: [reporter.log("X") for _ in range(100)]) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    reporter.close()

    assert list(range(802)) == sorted(event["event_session_index"] for event in events(server))
