"""One HTTP exchange: what is sent, with which key, and what closing does to it."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from contextlib import closing

import pytest

from tests.support.canned import HEALTHZ, OK, reply
from tests.support.fake_server import (
    URL,
    FakeServer,
    after,
    lost,
    reset,
    settings,
    status,
    transport,
)
from tinkex import config, errors, types, wire
from tinkex.runtime.transport import Transport


@pytest.fixture
def server():
    return FakeServer()


@pytest.fixture
def established(server):
    """A transport whose server has answered before."""
    with closing(transport(server)) as made:
        made.call(wire.HEALTHZ)
        server.requests.clear()
        yield made


@pytest.fixture
def heartbeat(way, canned):
    """Sends a request with a body; returns it."""

    def send():
        canned.give(reply(200, {}), to="session_heartbeat", method="POST")
        way.call(wire.SESSION_HEARTBEAT, types.SessionHeartbeatRequest("s0"))
        return canned.sent[-1]

    return send


def headers_of(canned, **options):
    """What a health check sends."""
    canned.give(OK)
    with closing(canned.transport(**options)) as way:
        way.call(wire.HEALTHZ)
    return canned.sent[-1].headers


# What is sent.


def test_a_request_carries_the_headers_of_the_protocol(heartbeat):
    request = heartbeat()

    assert {"session_id": "s0", "type": "session_heartbeat"} == json.loads(request.body)
    assert "application/json" == request.headers["Content-Type"]
    assert "application/json" == request.headers["Accept"]
    assert config.PROTOCOL_VERSION == request.headers["X-Stainless-Package-Version"]
    assert "0" == request.headers["x-stainless-retry-count"]
    assert request.headers["User-Agent"].startswith("tinkex/")
    assert str(len(request.body)) == request.headers["Content-Length"]


def test_the_key_travels_in_its_header(canned):
    assert "tml-secret" == headers_of(canned, api_key="tml-secret")["X-API-Key"]


def test_without_a_key_its_header_is_not_sent(canned):
    assert "X-API-Key" not in headers_of(canned)


def test_headers_of_the_configuration_go_with_every_request(canned):
    """Cloudflare Access, for one."""
    sent = headers_of(canned, default_headers={"CF-Access-Client-Id": "me"})

    assert "me" == sent["CF-Access-Client-Id"]


def test_a_resend_has_the_same_bytes_and_idempotency_key_and_counts_up(established, server):
    """So that the server can know it for a resend."""
    server.script("session_heartbeat", status(503), reset(), lost(), status(500))
    established.call(wire.SESSION_HEARTBEAT, types.SessionHeartbeatRequest("s0"))

    assert 5 == len(server.requests)
    assert 1 == len({seen.raw for seen in server.requests})
    assert 1 == len({seen.headers["X-Idempotency-Key"] for seen in server.requests})
    assert ["0", "1", "2", "3", "4"] == [
        seen.headers["x-stainless-retry-count"] for seen in server.requests
    ]


def test_two_requests_have_different_idempotency_keys(heartbeat):
    assert heartbeat().headers["X-Idempotency-Key"] != heartbeat().headers["X-Idempotency-Key"]


def test_a_forked_child_s_idempotency_keys_are_not_its_parent_s():
    """A server would take its first request for a resend of the parent's."""
    code = (
        "import os; from tinkex.runtime.transport import _own_headers\n"
        "pid = os.fork()\n"
        "pid and os.waitpid(pid, 0)\n"
        "print(_own_headers('POST', b'', None)['X-Idempotency-Key'], flush=True)"
    )
    keys = subprocess.check_output([sys.executable, "-c", code], text=True).split()

    assert 2 == len(set(keys))


def test_a_get_needs_no_idempotency_key(canned):
    assert "X-Idempotency-Key" not in headers_of(canned)


def test_parameters_are_quoted_in_the_path_but_for_the_slash_and_colon_of_ids(way):
    """`%2F` in a checkpoint's id is a 404 on the official service."""
    url = way.url("training_runs/{run_id}/{id}", run_id="a:train:0", id="weights/a b?c#d")

    assert f"{URL}/api/v1/training_runs/a:train:0/weights/a%20b%3Fc%23d" == url


def test_query_parameters_arrive_and_empty_ones_are_left_out(way, canned):
    canned.give(reply(200, {"sessions": []}), to="sessions")
    way.call(wire.LIST_SESSIONS, query={"limit": 5, "offset": 0, "access_scope": None})

    assert {"limit": "5", "offset": "0"} == canned.sent[0].params


def test_timeouts_are_those_of_the_configuration(way, canned):
    canned.give(OK)
    way.call(wire.HEALTHZ)
    way.call(wire.HEALTHZ, timeout=2.0)
    patience = way.config.patience

    assert [(patience.connect, patience.request), (2.0, 2.0)] == [
        request.req_kwargs["timeout"] for request in canned.sent
    ]


def test_a_deleted_thing_may_be_answered_with_nothing(way, canned):
    """204 with an empty body is a success, not broken JSON. (statement 29)"""
    canned.give(reply(204), to="training_runs/r/checkpoints/weights/a", method="DELETE")

    assert way.call(wire.DELETE_CHECKPOINT, run_id="r", checkpoint_id="weights/a")


def test_json_that_cannot_be_sent_is_refused_before_it_is_sent(way, canned):
    with pytest.raises(ValueError, match="cannot be sent as JSON"):
        way.call(wire.CREATE_SESSION, types.CreateSessionRequest(user_metadata={"a": object()}))
    assert [] == canned.sent


# Tokens.


def test_a_token_that_is_refused_is_replaced_and_the_request_replayed(way, canned):
    keys = iter(["old", "new"])
    current = [next(keys)]
    way.get_key = lambda: current[0]
    way.refresh_key = lambda: bool(current.__setitem__(0, next(keys))) or True
    canned.give(reply(401, **{"WWW-Authenticate": 'Bearer error="invalid_token"'}), OK)
    way.call(wire.HEALTHZ)

    assert ["old", "new"] == [request.headers["X-API-Key"] for request in canned.sent]


def test_a_401_that_is_not_about_a_token_is_not_replayed(way, canned):
    way.refresh_key = lambda: pytest.fail("asked for another token")
    canned.give(reply(401, {"detail": "no such key"}))

    with pytest.raises(errors.AuthenticationError):
        way.call(wire.HEALTHZ)


# Closing.


def test_a_closed_transport_tries_nothing_again(established, server):
    """Closing a client ends its threads; one that runs for ten more minutes would outlive it."""

    def close(server, request, limits, behave):
        established.close()
        return server.response(request, 503)

    server.script("healthz", close)

    with pytest.raises(
        errors.ClientClosedError, match=r"was closed; this was not sent again: .*503"
    ):
        established.call(wire.HEALTHZ)
    assert 1 == len(server.requests)


def test_closing_ends_a_pause_that_is_under_way(canned):
    """A Retry-After of minutes must not keep a thread."""
    way = Transport(settings())
    canned.give(OK, reply(503, retry_after=200))
    way.call(wire.HEALTHZ)
    threading.Timer(0.02, way.close).start()

    with pytest.raises(errors.ClientClosedError):
        way.call(wire.HEALTHZ)


def test_a_long_exchange_is_reported(established, server, caplog):
    """No wait is silent: the way to the server is waited for like everything else."""
    lines = []

    def look(server, request, limits, behave):
        lines.append(established.waits.report())
        return behave()

    server.script("healthz", *[status(503, {"message": "busy"})] * 4, after(10, look))
    established.call(wire.HEALTHZ)

    assert 1 == len([line for line in lines if line])
    assert (
        f"for GET {HEALTHZ} (4 retries, the last after: {HEALTHZ} answered 503: busy)" in lines[0]
    )
