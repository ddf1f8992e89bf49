"""How many samples are in flight at once, for all clients with one key; and slower after a 429."""

from __future__ import annotations

import threading

import pytest

from tests.support.fake_server import Clock
from tinkex.config import SamplingLimits
from tinkex.runtime.rate_limit import LARGE_PROMPT, Pace, pace_of

SMALL, LARGE = 1000, LARGE_PROMPT + 1


@pytest.fixture
def clock():
    return Clock()


def pace(clock, requests=400, nbytes=10_000_000):
    limits = SamplingLimits(requests_in_dispatch=requests, bytes_in_dispatch=nbytes)
    return Pace(limits, clock=clock)


class Sender:
    """A thread that wants to send, and holds its place until it is released."""

    def __init__(self, pace, nbytes=SMALL, cancelled=lambda: False):
        self.admitted, self.end = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, args=(pace, nbytes, cancelled))
        self._thread.start()

    def _run(self, pace, nbytes, cancelled):
        with pace.admitted(nbytes, cancelled):
            self.admitted.set()
            self.end.wait(10)

    def finish(self):
        self.end.set()
        self._thread.join(10)


def test_so_many_requests_are_admitted_at_a_time(clock):
    limited = pace(clock, requests=2)
    first, second = Sender(limited), Sender(limited)
    assert first.admitted.wait(10) and second.admitted.wait(10)
    third = Sender(limited)

    assert not third.admitted.wait(0.05)
    first.finish()
    assert third.admitted.wait(10)
    second.finish()
    third.finish()


def test_so_many_bytes_are_admitted_at_a_time(clock):
    limited = pace(clock, nbytes=1000)
    first = Sender(limited, 600)
    assert first.admitted.wait(10)
    second = Sender(limited, 600)

    assert not second.admitted.wait(0.05)
    first.finish()
    assert second.admitted.wait(10)
    second.finish()


def test_one_larger_than_the_limit_goes_alone(clock):
    """Else it could never go."""
    alone = Sender(pace(clock, nbytes=1000), 5000)

    assert alone.admitted.wait(10)
    alone.finish()


def test_a_place_is_given_back_when_sending_raises(clock):
    limited = pace(clock, requests=1)
    for _ in range(3):
        with pytest.raises(ValueError), limited.admitted(SMALL):
            raise ValueError

    sender = Sender(limited)
    assert sender.admitted.wait(10)
    sender.finish()


@pytest.mark.parametrize(
    "nbytes, retry_after, pause",
    [(SMALL, None, 1.0), (LARGE, None, 5.0), (SMALL, 7.0, 7.0), (LARGE, 0.075, 0.075)],
)
def test_statement_23_after_a_429_everybody_waits(clock, nbytes, retry_after, pause):
    """1 s for a small prompt, 5 s for a large one; the server's own wish wins. (statement 23)"""
    limited = pace(clock)

    assert pause == limited.throttled(nbytes, retry_after)
    sender = Sender(limited)
    assert not sender.admitted.wait(0.02)
    clock.sleep(pause)
    limited.wake()
    assert sender.admitted.wait(10)
    sender.finish()


def test_a_shorter_wish_does_not_cut_a_longer_one_short(clock):
    """In the SDK we follow the last 429 wins, whatever the one before it asked for."""
    limited = pace(clock)
    limited.throttled(SMALL, 60)
    limited.throttled(SMALL, 1)
    clock.sleep(2)
    sender = Sender(limited)

    assert not sender.admitted.wait(0.02)
    clock.sleep(60)
    limited.wake()
    assert sender.admitted.wait(10)
    sender.finish()


def test_one_success_does_not_end_the_quiet_for_all(clock):
    """Theirs does, though another request has just been refused with a 429."""
    limited = pace(clock)
    limited.throttled(SMALL, 60)
    limited.succeeded()
    sender = Sender(limited)

    assert not sender.admitted.wait(0.02)
    clock.sleep(60)
    limited.wake()
    assert sender.admitted.wait(10)
    sender.finish()


def test_the_full_speed_comes_back_step_by_step(clock):
    limited = pace(clock)
    limited.throttled(SMALL, None)
    assert 200 == limited.limit
    for _ in range(3):
        limited.throttled(SMALL, None)
    assert 25 == limited.limit
    for _ in range(10):
        limited.throttled(SMALL, None)
    assert 10 == limited.limit
    for _ in range(1000):
        limited.succeeded()

    assert 400 == limited.limit


def test_a_limit_below_the_throttled_one_stays(clock):
    limited = pace(clock, requests=3)
    limited.throttled(SMALL, None)

    assert 3 == limited.limit


def test_whoever_gives_up_is_let_through_soon(clock):
    """To find that its client is closed: not after the five minutes that the server asked for."""
    limited = pace(clock)
    limited.throttled(SMALL, 300)
    closed = threading.Event()
    sender = Sender(limited, cancelled=closed.is_set)
    closed.set()
    limited.wake()

    assert sender.admitted.wait(5)
    sender.finish()


def test_all_who_sample_at_one_place_with_one_key_share_a_pace():
    limits = SamplingLimits()
    mine = pace_of("http://a/services/x", "key", limits)

    assert mine is pace_of("http://a/services/x", "key", limits)
    assert mine is not pace_of("http://a/services/y", "key", limits)
    assert mine is not pace_of("http://a/services/x", "another", limits)


def test_many_senders_all_get_their_turn(clock):
    limited = pace(clock, requests=3, nbytes=5000)
    done = []

    def send(i):
        with limited.admitted(1000 * (i % 4)):
            done.append(i)

    threads = [threading.Thread(target=send, args=(i,)) for i in range(100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)

    assert list(range(100)) == sorted(done)
