"""When a request that failed is sent again, how long, and what its failure then says."""

from __future__ import annotations

import email.utils
import itertools
import time
from contextlib import closing

import pytest

from tests.support.canned import HEALTHZ, OK, reply
from tests.support.fake_server import (
    URL,
    FakeServer,
    bad_certificate,
    garbage,
    lost,
    no_connection,
    refused,
    reset,
    status,
    timeout,
    transport,
    unknown_host,
)
from tinkex import errors, types, wire
from tinkex.runtime.responses import MAX_RETRY_AFTER, Answer
from tinkex.runtime.retry import ONCE, Retry, seconds


@pytest.fixture
def server():
    return FakeServer()


@pytest.fixture
def fresh(server):
    """A transport whose server was never heard of."""
    with closing(transport(server)) as made:
        yield made


@pytest.fixture
def established(fresh, server):
    """A transport whose server has answered before."""
    fresh.call(wire.HEALTHZ)
    server.requests.clear()
    return fresh


# What is tried again.

TRANSIENT = {
    **{str(code): reply(code) for code in (408, 425, 502, 503, 529)},
    "429": reply(429, {"message": "slow down"}),
    "500": reply(500, b"<html>oops</html>"),
    "a login page": reply(200, b"<html>Please log in</html>"),
    "half a JSON": reply(200, b'{"status": "o', **{"Content-Type": "application/json"}),
    "an empty 400": reply(400),
    "a 400 from a proxy": reply(400, b"<html>Bad Request</html>"),
    "409": reply(409, {"detail": "conflict"}),
}


@pytest.mark.parametrize("fault", TRANSIENT.values(), ids=TRANSIENT)
def test_what_may_pass_is_tried_again_by_an_established_client(way, canned, fault):
    """A run of many hours must not end because a load balancer was restarted."""
    canned.give(fault, fault, OK)

    assert "ok" == way.call(wire.HEALTHZ).status
    assert 3 == len(canned.calls)


@pytest.mark.parametrize(
    "fault",
    [reset(), lost(), timeout(), no_connection(), refused(), unknown_host()],
    ids=["reset", "answer lost", "read timeout", "connect timeout", "refused", "not resolved"],
)
def test_so_is_what_got_no_answer(established, server, fault):
    server.script("healthz", fault, fault)

    assert "ok" == established.call(wire.HEALTHZ).status
    assert 3 == len(server.requests)


FINAL = {
    400: errors.BadRequestError,
    401: errors.AuthenticationError,
    402: errors.BillingError,
    403: errors.PermissionDeniedError,
    404: errors.NotFoundError,
    405: errors.APIStatusError,
    410: errors.PromiseExpiredError,
    413: errors.APIStatusError,
    415: errors.APIStatusError,
    422: errors.UnprocessableEntityError,
}


@pytest.mark.parametrize("code, kind", FINAL.items())
def test_what_will_not_pass_is_raised_at_once_with_the_server_s_own_words(way, canned, code, kind):
    canned.give(reply(code, {"detail": "this is why"}))

    with pytest.raises(kind, match=rf"{HEALTHZ} answered {code}: this is why") as caught:
        way.call(wire.HEALTHZ)
    assert 1 == len(canned.calls)
    assert (code, "this is why", "GET") == (
        caught.value.status,
        caught.value.detail,
        caught.value.method,
    )
    assert not caught.value.retryable


def test_pauses_grow_have_jitter_and_end_at_ten_seconds(way, canned):
    """Clients that fail together must not come back together."""
    canned.give(*[reply(503)] * 12, OK)
    way.call(wire.HEALTHZ)
    steps = [min(0.25 * 2**i, 10.0) for i in range(12)]

    assert all(s / 2 <= slept <= s for s, slept in zip(steps, canned.clock.slept))
    assert len(set(canned.clock.slept)) == len(canned.clock.slept)


def test_the_thousandth_try_does_not_overflow():
    """2^n does, in the SDK we follow, at attempt 1024."""
    assert 10.0 >= seconds(Retry().wait, 5000)


@pytest.mark.parametrize(
    "headers, seconds",
    [
        ({"retry_after_ms": "75"}, 0.075),
        ({"retry_after": "7"}, 7.0),
        ({"retry_after": "2.5"}, 2.5),
        ({"retry_after_ms": "75", "retry_after": "7"}, 0.075),
        ({"retry_after": "86400"}, MAX_RETRY_AFTER),
    ],
)
def test_the_server_s_wish_is_followed(way, canned, headers, seconds):
    """(statement 26)"""
    canned.give(reply(429, **headers), OK)
    way.call(wire.HEALTHZ)

    assert [seconds] == canned.clock.slept


def test_a_date_in_retry_after_is_understood(way, canned):
    date = email.utils.formatdate(time.time() + 100, usegmt=True)
    canned.give(reply(503, retry_after=date), OK)
    way.call(wire.HEALTHZ)

    assert 97 <= canned.clock.slept[0] <= 100


@pytest.mark.parametrize("nonsense", ["soon", "-5", "nan", "", "0", "Fri, 99 Foo 2020 00:00:00"])
def test_nonsense_in_retry_after_is_ignored(way, canned, nonsense):
    """Neither an exception of the date parser, nor a hot loop."""
    canned.give(reply(503, retry_after=nonsense), OK)
    way.call(wire.HEALTHZ)

    assert 0.1 <= canned.clock.slept[0] <= 0.25


def test_the_server_s_word_that_a_failure_is_final_wins(way, canned):
    """x-should-retry (statement 26)"""
    canned.give(reply(503, **{"x-should-retry": "false"}))

    with pytest.raises(errors.InternalServerError):
        way.call(wire.HEALTHZ)
    assert 1 == len(canned.calls)


def test_the_server_s_word_that_a_failure_may_pass_wins(way, canned):
    canned.give(*[reply(422, {"detail": "x"}, **{"x-should-retry": "true"})] * 2, OK)
    way.call(wire.HEALTHZ)

    assert 3 == len(canned.calls)


@pytest.mark.parametrize(
    "fault, kind",
    [
        (reply(200, b"<html>Please log in</html>"), errors.APIResponseValidationError),
        (reply(200, {"session_id": 5}), errors.APIResponseValidationError),
        (reply(400), errors.BadRequestError),
        (reply(409), errors.ConflictError),
    ],
    ids=["garbage", "unusable", "400", "409"],
)
def test_what_may_be_a_proxy_s_stray_answer_is_tried_four_times(way, canned, fault, kind):
    """A server that means it should be heard soon: not after ten minutes of the same."""
    canned.give(fault, to="create_session", method="POST")

    with pytest.raises(kind):
        way.call(wire.CREATE_SESSION, types.CreateSessionRequest())
    assert 4 == len(canned.calls)


def test_a_single_try_is_a_single_try(way, canned):
    canned.give(reply(503))

    with pytest.raises(errors.InternalServerError):
        way.call(wire.HEALTHZ, retry=ONCE)
    assert 1 == len(canned.calls)
    assert [] == canned.clock.slept


def test_an_error_that_is_the_caller_s_to_deal_with_is_passed_on(way, canned):
    canned.give(reply(429))

    with pytest.raises(errors.RateLimitError):
        way.call(wire.HEALTHZ, retry=Retry(pass_on=frozenset({429})))
    assert 1 == len(canned.calls)


def test_a_programming_mistake_is_not_tried_again(way, canned):
    """The SDK we follow repeats those for two hours."""
    canned.give(OK)

    def parse(answer):
        raise KeyError("mine")

    with pytest.raises(KeyError):
        way.send("GET", HEALTHZ, parse=parse)
    assert 1 == len(canned.calls)


# How long.


def chaos():
    """503s, 429s with Retry-After, resets and timeouts, one after another."""
    return itertools.cycle(
        [status(503), status(429, None, retry_after=5), reset(), timeout(), no_connection()]
    )


def test_an_established_client_survives_five_minutes_of_anything(established, server):
    faults, end = chaos(), server.clock() + 300

    def bad_weather(server, request, limits, behave):
        if server.clock() >= end:
            return behave()
        return next(faults)(server, request, limits, behave)

    server.always("healthz", bad_weather)

    assert "ok" == established.call(wire.HEALTHZ).status
    assert server.clock() >= end


def test_but_it_does_not_wait_for_ever(way, canned):
    """Ten minutes, then the last error, with how often it was tried."""
    canned.give(reply(503, {"message": "down for good"}))
    began = canned.clock()

    with pytest.raises(errors.InternalServerError, match="down for good") as caught:
        way.call(wire.HEALTHZ)
    assert 580 <= canned.clock() - began <= 600
    assert len(canned.calls) == caught.value.attempts > 50


HOPELESS = {
    "refused": (refused(), 4, "connection refused; is the server running, on this port?"),
    "not resolved": (unknown_host(), 0, "the host name does not resolve; is base_url spelled"),
    "certificate": (bad_certificate(), 0, "the TLS handshake failed"),
    "401": (status(401, {"detail": "bad key"}), 0, "answered 401: bad key (is TINKER_API_KEY"),
    "404": (status(404), 0, "answered 404"),
    "no connection": (no_connection(), 10, "no connection; is the host right, and reachable"),
    "silent": (timeout(), 10, "no answer within 8 s"),
    "500": (status(500), 10, "answered 500"),
    "503": (status(503, b"starting"), 10, "answered 503: starting"),
    "reset": (reset(), 10, "the connection broke: [Errno 104] Connection reset by peer"),
    "login page": (garbage(), 10, "is not JSON ('<html>Please log in</html>'). Is base_url the"),
}


@pytest.mark.parametrize("fault, limit, words", HOPELESS.values(), ids=HOPELESS)
def test_first_contact_fails_within_ten_seconds_with_the_url(fresh, server, fault, limit, words):
    """The official SDK prints nothing for 357 s, and then "Connection error."."""
    server.always("client/config", fault)
    began = server.clock()

    with pytest.raises(errors.APIError) as caught:
        fresh.call(wire.CLIENT_CONFIG, types.ClientConfigRequest("x"))
    assert server.clock() - began <= limit
    assert f"{URL}/api/v1/client/config" in str(caught.value)
    assert words in str(caught.value)


def test_a_server_that_is_just_starting_is_waited_for(fresh, server):
    """A refused connection in the first two seconds: `tinkex serve & python train.py`."""
    server.script("healthz", refused(), refused(), status(503), reset())

    assert "ok" == fresh.call(wire.HEALTHZ).status


# Whether the server may have done it.


@pytest.mark.parametrize(
    "faults, unknown",
    [
        ([status(422, {"detail": "x"})], False),
        ([refused()] * 200, False),
        ([no_connection()] * 200, False),
        ([status(429)] * 300, False),
        ([status(503)] * 200, True),
        ([lost()] * 200, True),
        ([timeout()] * 200, True),
        ([reset(), status(422, {"detail": "x"})], True),
        ([garbage()] * 4, True),
    ],
    ids=["422", "refused", "connect", "429", "503", "lost", "timeout", "reset+422", "garbage"],
)
def test_an_error_says_whether_the_request_may_have_been_carried_out(
    established, server, faults, unknown
):
    """Where it may, the next number is not known, and guessing could run something twice."""
    server.script("session_heartbeat", *faults)

    with pytest.raises(errors.APIError) as caught:
        established.send("POST", established.url("session_heartbeat"), b"{}", parse=Answer.json)
    assert unknown == caught.value.outcome_unknown


def test_a_refused_resend_is_called_outcome_unknown_rather_than_guessed(established, server):
    server.script("session_heartbeat", lost(), *[status(409, {"detail": "seen before"})] * 4)

    with pytest.raises(errors.OutcomeUnknownError, match=r"outcome unknown: .* \(.*seen before\)"):
        established.call(wire.SESSION_HEARTBEAT, types.SessionHeartbeatRequest("s0"))


# What a user gives.


@pytest.mark.parametrize(
    "options, words",
    [
        ({"budget": -1}, "budget must be seconds of at least 0 or None, got -1"),
        ({"budget": float("nan")}, "budget must be seconds of at least 0 or None, got nan"),
        ({"budget": "10"}, "budget must be seconds of at least 0 or None, got '10'"),
        ({"first": True}, "first must be seconds of at least 0, got True"),
        ({"longest": -0.5}, "longest must be seconds of at least 0, got -0.5"),
        ({"pass_on": {200}}, "pass_on must be a set of error statuses"),
        ({"pass_on": 429}, "pass_on must be a set of error statuses"),
    ],
)
def test_a_bad_retry_policy_is_refused(options, words):
    with pytest.raises((ValueError, TypeError), match=words):
        Retry(**options)
