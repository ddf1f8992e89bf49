"""No wait is silent: one line when something takes long, with all there is to say about it."""

from __future__ import annotations

import logging
import threading

import pytest

from tests.support.fake_server import Clock
from tinkex.runtime.wait_log import WaitLog


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def log(clock):
    made = WaitLog(report_after=10.0, report_every=60.0, clock=clock)
    yield made
    made.close()


def test_a_short_wait_is_not_reported(log, clock):
    log.begin("optim_step r1")
    clock.sleep(9.9)

    assert log.report() is None


def test_a_long_wait_is_reported_after_the_set_time(log, clock):
    """What is awaited, and how long: more than the official SDK says in six minutes."""
    log.heard()
    log.begin("optim_step r1")
    clock.sleep(10)
    log.heard()

    assert "waiting 10 s for optim_step r1" == log.report()


def test_the_report_has_the_queue_state_and_the_retries(log, clock):
    """Whoever reads the line should know whether to wait, to buy capacity, or to look for a bug."""
    log.heard()
    wait = log.begin("forward_backward r1")
    wait.state = "queue state paused_capacity: the cluster is full"
    wait.failed_once("http://x/api/v1/retrieve_future answered 503: nothing more")
    wait.failed_once("http://x/api/v1/retrieve_future: the connection broke: reset by peer")
    clock.sleep(12)
    log.heard()

    assert (
        "waiting 12 s for forward_backward r1 (queue state paused_capacity: the cluster is full; "
        "2 retries, the last after: http://x/api/v1/retrieve_future: the connection broke: reset "
        "by peer)" == log.report()
    )


def test_a_server_that_never_answered_is_called_so(log, clock):
    """The commonest cause of a long first wait is a wrong address."""
    log.begin("POST http://x/api/v1/client/config")
    clock.sleep(10)

    assert log.report().endswith("; the server has not answered yet")


def test_a_server_that_fell_silent_is_called_so(log, clock):
    log.heard()
    log.begin("optim_step r1")
    clock.sleep(30)

    assert log.report().endswith("; the server last answered 30 s ago")


def test_a_thousand_waits_are_one_line(log, clock):
    """The longest one, and how many others: a log is for people."""
    log.heard()
    log.begin("the oldest")
    clock.sleep(1)
    for i in range(1000):
        log.begin(f"sample {i}")
    clock.sleep(10)
    log.heard()

    assert "waiting 11 s for the oldest, and 1000 more" == log.report()
    assert log.report() is None


def test_the_same_wait_is_reported_again_after_a_minute(log, clock):
    log.begin("optim_step r1")
    clock.sleep(10)
    log.report()
    clock.sleep(59)
    assert log.report() is None
    clock.sleep(1)

    assert "waiting 70 s" in log.report()


def test_what_has_ended_is_not_reported(log, clock):
    with log.begin("optim_step r1") as wait:
        clock.sleep(20)
    wait.end()

    assert log.report() is None


def test_the_line_appears_in_the_log_by_itself():
    """It need not be asked for; a thread looks at the clock while something waits."""
    said = threading.Event()
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: (records.append(record), said.set())
    logging.getLogger("tinkex").addHandler(handler)
    log = WaitLog(report_after=0.02)
    try:
        log.begin("optim_step r1")
        assert said.wait(10)
    finally:
        logging.getLogger("tinkex").removeHandler(handler)
        log.close()

    assert "for optim_step r1" in records[0].getMessage()
    assert "WARNING" == records[0].levelname


def test_its_thread_lives_only_while_something_waits():
    """A client that is idle overnight should not wake the machine every second."""
    log = WaitLog(report_after=0.004)
    before = set(threading.enumerate())
    log.begin("a").end()
    [thread] = set(threading.enumerate()) - before
    thread.join(10)

    assert not thread.is_alive()
    log.begin("b")
    assert "tinkex-wait" in {t.name for t in threading.enumerate()}
    log.close()


def test_whoever_waits_may_be_told_of_each_failure(log):
    """So that a refusal's body can say why the server is paused."""
    told = []
    wait = log.begin("optim_step r1")
    wait.on_failure = told.append
    problem = ValueError("a problem\nin two lines")
    wait.failed_once(problem)

    assert [problem] == told
    assert "a problem in two lines" == wait.last_error
